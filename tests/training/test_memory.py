import jax
import jax.numpy as jnp
import pytest

from wsbcn_flax.training import device_bytes, largest_that_fits


@pytest.mark.parametrize("limit", [1, 7, 8, 9, 48, 49, 1000])
def test_bisection_finds_what_trying_all_finds(limit):
    sizes = [48, 1, 2, 3, 4, 6, 8, 12, 16, 24]
    fit = largest_that_fits(sizes, lambda size: size, limit=limit)
    assert fit.size == max(size for size in sizes if size <= limit)
    # Compilations are slow: few are tried, the answer among them.
    assert len(fit.tried) <= 5
    assert fit.tried[fit.size] <= limit


def test_nothing_that_fits_is_an_error_that_says_what_the_least_needs():
    with pytest.raises(ValueError, match=r"limit of 99 bytes, received \[1, 2\], .* 1: 100"):
        largest_that_fits([2, 1], lambda size: 100 * size, limit=99)
    with pytest.raises(ValueError, match=r"received \[\]"):
        largest_that_fits([], lambda size: size, limit=1)


@pytest.mark.parametrize("donated", [False, True])
def test_an_output_in_place_of_a_donated_argument_counts_once(donated):
    x = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    double = jax.jit(lambda x: 2 * x, donate_argnums=0 if donated else ())
    megabytes = device_bytes(double.lower(x).compile()) / 2**20
    assert megabytes == pytest.approx(1 if donated else 2, abs=0.1)
