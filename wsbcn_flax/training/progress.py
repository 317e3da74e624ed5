"""Progress display of a loop: a live bar on a terminal, a few plain lines in a log."""

import functools
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

from wsbcn_flax._extras import require

if TYPE_CHECKING:
    from rich.console import Console

_LINES_IN_A_LOG = 20
_SECONDS_BETWEEN_REFRESHES = 0.2


class Progress:
    """A display of a loop's step, remaining time and latest metrics, used in a `with` block.

    On a terminal it is a live bar; bars may be nested, as for an evaluation during training.
    Elsewhere it prints about twenty plain lines, without control codes. Metrics are converted only
    when they are shown, so that calling `update` at every step does not wait for the device each
    time.

    Args:
        description: Name of what the loop does.
        total: Step at which the loop ends.
        start: Step at which it starts or resumes.
        enabled: Whether to show anything.
        live: Whether a thread redraws the bar between updates. Turn it off while measuring times,
            since the thread competes with the measured code.
        console: Console to print to; defaults to the standard error.

    Example:
        >>> from rich.console import Console
        >>> with Progress("evaluate", total=1, console=Console()) as progress:
        ...     progress.update(1, {"error": 0.25})
        evaluate 1/1, 0:00:00 left, error 0.25
    """

    def __init__(
        self,
        description: str,
        *,
        total: int,
        start: int = 0,
        enabled: bool = True,
        live: bool = True,
        console: "Console | None" = None,
    ):
        self._display: _Bar | _Lines | None = None
        if enabled:
            console = console or _standard_error()
            # With FORCE_COLOR, rich mistakes a log for a terminal, hence isatty.
            if console.is_interactive and console.file.isatty():
                self._display = _Bar(console, description, start, total, live=live)
            else:
                self._display = _Lines(console, description, start, total)
        self._pending: tuple[int, Mapping[str, Any]] | None = None

    def __enter__(self) -> Self:
        if self._display:
            self._display.start()
        return self

    def update(self, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Receives a finished step and its metrics, and shows them from time to time."""
        self._pending = (step, metrics or {})
        if self._display and self._display.is_due(step):
            self._show()

    def note(self, text: str) -> None:
        """Shows what the loop does besides its steps, such as compiling."""
        if self._display:
            self._display.note(text)

    def __exit__(self, *exc_info: object) -> None:
        if self._display:
            self._show()
            self._display.stop()

    def _show(self) -> None:
        if self._display and self._pending:
            step, metrics = self._pending
            self._display.show(step, ", ".join(f"{name} {_text(x)}" for name, x in metrics.items()))
            self._pending = None


@functools.cache  # Bars of one console can be shown together.
def _standard_error() -> "Console":
    return require("rich.console", extra="train").Console(stderr=True)


class _Bar:
    """A live bar of rich."""

    def __init__(self, console: "Console", description: str, start: int, total: int, *, live: bool):
        bars = require("rich.progress", extra="train")
        # Only the metrics are cut if room is short; otherwise rich narrows every column.
        rest = require("rich.table", extra="train").Column(ratio=1, no_wrap=True)
        self._bar = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(bar_width=20),
            bars.MofNCompleteColumn(),
            bars.TimeRemainingColumn(),
            bars.TextColumn("{task.fields[metrics]}", markup=False, table_column=rest),
            console=console,
            auto_refresh=live,
            # Into a file, what the loop prints must go there, and not beside the bar.
            redirect_stdout=sys.stdout.isatty(),
            expand=True,
            speed_estimate_period=300,
        )
        self._task = self._bar.add_task(description, completed=start, total=total, metrics="")
        self._refreshed = -_SECONDS_BETWEEN_REFRESHES
        self.start, self.stop = self._bar.start, self._bar.stop

    def is_due(self, step: int) -> bool:
        return time.monotonic() - self._refreshed >= _SECONDS_BETWEEN_REFRESHES

    def note(self, text: str) -> None:
        self._bar.update(self._task, metrics=text, refresh=True)

    def show(self, step: int, metrics: str) -> None:
        self._bar.update(self._task, completed=step, metrics=metrics, refresh=True)
        self._refreshed = time.monotonic()


class _Lines:
    """Lines at the first step, then after each further twentieth of the steps, and at the last."""

    def __init__(self, console: "Console", description: str, start: int, total: int):
        self._file, self._description = console.file, description
        self._start, self._total = start, total
        self._due = start

    def start(self) -> None:
        self._began = time.monotonic()

    def stop(self) -> None:
        pass

    def is_due(self, step: int) -> bool:
        return step >= self._due or step == self._total

    def note(self, text: str) -> None:
        print(f"{self._description}: {text}", file=self._file, flush=True)

    def show(self, step: int, metrics: str) -> None:
        self._due = step + self._total / _LINES_IN_A_LOG
        pace = (time.monotonic() - self._began) / max(step - self._start, 1)
        left = timedelta(seconds=int(pace * max(self._total - step, 0)))
        line = f"{self._description} {step}/{self._total}, {left} left"
        print(f"{line}, {metrics}" if metrics else line, file=self._file, flush=True)


def _text(value: Any) -> str:
    try:
        return f"{float(value):.4g}"
    except Exception:  # A display must not end a run.
        return "?"
