import importlib.metadata

import jax
import jax.numpy as jnp
import pytest

from wsbcn_flax.training.ahead_of_time import (
    count_collectives,
    device_bytes,
    estimated_cycles,
    largest_that_fits,
    tpu_devices,
)

HLO = """
  %all-reduce.1 = (f32[8]{0}, f32[4]{0}) all-reduce(f32[8]{0} %a, f32[4]{0} %b), channel_id=1
  %start = f32[8]{0} all-reduce-start(f32[8]{0} %c), channel_id=2
  %done = f32[8]{0} all-reduce-done(f32[8]{0} %start)
  ROOT %gather = f32[64]{0} all-gather(f32[8]{0} %done), dimensions={0}
  %fusion = f32[8]{0} fusion(f32[8]{0} %all-reduce.1), calls=%not-a-all-reduce
"""


def test_counts_each_collective_once():
    assert count_collectives(HLO) == {"all-reduce": 2, "all-gather": 1}


def test_cycles_are_of_the_operations_that_run_and_of_loops_as_often_as_they_run():
    program = """
%fused (a: f32[8]) -> f32[8] {
  ROOT %add = f32[8]{0} add(%a, %a), backend_config={"estimated_cycles":"7"}
}

%body.1 (b: f32[8]) -> f32[8] {
  ROOT %twice = f32[8]{0} fusion(%b), calls=%fused, backend_config={"estimated_cycles":"20"}
}

ENTRY %main.2_spmd (c: f32[8]) -> f32[8] {
  %loop = f32[8]{0} while(%c), condition=%enough, body=%body.1

  ROOT %last = f32[8]{0} fusion(%loop), backend_config={"estimated_cycles":"100"}
}
"""
    assert estimated_cycles(program, trips=3) == 100 + 3 * 20


@pytest.mark.parametrize("installed", [None, "0.0.17"])
def test_needs_the_libtpu_that_jax_was_made_for(installed, monkeypatch):
    def version(name):
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(
        ImportError, match=rf"libtpu==.* found {installed or 'none'}: .*\[tpu-aot\]"
    ):
        tpu_devices("v5e:2x4")


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
