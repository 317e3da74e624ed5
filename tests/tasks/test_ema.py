"""The average of parameters moves in half precision too, and shares no buffer with them."""

import jax
import jax.numpy as jnp
import optax
import pytest

from wsbcn_flax.tasks import Ema, Task
from wsbcn_flax.training import init_state, make_train_step

BATCH = {"x": jnp.ones(2)}
SGD = optax.sgd(0.1)


class Constant(Task):
    """A parameter that training leaves at 1."""

    def __init__(self, dtype):
        self.dtype = dtype

    def init(self, key, batch):
        return {"params": {"w": jnp.ones(1, self.dtype)}}

    def loss(self, params, batch_stats, batch, *, rng, extra):
        return 0 * params["w"].sum(), (batch_stats, {})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_small_changes_add_up(dtype):
    """A step moves the average by 5e-5, which is lost beside 1 in half precision."""
    task = Ema(task=Constant(dtype), decay=0.9999)
    state = init_state(task, SGD, jax.random.key(0), BATCH)
    state = state.replace(params={"w": jnp.full(1, 1.5, dtype)}, step=jnp.int32(10**6))
    step = jax.jit(make_train_step(task, SGD))
    state, _ = jax.lax.scan(lambda state, _: (step(state, BATCH)[0], None), state, length=10_000)
    average = task.for_evaluation(state).params["w"]
    assert average.dtype == dtype
    assert float(average[0]) == pytest.approx(1.5 - 0.5 * 0.9999**10_000, rel=5e-3)


def test_a_step_may_donate_the_first_state():
    task = Ema(task=Constant(jnp.float32), decay=0.9)
    state = init_state(task, SGD, jax.random.key(0), BATCH)
    state, _ = jax.jit(make_train_step(task, SGD), donate_argnums=0)(state, BATCH)
    assert int(state.step) == 1
