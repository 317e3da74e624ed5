"""Kills a training at random moments, resumes it, and compares it with an undisturbed one.

`python -m experiments.crash RECIPE [--kills 10] [--devices 8]`
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import rich
import tyro

from experiments._command import run_command
from experiments._recipe import Recipe
from experiments._tables import table
from experiments.recipes import get_recipe
from wsbcn_flax.training import Checkpointer
from wsbcn_flax.training.progress import Progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrashOptions:
    """Kills a training at random moments and compares its end with an undisturbed one's.

    Attributes:
        recipe: Name of a recipe.
        kills: Number of times that the training is killed.
        epochs: Length of training.
        checkpoint_every: Number of steps between checkpoints.
        devices: Number of devices that the training simulates on the CPU; those that JAX finds if
            None.
        seed: Seed of the moments.
    """

    recipe: tyro.conf.Positional[str] = "mnist5k_resnet8_bcn_ws"
    kills: int = 10
    epochs: float = 8.0
    checkpoint_every: int = 10
    devices: int | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class CrashReport:
    """Result of the comparison.

    Attributes:
        killed_at: Last step recorded at each kill; fewer than asked for if training ended before.
        lost: Number of recorded steps that the newest checkpoint did not hold, at each kill.
        differing: Paths of the leaves of the final states that are not equal bit for bit.
        same_metrics: Whether the two metric files are equal.
        leaves: Number of arrays that were compared.
    """

    killed_at: tuple[int, ...]
    lost: tuple[int, ...]
    differing: tuple[str, ...]
    same_metrics: bool
    leaves: int


def crash(options: CrashOptions, folder: Path) -> CrashReport:
    """Runs the recipe undisturbed and killed, under ``folder``, and compares the ends.

    Raises:
        RuntimeError: if a training fails by itself.
    """
    whole, killed = folder / "whole", folder / "killed"
    startup = _undisturbed(options, whole)
    furthest = round(1.5 * _last_step(whole) / options.kills)
    moments = random.Random(options.seed)
    killed_at, lost = [], []
    with Progress("kill", total=options.kills) as progress:
        for number in range(options.kills):
            # While stepping and saving, or now and then while importing, restoring and compiling.
            further = moments.randint(0, furthest)
            pause = moments.uniform(0, 0.2 if further else startup)
            if not _kill(_start(options, killed), killed, further=further, pause=pause):
                break
            killed_at.append(_last_step(killed))
            lost.append(max(killed_at[-1] - _newest_checkpoint(killed), 0))
            progress.update(number + 1, {"killed at step": killed_at[-1]})
    _finish(_start(options, killed))
    recipe = _recipe(options)
    one, other = _final_leaves(recipe, whole), _final_leaves(recipe, killed)
    return CrashReport(
        tuple(killed_at),
        tuple(lost),
        tuple(path for path in one if one[path].tobytes() != other[path].tobytes()),
        (whole / "metrics.jsonl").read_text() == (killed / "metrics.jsonl").read_text(),
        len(one),
    )


def _recipe(options: CrashOptions) -> Recipe:
    return dataclasses.replace(get_recipe(options.recipe), epochs=options.epochs)


def _start(options: CrashOptions, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.train", options.recipe, "--out", str(folder)]
    command += ["--epochs", str(options.epochs), "--log-every", "1", "--no-progress"]
    command += ["--checkpoint-every", str(options.checkpoint_every)]
    environment = dict(os.environ)
    if options.devices is not None:
        flag = f"--xla_force_host_platform_device_count={options.devices}"
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {flag}"
        environment["JAX_PLATFORMS"] = "cpu"
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def _undisturbed(options: CrashOptions, folder: Path) -> float:
    """Runs to the end; returns the seconds until the first step."""
    started = time.monotonic()
    process = _start(options, folder)
    while process.poll() is None and not _last_step(folder):
        time.sleep(0.05)
    first = time.monotonic()
    _finish(process)
    return first - started


def _finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"A training failed by itself:\n{errors.decode()[-2000:]}")


def _kill(process: subprocess.Popen, folder: Path, *, further: int, pause: float) -> bool:
    """Kills the training some steps further than it ever was, and a pause; False if it ended."""
    target = _last_step(folder) + further
    while process.poll() is None and _last_step(folder) < target:
        time.sleep(0.02)
    try:
        process.wait(timeout=pause)
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        return True
    _finish(process)
    return False


def _last_step(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    # The last line may be torn by the kill.
    complete = [line for line in lines if line.endswith("}")]
    return json.loads(complete[-1])["step"] if complete else 0


def _newest_checkpoint(folder: Path) -> int:
    with Checkpointer(folder / "checkpoints") as checkpointer:
        return max(checkpointer.steps, default=0)


def _final_leaves(recipe: Recipe, folder: Path) -> dict[str, np.ndarray]:
    experiment = recipe.experiment(recipe.load_data())
    with Checkpointer(folder / "checkpoints") as checkpointer:
        template = jax.eval_shape(lambda: experiment.init(recipe.seed))
        restored = checkpointer.restore(experiment.steps, template)
    leaves = jax.tree_util.tree_leaves_with_path(restored.state)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def main(argv: list[str]) -> int:
    """Runs the command; returns 0 if the two ends are equal bit for bit."""
    return run_command(_crash, argv)


def _crash(argv: list[str]) -> None:
    options = tyro.cli(CrashOptions, args=argv, prog="crash")
    with tempfile.TemporaryDirectory() as folder:
        report = crash(options, Path(folder))
    results = {
        "last step recorded at each kill": ", ".join(map(str, report.killed_at)),
        "most steps lost at a kill": str(max(report.lost, default=0)),
        "arrays of the final state compared": str(report.leaves),
        "arrays that differ in any bit": str(len(report.differing)),
        "metrics.jsonl equal": "yes" if report.same_metrics else "no",
    }
    rows = [{"what": name, "result": result} for name, result in results.items()]
    rich.print(table(f"{options.recipe}, killed {len(report.killed_at)} times", rows))
    if len(report.killed_at) < options.kills:
        raise RuntimeError("The training ended before all its kills; lengthen it: --epochs.")
    if report.differing or not report.same_metrics:
        raise RuntimeError("The killed training did not end as the undisturbed one.")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
