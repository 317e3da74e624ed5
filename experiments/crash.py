"""Kills a run at random moments, resumes it, and compares it with an undisturbed one.

`python -m experiments.crash RECIPE [--kills 10] [--devices 8]`
"""

import dataclasses
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import rich
import tyro

from experiments._command import make_main
from experiments._model_file import restore_run
from experiments._tables import table
from wsbcn_flax.training import Checkpointer
from wsbcn_flax.training.progress import Progress
from wsbcn_flax.training.writers import read_jsonl


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrashOptions:
    """Kills a run at random moments and compares its results with an undisturbed run's.

    Attributes:
        recipe: Name of a recipe.
        kills: Number of times that the run is killed.
        epochs: Length of training in epochs.
        checkpoint_every: Number of steps between checkpoints.
        data_dir: Folder of datasets; the recipe's if None.
        devices: Number of devices to simulate on the CPU; None uses the devices that JAX finds.
        seed: Seed of the moments of the kills.
    """

    recipe: tyro.conf.Positional[str] = "mnist5k_resnet8_bcn_ws"
    kills: int = 10
    epochs: float = 8.0
    checkpoint_every: int = 10
    data_dir: str | None = None
    devices: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.kills < 1 or (self.devices is not None and self.devices < 1):
            raise ValueError(
                f"kills and devices must be at least 1, received {self.kills} and {self.devices}."
            )


class CrashReport(NamedTuple):
    """Result of the comparison.

    Attributes:
        killed_at: Last step recorded at each kill; fewer than ``kills`` if training ended first.
        lost: Number of recorded steps that the newest checkpoint did not hold, at each kill.
        differing: Paths of the leaves that are not bit-identical in the final states.
        same_metrics: Whether the two metric files are equal.
        leaves: Number of arrays that were compared.
    """

    killed_at: tuple[int, ...]
    lost: tuple[int, ...]
    differing: tuple[str, ...]
    same_metrics: bool
    leaves: int


def crash(options: CrashOptions, folder: Path) -> CrashReport:
    """Runs the recipe undisturbed and with kills, under ``folder``, and compares the results.

    Raises:
        RuntimeError: If a run fails without being killed.
    """
    whole, killed = folder / "whole", folder / "killed"
    began = time.monotonic()
    process = _start(options, whole)
    _wait_for_step(1, process, whole)
    startup = time.monotonic() - began
    _finish(process)
    end = _last_step(whole)
    furthest = round(1.5 * end / options.kills)
    moments = random.Random(options.seed)
    killed_at, lost = [], []
    with Progress("kill", total=options.kills) as progress:
        for number in range(1, options.kills + 1):
            process = _start(options, killed)
            # Kills it while it steps or saves, sometimes while it imports, restores or compiles.
            further = moments.randint(0, furthest)
            _wait_for_step(min(_last_step(killed) + further, end - 2), process, killed)
            time.sleep(moments.uniform(0, 0.2 if further else startup))
            if process.poll() is not None:
                _finish(process)
                break
            process.kill()
            process.communicate()
            killed_at.append(_last_step(killed))
            with Checkpointer(killed / "checkpoints") as checkpointer:
                lost.append(max(killed_at[-1] - max(checkpointer.steps, default=0), 0))
            progress.update(number, {"killed at step": killed_at[-1]})
    _finish(_start(options, killed))
    one, other = _final_leaves(whole), _final_leaves(killed)
    return CrashReport(
        tuple(killed_at),
        tuple(lost),
        tuple(path for path in one if one[path].tobytes() != other[path].tobytes()),
        (whole / "metrics.jsonl").read_text() == (killed / "metrics.jsonl").read_text(),
        len(one),
    )


def _start(options: CrashOptions, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.train", options.recipe, "--out", str(folder)]
    command += ["--epochs", str(options.epochs), "--log-every", "1", "--no-progress"]
    command += ["--checkpoint-every", str(options.checkpoint_every)]
    if options.data_dir is not None:
        command += ["--data.data-dir", options.data_dir]
    environment = dict(os.environ)
    if options.devices is not None:
        flag = f"--xla_force_host_platform_device_count={options.devices}"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}"
        environment["JAX_PLATFORMS"] = "cpu"
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def _wait_for_step(step: int, process: subprocess.Popen, folder: Path) -> None:
    """Waits until the step is recorded, or the process ends."""
    while process.poll() is None and _last_step(folder) < step:
        time.sleep(0.02)


def _finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"A run failed without being killed:\n{errors.decode()[-2000:]}")


def _last_step(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    records = read_jsonl(path) if path.exists() else []
    return records[-1]["step"] if records else 0


def _final_leaves(folder: Path) -> dict[str, np.ndarray]:
    *_, state = restore_run(folder)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def _crash(options: CrashOptions) -> None:
    """Prints the comparison.

    Raises:
        RuntimeError: If the results are not bit-identical, or training ended before the last kill.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = crash(options, Path(folder))
    *first, last = map(str, report.killed_at or (0,))
    shown = first if len(first) < 5 else [*first[:4], "..."]
    results = {
        "last step recorded at each kill": ", ".join([*shown, last]),
        "most steps lost at a kill": str(max(report.lost, default=0)),
        "arrays compared": str(report.leaves),
        "arrays that differ in any bit": str(len(report.differing)),
        "metrics.jsonl equal": "yes" if report.same_metrics else "no",
    }
    rows = [{"what": name, "result": result} for name, result in results.items()]
    rich.print(table(f"{options.recipe}, kills: {len(report.killed_at)}", rows))
    if len(report.killed_at) < options.kills:
        raise RuntimeError("The training ended before its last kill; raise --epochs.")
    if report.differing or not report.same_metrics:
        raise RuntimeError("The killed run must end like the undisturbed one; it did not.")


main = make_main(_crash, options=CrashOptions)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
