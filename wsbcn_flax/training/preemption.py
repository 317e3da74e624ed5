"""Stopping when asked to: a run that is about to lose its machine saves and leaves."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax

StopRule = Callable[[int], bool]

# A command's exit status after it was preempted: sysexits.h's EX_TEMPFAIL, "try again".
PREEMPTED_STATUS = 75


class PreemptedError(Exception):
    """Training stopped before its end because the process received SIGTERM."""


@contextlib.contextmanager
def stop_on_sigterm() -> Iterator[StopRule]:
    """Yields ``should_stop(step)``, true once SIGTERM came; to be asked after every step.

    Of several processes it is enough that one receives the signal, as JAX agrees among them on the
    step after which all stop. A process alone has its former handler back after the block; the
    processes of a run keep JAX's.

    Example:
        >>> import os, signal
        >>> from wsbcn_flax.training.preemption import stop_on_sigterm
        >>> with stop_on_sigterm() as should_stop:
        ...     before = should_stop(1)
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     print(before, should_stop(2))
        False True
    """
    if jax.distributed.is_initialized():
        from jax.experimental import multihost_utils

        yield multihost_utils.reached_preemption_sync_point
        return
    received = []
    former = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, former)
