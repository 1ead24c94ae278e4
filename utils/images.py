"""Class folders of image files: list them, and decode them in parallel to uint8 arrays of one shape.

Imports neither torch nor the rest of the program, so that the decoding processes stay light.
"""

import ctypes
import functools
import hashlib
import math
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps

from utils.errors import UserError
from utils.progress import stop_requests

Result = TypeVar("Result")
ImageShape = tuple[int, int, int]  # (C, H, W), C = 3 for RGB, 1 for grey

# What is read; JPEG includes MPO. Pillow knows more kinds, one of which (EPS) it hands to another program to run.
IMAGE_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")

# Files that live beside images. Any other file must decode: a misspelt suffix is an error, not a lost image.
NOT_IMAGES = {
    ".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".html", ".log", ".ini", ".db", ".lnk",
    ".mat", ".npy", ".npz", ".pkl", ".pickle", ".h5", ".zip", ".tar", ".gz", ".tmp", ".part", ".lock", ".md5",
}  # fmt: skip


class Listing(NamedTuple):
    """A listing names what a folder of class folders holds."""

    root: Path
    class_sizes: dict[str, int]  # classes sorted by name
    files: list[str]  # CLASS/FILE, class after class, sorted by name within each
    fingerprint: str  # changes with any file's name, size or modification time


def list_classes(root: Path) -> Listing:
    """Walk root/CLASS/FILE, opening no file. Raises UserError for no classes or a class without images."""
    class_sizes, files, digest = {}, [], hashlib.sha256()
    for folder in _children(root):
        if not (folder.is_dir() or _is_broken_link(folder)):
            continue
        images = [entry for entry in _children(root / folder.name) if _may_be_image(entry)]
        if not images:
            problem = f"The class folder {root / folder.name} holds no images. They must lie directly in it: "
            inner = [entry.name for entry in _children(root / folder.name) if entry.is_dir()]
            cure = f"is {root / folder.name} the folder of the class folders ({inner[0]}, ...)?" if inner else ""
            raise UserError(problem + (cure or "add some or remove the folder."))
        class_sizes[folder.name] = len(images)
        for image in images:
            stat = image.stat(follow_symlinks=not _is_broken_link(image))
            files.append(f"{folder.name}/{image.name}")
            digest.update(os.fsencode(f"{files[-1]}\0{stat.st_size}\0{stat.st_mtime_ns}\0"))
    if not files:
        raise UserError(f"{root} holds no class folders. Put its images at {root}/CLASS/*.png (or .jpg).")
    return Listing(root, class_sizes, files, digest.hexdigest())


def list_images(folder: Path) -> list[Path]:
    """Return what may be images in a folder and its subfolders, in order of their names; none is opened."""
    found: list[Path] = []
    for entry in _children(folder):
        if entry.is_dir(follow_symlinks=False):
            found += list_images(folder / entry.name)
        elif _may_be_image(entry):
            found.append(folder / entry.name)
    return found


def _children(folder: Path) -> list[os.DirEntry[str]]:
    """Return what is visible in a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            visible = [entry for entry in entries if not entry.name.startswith((".", "__MACOSX", "Icon\r"))]
    except OSError as error:
        raise UserError(f"Cannot list the folder {folder}: {error.strerror}.") from error
    return sorted(visible, key=lambda entry: entry.name)


def _is_broken_link(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a link to nothing; the listing keeps it, so that an error names it later."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def _may_be_image(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a regular file that may be an image; opening a named pipe would block for ever."""
    is_file = entry.is_file() or _is_broken_link(entry)
    return is_file and os.path.splitext(entry.name)[1].lower() not in NOT_IMAGES


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the files that are read, such as ".png", in lower case."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in IMAGE_FORMATS)


def open_image(source: Path | IO[bytes]) -> Image.Image:
    """Open an image of IMAGE_FORMATS; raises ValueError for one of more pixels than Pillow finds sane."""
    image = Image.open(source, formats=IMAGE_FORMATS)
    if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
        image.close()
        raise ValueError(f"{image.width}x{image.height} pixels, more than the {Image.MAX_IMAGE_PIXELS:,} that are read")
    return image


def plain_image(image: Image.Image, channels: int = 3) -> Image.Image:
    """Return the image upright, 8 bits per channel, transparency on white; grey for one channel, else RGB."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("pixels are floating-point, of unknown range; save it with 8 bits per channel")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("pixels have more than 16 bits; save it with 8 bits per channel")
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "LAB":  # Pillow makes RGB of it, but no grey
        image = image.convert("RGB")
    return image.convert("L" if channels == 1 else "RGB")


def decode_image(path: Path, shape: ImageShape) -> np.ndarray:
    """Return the plain image as (H, W, C) uint8; raises whatever Pillow does on a damaged file."""
    with open_image(path) as image:
        return fitted_image(image, shape)


def fitted_image(image: Image.Image, shape: ImageShape) -> np.ndarray:
    """Return the plain image, resized to `shape`, as (H, W, C) uint8."""
    channels, height, width = shape
    plain = plain_image(image, channels)
    if plain.size != (width, height):
        plain = plain.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(plain).reshape(height, width, channels)


class Decoded(NamedTuple):
    images: np.ndarray  # (readable files, H, W, C) uint8
    counts: np.ndarray  # (C, 256) int64: how often each pixel value occurs
    bad: list[tuple[str, str]]  # (file, reason) of the unreadable ones


def decode_all(listing: Listing, shape: ImageShape, workers: int | None = None) -> Generator[Decoded, None, None]:
    """Yield all images in the listing's order, about 1 MiB at a time."""
    size = max(1, min(256, 2**20 // math.prod(shape)))
    yield from in_processes(functools.partial(_decode, listing.root, shape), listing, size, workers)


def usable_cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    work: Callable[[list[str]], Result], listing: Listing, size: int, workers: int | None = None
) -> Generator[Result, None, None]:
    """Yield the results, in order, of `work` on `size` files at a time; by default with a process per usable CPU.

    Only a few pieces per worker are under way at once, so memory stays flat however many images there are.
    """
    pieces = [listing.files[start : start + size] for start in range(0, len(listing.files), size)]
    workers = min(workers or usable_cpus(), len(pieces))
    if workers == 1 or "fork" not in multiprocessing.get_all_start_methods():
        yield from map(work, pieces)
        return
    # fork, as torch's DataLoader does: nothing is imported again, and workers touch neither torch nor CUDA
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("fork"), initializer=end_with, initargs=(os.getpid(),)
    )
    try:
        yield from in_order((pool.submit(work, piece) for piece in pieces), ahead=3 * workers)
    except BrokenProcessPool as error:
        raise UserError(
            f"A process that decoded images of {listing.root} was killed: memory ran out, or a damaged file crashed "
            "the decoder. Run again with more free memory; if it happens again, look for the file."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(submitted: Iterable[Future[Result]], ahead: int) -> Iterator[Result]:
    """Yield results as a pool's map does, but at most `ahead` pieces are under way or wait for a slow consumer.

    Ctrl-C takes effect between the calls of the pool: inside one it can leave a lock held that the pool waits for.
    """
    pending: deque[Future[Result]] = deque()
    rest = iter(submitted)
    with stop_requests(signal.SIGINT) as stop:
        while not stop:
            pending.extend(islice(rest, ahead + 1 - len(pending)))
            if not pending:
                return
            yield pending.popleft().result()
        raise KeyboardInterrupt


def _decode(root: Path, shape: ImageShape, files: list[str]) -> Decoded:
    channels, height, width = shape
    images = np.empty((len(files), height, width, channels), np.uint8)
    good, bad = 0, []
    for file in files:
        try:
            images[good] = decode_image(root / file, shape)
            good += 1
        except MemoryError:  # says nothing about the file
            raise
        except Exception as error:  # Pillow's readers raise nearly any type on a damaged file
            bad.append((file, f"{type(error).__name__}: {error}"))
    images = images[:good]
    counts = [np.bincount(images[..., channel].ravel(), minlength=256) for channel in range(channels)]
    return Decoded(images, np.stack(counts), bad)


def end_with(parent: int) -> None:
    """Have Linux kill this process when its parent is killed; it would otherwise go on, or wait for work for ever.

    To Linux, the parent is the thread that started this process.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1 = PR_SET_PDEATHSIG
        if os.getppid() != parent:  # killed before the line above took effect
            os._exit(1)
