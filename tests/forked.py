"""The project's commands as real processes that may be killed at a chosen moment.

They are forked from this process, so that none of them spends seconds on importing torch.
"""

import atexit
import mmap
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # which torch.optim imports: each of the forked processes would take a second or two for it
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from utils.images import end_with

ROOT = Path(__file__).resolve().parents[1]
ON_GPU = torch.cuda.is_available()  # a fork of a process that may have used a GPU cannot compute gradients
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")  # audit events with a path


def nothing() -> None:
    """Do nothing."""


class Command:
    """A command is the script `words[0]` with its arguments, or a function, in a process of its own."""

    def __init__(
        self,
        output: Path,
        words: Sequence[str] | Callable[[], int],
        prepare: Callable[[], None] = nothing,
        anew: bool = False,
    ) -> None:
        """Start it in the project's folder. What it prints goes to `output`; it calls `prepare` first.

        `anew` starts a script in a new interpreter after all.
        """
        self.output, self.begun = output, time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self.pid = os.fork()
        self._status: int | None = None
        if self.pid == 0:
            _become(parent, output, words, prepare, anew)

    def status(self) -> int | None:
        """Return the exit status, negative after a signal; None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def wait(self, seconds: float = 120.0) -> int:
        """Return the exit status; raises TimeoutError where it does not end in time, and kills it and all its own."""
        if not self.ends_within(seconds):
            self.kill_all()
            raise TimeoutError(f"a command did not end within {seconds} s:\n{self.printed()}")
        status = self.status()
        assert status is not None
        return status

    def ends_within(self, seconds: float) -> bool:
        """Return whether it ends in time."""
        return until(lambda: self.status() is not None, seconds)

    def halts(self) -> bool:
        """Wait until it has stopped itself by `halt`, and return whether it has."""
        return until(lambda: Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T")

    def kill(self) -> None:
        """Kill it, if it runs, without a chance to clean up."""
        if self.status() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.ends_within(30)

    def kill_all(self) -> None:
        """Kill it with the processes that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.ends_within(30)

    def printed(self) -> str:
        return self.output.read_text(errors="replace")


def run_forked(
    command: Sequence[str],
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    anew: bool = True,
    timeout: float = 120.0,
    plain: Callable[..., "subprocess.CompletedProcess[str]"] = subprocess.run,
    **_: object,
) -> "subprocess.CompletedProcess[str]":
    """Do what `subprocess.run` does, and capture text; a new interpreter need not spend seconds on importing libraries.

    It imports the project `anew`, from where the command would find it; otherwise patches of this process hold there.
    """
    if ON_GPU or command[0] != sys.executable:
        return plain(command, cwd=cwd, env=env, timeout=timeout, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "errors"

        def main() -> int:
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
            os.environ.update(env or {})
            os.chdir(cwd)
            files = {name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}
            for name, file in files.items() if anew else ():
                if Path(file).is_relative_to(ROOT) and ".venv" not in file:
                    del sys.modules[name]
            _run_script(command[1:])
            return 0

        process = Command(Path(folder) / "output", main)
        return subprocess.CompletedProcess(command, process.wait(timeout), process.printed(), errors.read_text())


def two_processes(folder: Path, words: Sequence[str], **variables: str) -> tuple[int, str]:
    """Run a script in two processes that form a group, without the seconds that torchrun takes to start them.

    Returns an exit status that is not 0, if there is one, and what the two printed. Where one fails, the other has a
    moment to end by itself.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"} | variables
    both = []
    for rank in range(2):
        prepare = partial(os.environ.update, group, RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
        both.append(Command(folder / f"rank_{rank}", words, prepare, ON_GPU))
    until(lambda: any(process.status() for process in both) or all(p.status() == 0 for p in both), 120)
    for process in both:
        if not process.ends_within(15):
            process.kill_all()
    return next(filter(None, (process.status() for process in both)), 0), "".join(p.printed() for p in both)


class _Forked(subprocess.Popen[str]):
    """A script that Python shall run, forked from this process."""

    def _execute_child(  # type: ignore[override, unused-ignore]
        self, args: Sequence[str], executable: None, preexec: None, close: bool, keep: object, cwd: None,
        env: Mapping[str, str], *_: object,
    ) -> None:  # fmt: skip
        sys.stdout.flush()
        parent, (_python, _unbuffered, *words) = os.getpid(), args
        self.pid = os.fork()
        if self.pid == 0:
            _become(parent, None, words, partial(os.environ.update, env), False)
        self._child_created = True


def fork_workers() -> None:
    """From now on, where this process is torchrun, what it starts is forked from it."""
    if not ON_GPU:
        subprocess_handler.Popen = _Forked  # type: ignore[misc, assignment]


def until(condition: Callable[[], object], seconds: float = 30.0) -> bool:
    """Return whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.002)
    return bool(met)


def _become(
    parent: int, output: Path | None, words: Sequence[str] | Callable[[], int], prepare: Callable[[], None], anew: bool
) -> None:
    """Run the command in this, the forked process, and end it; there is no way back into the code of the parent."""
    status = 1
    try:
        end_with(parent)
        os.setsid()
        torch.set_num_threads(1)  # those of the parent are not here, and OpenMP would wait for them
        if output:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for standard in (1, 2):
                os.dup2(file, standard)
        _let_go_of_files()
        sys.stdout, sys.stderr = (os.fdopen(standard, "w", buffering=1, closefd=False) for standard in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for ending in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(ending, signal.SIG_DFL)
        atexit._clear()
        os.chdir(ROOT)
        prepare()
        if callable(words):
            status = words()
        elif anew:
            os.execv(sys.executable, [sys.executable, str(ROOT / words[0]), *words[1:]])
        else:
            _run_script(words)
            status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
        except OSError:
            status = 120  # as Python does where what was printed last cannot be written
        finally:
            os._exit(status)


def _run_script(words: Sequence[str]) -> None:
    """Run what follows the interpreter in a command."""
    module = words[0] == "-m"
    place = Path.cwd() if module else (ROOT / words[0]).parent
    sys.path[:] = [str(place), *(path for path in sys.path if Path(path).resolve() != ROOT)]
    sys.argv = list(words[module:])
    if module:
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")


def _let_go_of_files() -> None:
    """Close what the parent has open, and may wait for the end of.

    The numbers stay taken: when an object of the parent that owns one is collected here, it closes that number, which
    must not be that of a file or a connection of this process.
    """
    nothing_there = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number not in (0, 1, 2, nothing_there):
            os.dup2(nothing_there, number, inheritable=False)


class Operations:
    """Counts what a process does to the files below a folder: opens, renames, removes, makes folders.

    `watch` is for `Command`'s prepare, `at` makes such. The count is in memory that the processes share.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self._shared = mmap.mmap(-1, 8)

    @property
    def count(self) -> int:
        return int(struct.unpack("q", self._shared[:8])[0])

    def at(self, number: int, act: Callable[[], None]) -> Callable[[], None]:
        """Return what makes a command `act` just before its operation of that number."""
        return partial(self.watch, number, act)

    def watch(self, number: int = 0, act: Callable[[], None] = nothing) -> None:
        """Count what this process does from now on; `act` just before the operation of that number, from 1."""
        own = os.getpid()  # the processes that it forks are not watched

        def hook(event: str, arguments: tuple[object, ...]) -> None:
            if event in CHANGES and str(arguments[0]).startswith(self.folder) and os.getpid() == own:
                self._shared[:8] = struct.pack("q", self.count + 1)
                if self.count == number:
                    act()

        sys.addaudithook(hook)


def die() -> None:
    """Kill this process without a chance to clean up."""
    os.kill(os.getpid(), signal.SIGKILL)


def halt() -> None:
    """Stop this process until it gets a SIGCONT."""
    os.kill(os.getpid(), signal.SIGSTOP)
