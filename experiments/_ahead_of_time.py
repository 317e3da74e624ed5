"""A recipe's whole training step compiled for devices that need not be there."""

import collections
import contextlib
import importlib.metadata
import os
import re
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from experiments._config import Recipe
from experiments._data_specs import DATA_SPECS
from experiments._models import make_loss_scale
from experiments._run import make_partition, make_state, make_steps
from wsbcn_flax.training import Progress, device_bytes

KeyT = TypeVar("KeyT", bound=Hashable)

_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# An operation, or the first half of an asynchronous one, but not its second half.
_OPERATION = re.compile(rf" ({'|'.join(_COLLECTIVES)})(?:-start)?\(")

# Memory of a chip, in bytes, from Google's descriptions of its TPU generations.
HBM_BYTES = {"v4": 32 * 2**30, "v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30}


class Compiled(NamedTuple):
    """What the compiler says of a training step; all but ``chips`` is per chip.

    Attributes:
        chips: devices of the topology.
        bytes_accessed: by all operations of one step.
        argument_bytes: of the state and the batch.
        temp_bytes: of everything computed on the way.
        peak_bytes: the most in use at once, arguments included; the compiler for CPU leaves the
            temporaries out of it.
        total_bytes: of arguments, outputs that take no argument's place, temporaries and program.
        all_reduces: in the program.
        collectives: all kinds, by name.
        compile_seconds: on this machine.
    """

    chips: int
    bytes_accessed: float
    argument_bytes: int
    temp_bytes: int
    peak_bytes: int
    total_bytes: int
    all_reduces: int
    collectives: dict[str, int]
    compile_seconds: float


def tpu_devices(topology: str) -> Sequence[Any]:
    """The devices of a TPU topology such as "v5e:16x16", none of which need be here.

    Raises:
        ImportError: without libtpu, or with another version than this jax was made for.
        ValueError: for a topology that libtpu does not know.
    """
    _check_libtpu()
    # It would look for the machine it runs on, and for another process that holds it.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # Whatever libtpu raises.
        raise ValueError(
            f"topology must be one that libtpu knows, such as v5e:2x4, v5e:16x16, v4:4x4x4 or "
            f"v5p:4x4x4, received {topology!r} ({str(error).splitlines()[0]:.200})."
        ) from error


def lower_step(recipe: Recipe, devices: Sequence[Any]) -> jax.stages.Lowered:
    """Lowers the training step of a recipe for ``devices``, without data."""
    spec = DATA_SPECS[recipe.data.name]
    partition = make_partition(recipe.batch, devices)
    steps = make_steps(
        recipe,
        partition,
        num_classes=spec.num_classes,
        steps_per_epoch=max(1, spec.train_size // recipe.batch.size),
    )
    state = jax.eval_shape(
        lambda: make_state(
            steps.task,
            steps.optimizer,
            recipe.seed,
            transform=steps.transform,
            image_shape=spec.image_shape,
            loss_scale=make_loss_scale(recipe.model),
        )
    )
    batch = {
        "image": jax.ShapeDtypeStruct((recipe.batch.size, *spec.image_shape), jnp.float32),
        "label": jax.ShapeDtypeStruct((recipe.batch.size,), jnp.int32),
    }
    step: Any = partition.compile(steps.train)  # Of jax.jit.
    return step.lower(state, batch)


def compile_step(recipe: Recipe, devices: Sequence[Any]) -> Compiled:
    """Compiles the training step of a recipe for ``devices``, without data."""
    lowered = lower_step(recipe, devices)
    started = time.monotonic()
    compiled: Any = lowered.compile()
    seconds = time.monotonic() - started
    memory = compiled.memory_analysis()
    collectives = count_collectives(compiled.as_text())
    return Compiled(
        chips=len(devices),
        bytes_accessed=compiled.cost_analysis()["bytes accessed"],
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        total_bytes=device_bytes(compiled),
        all_reduces=collectives.get("all-reduce", 0),
        collectives=collectives,
        compile_seconds=round(seconds, 1),
    )


def compile_steps(
    recipes: Mapping[KeyT, Recipe],
    devices: Sequence[Any],
    *,
    on_result: Callable[[Mapping[KeyT, Compiled]], object] = lambda results: None,
) -> dict[KeyT, Compiled]:
    """Compiles the training steps of several recipes, which takes minutes each for a large network.

    Args:
        recipes: by what to call them.
        devices: to compile for.
        on_result: is called with all results so far, after each.
    """
    results: dict[KeyT, Compiled] = {}
    with Progress("compile", total=len(recipes)) as progress:
        for key, recipe in recipes.items():
            results[key] = compile_step(recipe, devices)
            progress.update(len(results), {f"{key} seconds": results[key].compile_seconds})
            on_result(results)
    return results


def count_collectives(hlo: str) -> dict[str, int]:
    """How many collective operations of each kind a compiled program holds."""
    return dict(collections.Counter(_OPERATION.findall(hlo)))


def _check_libtpu() -> None:
    needed = "libtpu"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for requirement in importlib.metadata.requires("jax") or []:
            if requirement.startswith("libtpu"):
                needed = requirement.partition(";")[0].strip()
    pattern = needed.partition("==")[2].removesuffix("*")
    try:
        installed = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed is None or not installed.startswith(pattern):
        raise ImportError(
            f"Compiling for TPU needs the {needed} that jax {jax.__version__} was made for, found "
            f"{installed or 'none'}: pip install 'wsbcn_flax[tpu-aot]'."
        )
