"""States to save, and helpers that inspect or damage the saved files."""

from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from wsbcn_flax.training.checkpoints import (
    Checkpointer,
)


@flax.struct.dataclass
class State:
    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def make_state(seed: int, *, optimizer=OPTIMIZER, features: int = 5) -> State:
    key = jax.random.key(seed)
    params = {
        "conv": {"kernel": jax.random.normal(key, (3, 3, 4, features)), "bias": jnp.ones(features)},
        "scale": jax.random.normal(key, (7,), jnp.bfloat16),
    }
    stats = {"mean": jnp.full(features, seed, jnp.float32), "ready": jnp.array(True)}
    return State(jnp.int32(seed), params, stats, optimizer.init(params))


@jax.jit
def train_step(state: State, x: jax.Array) -> State:
    def loss(params):
        kernel = params["conv"]["kernel"].sum((0, 1))
        y = x @ kernel + params["conv"]["bias"][None]
        return (y**2).mean() + (params["scale"].astype(jnp.float32) ** 2).sum()

    grads = jax.grad(loss)(state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)


def bits(tree) -> list[tuple[str, tuple[int, ...], bytes]]:
    arrays = map(np.asarray, jax.tree.leaves(tree))
    return [(a.dtype.name, a.shape, a.tobytes()) for a in arrays]


def save_steps(directory: Path, *steps: int) -> None:
    with Checkpointer(directory) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), extra={"step": step})


def files_of(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def corrupt(directory: Path) -> None:
    """Flips one bit in the array data of one checkpoint."""
    (path,) = directory.glob("state/d/*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)
