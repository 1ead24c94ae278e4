"""The short form of `make torture`: whatever is done to the program, nothing is lost and every error is one line."""

import gc
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.forked import Command
from tests.torture import SECTIONS, Skipped, tried
from tests.torture_lab import Lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with closing(Lab(tmp_path_factory.mktemp("torture"), seed=0, short=True)) as lab:
        yield lab


@pytest.mark.parametrize("section", SECTIONS)
def test_the_program_withstands(section: str, lab: Lab) -> None:
    try:
        found = tried(section, lab)
    except Skipped as reason:
        pytest.skip(str(reason))
    assert found and not [problem for problem in found if problem]


def test_objects_of_the_parent_that_are_collected_leave_the_files_of_a_forked_command_alone(tmp_path: Path) -> None:
    of_the_parent = [socket.socketpair() for _ in range(9)]

    def send() -> int:
        own = [socket.socketpair() for _ in range(9)]
        of_the_parent.clear()
        gc.collect()
        return 0 if all(one.send(b"x") == 1 and other.recv(1) == b"x" for one, other in own) else 1

    process = Command(tmp_path / "output", send)
    assert process.wait() == 0, process.printed()
