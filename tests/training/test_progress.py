import io
import os
import re
import threading
import time

import jax.numpy as jnp
import pytest
from rich.console import Console

from wsbcn_flax.training.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(console: Console, total: int, *, start: int = 0, enabled: bool = True, metrics=None) -> str:
    metrics = metrics or (lambda step: {"loss": 1 / step})
    with Progress("train", total=total, start=start, enabled=enabled, console=console) as progress:
        for step in range(start + 1, total + 1):
            progress.update(step, metrics(step))
    return console.file.getvalue()


def log() -> Console:
    return Console(file=io.StringIO())


def terminal() -> Console:
    return Console(file=Terminal(), force_interactive=True, width=150)


@pytest.mark.parametrize("total", [1, 2, 7, 19, 20, 21, 100, 999, 54_321])
@pytest.mark.parametrize("resumed", [0.0, 0.5])
def test_a_log_gets_some_plain_lines(total, resumed):
    start = int(total * resumed)
    text = run(log(), total, start=start)
    lines = text.splitlines()
    steps = [int(re.fullmatch(r"train (\d+)/(\d+), .+ left, loss \S+", line)[1]) for line in lines]
    assert text.isascii()
    assert text.replace("\n", "").isprintable()
    assert (steps[0], steps[-1]) == (start + 1, total)
    assert steps == sorted(set(steps))
    assert min(total, 20) * (1 - resumed) / 2 <= len(steps) <= 22


def test_forced_colours_do_not_put_control_codes_into_a_log(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = run(log(), 50)
    assert "train 50/50" in text
    assert "\x1b" not in text


def test_the_last_step_is_shown_even_if_the_loop_ends_early():
    console = log()
    with Progress("train", total=1000, console=console) as progress:
        for step in range(1, 33):
            progress.update(step)
    assert "train 32/1000" in console.file.getvalue().splitlines()[-1]


def test_the_time_left_follows_the_pace_since_the_start(monkeypatch):
    console, now = log(), 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Progress("train", total=1000, start=900, console=console) as progress:
        now = 130.0
        progress.update(910)
        now = 220.0
        progress.update(960)
    assert console.file.getvalue() == (
        "train 910/1000, 0:04:30 left\ntrain 960/1000, 0:01:20 left\n"
    )


ODD = {
    "nan": float("nan"),
    "none": None,
    "text": "[/red] {x}",
    "vector": jnp.ones(3),
    "[bold]": 0.12345678,
    "{name}": jnp.float32(2),
}


def test_odd_metrics_are_shown_as_far_as_they_can_be():
    deleted = jnp.ones(())
    deleted.delete()
    text = run(log(), 1, metrics=lambda step: ODD | {"deleted": deleted})
    expected = "nan nan, none ?, text ?, vector ?, [bold] 0.1235, {name} 2, deleted ?"
    assert text.endswith(f"left, {expected}\n")


def test_metrics_are_converted_only_when_shown():
    class Metric:
        converted = 0

        def __float__(self):
            Metric.converted += 1
            return 0.5

    text = run(log(), 5000, metrics=lambda step: {"loss": Metric()})
    assert Metric.converted == len(text.splitlines())


def test_a_terminal_gets_a_live_bar():
    text = run(terminal(), 40, metrics=lambda step: {"loss": step / 8} | ODD)
    assert "\x1b[" in text
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.split("\r")[-1])
    assert re.match(r"train .* 40/40 0:00:00 loss 5, nan nan, none \?.* \[bold\] 0.1235, ", last)
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor must come back"


@pytest.mark.parametrize("live", [True, False])
def test_a_bar_for_measurements_has_no_thread_and_shows_every_update(live):
    console, before = terminal(), set(threading.enumerate())
    with Progress("measure", total=2, live=live, console=console) as progress:
        assert bool(set(threading.enumerate()) - before) == live
        progress.update(1, {"loss": 0.5})
        assert "1/2" in console.file.getvalue()


def test_bars_nest_for_an_evaluation_during_training():
    console = terminal()
    with Progress("train", total=2, console=console) as outer:
        outer.update(1, {"loss": 1.0})
        with Progress("evaluate", total=3, console=console) as inner:
            inner.update(3, {"error": 0.25})
        outer.update(2, {"loss": 0.5})
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    assert re.search(r"evaluate .* 3/3 .* error 0.25", text)
    assert re.search(r"train .* 2/2 .* loss 0.5\s*$", text)


@pytest.mark.parametrize("console", [log, terminal])
def test_it_can_be_disabled(console):
    assert run(console(), 30, enabled=False) == ""


def test_an_empty_loop_shows_nothing_in_a_log():
    assert run(log(), 0) == ""


def test_what_a_loop_prints_stays_in_the_standard_output(capsys):
    """A bar takes what is printed only if both are on a terminal."""
    with Progress("train", total=1, console=terminal()):
        print("printed")
    assert capsys.readouterr().out == "printed\n"


def test_the_default_is_the_standard_error(capsys):
    with Progress("train", total=1) as progress:
        progress.update(1)
    assert capsys.readouterr().err == f"train 1/1, 0:00:00 left{os.linesep}"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_metrics_are_cut_before_the_bar_the_count_and_the_time_left(width):
    console = Console(file=Terminal(), force_interactive=True, width=width)

    def last_line() -> str:
        text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
        return re.split(r"[\r\n]", text.rstrip())[-1]

    bar = "\N{BOX DRAWINGS HEAVY HORIZONTAL}"
    with Progress("train", total=1200, console=console, live=False) as progress:
        progress.note("compiling the step")
        assert re.match(rf"train {bar}+ +0/1200 -:--:-- compiling ", last_line())
        progress.update(600, {f"eval_top{k}_error": k / 7 for k in range(1, 9)})
        assert re.match(rf"train {bar}+\S* +600/1200 \S+ eval_top1_", last_line())
        assert last_line().endswith("\N{HORIZONTAL ELLIPSIS}")
        assert len(last_line()) == width
