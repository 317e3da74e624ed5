"""What every command does with the errors that people can mend."""

import sys
from collections.abc import Callable

from wsbcn_flax.training import PREEMPTED_STATUS, PreemptedError


def run_command(command: Callable[[], object]) -> int:
    """Runs a command and returns its status: 0, 1 after an error or 75 after SIGTERM, both told."""
    try:
        command()
    except PreemptedError as stop:
        print(stop, file=sys.stderr)
        return PREEMPTED_STATUS
    except (ValueError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0
