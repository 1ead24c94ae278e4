"""Files that are replaced as a whole: a reader, or a crash at any moment, sees the old one or the new one."""

import csv
import fcntl
import io
import itertools
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from utils.errors import UserError

log = logging.getLogger(__name__)


@contextmanager
def replace_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file that takes the place of `path` when the block ends without an exception.

    Until then the file has a name of its own, so that several processes may replace one path at once: the last one
    to finish wins. What writers that were killed left in its folder is removed.
    Raises UserError when the disk is full or not writable; the file that was at `path` is then untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        with _temporary_file(path) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            finally:
                Path(file.name).unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error}. Free some disk space or choose another folder (--experiments_dir, "
            "--dataset_dir); what was saved before is intact"
        ) from error


def parsed_json(text: str | bytes, **options: Any) -> Any:
    """Return what JSON text says; `options` as of `json.loads`.

    Raises ValueError where it is no JSON, not Unicode or nested too deeply.
    """
    try:
        return json.loads(text, **options)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def write_text(path: Path, text: str) -> None:
    """Replace a small text file (UTF-8; names of files need not be Unicode, what is not becomes an escape)."""
    with replace_file(path) as file:
        file.write(text.encode(errors="backslashreplace"))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a CSV file; its columns are the keys of all rows, and a row that lacks one is empty there."""
    text, columns = io.StringIO(), dict.fromkeys(name for row in rows for name in row)
    writer = csv.DictWriter(text, fieldnames=[*columns], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def copy_file(source: Path, path: Path) -> None:
    """Replace the file `path` by a copy of `source`."""
    with replace_file(path) as file:
        file.write(source.read_bytes())


def new_folder(path: Path) -> Path:
    """Make and return the first of PATH, PATH_2, PATH_3, ... that is not there; UserError where that cannot be."""
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}_{number}")
        try:
            folder.mkdir()
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make the folder {folder}: {error.strerror}; choose another place") from error
    return folder


def move_aside(paths: Sequence[Path], folder: Path) -> Path:
    """Move files into a new folder, see `new_folder`, and return it; UserError where the disk does not let it."""
    folder = new_folder(folder)
    try:
        for path in paths:
            path.rename(folder / path.name)
    except OSError as error:
        raise UserError(f"cannot move files to {folder}: {error.strerror}; mend that and run again") from error
    return folder


@contextmanager
def replace_folder(path: Path) -> Iterator[Path]:
    """Make a folder that takes the place of `path`, an earlier one's too, when the block ends without an exception.

    What writers that were killed left beside it is removed. UserError where the system does not let it; what was at
    `path` is then there, or comes back with the next call.
    """
    earlier = path.with_name(f".{path.name}.earlier")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path.parent)
        with _alone_in(path.parent):
            _settle(earlier, path)
        new, lock = _temporary_folder(path)
        try:
            yield new
            with _alone_in(path.parent):
                try:
                    if path.exists():
                        path.rename(earlier)
                    new.rename(path)
                finally:
                    _settle(earlier, path)
        finally:
            os.close(lock)
            shutil.rmtree(new, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; choose another folder") from error


@contextmanager
def only_process(folder: Path, purpose: str | None = None) -> Iterator[None]:
    """Hold the lock of `folder`, which the system frees when the process ends.

    While another process holds it, this one waits; where a `purpose` such as "training" is named, UserError, which
    names that process, is raised instead. UserError too where the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("ab+", buffering=0)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if purpose:
                raise UserError(
                    f"{_holder(lock)} is {purpose} in {folder}; wait for it, end it, or choose another folder"
                ) from error
            log.info("waiting for %s, which works in %s", _holder(lock), folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        with suppress(OSError):  # on a full disk the lock holds all the same
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {platform.node()} (since {time.strftime('%F %T')})".encode())
        yield


def _holder(lock: IO[bytes]) -> str:
    """Return in words which process holds a lock, as it has written there itself."""
    lock.seek(0)
    written = lock.read(200).decode(errors="replace")
    return written if written.isprintable() and written else "another process"


def _temporary_file(path: Path) -> IO[bytes]:
    """Return a new file beside `path`, locked so that `_remove_leftovers` knows that its writer is alive."""
    while True:
        file = _beside(path).open("xb")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another process took it for a leftover before it was locked


def _temporary_folder(path: Path) -> tuple[Path, int]:
    """Return a new folder beside `path`, and the open descriptor of it that holds its lock, as of a temporary file."""
    while True:
        folder = _beside(path)
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for a leftover
            continue
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            return folder, lock
        os.close(lock)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Let one process at a time, of those that ask, rename what is in a folder; it leaves no file there."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # where the file system has no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _settle(earlier: Path, path: Path) -> None:
    """Put an earlier folder back, or remove it where a new one is in its place."""
    if path.exists():
        shutil.rmtree(earlier, ignore_errors=True)
    elif earlier.exists():
        earlier.rename(path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid4().hex}.partial")


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders in `folder` that no process holds a lock on."""
    for leftover in folder.glob(f".*.{'[0-9a-f]' * 32}.partial"):
        with suppress(OSError):
            lock = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
            finally:
                os.close(lock)
