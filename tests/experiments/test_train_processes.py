"""Several real processes train together, over loopback."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import chex
import jax
import numpy as np
import pytest
from oracles import relative_difference

from experiments import train
from experiments.recipes import recipe_from_dict
from wsbcn_flax.training import Checkpointer
from wsbcn_flax.training.preemption import PREEMPTED_STATUS
from wsbcn_flax.training.writers import read_jsonl

pytestmark = pytest.mark.usefixtures("data_dir")

STEPS = 22
RECIPE = ["digits_resnet8_bcn_ws", "--epochs", "0.25", "--batch.size", "16", "--model.width", "8"]
OPTIONS = ["--log-every", "1", "--checkpoint-every", "5", "--no-progress"]
# A tenth of the recipe's learning rate keeps accumulated rounding within the tolerances.
OPTIM = ["--optim.learning-rate", "0.01", "--optim.warmup-epochs", "0"]
ARGUMENTS = [*RECIPE, *OPTIM, *OPTIONS]
# Output of Gloo, the library of the CPU's collectives, about each connection. Its threads write
# concurrently, so a line may be inside another.
GLOO_REPORT = (
    r"\[Gloo\] Rank |\d+| is connected to | peer ranks\. "
    r"|Expected number of connected peer ranks is : "
)
HEARTBEAT_TIMEOUT = 6  # Seconds; far below the timeout of `Pair.ends`.
NOTICE = 1.5  # Seconds until JAX, which checks once a second, has noticed a SIGTERM.


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data_dir):
    """The folder of an undisturbed run of one process with eight devices."""
    folder = tmp_path_factory.mktemp("alone")
    assert train.main([*ARGUMENTS, "--out", str(folder)]) == 0
    return folder


class Pair:
    """Two processes of four devices each."""

    def __init__(self, folder):
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        command = [sys.executable, "-m", "experiments.train", *ARGUMENTS, "--out", str(folder)]
        command += ["--heartbeat-timeout", str(HEARTBEAT_TIMEOUT)]
        devices = "--xla_force_host_platform_device_count"
        environment = {
            **os.environ,
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(f"{devices}=8", f"{devices}=4"),
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
        }
        self.processes = [
            subprocess.Popen(
                command,
                env={**environment, "JAX_PROCESS_ID": str(index)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(2)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait_for_step(self, step):
        deadline = time.monotonic() + 120
        while last_step(self._folder) < step:
            ended = any(process.poll() is not None for process in self.processes)
            if ended or time.monotonic() > deadline:
                for process in self.processes:
                    process.kill()
                raise AssertionError(self.ends())
            time.sleep(0.05)

    def ends(self):
        """Waits for both; returns exit statuses, and each process's standard output and error."""
        outputs = [process.communicate(timeout=120) for process in self.processes]
        return [process.returncode for process in self.processes], outputs


def last_step(folder):
    path = folder / "metrics.jsonl"
    records = read_jsonl(path) if path.exists() else []
    return records[-1]["step"] if records else 0


def final_state(folder):
    recipe = recipe_from_dict(json.loads((folder / "recipe.json").read_text()))
    experiment = recipe.experiment()
    with Checkpointer(folder / "checkpoints") as checkpointer:
        template = jax.eval_shape(lambda: experiment.init(recipe.seed))
        restored = checkpointer.restore(STEPS, template)
    return jax.device_get(restored.state)


def test_two_processes_train_as_one_through_sigterm_and_the_death_of_one(tmp_path, alone):
    # One of them is told to stop: both save the same step and say so.
    with Pair(tmp_path) as pair:
        pair.wait_for_step(6)
        pair.processes[1].send_signal(signal.SIGTERM)
        # Steps may be fast. While one process pauses, the other cannot take a step either.
        pair.processes[0].send_signal(signal.SIGSTOP)
        time.sleep(NOTICE)
        pair.processes[0].send_signal(signal.SIGCONT)
        statuses, outputs = pair.ends()
    assert statuses == [PREEMPTED_STATUS] * 2
    (stopped,) = {re.search(r"asked to stop at step (\d+)", err)[1] for _, err in outputs}
    assert (tmp_path / "checkpoints" / stopped).exists()

    # One of them dies: the other, in a collective with it, stops in bounded time and says why.
    assert int(stopped) < STEPS - 8
    with Pair(tmp_path) as pair:
        pair.wait_for_step(int(stopped) + 4)
        pair.processes[1].kill()
        statuses, outputs = pair.ends()
    assert statuses[1] == -signal.SIGKILL
    # Either JAX's heartbeats notice first, or the library of the CPU's collectives. The library
    # raises an error or, if others of its collectives are running, aborts.
    assert statuses[0] in (1, -signal.SIGABRT)
    assert re.search("another task died|gloo", outputs[0][1], re.IGNORECASE), outputs[0][1]

    with Pair(tmp_path) as pair:
        statuses, outputs = pair.ends()
    assert statuses == [0, 0], outputs
    # Only process 0 reports, and the record of metrics has every step once.
    assert "eval_error" in outputs[0][0]
    assert re.sub(GLOO_REPORT, "", outputs[1][0]).split() == []
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    expected = read_jsonl(alone / "metrics.jsonl")
    for name in ("loss", "eval_error", "eval_loss"):
        values = [[r[name] for r in run if name in r] for run in (expected, records)]
        np.testing.assert_allclose(*values, rtol=1e-5)
    assert relative_difference(final_state(alone), final_state(tmp_path)) < 5e-6 * STEPS


def test_sigterm_leaves_a_checkpoint_that_resumes(tmp_path, alone, capsys):
    def send_when_training():
        while last_step(tmp_path) < 6:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send_when_training)
    sender.start()
    assert train.main([*ARGUMENTS, "--out", str(tmp_path)]) == PREEMPTED_STATUS
    sender.join()
    stopped = int(re.search(r"asked to stop at step (\d+)", capsys.readouterr().err)[1])
    assert 6 <= stopped < STEPS
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.steps[-1] == stopped
    assert train.main([*ARGUMENTS, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "metrics.jsonl").read_text() == (alone / "metrics.jsonl").read_text()
    chex.assert_trees_all_equal(final_state(alone), final_state(tmp_path))
