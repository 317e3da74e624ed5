"""bfloat16 inputs with running means far from the data, as in the first steps."""

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
@pytest.mark.parametrize("running_mean", [0.0, 1e4])
def test_outputs_are_rounded_only_at_the_end(running_mean, statistics, shape):
    """The error is at most twice the result's rounding, plus float32's own error near zero."""
    options = {"num_groups": 4, "statistics": statistics, "order": "normalize_first"}
    norm = jax.jit(functools.partial(batch_channel_norm, **options))
    running = RunningStats.fresh(12)._replace(mean=jnp.full(12, running_mean))
    # The distance to a running mean, in the output and in the new mean, has float32 precision.
    coarse = running_mean * 2.0**-22
    for name, draw in DATA.items():
        x = jnp.asarray(draw(shape), jnp.bfloat16)
        y, new = norm(x, running)
        expected = oracles.batch_channel_norm(
            np.asarray(x, np.float64), running.mean, running.var, **options
        )
        largest = max(1, np.abs(expected.y).max())
        allowed = 2 * 2.0**-9 * np.abs(expected.y) + (1e-5 + coarse) * largest
        assert (np.abs(np.asarray(y, np.float64) - expected.y) <= allowed).all(), name
        atol = 1e-6 + coarse
        np.testing.assert_allclose(new.mean, expected.mean, rtol=1e-5, atol=atol, err_msg=name)
        np.testing.assert_allclose(new.var, expected.var, rtol=1e-5, err_msg=name)


def test_x_is_in_no_branch():
    """XLA for TPU does not keep operands of a conditional in the chip's own memory."""
    norm = functools.partial(batch_channel_norm, running=RunningStats.fresh(4), num_groups=2)
    x = jnp.ones((8, 6, 6, 4), jnp.bfloat16)
    lowered = jax.jit(lambda x: norm(x)[0]).trace(x).lower(lowering_platforms=("tpu",))
    text = lowered.as_text()
    assert "stablehlo.reduce" in text
    assert not any(branch in text for branch in ("stablehlo.if", "stablehlo.case"))
