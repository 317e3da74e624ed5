"""Checkpoints that are restored exactly as they were saved, or not at all.

Only this module uses orbax. Orbax keeps no checksum of array data: after one flipped bit on disk it
restores a wrong number without an error. So the CRC-32 of every leaf is stored beside it and
verified before anything is returned.
"""

import contextlib
import errno
import json
import logging
import operator
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, Self, TypeVar

import jax
import numpy as np

from wsbcn_flax._extras import require
from wsbcn_flax.training._state_leaves import fingerprint, named_leaves, place_like
from wsbcn_flax.training.processes import fetch, is_first_process, on_first_process

StateT = TypeVar("StateT")

_FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved or restored; base of the errors below."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint is unreadable, or its bytes differ from those that were saved."""


class CheckpointMismatchError(CheckpointError):
    """The leaves, shapes or dtypes of an intact checkpoint differ from those of the template."""


class NonFiniteStateError(CheckpointError):
    """A state to be saved holds NaN or infinite values."""


class CheckpointWarning(UserWarning):
    """An unusable checkpoint was skipped in favour of an older one."""


class Restored(NamedTuple, Generic[StateT]):
    """A restored checkpoint: its step, its state bit for bit, and the JSON values saved with it."""

    step: int
    state: StateT
    extra: dict[str, Any]


class Checkpointer:
    """A directory that saves and restores a training state, in a numbered subdirectory per step.

    A state is copied to the host and then written in the background, so its arrays may be donated
    at once. A kill at any moment leaves the checkpoints committed so far intact. Restoring never
    changes the directory. An evaluation may thus read it while a training run, the only writer,
    saves there.

    In a run of several processes all must call the same methods. Only process 0 reads and writes,
    so only it needs access to the directory. It shares the restored state with all processes.

    A state is a pytree of JAX or NumPy arrays, without typed PRNG keys. A template is a state, or
    one of `jax.ShapeDtypeStruct`s. The restored state takes the template's shardings, whatever the
    shardings of the saved state were. Restored leaves are JAX arrays. They are on the default
    device where the template has NumPy arrays or scalars, whose dtypes must be among those that
    JAX holds. If several processes have NumPy arrays, those of process 0 are saved.

    Args:
        directory: Local directory; created at the first save.
        max_to_keep: Number of newest steps to keep, at least one; None keeps all.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> state = {"step": jnp.int32(7), "params": {"kernel": jnp.ones((2, 3))}}
        >>> with tempfile.TemporaryDirectory() as path, Checkpointer(path) as checkpointer:
        ...     checkpointer.save(7, state, extra={"best_error": 0.25})
        ...     restored = checkpointer.restore_latest(template=state)
        >>> restored.step, restored.extra, restored.state["params"]["kernel"].shape
        (7, {'best_error': 0.25}, (2, 3))
    """

    def __init__(self, directory: str | os.PathLike[str], *, max_to_keep: int | None = 3):
        if max_to_keep is not None and max_to_keep < 1:
            raise ValueError(
                f"max_to_keep must be at least 1, or None for all, received {max_to_keep}"
            )
        ocp = require("orbax.checkpoint", extra="train")
        self._orbax = ocp
        self._directory = Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=ocp.checkpoint_managers.LatestN(max_to_keep),
            # Otherwise a failed save leaves threads that delay the exit by five minutes.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=0, active_processes={0}, barrier_sync_key_prefix="checkpointer"
            ),
        )
        self._manager: Any = None
        if is_first_process():
            if self._directory.is_file():
                raise ValueError(f"directory must not be a file, received {self._directory}")
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._skipped: dict[int, str] = {}
        self._entered = False
        logging.getLogger("absl").addFilter(_is_not_of_orbax)

    def __enter__(self) -> Self:
        self._entered = True
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps in the directory, oldest first, usable or not."""
        return on_first_process(self._steps)

    def save(self, step: int, state: Any, *, extra: Mapping[str, Any] | None = None) -> None:
        """Starts to save a state; `wait`, `close` or leaving the `with` block completes the save.

        Args:
            step: Number of the step, larger than all in the directory.
            state: State; all values must be finite.
            extra: JSON values to keep with it.

        Raises:
            NonFiniteStateError: If a leaf holds NaN or infinity; nothing is written.
            CheckpointError: If called outside `with`, if the directory has a step at least as new,
                or if the previous save failed.
            TypeError: If a leaf is not an array that JAX can hold, or `extra` is not JSON.
            ValueError: If `step` is negative, an array was donated to an earlier step, or `extra`
                would not come back from JSON unchanged.
        """
        if not self._entered:
            raise CheckpointError("save needs a `with` block: what is unfinished at exit is lost")
        if (step := operator.index(step)) < 0:
            raise ValueError(f"step must not be negative, received {step}")
        arrays = {name: _kept(name, leaf) for name, leaf in named_leaves(state).items()}
        leaves = _checked_fingerprints(arrays)
        if not is_first_process():
            return
        meta = _sealed({"step": step, "leaves": leaves, "extra": dict(extra or {})})
        self._make_way()
        args = self._orbax.args
        items = args.Composite(state=args.StandardSave(arrays), meta=args.JsonSave(meta))
        with _reraise(CheckpointError, f"saving step {step} to {self._directory} failed"):
            if not self._manager.save(step, args=items):
                newest = self._manager.latest_step()
                raise ValueError(f"the newest is step {newest}: resume from it, or save elsewhere")

    def restore_latest(self, template: StateT) -> Restored[StateT] | None:
        """Restores the newest step that verifies; returns None if the directory holds no step.

        It gives a `CheckpointWarning` for every newer step that is unreadable or does not verify.
        The next `save` moves those steps into the subdirectory `corrupt`, so that training can save
        them again.

        Raises:
            CheckpointError: If there are steps and none is usable; the message lists the reasons.
            CheckpointMismatchError: If an intact step does not fit the template.
        """
        restored = on_first_process(lambda: self._read_latest(template))
        return None if restored is None else self._place(restored, template)

    def restore(self, step: int, template: StateT) -> Restored[StateT]:
        """Restores one step; raises `CheckpointError` if it is absent, corrupt or does not fit."""
        return self._place(on_first_process(lambda: self._read_step(step, template)), template)

    def wait(self) -> None:
        """Blocks until the last save is on disk; raises `CheckpointError` if that save failed.

        Like `close`, it waits on process 0 and does nothing on the other processes.
        """
        if self._manager is None:
            return
        with _reraise(CheckpointError, f"the last save to {self._directory} failed"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save, as `wait` does, and ends the background threads."""
        self._entered = False
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()

    def _steps(self) -> tuple[int, ...]:
        self.wait()
        self._manager.reload()
        return tuple(self._manager.all_steps())

    def _make_way(self) -> None:
        """Removes the remains of killed saves and moves the skipped steps aside."""
        self.wait()
        self._directory.mkdir(parents=True, exist_ok=True)
        for path in self._directory.glob(f"*{self._orbax.utils.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(path)
        for step in self._skipped:
            aside = self._directory / "corrupt"
            aside.mkdir(exist_ok=True)
            number = len(list(aside.glob(f"{step}.*")))
            (self._directory / str(step)).rename(aside / f"{step}.{number}")
        self._skipped = {}
        self._manager.reload()

    def _read_latest(self, template: Any) -> Restored[Any] | None:
        self._skipped = {}
        for step in reversed(self._steps()):
            try:
                return self._read(step, template)
            except CorruptCheckpointError as error:
                # The stack level is that of restore_latest's caller.
                warnings.warn(f"skipped a checkpoint: {error}", CheckpointWarning, stacklevel=5)
                self._skipped[step] = str(error)
        if self._skipped:
            raise CheckpointError(
                f"no checkpoint in {self._directory} is usable; to start from scratch, use another"
                " directory:\n  " + "\n  ".join(self._skipped.values())
            )
        return None

    def _read_step(self, step: int, template: Any) -> Restored[Any]:
        if step not in (steps := self._steps()):
            raise CheckpointError(f"no step {step} in {self._directory}; it holds {list(steps)}")
        return self._read(step, template)

    def _read(self, step: int, template: Any) -> Restored[Any]:
        """Reads a step to host arrays, to verify exactly what is later placed on devices."""
        wanted = named_leaves(template)
        path = self._directory / str(step)
        meta = self._load(path, meta=self._orbax.args.JsonRestore())
        with _reraise(CorruptCheckpointError, str(path)):
            body = meta["body"]
            if meta != _sealed(body) or body["step"] != step:
                raise ValueError("the metadata is not what was saved here")
        _check_fit(path, body["leaves"], wanted)
        blank = {n: np.broadcast_to(np.zeros((), x.dtype), x.shape) for n, x in wanted.items()}
        arrays = self._load(path, state=self._orbax.args.StandardRestore(blank))
        if wrong := [n for n, x in arrays.items() if fingerprint(x) != body["leaves"][n]]:
            raise CorruptCheckpointError(f"{path}: wrong checksum of {_first_few(wrong)}")
        state = jax.tree.unflatten(jax.tree.structure(template), [arrays[name] for name in wanted])
        return Restored(step, state, body["extra"])

    def _place(self, restored: Restored[Any], template: StateT) -> Restored[StateT]:
        return restored._replace(state=jax.tree.map(place_like, restored.state, template))

    def _load(self, path: Path, **item: Any) -> Any:
        with _reraise(CorruptCheckpointError, str(path)):
            args = self._orbax.args.Composite(**item)
            (loaded,) = self._manager.restore(int(path.name), args=args).values()
            return loaded


@contextlib.contextmanager
def _reraise(kind: type[CheckpointError], what: str) -> Iterator[None]:
    """Turns any exception into our error; orbax may raise any type for corrupt bytes."""
    try:
        yield
    except Exception as error:
        full = [text for text in _FULL if text in repr(error)]
        reason = f"{full[0]}. Make room, then resume" if full else f"{error!r:.300}"
        raise kind(f"{what}: {reason}") from error


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    """Whether to keep a log record: drops orbax's tracebacks of errors that we report anyway."""
    return not (record.exc_info and "orbax" in record.pathname)


def _kept(name: str, leaf: Any) -> Any:
    """Returns the leaf, protected against changes by the caller while it is written."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        raise TypeError(f"every leaf must be an array to be saved; {name} is a ShapeDtypeStruct")
    if not isinstance(leaf, jax.Array):
        return np.array(leaf, order="C")
    if leaf.is_deleted():
        raise ValueError(f"{name} was donated to a step: save the state that the step returned")
    # With several processes, orbax refuses arrays that only one of them has.
    return fetch(leaf) if jax.process_count() > 1 else leaf


def _checked_fingerprints(leaves: Mapping[str, Any]) -> dict[str, list[Any]]:
    arrays = {name: np.asarray(leaf) for name, leaf in leaves.items()}
    if bad := [name for name, array in arrays.items() if not np.isfinite(array).all()]:
        raise NonFiniteStateError(f"only finite states are saved; not finite: {_first_few(bad)}")
    return {name: fingerprint(array) for name, array in arrays.items()}


def _check_fit(path: Path, saved: Mapping[str, list[Any]], wanted: Mapping[str, Any]) -> None:
    has = {name: f"{dtype}{shape}" for name, (dtype, shape, _) in saved.items()}
    asks = {name: f"{np.dtype(x.dtype).name}{list(x.shape)}" for name, x in wanted.items()}
    both = {name: (has.get(name, "absent"), asks.get(name, "absent")) for name in asks | has}
    if differing := [f"{name} ({a} != {b})" for name, (a, b) in both.items() if a != b]:
        raise CheckpointMismatchError(
            f"{path} is not of this model and optimizer: {_first_few(differing)}, checkpoint !="
            " template. Use the configuration it was saved with, or another directory"
        )


def _sealed(body: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(body, sort_keys=True, allow_nan=False)
    if (copy := json.loads(text)) != body:
        raise ValueError(f"extra must come back from JSON as it was, not as {copy['extra']}")
    return {"crc32": zlib.crc32(text.encode()), "body": copy}


def _first_few(items: list[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
