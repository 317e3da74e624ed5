"""Preemption: a run that is asked to stop saves a checkpoint and ends."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import jax

StopRule = Callable[[int], bool]

# Exit status of a command that was preempted: EX_TEMPFAIL of sysexits.h, "try again".
PREEMPTED_STATUS = 75


class PreemptedError(Exception):
    """Training stopped early because of SIGTERM or Ctrl-C."""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRule]:
    """Yields ``should_stop(step)``, true after SIGTERM or Ctrl-C; call it after every step.

    A second Ctrl-C raises ``KeyboardInterrupt`` as usual. If a run has several processes, a signal
    to one of them is enough: JAX makes all of them stop after the same step. Former handlers return
    after the block, except that such a run keeps JAX's handler of SIGTERM.

    Example:
        >>> import os, signal
        >>> from wsbcn_flax.training.preemption import stop_on_signal
        >>> with stop_on_signal() as should_stop:
        ...     before = should_stop(1)
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     print(before, should_stop(2))
        False True
    """
    with contextlib.ExitStack() as stack:
        # A program started in the background ignores Ctrl-C and must continue to do so.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            _handle(stack, signal.SIGINT, _pass_on)
        if jax.distributed.is_initialized():
            from jax.experimental import multihost_utils

            yield multihost_utils.reached_preemption_sync_point
            return
        received = []
        _handle(stack, signal.SIGTERM, lambda *_: received.append(True))
        yield lambda step: bool(received)


def _handle(stack: contextlib.ExitStack, number: int, handler: Callable[..., object]) -> None:
    """Sets a handler until the stack unwinds."""
    stack.callback(signal.signal, number, signal.signal(number, handler))


def _pass_on(*_: object) -> None:
    """Turns the first Ctrl-C into SIGTERM, which the processes of a run handle together."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not print, which raises if the signal interrupts another print.
    os.write(2, b"\nSaving after this step, to resume from it. Ctrl-C again stops at once.\n")
    signal.raise_signal(signal.SIGTERM)
