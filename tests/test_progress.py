"""Messages of all modules go through one channel, and every program ends alike."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from utils import entry
from utils.errors import UserError
from utils.progress import set_up_logging

log = logging.getLogger("any module")
ROOT = Path(__file__).resolve().parents[1]


def test_messages_are_lines_of_stdout_and_warnings_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    set_up_logging()
    log.info("epoch %d", 1)
    log.warning("disk is nearly full")
    log.debug("a detail")
    assert capsys.readouterr().out == "epoch 1\nwarning: disk is nearly full\n"


def test_only_the_main_process_writes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    log.warning("said by another process")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("raised", "status", "printed"),
    [
        (None, 0, ""),
        (UserError("no data"), 2, "error: no data\n"),
        (KeyboardInterrupt(), 130, "stopped here\n"),
        (PermissionError(13, "Permission denied", "a/file"), 2, "error: a/file: Permission denied\n"),
    ],
)
def test_a_program_ends_with_a_status_and_one_line(
    raised: BaseException | None, status: int, printed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        if raised:
            raise raised

    assert entry.run(main, "stopped here") == status
    assert capsys.readouterr().err == printed


def test_preparing_data_sets_does_not_wait_for_torch() -> None:
    command = [sys.executable, "-c", "import sys, preprocess.preprocess; sys.exit('torch' in sys.modules)"]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0


def test_a_program_prints_names_of_files_that_are_not_unicode() -> None:
    lines = r"from utils import entry; entry.run(lambda: print('caf\udce9'))"
    run = subprocess.run(
        [sys.executable, "-c", lines], cwd=ROOT, capture_output=True, env={"PYTHONIOENCODING": "utf-8"}
    )
    assert (run.stdout, run.stderr) == (b"caf\\udce9\n", b"")


def test_a_program_whose_reader_has_ended_ends_without_a_word() -> None:
    talk = "entry.run(lambda: [print('a line') for _ in range(10**5)])"
    lines = f"import sys; from utils import entry; print({talk}, file=sys.stderr)"
    run = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "{lines}" | head -n 1'], cwd=ROOT, capture_output=True)
    assert (run.stdout, run.stderr) == (b"a line\n", b"141\n")
