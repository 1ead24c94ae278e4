"""Files that are replaced as a whole: a reader, or a crash at any moment, sees the old one or the new one."""

import csv
import fcntl
import io
import json
import logging
import os
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


def parsed_json(text: bytes, **options: Any) -> Any:
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
    """Replace a CSV file; the first row's keys are the columns."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


@contextmanager
def only_process(folder: Path, purpose: str | None = None) -> Iterator[None]:
    """Hold the lock of `folder`, which the system frees when the process ends.

    While another process holds it, this one waits; where a `purpose` such as "training" is named, UserError is raised
    instead. UserError too where the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another folder") from error
    with file as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if purpose:
                raise UserError(
                    f"another process is {purpose} in {folder}; wait for it or choose another folder"
                ) from error
            log.info("waiting for another process that works in %s", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _temporary_file(path: Path) -> IO[bytes]:
    """Return a new file beside `path`, locked so that `_remove_leftovers` knows that its writer is alive."""
    while True:
        file = path.with_name(f".{path.name}.{uuid4().hex}.partial").open("xb")
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another process took it for a leftover before it was locked


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files in `folder` that no process holds a lock on."""
    for leftover in folder.glob(f".*.{'[0-9a-f]' * 32}.partial"):
        with suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()
