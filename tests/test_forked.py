"""Commands as forks: one that hangs ends with all that it started."""

import os
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
    assert until((tmp_path / "pid").exists)
    with pytest.raises(TimeoutError, match="did not end within"):
        command.wait(0.2)
    child = Path("/proc") / (tmp_path / "pid").read_text()
    assert until(lambda: not child.exists() or ") Z " in (child / "stat").read_text())
