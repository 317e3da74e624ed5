"""Writers of a run's files: metrics as JSON lines and for TensorBoard, and JSON documents."""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from wsbcn_flax._extras import require


class MetricWriter(Protocol):
    """The interface of writers, which receive the scalar metrics of a run."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records the metrics of one step; `float` must accept every value."""

    def close(self) -> None:
        """Writes pending records and releases the files."""


class JsonlWriter:
    """A writer that appends a line `{"step": 3, "loss": 0.5}` to a file at every `write`.

    Each line is flushed at once. NaN and infinities, which JSON lacks, become the strings "NaN",
    "Infinity" and "-Infinity". If a kill cut off the last line, that line is removed when the file
    is opened again. Any other content that is not a record raises `ValueError`.

    Args:
        path: Path of the file; the file and its directory are created if absent.
        resume_step: Step that a run resumes from; later records are removed, as if the run had
            never stopped. -1 removes all records, None (the default) none.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     with contextlib.closing(JsonlWriter(f"{directory}/metrics.jsonl")) as writer:
        ...         writer.write(1, {"loss": 0.5})
        ...     read_jsonl(f"{directory}/metrics.jsonl")
        [{'step': 1, 'loss': 0.5}]
    """

    def __init__(self, path: str | os.PathLike[str], *, resume_step: int | None = None):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            last = math.inf if resume_step is None else resume_step
            kept = [record for record in _records(path) if record["step"] <= last]
            rewound = path.with_name(f"{path.name}.tmp")
            with _naming(rewound):
                rewound.write_text("".join(json.dumps(record) + "\n" for record in kept))
            rewound.replace(path)
        self._path, self._file = path, path.open("a")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a record; raises `ValueError` for a non-scalar metric or one named "step"."""
        if "step" in metrics:
            raise ValueError('no metric may be named "step", which is the key of the step itself')
        values = {name: _json_scalar(name, value) for name, value in metrics.items()}
        with _naming(self._path):
            print(json.dumps({"step": int(step)} | values), file=self._file, flush=True)

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):  # If the disk is full, `write` has reported it.
            self._file.close()


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns a `JsonlWriter`'s records with numbers as values, without a cut-off last line."""
    records = list(_records(Path(path)))
    return [{k: float(x) if isinstance(x, str) else x for k, x in r.items()} for r in records]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_text(errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines):  # The last line may be empty, or cut off by a kill.
                raise ValueError(f"{path}, line {number}, is no record: {line!r:.80}") from error
        else:
            yield record | {"step": step}


def _json_scalar(name: str, value: Any) -> float | str:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metric {name!r} must be a scalar, received {value!r:.80}") from error
    return number if math.isfinite(number) else json.dumps(number)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Adds the file's name to an error of writing it, such as a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises ``ValueError`` if the file is damaged."""
    try:
        document = json.loads(path.read_text())
        if not isinstance(document, dict):
            raise ValueError(f"it holds a {type(document).__name__}")
    except ValueError as error:  # Errors of decoding text or JSON are ValueErrors.
        raise ValueError(
            f"{path} must hold a JSON object; it is damaged: {error}. Restore it from a copy, or "
            "use another folder."
        ) from None
    return document


def write_json(path: Path, document: Any) -> None:
    """Writes a JSON file by atomic replacement, so that a kill leaves the old file or the new."""
    temporary = path.with_name(f"{path.name}.tmp")
    with _naming(temporary):
        temporary.write_text(json.dumps(document, indent=2) + "\n")
    temporary.replace(path)


class TensorBoardWriter:
    """A writer for TensorBoard, which hides earlier records of steps after `resume_step`."""

    def __init__(self, directory: str | os.PathLike[str], *, resume_step: int | None = None):
        SummaryWriter = require("tensorboardX", extra="tensorboard").SummaryWriter
        purge_step = None if resume_step is None else resume_step + 1
        suffix = f".{time.time_ns()}"  # Keeps writers made in the same second in separate files.
        self._writer = SummaryWriter(str(directory), purge_step=purge_step, filename_suffix=suffix)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds one scalar event per metric, under its name."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, float(value), int(step))

    def close(self) -> None:
        """Flushes and closes the event file."""
        self._writer.close()


class MultiWriter:
    """A writer that passes every call on to several writers, in their order."""

    def __init__(self, *writers: MetricWriter):
        self._writers = writers

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes to all writers."""
        for writer in self._writers:
            writer.write(step, metrics)

    def close(self) -> None:
        """Closes all writers, even if closing one of them raises."""
        with contextlib.ExitStack() as stack:
            for writer in reversed(self._writers):
                stack.callback(writer.close)
