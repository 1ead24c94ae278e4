"""Commands as forks: one that hangs ends with all that it started, and all end with the process that tests."""

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from tests.forked import Command, until


def test_a_command_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    def hang() -> int:
        if not os.fork():
            (tmp_path / "pid").write_text(str(os.getpid()))
        time.sleep(600)
        return 0

    command = Command(tmp_path / "output", hang)
    assert until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    with pytest.raises(TimeoutError, match="did not end within"):
        command.wait(0.2)
    assert until(lambda: has_ended(tmp_path / "pid"))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can be asked to do this")
def test_a_command_ends_when_the_one_that_started_it_is_killed(tmp_path: Path) -> None:
    def wait() -> int:
        time.sleep(600)
        return 0

    def start() -> int:
        command = Command(tmp_path / "of the other", wait)
        (tmp_path / "pid").write_text(str(command.pid))
        return wait()

    command = Command(tmp_path / "output", start)
    assert until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    command.kill()
    assert until(lambda: has_ended(tmp_path / "pid"))


def has_ended(pid: Path) -> bool:
    """Return whether the process, whose number is in this file, has ended."""
    try:
        return ") Z " in (Path("/proc") / pid.read_text() / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_objects_of_the_parent_that_are_collected_leave_the_files_of_a_forked_command_alone(tmp_path: Path) -> None:
    of_the_parent = [socket.socketpair() for _ in range(9)]

    def send() -> int:
        own = [socket.socketpair() for _ in range(9)]
        of_the_parent.clear()
        return 0 if all(one.send(b"x") == 1 and other.recv(1) == b"x" for one, other in own) else 1

    process = Command(tmp_path / "output", send)
    assert process.wait() == 0, process.printed()
