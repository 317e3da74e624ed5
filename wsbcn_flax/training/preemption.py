"""Stopping when asked to: a run that is about to lose its machine saves and leaves."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import jax

StopRule = Callable[[int], bool]

# A command's exit status after it was preempted: sysexits.h's EX_TEMPFAIL, "try again".
PREEMPTED_STATUS = 75


class PreemptedError(Exception):
    """Training stopped before its end because of SIGTERM or Ctrl-C."""


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRule]:
    """Yields ``should_stop(step)``, true once SIGTERM or Ctrl-C came; ask it after every step.

    The second Ctrl-C raises ``KeyboardInterrupt`` as ever. Of several processes it is enough that
    one receives a signal, as JAX agrees among them on the step after which all stop. A process
    alone has its former handlers back after the block; of SIGTERM, the processes of a run keep
    JAX's.

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
        # A program started in the background ignores Ctrl-C, and goes on ignoring it.
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
    """Makes the first Ctrl-C a SIGTERM, for which the processes of a run have one rule."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not print, which raises where it interrupts another print.
    os.write(2, b"\nSaving after this step, to resume from it. Ctrl-C again stops at once.\n")
    signal.raise_signal(signal.SIGTERM)
