"""Archives are fetched here, and only where `--download` is set.

Neither torchvision's downloader nor pooch resumes a broken transfer, and torchvision's goes on without encryption where
https fails; tieredImageNet takes gigabytes, so this is a short program of our own over urllib. A file is accepted when
its md5 is the expected one, which also finds a part that belongs to another file, as the header If-Range would.
"""

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from preprocess.archives import is_web_page
from preprocess.sources import DataSet, Source, md5_of, missing_files
from utils.errors import UserError
from utils.files import only_process, parsed_json
from utils.progress import progress_bar

log = logging.getLogger(__name__)
T = TypeVar("T")

FOLDER = ".downloads"  # in the folder of archives: what was fetched of each file so far
TIMEOUT = 30.0  # seconds without any data
PAUSES = (1.0, 5.0, 20.0)  # seconds before each further try
MAX_PAUSE = 300.0  # seconds; a server may ask for a pause
BUSY = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses after which the next try may succeed
CHUNK = 2**18  # bytes
RECORD = re.compile(r"(https?://[^/]+)/records/(\w+)/files/([^/?]+)")  # Zenodo's address of a file


class BrokenError(Exception):
    """The transfer broke off, but the next try may succeed; a server may ask for a `pause` in seconds before it."""

    def __init__(self, what: object, pause: float = 0) -> None:
        super().__init__(what)
        self.pause = pause


def fetch(data_set: DataSet, archives: Path) -> None:
    """Fetch into `archives` what is missing of the first source with addresses; where that fails, of the next one.

    Nothing is fetched where a source is complete, or where a folder or a dead link is in the place of a file.
    UserError, with all reasons, where every source fails.
    """
    lacks = [missing_files(source, archives) for source in data_set.sources]
    if not all(lacks) or any(os.path.lexists(path) for paths in lacks for path in paths):
        return
    reasons = []
    for source in (source for source in data_set.sources if source.addresses):
        try:
            for path in missing_files(source, archives):
                fetch_file(source, path)
            return
        except UserError as error:
            reasons.append(str(error))
    if reasons:
        raise UserError(f"{data_set.name} could not be fetched.\n  " + "\n  ".join(reasons))


def fetch_file(source: Source, target: Path) -> None:
    """Fetch the file at `target` from the first of its addresses that has it. UserError, with all reasons, if none has.

    Processes that fetch into one folder take turns. Whatever interrupts this, `target` is absent or whole, and the
    next call continues the transfer.
    """
    part = target.parent / FOLDER / f"{target.name}.part"
    reasons = []
    with _writing(part), only_process(part.parent):
        for address in source.addresses[target.name] if not target.exists() else ():
            try:
                known = source.md5.get(target.name)
                size, md5 = (None, known) if known else _listed(address)
                _fetch_part(address, part, size, md5)
                os.replace(part, target)
                log.info("%s is fetched and has the expected checksum", target)
                return
            except UserError as error:
                reasons.append(str(error))
    if reasons:
        raise UserError("\n  ".join(reasons))


def _listed(address: str) -> tuple[int, str]:
    """Return size and md5 of the file at a Zenodo address, as the list of its record states them."""
    host, record, name = RECORD.fullmatch(address).groups()  # type: ignore[union-attr]  # without it a md5 is declared
    listing = f"{host}/api/records/{record}"

    def read() -> bytes:
        with _reading(), _open(listing) as response:
            content: bytes = response.read()
            return content

    content = _persist(listing, read)
    try:
        files = {file["key"]: file for file in parsed_json(content)["files"]}
        md5 = re.fullmatch("md5:([0-9a-f]{32})", files[name]["checksum"])[1]  # type: ignore[index]
        return int(files[name]["size"]), md5
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{listing} states no size and md5 of {name} ({error!r})") from error


def _fetch_part(address: str, part: Path, size: int | None, md5: str | None) -> None:
    """Bring `part` to its end and check it. UserError where the content is not the expected one; it is removed then."""
    is_resumed = part.exists()
    _persist(address, partial(_transfer, address, part, size), part)
    if (found := md5_of(part)) == md5:
        return
    what = "is a web page" if is_web_page(part) else f"has the md5 {found}, not {md5}"
    part.unlink()
    if not is_resumed:
        raise UserError(f"what {address} sent {what}: it is not the published file and was removed")
    log.warning("what was kept of %s does not fit; it is fetched from the beginning", part.stem)
    _fetch_part(address, part, size, md5)


def _persist(address: str, work: Callable[[], T], part: Path | None = None) -> T:
    """Return work(), called again after a pause where it breaks off; `part` that has grown starts the count anew."""
    failures, furthest = 0, 0
    while True:
        try:
            return work()
        except BrokenError as error:
            reached = part.stat().st_size if part and part.exists() else 0
            failures, furthest = (0 if reached > furthest else failures), max(reached, furthest)
            if failures == len(PAUSES):
                kept = f"; the first {reached / 1e6:,.1f} MB are kept in {part}" if reached else ""
                cure = "Run the same command again later to continue, or fetch the file by hand"
                raise UserError(f"{address}: {error}, after {failures + 1} tries{kept}. {cure}") from error
            pause = min(max(PAUSES[failures], error.pause), MAX_PAUSE)
            failures += 1
            log.warning("%s: %s; the next try is in %.0f s", address, error, pause)
            time.sleep(pause)


def _transfer(address: str, part: Path, size: int | None) -> None:
    """Append the rest of the file at `address` to `part`; its size in bytes is checked where it is known."""
    start = part.stat().st_size if part.exists() else 0
    with _reading(), _open(address, start) as response:
        if response.status == 416:
            return  # nothing is beyond `start`: the part is whole or of another file, which its checksum shows
        if "html" in response.headers.get_content_subtype():
            raise UserError(
                f"{address} sent a web page, not a file. Look at it in a browser, or fetch the file by hand"
            )
        if response.status != 206:
            start = 0  # the server sends all of it
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise UserError(f"{address} sent other bytes than those from {start} on")
        total = size if response.length is None else start + response.length
        if size not in (None, total):
            raise UserError(f"{address} has {total:,} bytes, not {size:,}: it is not the published file")
        free = shutil.disk_usage(part.parent).free
        if total is not None and free < total - start:
            raise UserError(
                f"{part.stem} takes {(total - start) / 1e6:,.1f} MB more, of which {free / 1e6:,.1f} MB are free in "
                f"{part.parent}. Free some space or choose another folder with --dataset_dir"
            )
        from_where = f"{response.url}, from {start / 1e6:,.1f} MB on" if start else response.url
        log.info("fetching %s%s from %s", part.stem, f", {total / 1e6:,.1f} MB," if total else "", from_where)
        with _writing(part), part.open("ab") as file, progress_bar(total, start, part.stem, unit="B") as bar:
            file.truncate(start)
            at = start
            while (total is None or at <= total) and (chunk := _read(response)):
                file.write(chunk)
                at += len(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
        if total is not None and at < total:
            raise BrokenError(f"the connection ended after {at / 1e6:,.1f} of {total / 1e6:,.1f} MB")


class _StaysEncrypted(HTTPRedirectHandler):
    """This handler follows a redirect to any host, but from https to https only."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        if req.type == "https" and not newurl.lower().startswith("https:"):
            raise UserError(f"{req.full_url} leads to {newurl}, where nothing is encrypted: not followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(address: str, start: int = 0) -> Any:
    """Return the response to a request for the bytes from `start` on. UserError for a status that will not change."""
    headers = {"User-Agent": "Mozilla/5.0 (fewshot preprocess)"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        return build_opener(_StaysEncrypted).open(Request(address, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:
            return error
        if error.code not in BUSY:
            raise UserError(f"{error.url} answers {error.code} {error.reason}") from error
        wanted = error.headers.get("Retry-After", "")
        what = f"the server answers {error.code} {error.reason}"
        raise BrokenError(what, float(wanted) if wanted.isdecimal() else 0) from error


def _read(response: HTTPResponse) -> bytes:
    """Return what has arrived, at most CHUNK bytes; empty at the end."""
    with _reading():
        return response.read1(CHUNK)


@contextmanager
def _reading() -> Iterator[None]:
    """Raise BrokenError for what the network does."""
    try:
        yield
    except TimeoutError as error:
        raise BrokenError(f"no data came for {TIMEOUT:.0f} s") from error
    except (OSError, HTTPException) as error:
        raise BrokenError(getattr(error, "reason", "") or repr(error)) from error


@contextmanager
def _writing(part: Path) -> Iterator[None]:
    """Raise UserError for what the disk does; the part stays."""
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {part}: {error}. Free some space or choose another folder with --dataset_dir, then run the "
            "same command again: it continues where this one ended"
        ) from error
