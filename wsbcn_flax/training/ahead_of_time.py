"""Compiled steps: what they need of a device, found without running them or having the device."""

import collections
import contextlib
import importlib.metadata
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# An operation, or the first half of an asynchronous one, but not its second half.
_COLLECTIVE = re.compile(rf" ({'|'.join(_COLLECTIVES)})(?:-start)?\(")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\n((?: .*\n|\n)*?)\}", re.MULTILINE)
_LOOP_BODY = re.compile(r" while\(.*body=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class Compiled(NamedTuple):
    """Figures of a compiled step; all but ``chips`` are for each chip.

    Attributes:
        chips: Number of devices.
        bytes_accessed: Bytes that all operations of one step access.
        argument_bytes: Bytes of the state and the batch.
        temp_bytes: Bytes of temporaries.
        peak_bytes: Most bytes in use at once, arguments included; the compiler for CPU leaves the
            temporaries out.
        total_bytes: Bytes of arguments, outputs that take no argument's place, temporaries and
            program.
        estimated_cycles: Cycles of a step by the compiler's own estimate, a sum over operations;
            None where the compiler gives none, as for CPU. Collectives, custom calls and branches
            have no estimate.
        all_reduces: Number of all-reduces in the program.
        collectives: Number of collectives of every kind.
        compile_seconds: Seconds that compiling took on this machine.
    """

    chips: int
    bytes_accessed: float
    argument_bytes: int
    temp_bytes: int
    peak_bytes: int
    total_bytes: int
    estimated_cycles: int | None
    all_reduces: int
    collectives: dict[str, int]
    compile_seconds: float


def compile_lowered(lowered: jax.stages.Lowered, *, chips: int, trips: int = 1) -> Compiled:
    """Compiles a lowered step, such as ``Experiment.lower`` returns, for its devices.

    Args:
        lowered: Lowered step.
        chips: Number of devices.
        trips: Number of times that loops run, as those over micro-batches do.
    """
    started = time.monotonic()
    compiled: Any = lowered.compile()
    seconds = time.monotonic() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    collectives = count_collectives(text)
    return Compiled(
        chips=chips,
        bytes_accessed=compiled.cost_analysis()["bytes accessed"],
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        total_bytes=device_bytes(compiled),
        estimated_cycles=estimated_cycles(text, trips=trips) or None,
        all_reduces=collectives.get("all-reduce", 0),
        collectives=collectives,
        compile_seconds=round(seconds, 1),
    )


def count_collectives(hlo: str) -> dict[str, int]:
    """Counts the collective operations of each kind in a compiled program.

    Example:
        >>> from wsbcn_flax.training.ahead_of_time import count_collectives
        >>> count_collectives("%x = f32[8] all-reduce-start(%a)  %y = f32[8] all-reduce-done(%x)")
        {'all-reduce': 1}
    """
    return dict(collections.Counter(_COLLECTIVE.findall(hlo)))


def estimated_cycles(hlo: str, *, trips: int) -> int:
    """Returns the estimated cycles of a compiled program whose loops run ``trips`` times."""
    bodies = set(_LOOP_BODY.findall(hlo))
    return sum(
        sum(map(int, _CYCLES.findall(operations))) * (1 if entry else trips)
        for entry, name, operations in _COMPUTATION.findall(hlo)
        if entry or name in bodies
    )


def tpu_devices(topology: str) -> Sequence[Any]:
    """Returns the devices of a TPU topology such as "v5e:16x16", none of which need be here.

    Raises:
        ImportError: Without libtpu, or with another version than this jax was made for.
        ValueError: For a topology that libtpu does not know.
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


class Fit(NamedTuple):
    """The largest size that fits, and the bytes per device of every size that was compiled."""

    size: int
    tried: dict[int, int]


def device_bytes(compiled: Any) -> int:
    """Returns the bytes that a program needs on each device: arguments, outputs, temporaries, code.

    Args:
        compiled: Result of ``jax.jit(step).lower(*arguments).compile()``. An output that takes a
            donated argument's place counts once.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from wsbcn_flax.training.ahead_of_time import device_bytes
        >>> x = jnp.ones((1024, 1024))
        >>> device_bytes(jax.jit(lambda x: 2 * x).lower(x).compile()) // 2**20
        8
    """
    memory = compiled.memory_analysis()
    sizes = (
        memory.argument_size_in_bytes,
        memory.output_size_in_bytes,
        -memory.alias_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )
    return sum(sizes)


def largest_that_fits(
    sizes: Iterable[int], bytes_needed: Callable[[int], int], *, limit: int
) -> Fit:
    """Finds the largest size that needs no more than ``limit`` bytes, by bisection.

    The largest of all is tried first: a batch that is one micro-batch needs no sum of gradients,
    and so may need less than one of two.

    Args:
        sizes: Sizes, such as the micro-batches that divide a batch.
        bytes_needed: Maps a size to bytes; must not decrease with the size.
        limit: Number of bytes of a device.

    Raises:
        ValueError: If none fits, or there are none.

    Example:
        >>> from wsbcn_flax.training.ahead_of_time import largest_that_fits
        >>> largest_that_fits([1, 2, 4, 8, 16], lambda size: 100 * size, limit=500)
        Fit(size=4, tried={16: 1600, 4: 400, 8: 800})
    """
    ordered = sorted(set(sizes))
    tried: dict[int, int] = {}
    # All below `low` fit, none from `high` on does.
    low, high = 0, len(ordered)
    middle = high - 1
    while low < high:
        size = ordered[middle]
        tried[size] = bytes_needed(size)
        low, high = (middle + 1, high) if tried[size] <= limit else (low, middle)
        middle = (low + high) // 2
    if low == 0:
        raise ValueError(
            f"One size at least must fit into the limit of {limit:,} bytes, received {ordered}, "
            f"which need {tried}. Use a narrower dtype, rematerialization, more devices or a "
            "smaller model."
        )
    return Fit(ordered[low - 1], tried)
