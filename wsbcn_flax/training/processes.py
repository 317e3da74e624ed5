"""Runs of several processes: joining them, sharing results of the first process, and exiting."""

import os
import pickle
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np

from wsbcn_flax.training.preemption import PREEMPTED_STATUS

T = TypeVar("T")

_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join_processes(*, cluster: bool = False, heartbeat_timeout: int = 100) -> None:
    """Makes this process one of several that train together, if the environment says so.

    The environment variables ``JAX_COORDINATOR_ADDRESS`` (host:port of process 0),
    ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` describe the processes. Without them, and without
    ``cluster``, this process trains alone. Call this function before JAX is asked for devices.

    If a process dies, the others end too. Either the collective in which they wait for it fails, or
    JAX aborts them (status 134) with "another task died". JAX does so at once if process 0 died,
    otherwise after ``heartbeat_timeout`` seconds. All resume together from the last checkpoint. An
    uncaught exception ends this process at once.

    Args:
        cluster: Whether JAX should find the processes itself, as it can under SLURM, Open MPI and
            Kubernetes and on Cloud TPUs.
        heartbeat_timeout: Seconds without a sign of life after which a process counts as dead.

    Raises:
        ValueError: If some of the variables are missing or not numbers, or if ``cluster`` is set
            and JAX finds none.
        RuntimeError: If devices were asked for before, or the others cannot be reached.

    Example:
        >>> from wsbcn_flax.training.processes import join_processes
        >>> join_processes()  # None of the variables is set: this process stays alone.
    """
    described = _described(os.environ)
    if not (described or cluster):
        return
    if heartbeat_timeout < 1:
        raise ValueError(f"heartbeat_timeout must be at least 1 s, received {heartbeat_timeout}.")
    try:
        jax.distributed.initialize(**described, heartbeat_timeout_seconds=heartbeat_timeout)
    except ValueError as error:
        if described or "should be defined" not in str(error):
            raise
        raise ValueError(
            "cluster needs SLURM, Open MPI, Kubernetes or a Cloud TPU, received a machine where "
            f"JAX finds none ({error}). Elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES "
            "and JAX_PROCESS_ID."
        ) from error
    sys.excepthook = _print_and_leave


def is_first_process() -> bool:
    """Whether this is process 0, the one that writes files and shows progress."""
    return jax.process_index() == 0


def on_first_process(action: Callable[[], T]) -> T:
    """Runs ``action`` on process 0 and gives its result, or its exception, to all processes.

    All processes must call this function, in the same order among their collectives.

    Args:
        action: Function to run; ``pickle`` must support its result.

    Example:
        >>> from wsbcn_flax.training.processes import on_first_process
        >>> on_first_process(lambda: 1 + 1)
        2
    """
    if jax.process_count() == 1:
        return action()
    payload, error = b"", None
    if is_first_process():
        try:
            payload = pickle.dumps((action(), None))
        except Exception as raised:
            error = raised
            payload = pickle.dumps((None, _portable(raised)))
    result, portable = pickle.loads(_broadcast(payload))
    if portable is not None:
        raise error or portable
    return result


def fetch(array: jax.Array) -> np.ndarray:
    """Copies an array to this host, gathering it from the processes that hold parts of it.

    All processes must call this function.
    """
    if array.is_fully_replicated or array.is_fully_addressable:
        return np.array(array)
    from jax.experimental import multihost_utils

    return np.array(multihost_utils.process_allgather(array, tiled=True))


def place(value: jax.Array | np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Makes an array of a given sharding from a value that every process has."""
    if sharding.is_fully_addressable:
        return jax.device_put(value, sharding)
    # device_put would first compare the value over all processes, in a collective for each array.
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, host.__getitem__)


def leave(status: int) -> NoReturn:
    """Ends this process with an exit status; on failure it does not wait for the other processes.

    Those may wait for this process in a collective, so waiting for them would block forever.
    """
    if jax.distributed.is_initialized() and status not in (0, PREEMPTED_STATUS):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _described(environment: Mapping[str, str]) -> dict[str, Any]:
    values = {name: environment[name] for name in _VARIABLES if environment.get(name)}
    if not values:
        return {}
    if len(values) < len(_VARIABLES):
        missing = [name for name in _VARIABLES if name not in values]
        raise ValueError(
            f"{', '.join(_VARIABLES)} go together, received all but {', '.join(missing)}. Set all "
            "of them in every process, or none."
        )
    address, *numbers = values.values()
    if not all(number.isdecimal() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
        raise ValueError(
            f"JAX_PROCESS_ID must be from 0 to below JAX_NUM_PROCESSES, received {numbers[1]} of "
            f"{numbers[0]}."
        )
    return {
        "coordinator_address": address,
        "num_processes": int(numbers[0]),
        "process_id": int(numbers[1]),
        "cluster_detection_method": "deactivate",
    }


def _broadcast(payload: bytes) -> bytes:
    """Returns process 0's bytes; as floats they would pass through a sum that loses -0.0."""
    from jax.experimental import multihost_utils

    header = np.frombuffer(len(payload).to_bytes(8, "little"), np.uint8)
    size = int.from_bytes(multihost_utils.broadcast_one_to_all(header).tobytes(), "little")
    data = np.frombuffer(payload, np.uint8) if payload else np.zeros(size, np.uint8)
    return multihost_utils.broadcast_one_to_all(data).tobytes()


def _portable(error: Exception) -> Exception:
    """Returns the exception, or a RuntimeError with its text if ``pickle`` cannot restore it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"process 0: {error!r}")
    return error


def _print_and_leave(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    sys.__excepthook__(kind, error, traceback)
    leave(1)
