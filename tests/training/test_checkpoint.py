import contextlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from wsbcn_flax.training._checkpoint import (
    Checkpointer,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointWarning,
    CorruptCheckpointError,
    NonFiniteStateError,
)

# When one of several concurrent reads of a corrupt file fails, orbax closes the event loop that the
# callbacks of the others then look for.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(?s)Exception ignored in. None.*Event loop is closed"
    ":pytest.PytestUnraisableExceptionWarning"
)


@flax.struct.dataclass
class State:
    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def make_state(seed: int, *, optimizer=OPTIMIZER, features: int = 5) -> State:
    key = jax.random.key(seed)
    params = {
        "conv": {"kernel": jax.random.normal(key, (3, 3, 4, features)), "bias": jnp.ones(features)},
        "scale": jax.random.normal(key, (7,), jnp.bfloat16),
    }
    stats = {"mean": jnp.full(features, seed, jnp.float32), "ready": jnp.array(True)}
    return State(jnp.int32(seed), params, stats, optimizer.init(params))


@jax.jit
def train_step(state: State, x: jax.Array) -> State:
    def loss(params):
        kernel = params["conv"]["kernel"].sum((0, 1))
        y = x @ kernel + params["conv"]["bias"][None]
        return (y**2).mean() + (params["scale"].astype(jnp.float32) ** 2).sum()

    grads = jax.grad(loss)(state.params)
    updates, opt_state = OPTIMIZER.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)


def bits(tree) -> list[tuple[str, tuple[int, ...], bytes]]:
    arrays = map(np.asarray, jax.tree.leaves(tree))
    return [(a.dtype.name, a.shape, a.tobytes()) for a in arrays]


def save_steps(directory: Path, *steps: int) -> None:
    with Checkpointer(directory) as checkpointer:
        for step in steps:
            checkpointer.save(step, make_state(step), extra={"step": step})


def files_of(directory: Path) -> dict[str, bytes]:
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def corrupt(directory: Path) -> None:
    """Flips one bit in the array data of one checkpoint."""
    (path,) = directory.glob("state/d/*")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)


# --- what is restored is what was saved ---------------------------------------------------------

EXTREMES = {
    "float32": np.array([0.0, -0.0, 1e-45, 3.4e38, 1 / 3], np.float32),
    "bfloat16": np.array([0.0, -0.0, 1e-40, 3e38, 1 / 3], ml_dtypes.bfloat16),
    "float16": np.array([-0.0, 6e-8, 65504], np.float16),
    "int32": np.array([-(2**31), 2**31 - 1], np.int32),
    "uint8": np.arange(256, dtype=np.uint8),
    "bool": np.array([[True, False], [False, True]]),
    "complex64": np.array([1 - 2j, -0.0], np.complex64),
}
WIDE = {
    "float64": np.array([-0.0, 5e-324, 1.7e308, 1 / 3]),
    "int64": np.array([-(2**63), 2**63 - 1]),
}


def assert_round_trip(directory: Path, values: np.ndarray) -> None:
    state = {
        "vector": jnp.asarray(values),
        "scalar": jnp.asarray(values.reshape(-1)[-1]),
    }
    assert state["vector"].dtype == values.dtype
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(0, state)
        restored = checkpointer.restore(0, jax.eval_shape(lambda: state))
    assert bits(restored.state) == bits(state)


@pytest.mark.parametrize("dtype", EXTREMES)
def test_every_dtype_comes_back_bit_for_bit(tmp_path, dtype):
    assert_round_trip(tmp_path, EXTREMES[dtype])


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.usefixtures("x64")
def test_wide_dtypes_come_back_bit_for_bit(tmp_path, dtype):
    assert_round_trip(tmp_path, WIDE[dtype])


def test_float64_is_never_narrowed_silently(tmp_path):
    with jax.enable_x64(True):
        state = {"x": jnp.full(3, 1 / 3, jnp.float64)}
        template = jax.eval_shape(lambda: state)
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(0, state)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(TypeError, match="enable_x64"):
        checkpointer.restore(0, template)


class Pair(NamedTuple):
    first: Any
    second: Any


def test_the_container_comes_back(tmp_path):
    state = {
        "a.b/c": Pair([jnp.ones(2), ()], None),
        "tuple": (jnp.zeros(1), {}, optax.EmptyState()),
        "state": make_state(3),
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, state)
        restored = checkpointer.restore_latest(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert bits(restored.state) == bits(state)


def test_the_newest_step_and_its_extra_come_back(tmp_path):
    extra = {"best": 0.1, "history": [1, 2.5, None, True, "é"], "nested": {"a": {}}}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(np.int64(9), make_state(9))
        checkpointer.save(jnp.int32(10), make_state(10), extra=extra)
    with Checkpointer(tmp_path) as checkpointer:
        step, state, saved_extra = checkpointer.restore_latest(make_state(0))
        older = checkpointer.restore(9, make_state(0))
    assert (step, bits(state)) == (10, bits(make_state(10)))
    assert saved_extra == extra
    assert (older.step, older.extra, bits(older.state)) == (9, {}, bits(make_state(9)))


def test_extra_may_change_once_it_is_being_saved(tmp_path, monkeypatch):
    extra, save = {"history": [1]}, ocp.CheckpointManager.save

    def save_late(*args, **kwargs):
        extra["history"].append(2)
        return save(*args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", save_late)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), extra=extra)
        assert checkpointer.restore(1, make_state(0)).extra == {"history": [1]}


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    batches = jax.random.normal(jax.random.key(0), (6, 8, 4))
    donating_step = jax.jit(train_step, donate_argnums=0)
    expected = make_state(0)
    for batch in batches:
        expected = train_step(expected, batch)

    state = make_state(0)
    with Checkpointer(tmp_path) as checkpointer:
        for batch in batches[:3]:
            state = donating_step(state, batch)
            checkpointer.save(int(state.step), state)
    with Checkpointer(tmp_path) as checkpointer:
        step, state, _ = checkpointer.restore_latest(make_state(1))
    for batch in batches[step:]:
        state = donating_step(state, batch)
    assert bits(state) == bits(expected)


def test_donated_arrays_are_saved_as_they_were(tmp_path):
    scramble = jax.jit(lambda x: -x, donate_argnums=0)
    with Checkpointer(tmp_path, max_to_keep=None) as checkpointer:
        for step in range(4):
            x = jnp.full(1 << 21, step, jnp.float32)
            checkpointer.save(step, {"x": x})
            for _ in range(3):
                x = scramble(x)
            x.block_until_ready()
        for step in range(4):
            x = checkpointer.restore(step, {"x": x}).state["x"]
            np.testing.assert_array_equal(x, step)


# --- placement ----------------------------------------------------------------------------------


def placed(state: State, devices: int) -> State:
    """Spreads the last axis over devices where it divides, and copies the rest to all."""
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))

    def place(x):
        spec = PartitionSpec(*[None] * (x.ndim - 1), "data") if x.shape[-1:] == (16,) else ()
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, state)


@pytest.mark.parametrize(("saved_on", "restored_on"), [(8, 8), (8, 4), (8, 1), (1, 8), (2, 4)])
@pytest.mark.parametrize("abstract", [False, True])
def test_a_state_moves_between_device_counts(tmp_path, saved_on, restored_on, abstract):
    state = placed(make_state(1, features=16), saved_on)
    template = placed(make_state(2, features=16), restored_on)
    assert len(state.params["conv"]["kernel"].sharding.device_set) == saved_on
    if abstract:
        template = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), template
        )
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        restored = checkpointer.restore_latest(template).state
    assert bits(restored) == bits(state)
    for leaf, like in zip(jax.tree.leaves(restored), jax.tree.leaves(template), strict=True):
        assert leaf.sharding == like.sharding


def test_uncommitted_leaves_stay_free_to_move(tmp_path, mesh8):
    sharded = jax.device_put(jnp.arange(16.0), NamedSharding(mesh8, PartitionSpec("data")))
    state = {"step": jnp.int32(4), "x": sharded}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(4, state)
        restored = checkpointer.restore_latest(state).state
    # jit refuses arrays committed to different devices.
    total = jax.jit(lambda s: s["x"] * s["step"])(restored)
    np.testing.assert_array_equal(total, 4 * np.arange(16.0))
    assert not restored["step"].committed
    assert restored["x"].committed


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
        for _ in range(1 if how == "delete" else 8):
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
    # Files whose every byte matters; the others hold what a restore can do without.
    assert {"meta/metadata", "state/manifest.ocdbt"} <= set(skipped)
    assert any("/d/" in name for name in skipped)


def test_orbax_alone_would_restore_the_wrong_numbers(tmp_path):
    """Why the checksums are kept; if this fails, orbax has learned to do it itself."""
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
    [(1.5, "float"), (np.ones(2), "ndarray"), (jax.random.key(0), "key_data")],
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
    with pytest.raises(ValueError, match="max_to_keep must be at least 1"):
        Checkpointer(tmp_path, max_to_keep=0)
    with Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(ValueError, match="must not be negative; got -1"):
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


@contextlib.contextmanager
def full_disk():
    """Limits the size of files, which fails writes as a full disk does."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


def test_a_save_that_cannot_be_written_is_an_error(tmp_path):
    state = {"x": jax.random.normal(jax.random.key(0), (1 << 18,))}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        checkpointer.wait()
        with full_disk():
            checkpointer.save(2, state)
            with pytest.raises(CheckpointError, match=f"the last save to {tmp_path} failed"):
                checkpointer.wait()
        assert checkpointer.steps == (1,)
        checkpointer.save(3, state)
        checkpointer.wait()
        with full_disk():
            checkpointer.save(4, state)
            with pytest.raises(CheckpointError, match=f"the last save to {tmp_path} failed"):
                checkpointer.close()
    assert Checkpointer(tmp_path).steps == (1, 3)


def test_what_orbax_refuses_is_an_error_at_once_and_blocks_nothing(tmp_path):
    before = threading.enumerate()
    with Checkpointer(tmp_path) as checkpointer:
        for refused in (jnp.ones(3), {}, {"x": jnp.zeros((0, 3))}):
            with pytest.raises(CheckpointError, match=f"saving step 1 to {tmp_path} failed"):
                checkpointer.save(1, refused)
        checkpointer.save(1, make_state(1))
        assert checkpointer.steps == (1,)
    for thread in set(threading.enumerate()) - set(before):
        thread.join(timeout=10)
        assert not thread.is_alive(), "it would keep the interpreter from exiting"


# --- other processes ----------------------------------------------------------------------------

TRAIN_FOREVER = """
import sys
import jax.numpy as jnp
from wsbcn_flax.training._checkpoint import Checkpointer

with Checkpointer(sys.argv[1], max_to_keep=2) as checkpointer:
    state = {"step": jnp.int32(0), "x": jnp.arange(5_000_000, dtype=jnp.float32)}
    restored = checkpointer.restore_latest(state)
    step, state = (restored.step, restored.state) if restored else (0, state)
    while True:
        step, state = step + 1, {"step": state["step"] + 1, "x": state["x"] + 1}
        checkpointer.save(step, state)
        if step % 3 == 0:
            checkpointer.wait()
            print(step, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_sound_checkpoint(tmp_path):
    rng = random.Random(0)
    committed = 0
    template = {"step": jnp.int32(0), "x": jnp.zeros(5_000_000)}
    for _ in range(4):
        command = [sys.executable, "-W", "error", "-c", TRAIN_FOREVER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            committed = int(child.stdout.readline())
            time.sleep(rng.uniform(0, 0.3))
            child.send_signal(signal.SIGKILL)
            committed = max([committed, *map(int, child.stdout.read().split())])
        assert child.returncode == -signal.SIGKILL
        with Checkpointer(tmp_path) as checkpointer:
            step, state, _ = checkpointer.restore_latest(template)
        assert step >= committed
        assert state["step"] == step
        np.testing.assert_array_equal(state["x"], np.arange(5_000_000, dtype=np.float32) + step)


def test_importing_does_not_import_orbax():
    code = "import sys, wsbcn_flax.training._checkpoint; assert 'orbax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
