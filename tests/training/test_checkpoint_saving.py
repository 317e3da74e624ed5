import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from checkpoint_states import (
    bits,
    files_of,
    make_state,
    save_steps,
)
from full_disk import full_disk

from wsbcn_flax.training.checkpoints import (
    Checkpointer,
    CheckpointError,
    NonFiniteStateError,
)

# --- what may be saved --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_state_that_is_not_finite_is_refused(tmp_path, value, dtype):
    good = {"a": jnp.zeros(3, dtype), "b": jnp.ones(2)}
    bad = good | {"a": jnp.array([0, value, 0], dtype)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, good)
        with pytest.raises(NonFiniteStateError, match=r"not finite: a$"):
            checkpointer.save(2, bad)
        assert checkpointer.steps == (1,)
        checkpointer.save(2, good)
        assert checkpointer.restore_latest(good).step == 2


@pytest.mark.parametrize("step", [3, 5])
def test_a_step_that_is_not_newer_is_refused(tmp_path, step):
    save_steps(tmp_path, 5)
    before = files_of(tmp_path)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(CheckpointError, match=f"saving step {step} .*the newest is step 5"):
            checkpointer.save(step, make_state(step))
        assert files_of(tmp_path) == before
        checkpointer.save(6, make_state(6))
        assert checkpointer.steps == (5, 6)


@pytest.mark.parametrize(
    ("leaf", "match"),
    [
        (1.5, "float"),
        (np.ma.masked_array([1.0, 2.0], [True, False]), "MaskedArray"),
        (np.array("a"), "<U1.*JAX cannot hold"),
        (np.ones(2, ">f4"), ">f4.*JAX cannot hold"),
        (np.ones(2), r"float64.*enable_x64.*astype\(np.float32\)"),
        (np.int64(2), r"int64.*enable_x64.*astype\(np.int32\)"),
        (jax.random.key(0), "key_data"),
    ],
)
def test_leaves_that_are_not_arrays_of_numbers_are_refused(tmp_path, leaf, match):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(TypeError, match=f"x is a .*{match}"):
            checkpointer.save(1, {"x": leaf, "y": jnp.ones(1)})
        checkpointer.save(1, {"x": jnp.ones(1)})
        with pytest.raises(TypeError, match=f"x is a .*{match}"):
            checkpointer.restore_latest({"x": leaf})


@pytest.mark.parametrize(
    "extra", [{"x": float("nan")}, {"x": float("inf")}, {"x": jnp.ones(1)}, {1: 2}, {"x": (1, 2)}]
)
def test_extra_that_json_would_change_is_refused(tmp_path, extra):
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises((TypeError, ValueError), match="JSON"):
            checkpointer.save(1, make_state(1), extra=extra)
        assert checkpointer.steps == ()


def test_saving_needs_a_with_block(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    with pytest.raises(CheckpointError, match="with"):
        checkpointer.save(1, make_state(1))
    with checkpointer:
        checkpointer.save(1, make_state(1))
    with pytest.raises(CheckpointError, match="with"):
        checkpointer.save(2, make_state(2))
    assert checkpointer.restore_latest(make_state(0)).step == 1


def test_bad_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1, or None for all, received 0"):
        Checkpointer(tmp_path, max_to_keep=0)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="must not be negative, received -1"):
            checkpointer.save(-1, make_state(1))
        with pytest.raises(TypeError):
            checkpointer.save(1.5, make_state(1))
        with pytest.raises(CheckpointError, match=r"no step 4 .* holds \[\]"):
            checkpointer.restore(4, make_state(1))


# --- the directory ------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "left"), [(1, (4,)), (2, (3, 4)), (None, (0, 1, 2, 3, 4))])
def test_the_newest_steps_are_kept(tmp_path, keep, left):
    with Checkpointer(tmp_path, max_to_keep=keep) as checkpointer:
        for step in range(5):
            checkpointer.save(step, make_state(step))
        assert checkpointer.steps == left
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(step) for step in left]


def test_reading_creates_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpointer("runs/none") as checkpointer:
        assert checkpointer.restore_latest(make_state(0)) is None
        assert list(tmp_path.iterdir()) == []
        checkpointer.save(1, make_state(1))
    assert (tmp_path / "runs" / "none" / "1").is_dir()


def test_leftovers_of_a_killed_save_are_ignored_then_removed(tmp_path):
    save_steps(tmp_path, 1)
    for name in ("2", "7"):
        leftover = tmp_path / f"{name}{ocp.utils.TMP_DIR_SUFFIX}"
        shutil.copytree(tmp_path / "1", leftover)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore_latest(make_state(0)).step == 1
        checkpointer.save(2, make_state(2))
        assert bits(checkpointer.restore_latest(make_state(0)).state) == bits(make_state(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_the_last_save_survives_an_exception_in_the_run(tmp_path):
    def run():
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(1, make_state(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert Checkpointer(tmp_path).steps == (1,)


def test_a_save_that_cannot_be_written_is_an_error_in_one_line(tmp_path, caplog):
    failed = f"the last save to {tmp_path} failed: File too large. Make room, then resume$"
    state = {"x": jax.random.normal(jax.random.key(0), (1 << 18,))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.wait()
        with full_disk(100_000):
            checkpointer.save(2, state)
            with pytest.raises(CheckpointError, match=failed):
                checkpointer.wait()
        assert checkpointer.steps == (1,)
        checkpointer.save(3, state)
        checkpointer.wait()
        with full_disk(100_000):
            checkpointer.save(4, state)
            with pytest.raises(CheckpointError, match=failed):
                checkpointer.close()
    assert not caplog.records, "orbax logs hundreds of lines"
    assert Checkpointer(tmp_path).steps == (1, 3)


def test_what_orbax_refuses_is_an_error_at_once_and_blocks_nothing(tmp_path):
    before = threading.enumerate()
    with Checkpointer(tmp_path) as checkpointer:
        for refused in ({}, {"x": jnp.zeros((0, 3))}):
            with pytest.raises(CheckpointError, match=f"saving step 1 to {tmp_path} failed"):
                checkpointer.save(1, refused)
        checkpointer.save(1, make_state(1))
        assert checkpointer.steps == (1,)
    for thread in set(threading.enumerate()) - set(before):
        thread.join(timeout=10)
        assert not thread.is_alive(), "it would keep the interpreter from exiting"


def test_a_field_of_none_is_no_part_of_a_checkpoint(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.ones(3)})
        restored = checkpointer.restore_latest({"x": jnp.zeros(3), "later": None})
    assert restored.state["later"] is None
    np.testing.assert_array_equal(restored.state["x"], 1)


def test_what_cannot_be_saved_says_so(tmp_path):
    x = jnp.ones(3)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(TypeError, match="array to be saved; x is a ShapeDtypeStruct"):
            checkpointer.save(1, jax.eval_shape(lambda: {"x": x}))
        x.delete()
        with pytest.raises(ValueError, match="x was donated to a step"):
            checkpointer.save(1, {"x": x})
        assert checkpointer.steps == ()


def test_the_directory_is_no_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ValueError, match=f"must not be a file, received {path}"):
        Checkpointer(path)


def test_one_bare_array_is_a_state(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, jnp.arange(3))
        np.testing.assert_array_equal(
            checkpointer.restore_latest(jnp.zeros(3, int)).state, [0, 1, 2]
        )
