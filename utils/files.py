"""Files that are replaced as a whole: a reader, or a crash at any moment, sees the old one or the new one."""

import csv
import fcntl
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from utils.errors import UserError


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Fill a temporary file beside `path`, fsync it, rename it to `path`, fsync the folder.

    Raises UserError when the disk is full or not writable; the file that was at `path` is then untouched.
    """
    temporary = path.with_name(f".{path.name}.partial")  # one name, so that what a killed writer left is used again
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error}. Free some disk space or choose another --experiments_dir; "
            "what was saved before is intact, and training goes on from it"
        ) from error


def write_text(path: Path, text: str) -> None:
    """Replace a small text file (UTF-8)."""
    replace_file(path, lambda file: file.write(text.encode()))


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace a CSV file; the first row's keys are the columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


@contextmanager
def only_process(folder: Path, purpose: str) -> Iterator[None]:
    """Hold a lock on `folder`, which the system frees when the process ends; UserError if another process has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --experiments_dir") from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is {purpose} in {folder}; wait for it or choose another folder"
            ) from error
        yield


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
