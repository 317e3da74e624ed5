"""bfloat16 with running means that are nowhere near the data, as in the first steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from wsbcn_flax.ops import RunningStats, batch_channel_norm

rng = np.random.default_rng(0)
SHAPES = [(2, 24, 24, 12), (8, 12, 12, 12)]
DATA = {
    "normal": lambda shape: rng.normal(size=shape),
    "far": lambda shape: 100 + rng.normal(size=shape),
    "very far": lambda shape: 1000 + 10 * rng.normal(size=shape),
    "one unit in few positions": lambda shape: 100 + (rng.random(shape) < 0.003),
    "constant 100": lambda shape: np.full(shape, 100.0),
    "constant 10,000": lambda shape: np.full(shape, 10_000.0),
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("statistics", ["batch", "estimate"])
def test_outputs_are_rounded_only_at_the_end(statistics, shape):
    """Within twice the rounding of the float64 result, beside float32's own error at zero."""
    options = {"num_groups": 4, "statistics": statistics, "order": "normalize_first"}
    norm, running = (
        jax.jit(functools.partial(batch_channel_norm, **options)),
        RunningStats.fresh(12),
    )
    for name, draw in DATA.items():
        x = jnp.asarray(draw(shape), jnp.bfloat16)
        y, new = norm(x, running)
        expected = oracles.batch_channel_norm(
            np.asarray(x, np.float64), running.mean, running.var, **options
        )
        allowed = 2 * 2.0**-9 * np.abs(expected.y) + 1e-5 * max(1, np.abs(expected.y).max())
        assert (np.abs(np.asarray(y, np.float64) - expected.y) <= allowed).all(), name
        np.testing.assert_allclose(new.mean, expected.mean, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(new.var, expected.var, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(("mean", "second_pass"), [(5.0, False), (1e4, True)])
def test_a_second_pass_is_made_only_where_the_mean_is_far(mean, second_pass, monkeypatch):
    """By a branch: no pass is added to a step whose running means are near."""
    taken, cond = [], jax.lax.cond

    def spy(is_far, *branches):
        taken.append(bool(is_far))
        return cond(is_far, *branches)

    x = jnp.asarray(5 + rng.normal(size=(8, 6, 6, 4)), jnp.bfloat16)
    running = RunningStats.fresh(4)._replace(mean=jnp.full(4, mean, jnp.float32))
    monkeypatch.setattr(jax.lax, "cond", spy)
    batch_channel_norm(x, running, num_groups=2)
    assert taken == [second_pass]
