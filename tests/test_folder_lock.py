"""A folder's lock keeps out a real second process, and ends with its owner."""

import fcntl
import re
import signal
import subprocess
import sys

import pytest

from wsbcn_flax._folder_lock import FolderInUseError, lock_folder

HOLD = """
import pathlib, sys, time
from wsbcn_flax._folder_lock import lock_folder
with lock_folder(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_in_one_line_that_names_the_first(owner, tmp_path):
    with pytest.raises(FolderInUseError) as refused, lock_folder(tmp_path / "run"):
        pass
    (line,) = str(refused.value).splitlines()
    assert re.search(rf"/run is in use by process {owner.pid} on \S+ since \d{{4}}-.* UTC\.", line)


@pytest.mark.parametrize("end", ["kill", "return"])
def test_an_owner_that_ended_is_none(end, owner, tmp_path):
    """The owner's process number, which stays in the file, may now belong to another process."""
    if end == "kill":
        owner.send_signal(signal.SIGKILL)
    owner.communicate()
    with lock_folder(tmp_path / "run"):
        assert f"process {owner.pid} " not in (tmp_path / "run" / ".lock").read_text()


def test_two_blocks_of_one_process_exclude_each_other(tmp_path):
    for _ in range(2):
        with lock_folder(tmp_path):
            with pytest.raises(FolderInUseError), lock_folder(tmp_path):
                pass
            with lock_folder(tmp_path / "another"):
                pass


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked"), lock_folder(tmp_path):
        pass
