import random
import shutil
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from checkpoint_states import bits, corrupt, files_of, make_state, save_steps

from wsbcn_flax.training.checkpoints import (
    Checkpointer,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointWarning,
    CorruptCheckpointError,
)

# When one of several concurrent reads of a corrupt file fails, orbax closes the event loop, which
# callbacks of the other reads still need.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s)Exception ignored in. None.*Event loop is closed"
    ":pytest.PytestUnraisableExceptionWarning"
)


# --- corruption ---------------------------------------------------------------------------------


def damaged(data: bytes, how: str, rng: random.Random) -> bytes | None:
    if how == "delete":
        return None
    if how == "truncate":
        return data[: rng.randrange(len(data))]
    position = rng.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << rng.randrange(8)]) + data[position + 1 :]


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_damage_to_any_file_is_skipped_or_harmless(tmp_path, how):
    save_steps(tmp_path, 1, 2)
    expected = {step: bits(make_state(step)) for step in (1, 2)}
    rng = random.Random(how)
    newest = tmp_path / "2"
    sound = files_of(newest)
    assert {"_CHECKPOINT_METADATA", "meta/metadata", "state/_METADATA"} <= sound.keys()
    skipped = []
    for name, data in sound.items():
        for _ in range(1 if how == "delete" else 4):
            bad = damaged(data, how, rng)
            (newest / name).unlink() if bad is None else (newest / name).write_bytes(bad)
            with (
                Checkpointer(tmp_path) as checkpointer,
                warnings.catch_warnings(record=True) as caught,
            ):
                warnings.simplefilter("always")
                step, state, extra = checkpointer.restore_latest(make_state(0))
            assert (bits(state), extra) == (expected[step], {"step": step}), name
            assert [w.category for w in caught] == [CheckpointWarning] * (2 - step)
            skipped += [name] * (2 - step)
            (newest / name).write_bytes(data)
    # Every byte of these files matters; a restore does not need the other files.
    assert {"meta/metadata", "state/manifest.ocdbt"} <= set(skipped)
    assert any("/d/" in name for name in skipped)


def test_orbax_alone_would_restore_the_wrong_numbers(tmp_path):
    """This is why checksums are kept; if it fails, orbax now verifies data itself."""
    x = np.asarray(jax.random.bits(jax.random.key(0), (64, 64)))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"x": jnp.asarray(x)})
    path = max(tmp_path.glob("1/state/**/d/*"), key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    path.write_bytes(data[:9999] + bytes([data[9999] ^ 8]) + data[10_000:])
    with ocp.CheckpointManager(tmp_path) as manager:
        items = ocp.args.Composite(state=ocp.args.StandardRestore({"x": np.zeros_like(x)}))
        wrong = manager.restore(1, args=items)["state"]["x"]
    assert (wrong != x).sum() == 1
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(CorruptCheckpointError, match=r"wrong checksum of x$"),
    ):
        checkpointer.restore(1, {"x": jnp.zeros_like(x)})


@pytest.mark.parametrize("part", ["meta", "state", "."])
def test_missing_directories_are_skipped(tmp_path, part):
    save_steps(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "2" / part)
    (tmp_path / "2").mkdir(exist_ok=True)
    with Checkpointer(tmp_path) as checkpointer, pytest.warns(CheckpointWarning, match="/2: "):
        assert checkpointer.restore_latest(make_state(0)).step == 1


def test_a_renamed_step_is_not_taken_for_another(tmp_path):
    save_steps(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / "30")
    with Checkpointer(tmp_path) as checkpointer, pytest.warns(CheckpointWarning, match="/30: "):
        assert checkpointer.restore_latest(make_state(0)).step == 1


def test_a_changed_number_in_the_metadata_is_noticed(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), extra={"best_error": 0.25})
    path = tmp_path / "1" / "meta" / "metadata"
    path.write_text(path.read_text().replace("0.25", "0.15"))
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(CorruptCheckpointError, match="meta"),
    ):
        checkpointer.restore(1, make_state(0))


def test_a_checkpoint_of_plain_orbax_is_refused(tmp_path):
    state = make_state(1)
    args = ocp.args
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=args.Composite(state=args.StandardSave(state)))
        manager.save(2, args=args.Composite(meta=args.JsonSave({"body": {}})))
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(3, args=args.StandardSave(state))
    with Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2, 3):
            with pytest.raises(CorruptCheckpointError, match=f"/{step}: "):
                checkpointer.restore(step, state)


def test_training_never_starts_over_silently(tmp_path):
    save_steps(tmp_path, 1, 2, 3)
    for step in (1, 2, 3):
        corrupt(tmp_path / str(step))
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.warns(CheckpointWarning) as caught,
        pytest.raises(CheckpointError, match="from scratch") as error,
    ):
        checkpointer.restore_latest(make_state(0))
    assert len(caught) == 3
    for step in (1, 2, 3):
        assert f"{tmp_path / str(step)}: " in str(error.value)


def test_skipped_steps_are_set_aside_when_training_saves_them_anew(tmp_path):
    save_steps(tmp_path, 10, 20, 30)
    for attempt in range(2):
        bad = {}
        for step in (20, 30):
            corrupt(tmp_path / str(step))
            bad[step] = files_of(tmp_path / str(step))
        before = files_of(tmp_path)
        with Checkpointer(tmp_path) as checkpointer:
            with pytest.warns(CheckpointWarning, match=r"/(20|30): "):
                assert checkpointer.restore_latest(make_state(0)).step == 10
            assert files_of(tmp_path) == before, "restoring must not change the directory"
            for step in (20, 30):
                checkpointer.save(step, make_state(step))
            assert bits(checkpointer.restore_latest(make_state(0)).state) == bits(make_state(30))
            assert checkpointer.steps == (10, 20, 30)
        for step, files in bad.items():
            assert files_of(tmp_path / "corrupt" / f"{step}.{attempt}") == files


# --- a checkpoint of something else -------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "named"),
    [
        (make_state(0, optimizer=optax.sgd(1e-2)), "opt_state"),
        (make_state(0, optimizer=optax.adamw(1e-2)), "opt_state"),
        (
            make_state(0, features=6),
            r"params.conv.kernel \(float32\[3, 3, 4, 5\] != float32\[3, 3, 4, 6\]",
        ),
        (make_state(0).replace(step=jnp.float32(0)), r"step \(int32\[\] != float32\[\]\)"),
        (make_state(0).replace(batch_stats={}), r"batch_stats.mean \(float32\[5\] != absent\)"),
        (
            make_state(0).replace(batch_stats=make_state(0).batch_stats | {"n": jnp.ones(2)}),
            r"batch_stats.n \(absent != float32\[2\]\)",
        ),
    ],
    ids=["sgd", "chain", "shape", "dtype", "fewer", "more"],
)
def test_a_template_that_does_not_fit_is_an_error_not_corruption(tmp_path, template, named):
    save_steps(tmp_path, 1, 2)
    with Checkpointer(tmp_path) as checkpointer:
        for restore in (checkpointer.restore_latest, partial(checkpointer.restore, 1)):
            with pytest.raises(CheckpointMismatchError, match=named):
                restore(template)


def test_leaves_that_would_share_a_name_on_disk_are_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match=r"two a\.b"):
        checkpointer.save(1, {"a": {"b": jnp.ones(3)}, "a.b": jnp.zeros(3)})


def test_a_long_list_of_differences_is_cut(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, [jnp.ones(1)] * 40)
        with pytest.raises(CheckpointMismatchError, match="and 35 more") as error:
            checkpointer.restore(1, [jnp.ones(2)] * 40)
    assert len(str(error.value)) < 800
