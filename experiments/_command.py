"""The frame of every command: exit status, errors of users, the debugger."""

import dis
import pdb
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from wsbcn_flax.training.preemption import PREEMPTED_STATUS, PreemptedError

_OURS = {"experiments", "wsbcn_flax"}


def run_command(command: Callable[[list[str]], object], argv: list[str]) -> int:
    """Runs a command and returns its exit status: 0, 1 after an error, 75 after SIGTERM.

    A mistake of the user is printed in one line. Any other error keeps its traceback, and with the
    argument ``--pdb`` opens the debugger where it was raised.
    """
    try:
        command([argument for argument in argv if argument != "--pdb"])
    except PreemptedError as stop:
        print(stop, file=sys.stderr)
        return PREEMPTED_STATUS
    except Exception as error:
        if "--pdb" in argv:
            traceback.print_exc()
            pdb.post_mortem(error.__traceback__)
            return 1
        if not is_users_mistake(error):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def is_users_mistake(error: Exception) -> bool:
    """Tells errors that this project raises on purpose, and missing files, from bugs."""
    if isinstance(error, OSError):
        return True
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    # A raise statement: what an operation or a call raises is a bug.
    raised = dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
    return raised and not _OURS.isdisjoint(Path(code.co_filename).parts)
