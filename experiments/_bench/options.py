"""What every measurement takes, and the file it writes."""

import dataclasses
from pathlib import Path
from typing import Any

from experiments._files import write_json

_QUICK_ROUNDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What every measurement takes.

    Attributes:
        json: file to write the figures to, replacing it; only tables are printed without one.
        quick: as little as shows that everything runs; the figures mean nothing.
    """

    json: Path | None = None
    quick: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedOptions(BenchOptions):
    """What every measurement of time takes.

    Attributes:
        repeats: rounds in which each form is timed once; three at most if ``quick``.
    """

    repeats: int = 120

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"repeats must be at least 1, received {self.repeats}.")

    @property
    def rounds(self) -> int:
        """How many rounds are timed."""
        return min(self.repeats, _QUICK_ROUNDS) if self.quick else self.repeats


def check_writable(path: Path | None) -> None:
    """Raises OSError now for a file that could not be written after minutes of measuring."""
    if path is None:
        return
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise type(error)(
            f"--json must name a file that can be written, received {path}: {error.strerror}."
        ) from error
    if is_new:
        path.unlink()


def save(path: Path | None, document: Any) -> None:
    """Writes the figures where asked to."""
    if path is not None:
        write_json(path, document)
