"""Reading archives that came from elsewhere: present, undamaged, and with names that stay inside."""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath

from utils.errors import UserError


@contextmanager
def open_zip(path: Path, origin: str) -> Iterator[zipfile.ZipFile]:
    """The archive at `path`; `origin` says what to fetch where it is missing.

    UserError for a missing or damaged archive (also when the damage shows only while it is read), and for a
    member whose name leads out of the folder it is unpacked to.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing. Fetch {origin} and put it there as it is (do not unpack it)")
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                refuse_unsafe(name, path)
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise UserError(f"{path} is damaged or not a zip archive ({error}). Fetch {origin} again") from error


def refuse_unsafe(name: str, archive: Path) -> None:
    """UserError for an absolute member name and for one with '..'."""
    path = PureWindowsPath(name)  # it knows drives and backslashes too
    if path.drive or path.root or ".." in path.parts:
        raise UserError(
            f"{archive} has a member named {name!r}, which leads out of the data set's folder: not unpacked"
        )
