"""Functions for several processes, in a single one; `tests/experiments` starts several."""

import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from wsbcn_flax.training import Checkpointer, LoopConfig, TrainState, fit, make_train_step
from wsbcn_flax.training.preemption import PREEMPTED_STATUS, PreemptedError, stop_on_signal
from wsbcn_flax.training.processes import is_first_process, join_processes, on_first_process

VARIABLES = {
    "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "0",
}


@pytest.mark.parametrize("missing", VARIABLES)
def test_variables_go_together(missing, monkeypatch):
    for name in VARIABLES.keys() - {missing}:
        monkeypatch.setenv(name, VARIABLES[name])
    with pytest.raises(ValueError, match=f"received all but {missing}"):
        join_processes()


@pytest.mark.parametrize(("index", "count"), [("2", "2"), ("-1", "2"), ("a", "2"), ("0", "two")])
def test_an_index_beyond_the_count_is_refused(index, count, monkeypatch):
    values = {**VARIABLES, "JAX_PROCESS_ID": index, "JAX_NUM_PROCESSES": count}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"received {index} of {count}"):
        join_processes()


def test_a_machine_that_is_in_no_cluster_is_told_so():
    program = "from wsbcn_flax.training import processes; processes.join_processes(cluster=True)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "cluster needs SLURM" in result.stderr.splitlines()[-1]


def test_a_process_alone_is_the_first_and_stays_alone():
    join_processes()
    assert not jax.distributed.is_initialized()
    assert is_first_process()
    assert on_first_process(lambda: "value") == "value"
    with pytest.raises(KeyError, match="own"):
        on_first_process(lambda: {}["own"])


def test_joining_after_devices_were_used_is_refused():
    code = (
        "import jax; jax.devices()\n"
        "from wsbcn_flax.training.processes import join_processes\n"
        "join_processes()"
    )
    environment = {**os.environ, **VARIABLES}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "must be called before" in result.stderr


def test_sigterm_outside_of_training_ends_a_process_as_ever():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signal() as should_stop:
        assert not should_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert should_stop(2)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def in_the_foreground():
    """Makes Ctrl-C raise KeyboardInterrupt, since test runs in the background ignore it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


def test_ctrl_c_stops_training_and_a_second_one_stops_at_once(capfd, in_the_foreground):
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signal() as should_stop:
        assert not should_stop(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop(2)
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert "to resume" in line
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_background_program_goes_on_ignoring_ctrl_c():
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signal() as should_stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not should_stop(1)
    finally:
        signal.signal(signal.SIGINT, former)


def loss_fn(params, batch_stats, batch, *, rng):
    return jnp.mean((params["w"][None] - batch["x"]) ** 2), (batch_stats, {})


OPTIMIZER = optax.sgd(0.1, momentum=0.9)
STEP = jax.jit(make_train_step(loss_fn, OPTIMIZER))


def batches_from(done):
    while True:
        done += 1
        yield {"x": np.random.default_rng(done).normal(size=(4, 3)).astype(np.float32)}


def run(folder, should_stop=lambda step: False):
    state = TrainState.create({"params": {"w": jnp.zeros(3)}}, OPTIMIZER)
    config = LoopConfig(steps=10, checkpoint_every=4, show_progress=False)
    with Checkpointer(folder) as checkpointer:
        restored = checkpointer.restore_latest(state)
        return fit(
            STEP,
            state if restored is None else restored.state,
            batches_from,
            config=config,
            checkpointer=checkpointer,
            should_stop=should_stop,
        )[0]


@pytest.mark.parametrize("stop", [1, 4, 7])
def test_a_run_that_is_stopped_saves_and_resumes_bit_for_bit(tmp_path, stop):
    with pytest.raises(PreemptedError, match=f"step {stop}, which is saved"):
        run(tmp_path / "stopped", should_stop=lambda step: step == stop)
    with Checkpointer(tmp_path / "stopped") as checkpointer:
        assert checkpointer.steps[-1] == stop
    whole, resumed = run(tmp_path / "whole"), run(tmp_path / "stopped")
    for one, other in zip(*map(jax.tree.leaves, (whole, resumed)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_stop_at_the_last_step_is_the_end(tmp_path):
    assert int(run(tmp_path, should_stop=lambda step: step == 10).step) == 10


def test_the_status_is_one_that_means_try_again():
    assert os.EX_TEMPFAIL == PREEMPTED_STATUS
