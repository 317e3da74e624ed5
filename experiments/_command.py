"""The frame of every command: options, exit status, errors of users, the debugger."""

import dis
import functools
import pdb
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from wsbcn_flax.training.preemption import PREEMPTED_STATUS, PreemptedError

_OURS = {"experiments", "wsbcn_flax"}


def make_main(command: Callable[..., object], *, options: Any = None) -> Callable[[list[str]], int]:
    """Makes the ``main(argv)`` of a command from a function whose arguments are its options.

    With ``options``, a dataclass or a union of dataclasses, the function takes one of these alone.
    """
    prog = command.__name__.strip("_")

    def parse_and_run(argv: list[str]) -> None:
        if options is None:
            tyro.cli(command, args=argv, prog=prog)
        else:
            command(tyro.cli(options, args=argv, prog=prog))

    return functools.partial(run_command, parse_and_run)


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
