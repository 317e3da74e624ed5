"""Code shared by all commands: options, exit status, user errors and the debugger."""

import dis
import functools
import os
import pdb
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import tyro

from wsbcn_flax.data import default_data_dir
from wsbcn_flax.training.preemption import PREEMPTED_STATUS, PreemptedError

_OURS = {"experiments", "wsbcn_flax"}


def make_main(command: Callable[..., object], *, options: Any = None) -> Callable[[list[str]], int]:
    """Makes the ``main(argv)`` of a command from a function whose arguments are its options.

    With ``options``, a dataclass or a union of dataclasses, the function takes an instance.
    """
    prog = f"python -m experiments.{command.__name__.strip('_')}"

    def parse_and_run(argv: list[str]) -> None:
        if options is None:
            tyro.cli(command, args=argv, prog=prog)
        else:
            command(tyro.cli(options, args=argv, prog=prog))

    return functools.partial(run_command, parse_and_run)


def run_command(command: Callable[[list[str]], object], argv: list[str]) -> int:
    """Runs a command and returns its exit status.

    It is 0, 1 after an error, 75 after a stop that saved a checkpoint, or 130 after Ctrl-C.

    A user's mistake is printed in one line; any other error keeps its traceback. With the argument
    ``--pdb``, every error opens the debugger where it was raised. Compiled programs are kept in the
    user's cache for the next run, unless the argument ``--no-compilation-cache`` is given.
    """
    flags = {"--pdb", "--no-compilation-cache"}
    if "--no-compilation-cache" not in argv:
        _keep_compiled_programs()
    try:
        command([argument for argument in argv if argument not in flags])
        sys.stdout.flush()
    except BrokenPipeError:  # As in `COMMAND | head`; Python would complain again when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except PreemptedError as stop:
        print(stop, file=sys.stderr)
        return PREEMPTED_STATUS
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.", file=sys.stderr)
        return 130
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


def _keep_compiled_programs() -> None:
    """Sets JAX's persistent compilation cache, unless the user has set one."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = default_data_dir().parent / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def is_users_mistake(error: Exception) -> bool:
    """Returns whether this project raised an error on purpose, or it is an ``OSError``."""
    if isinstance(error, OSError) or "No such compile option" in str(error):
        return True
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code = last.tb_frame.f_code
    # Only a raise statement is on purpose; what an operation or a call raises is a bug.
    raised = dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
    return raised and not _OURS.isdisjoint(Path(code.co_filename).parts)
