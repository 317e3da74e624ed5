"""Costs of compiled steps on a device, found without running them and without the device."""

import collections
import contextlib
import importlib.metadata
import importlib.resources
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from wsbcn_flax.training._estimate import (
    SMALL_CYCLES,
    Group,
    Operation,
    estimated_operations,
    gpu_kernels,
    group_by_module,
)

_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Matches an operation or the first half of an asynchronous one, but not its second half.
_COLLECTIVE = re.compile(rf" ({'|'.join(_COLLECTIVES)})(?:-start)?\(")


class Chip(NamedTuple):
    """The speed of a generation of TPU chips: clock cycles and memory bytes per second."""

    clock: float
    bandwidth: float


CHIPS = {"v5e": Chip(clock=1.5e9, bandwidth=819e9)}


class Compiled(NamedTuple):
    """The costs of a compiled step; all but ``chips`` and ``compile_seconds`` are for each chip.

    Attributes:
        chips: Number of devices.
        bytes_accessed: Bytes that all operations of one step access. On a GPU, bytes of the
            operands and results of all kernels, without the workspaces of libraries.
        argument_bytes: Bytes of the state and the batch.
        temp_bytes: Bytes of temporaries.
        peak_bytes: Most bytes in use at once, including arguments; on CPU the compiler leaves out
            temporaries.
        total_bytes: Bytes of arguments, temporaries, program, and outputs that do not take the
            place of an argument.
        estimated_ms: Milliseconds of a step by the compiler's own estimate, a sum over operations;
            None without estimates. Collectives and branches have none. A custom call, such as a
            Pallas kernel, counts as 3,000 cycles or the time to move its bytes, whichever is
            longer.
        operations: Number of operations with an estimate.
        small_operations: Number of operations below 3,000 cycles.
        small_ms: Milliseconds of operations below 3,000 cycles.
        custom_calls: Number of custom calls among the operations.
        fusions: Number of kernels that XLA makes for a GPU; None elsewhere.
        library_calls: Number of calls to a GPU's libraries; None elsewhere.
        all_reduces: Number of all-reduces in the program.
        collectives: Number of collectives of every kind.
        compile_seconds: Seconds that compiling took on this machine.
        profile: Groups of operations by module, the costliest first.
    """

    chips: int
    bytes_accessed: float
    argument_bytes: int
    temp_bytes: int
    peak_bytes: int
    total_bytes: int
    estimated_ms: float | None
    operations: int | None
    small_operations: int | None
    small_ms: float | None
    custom_calls: int | None
    fusions: int | None
    library_calls: int | None
    all_reduces: int
    collectives: dict[str, int]
    compile_seconds: float
    profile: tuple[Group, ...] = ()


def compile_lowered(
    lowered: jax.stages.Lowered, *, chips: int, trips: int = 1, chip: Chip | None = None
) -> Compiled:
    """Compiles a lowered step, such as ``Experiment.lower`` returns, for its devices.

    Args:
        lowered: Lowered step.
        chips: Number of devices.
        trips: Number of iterations of loops, such as the loop over micro-batches.
        chip: Speed of a device, for estimates; None for no estimates.
    """
    started = time.monotonic()
    compiled: Any = lowered.compile()
    seconds = time.monotonic() - started
    memory, text = compiled.memory_analysis(), compiled.as_text()
    collectives = count_collectives(text)
    operations = []
    if chip is not None:
        speed = chip.bandwidth / chip.clock
        operations = estimated_operations(text, trips=trips, bytes_per_cycle=speed)
    costs = compiled.cost_analysis() or {}  # The compiler for GPU gives none.
    kernels = None if costs else gpu_kernels(text)
    return Compiled(
        chips=chips,
        bytes_accessed=costs["bytes accessed"] if kernels is None else kernels.bytes_accessed,
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        peak_bytes=memory.peak_memory_in_bytes,
        total_bytes=device_bytes(compiled),
        **_estimate(operations, chip),
        fusions=kernels and kernels.fusions,
        library_calls=kernels and kernels.library_calls,
        all_reduces=collectives.get("all-reduce", 0),
        collectives=collectives,
        compile_seconds=round(seconds, 1),
        profile=tuple(group_by_module(operations)),
    )


def _estimate(operations: Sequence[Operation], chip: Chip | None) -> dict[str, Any]:
    """Computes the fields of ``Compiled`` that are sums over operations."""
    names = ("estimated_ms", "operations", "small_operations", "small_ms", "custom_calls")
    if chip is None or not operations:
        return dict.fromkeys(names)
    small = [operation for operation in operations if operation.cycles < SMALL_CYCLES]
    values = (
        _milliseconds(operations, chip),
        sum(operation.times for operation in operations),
        sum(operation.times for operation in small),
        _milliseconds(small, chip),
        sum(operation.times for operation in operations if operation.is_custom_call),
    )
    return dict(zip(names, values, strict=True))


def _milliseconds(operations: Iterable[Operation], chip: Chip) -> float:
    return 1e3 * sum(o.cycles * o.times for o in operations) / chip.clock


def count_collectives(hlo: str) -> dict[str, int]:
    """Counts the collective operations of each kind in a compiled program.

    Example:
        >>> from wsbcn_flax.training.ahead_of_time import count_collectives
        >>> count_collectives("%x = f32[8] all-reduce-start(%a)  %y = f32[8] all-reduce-done(%x)")
        {'all-reduce': 1}
    """
    return dict(collections.Counter(_COLLECTIVE.findall(hlo)))


def tpu_devices(topology: str) -> Sequence[Any]:
    """Returns the devices of a TPU topology such as "v5e:16x16", which may be absent.

    Raises:
        ImportError: Without libtpu, or with another version than this jax was made for.
        ValueError: For a topology that libtpu does not know.
    """
    _check_libtpu()
    # Otherwise libtpu looks for the machine it runs on, and for another process that holds libtpu.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # Catches whatever libtpu raises.
        raise ValueError(
            f"topology must be one that libtpu knows, such as v5e:2x4, v5e:16x16, v4:4x4x4 or "
            f"v5p:4x4x4, received {topology!r} ({str(error).splitlines()[0]:.200})."
        ) from error


def gpu_devices(target: str, count: int = 8) -> Sequence[Any]:
    """Returns GPUs of a kind such as "h100", which may be absent.

    Raises:
        ImportError: Without jax's plugin for CUDA.
        ValueError: For an unknown kind.
    """
    folder = importlib.resources.files("wsbcn_flax.training").joinpath("gpu_targets")
    names = sorted(file.name.removesuffix(".txtpb") for file in folder.iterdir())
    if target not in names:
        raise ValueError(f"target must be one of {', '.join(names)}, received {target!r}.")
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise ImportError(
            f"Compiling for GPU needs the plugin of jax {jax.__version__}, but no GPU: pip install "
            f"--no-deps jax-cuda12-plugin=={jax.__version__} jax-cuda12-pjrt=={jax.__version__}"
        )
    from jax.experimental import topologies

    config = folder.joinpath(f"{target}.txtpb").read_text()
    # The topology is slices x hosts x devices.
    return topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{count}", target_config=config
    ).devices


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

    An output that takes the place of a donated argument counts once.

    Args:
        compiled: Result of ``jax.jit(step).lower(*arguments).compile()``.

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

    The largest size is tried first. If it makes the batch a single micro-batch, no gradients are
    summed, so it may need fewer bytes than half the size.

    Args:
        sizes: Sizes, such as the micro-batches that divide a batch.
        bytes_needed: Maps a size to bytes; must not decrease with the size, except for the largest.
        limit: Number of bytes of a device.

    Raises:
        ValueError: If no size fits, or there are no sizes.

    Example:
        >>> from wsbcn_flax.training.ahead_of_time import largest_that_fits
        >>> largest_that_fits([1, 2, 4, 8, 16], lambda size: 100 * size, limit=500)
        Fit(size=4, tried={16: 1600, 4: 400, 8: 800})
    """
    ordered = sorted(set(sizes))
    tried: dict[int, int] = {}
    # Sizes before index `low` fit; sizes from index `high` on do not.
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
