"""Archives that came from elsewhere are read here: zip and tar, undamaged, with names that stay inside and sane sizes.

Nothing is unpacked here: members come out one by one as (name, content), so memory stays flat.
"""

import bz2
import gzip
import lzma
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Self

from utils.errors import UserError
from utils.names import leads_out

MAX_MEMBERS = 2_000_000  # tieredImageNet has 779,165 images
MAX_MEMBER_BYTES = 2**26  # ImageNet's largest image takes 16 MB
MAX_RATIO = 100  # of unpacked to packed size; images are packed already, pixels shrink to a half
FREE_BYTES = 2**26  # below that, a ratio does no harm
MAX_HEADER_BYTES = 2**20  # of a tar member's long name or extended header, which tarfile reads in one go

ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")  # a member; the end of one without members
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile unpacks pieces of the others to any size
COMPRESSED: dict[bytes, Callable[[BinaryIO], Any]] = {  # first bytes -> file that decompresses
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
File = tuple[str, int, Callable[[], Any]]  # name, size, what opens it


def members(
    path: Path, origin: str, wanted: Callable[[str], bool], max_bytes: int = MAX_MEMBER_BYTES
) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of each file in the zip or tar at `path` whose name is `wanted`, in the archive's order.

    A tar may be compressed, whatever its suffix says. UserError for a missing or damaged archive, one that
    unpacks to far more than it takes, one that holds anything but files and folders with names that stay inside,
    and a wanted member above `max_bytes`. `origin` says what to fetch instead.
    """
    with _explained(path, origin):
        is_zip = _first_bytes(path).startswith(ZIP_STARTS)
        for name, size, opener in _zip_files(path, origin) if is_zip else _tar_files(path):
            if wanted(name):
                if size > max_bytes:
                    what = f"{name!r} in {path} unpacks to {size / 1e6:,.0f} MB"
                    raise UserError(f"{what}, more than it can need: not unpacked")
                with opener() as file:
                    yield name, file.read(size)


@contextmanager
def open_zip(path: Path, origin: str) -> Iterator[zipfile.ZipFile]:
    """Open the zip at `path`, all members checked as in `members` but for their size; `origin` as there.

    UserError also when damage shows only while the block reads the archive. zipfile unpacks up to 2 GB of a member,
    whatever size it declares, unless the reader says how many bytes it wants.
    """
    with _explained(path, origin), zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        _check_unpacked(sum(info.file_size for info in infos), path)
        for number, info in enumerate(infos, start=1):
            if not info.filename:
                raise zipfile.BadZipFile("a member has no name")
            info.filename = info.filename.replace("\\", "/")  # as some programs write them
            kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the zip was not made on Unix
            _check_member(number, info.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR), path)
            if info.flag_bits & 1:
                raise UserError(f"{path} is encrypted: unpack it with its password and pack it again without one")
            if info.compress_type not in ZIP_METHODS:
                method = zipfile.compressor_names.get(info.compress_type, info.compress_type)  # type: ignore[attr-defined]
                what = f"{info.filename!r} in {path} is packed with {method}, of which too much could come out"
                raise UserError(f"{what}: not unpacked. Pack it again as an ordinary zip (deflate)")
        yield archive


@contextmanager
def _explained(path: Path, origin: str) -> Iterator[None]:
    """Raise UserError for what the archive modules raise. OSErrors of the system, a full disk say, pass."""
    if not path.is_file():
        raise UserError(f"{path} is missing. Fetch {origin} and put it there as it is (do not unpack it)")
    try:
        yield
    except UserError:
        raise
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError,
            RecursionError, ValueError, OSError) as error:  # fmt: skip
        if isinstance(error, OSError) and error.errno is not None:  # gzip and bz2 have no error type of their own
            raise
        is_page, what = is_web_page(path), f"is damaged or not an archive of its kind ({error})"
        what = "is a web page, not an archive: the download went wrong" if is_page else what
        raise UserError(f"{path} {what}. Fetch {origin} again") from error


def is_web_page(path: Path) -> bool:
    """Return whether a download ended in a page about it, as those of large files from Google Drive do."""
    return _first_bytes(path).lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml"))


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(64)


def _zip_files(path: Path, origin: str) -> Iterator[File]:
    with open_zip(path, origin) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield info.filename, info.file_size, partial(archive.open, info)


def _tar_files(path: Path) -> Iterator[File]:
    """Yield the files in one pass, which is all that a compressed tar of gigabytes allows."""
    first = _first_bytes(path)
    opener = next((opener for magic, opener in COMPRESSED.items() if first.startswith(magic)), nullcontext)
    with path.open("rb") as file, opener(file) as unpacked:
        stream: Any = _Limited(unpacked, path)
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_TarHeader, bufsize=2**16) as archive:
            for number, info in enumerate(iter(archive.next, None), start=1):
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them all: 1 GB for tieredImageNet
                _check_member(number, info.name, (info.isreg() or info.isdir()) and not info.issparse(), path)
                if info.isreg():
                    yield info.name, info.size, partial(archive.extractfile, info)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it is cut off: a tar ends with two empty blocks")


class _Limited:
    """This stream ends in a UserError when far more came out of it than the archive takes on disk."""

    def __init__(self, stream: Any, path: Path) -> None:
        self.stream, self.path, self.size = stream, path, 0

    def read(self, size: int) -> bytes:
        data: bytes = self.stream.read(size)
        self.size += len(data)
        _check_unpacked(self.size, self.path)
        return data


class _TarHeader(tarfile.TarInfo):
    """A damaged or oversized header of this class is an error; tarfile's own takes a damaged one for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            info = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the regular end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} in the middle") from error
        if info.type == tarfile.GNUTYPE_SPARSE or (not info.isreg() and info.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header of type {info.type!r} and {info.size} bytes")
        return info


def _check_member(number: int, name: str, is_plain_file: bool, path: Path) -> None:
    """Raise UserError for too many members, a name that leads out and anything but a file or a folder.

    tarfile's own data_filter is for unpacking: it mends absolute names and allows links within the archive.
    """
    if number > MAX_MEMBERS:
        raise UserError(f"{path} has more than {MAX_MEMBERS} members, more than any data set: not unpacked")
    if leads_out(name):
        raise UserError(f"{path} has a member named {name!r}, which leads out of the data set's folder: not unpacked")
    if not is_plain_file:
        raise UserError(f"{name!r} in {path} is a link or a device, not a file: not unpacked")


def _check_unpacked(size: int, path: Path) -> None:
    packed = path.stat().st_size
    if size > max(MAX_RATIO * packed, FREE_BYTES):
        what = f"{path} takes {packed / 1e6:,.1f} MB but unpacks to {size / 1e6:,.0f} MB or more"
        raise UserError(f"{what}, as images never do: it is built to fill your disk and was not unpacked")
