"""Costs read from a compiled program's text: TPU time estimates and GPU kernels."""

import collections
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

SMALL_CYCLES = 3000  # On a v5e every operation costs at least about 1,800.

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\n((?: .*\n|\n)*?)\}", re.MULTILINE)
_LOOP_BODY = re.compile(r" while\(.*body=%?([\w.\-]+)")
# Groups: name, type, kind, operands.
_OPERATION = re.compile(r"^ +(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\(([^)]*)\)")
_NAME = re.compile(r"%?([\w.\-]+)(?:,|$)")
_CALLED = re.compile(r" fusion\(.*calls=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_PATH = re.compile(r'op_name="([^"]*)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+?(\d+)\w*)\[([\d,]*)\]")
_KERNEL = 'custom_call_target="tpu_custom_call"'
# Parts of a path that are not modules, and transformations around a module's name.
_MACHINERY = re.compile(r"jit\(|(shard_map|checkpoint|rematted_computation|cond|branch_\d+_fun)$")
_TRANSFORMED = re.compile(r"(?:\w+\()*([^()]*)\)*")


class Operation(NamedTuple):
    """One operation of a compiled program that takes time.

    Attributes:
        path: Name that JAX gave it: modules, transformations and a primitive.
        cycles: Estimated cycles of one execution.
        times: Number of executions.
        is_custom_call: Whether it is a Pallas kernel of this library, for which the compiler gives
            no estimate. It counts as ``SMALL_CYCLES`` or the cycles to move its operands and
            results, whichever is more.
    """

    path: str
    cycles: int
    times: int
    is_custom_call: bool = False


def estimated_operations(hlo: str, *, trips: int, bytes_per_cycle: float) -> list[Operation]:
    """Returns the operations of a compiled program, those of loops with ``times=trips``.

    Collectives and the branches of conditionals have no estimate and are left out.

    Args:
        hlo: Text of the compiled program.
        trips: Number of iterations of loops.
        bytes_per_cycle: Bytes that the chip's memory moves in a cycle, for custom calls.
    """
    bodies = set(_LOOP_BODY.findall(hlo))
    operations = []
    for entry, name, text in _COMPUTATION.findall(hlo):
        if not entry and name not in bodies:
            continue
        sizes: dict[str, int] = {}
        for line, result, shape, kind, operands in _lines(text):
            sizes[result] = _byte_count(shape)
            cycles, path = _CYCLES.search(line), _PATH.search(line)
            is_kernel = kind == "custom-call" and _KERNEL in line
            if cycles is None and not is_kernel:
                continue
            if is_kernel:
                names = _NAME.findall(operands)
                moved = sizes[result] + sum(sizes.get(operand, 0) for operand in names)
                count = max(SMALL_CYCLES, math.ceil(moved / bytes_per_cycle))
            else:
                count = int(cycles.group(1)) if cycles else 0
            times = 1 if entry else trips
            operations.append(Operation(path.group(1) if path else "", count, times, is_kernel))
    return operations


def _lines(computation: str) -> Iterator[tuple[str, ...]]:
    """Yields each line that is an operation, with its name, type, kind and operands."""
    for line in computation.splitlines():
        if match := _OPERATION.match(line):
            yield line, *match.groups()


class Group(NamedTuple):
    """A sum of operations of one module, or of modules that differ by number, in one direction."""

    path: str
    cycles: int
    operations: int
    small_operations: int


def group_by_module(operations: Iterable[Operation]) -> list[Group]:
    """Adds up the operations of each module and direction, the costliest first.

    Example:
        >>> from wsbcn_flax.training.ahead_of_time import Operation, group_by_module
        >>> paths = [f"jit(step)/transpose(jvp(Net))/block{i}/norm/reduce_sum" for i in (1, 2)]
        >>> group_by_module(Operation(path, cycles=2000, times=1) for path in paths)
        [Group(path='backward Net/block*/norm', cycles=4000, operations=2, small_operations=2)]
    """
    groups: dict[str, list[Operation]] = collections.defaultdict(list)
    for operation in operations:
        groups[_module(operation.path)].append(operation)
    sums = [
        Group(
            path,
            sum(o.cycles * o.times for o in group),
            sum(o.times for o in group),
            sum(o.times for o in group if o.cycles < SMALL_CYCLES),
        )
        for path, group in groups.items()
    ]
    return sorted(sums, key=lambda group: -group.cycles)


def _module(path: str) -> str:
    """Returns the direction of differentiation and the path of modules, with * for numbers."""
    direction = ""
    if "jvp(" in path:
        direction = "backward " if "transpose(" in path else "forward "
    # The last part is a primitive. A checkpoint names its module a second time.
    parts = [part for part in path.split("/")[:-1] if not _MACHINERY.match(part)]
    modules = dict.fromkeys(_TRANSFORMED.sub(r"\1", part) for part in parts)
    return direction + (re.sub(r"\d+", "*", "/".join(filter(None, modules))) or "(no module)")


class Kernels(NamedTuple):
    """The kernels that a GPU launches in a step, outside loops.

    Attributes:
        bytes_accessed: Bytes of the operands and results of all kernels.
        fusions: Number of kernels that XLA made.
        library_calls: Number of calls to cuDNN, cuBLAS and similar libraries.
    """

    bytes_accessed: int
    fusions: int
    library_calls: int


_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


def gpu_kernels(hlo: str) -> Kernels:
    """Counts the kernels in the entry computation of a GPU program, and their bytes.

    If a fusion reads only slices of an operand, only the bytes of the slices count.
    """
    computations = _COMPUTATION.findall(hlo)
    texts = {name: text for _, name, text in computations}
    entry = next((text for is_entry, _, text in computations if is_entry), "")
    sizes: dict[str, int] = {}
    kinds: list[str] = []
    moved = 0
    for line, result, shape, kind, operands in _lines(entry):
        sizes[result] = _byte_count(shape)
        if kind in _FREE or kind.endswith("-done"):
            continue
        kinds.append(kind)
        read = [sizes.get(name, 0) for name in _NAME.findall(operands)]
        if called := _CALLED.search(line):
            sliced = _sliced_bytes(texts.get(called.group(1), ""))
            read = [sliced.get(number, size) for number, size in enumerate(read)]
        moved += sizes[result] + sum(read)
    return Kernels(moved, kinds.count("fusion"), kinds.count("custom-call"))


def _sliced_bytes(fusion: str) -> dict[int, int]:
    """Returns the bytes that a fusion reads of those parameters of which it reads only slices."""
    numbers: dict[str, int] = {}
    read: dict[int, int] = collections.defaultdict(int)
    whole: set[int] = set()
    for _, result, shape, kind, operands in _lines(fusion):
        if kind == "parameter":
            numbers[result] = int(operands)
            continue
        for name in _NAME.findall(operands):
            if name in numbers and kind in ("slice", "dynamic-slice"):
                read[numbers[name]] += _byte_count(shape)
            elif name in numbers:
                whole.add(numbers[name])
    return {number: size for number, size in read.items() if number not in whole}


def _byte_count(shape: str) -> int:
    """Returns the bytes of an array or a tuple of arrays, without the padding of tiles."""
    total = 0
    for dtype, bits, dimensions in _ARRAY.findall(shape):
        elements = math.prod(int(size) for size in dimensions.split(",") if size)
        total += elements * (8 if dtype == "pred" else int(bits)) // 8
    return total
