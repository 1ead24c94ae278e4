"""A split of a data set as one uint8 array on disk.

`open_split` decodes DATASET_DIR/NAME/{train,val,test}/CLASS/* once, into .cache/NAME/SPLIT_CxHxW.npy with a .json file
beside it, and maps that array into memory.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from utils.errors import UserError
from utils.files import parsed_json, replace_file
from utils.images import ImageShape, Listing, decode_all, list_classes
from utils.names import find_dataset, missing_dataset

log = logging.getLogger(__name__)

SPLITS = ("train", "val", "test")
IS_FIRST = os.environ.get("LOCAL_RANK", "0") == "0"  # of a run's processes on this machine; it checks what all read
FORMAT = 2  # raise it when the same files would give other bytes
Cached = tuple[np.ndarray, dict[str, Any]]  # images (N, H, W, C) and the JSON file, see `_build`


@dataclass
class Split:
    """A split holds its images class by class; class k is images[class_starts[k] : class_starts[k + 1]]."""

    images: np.ndarray  # (N, H, W, C) uint8, a read-only memory map
    class_names: list[str]  # sorted
    class_starts: np.ndarray  # (classes + 1,) int64
    name: str  # the data set's folder
    split: str  # train, val or test
    mean: tuple[float, ...]  # per channel, over all pixels of the split, in [0, 1]
    std: tuple[float, ...]
    checksum: int  # of the pixels and of the classes' names and sizes

    @property
    def class_sizes(self) -> np.ndarray:
        return np.diff(self.class_starts)


def open_split(
    dataset_dir: Path,
    name: str,
    split: str,
    image_shape: ImageShape,
    skip_bad_images: bool = False,
    workers: int | None = None,
) -> Split:
    """Return the split at `image_shape` from its cache, which is built first if missing, damaged or out of date.

    Raises UserError for a missing data set or split, an empty class, an unreadable image, a full disk.
    """
    root = _split_folder(dataset_dir, name, split)
    listing = list_classes(root)
    # Beside the data sets; failing that (a read-only disk), in the user's own cache.
    own = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folders = [dataset_dir / ".cache" / root.parent.name, own / "fewshot" / root.parent.name]
    stem = f"{split}_{'x'.join(map(str, image_shape))}"
    for folder in folders:
        cached = _load(folder / stem, listing, image_shape)
        if cached and (skip_bad_images or not cached[1]["skipped"]):
            break
    else:
        cached = _build(_writable(folders) / stem, listing, image_shape, skip_bad_images, workers)
    images, meta = cached
    if meta["skipped"]:
        log.warning("going on without %s", _unreadable(root, meta["skipped"]))
    return Split(
        images=images,
        class_names=list(meta["class_sizes"]),
        class_starts=np.cumsum([0, *meta["class_sizes"].values()], dtype=np.int64),
        name=root.parent.name,
        split=split,
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
        checksum=zlib.crc32(json.dumps(meta["class_sizes"]).encode(), meta["checksum"]),
    )


def _split_folder(dataset_dir: Path, name: str, split: str) -> Path:
    """Return the folder of a split; raises UserError that says what to put where."""
    folder = find_dataset(dataset_dir, name)
    if not folder.is_dir():
        raise missing_dataset(dataset_dir, name)
    if not (folder / split).is_dir():
        there = [known for known in SPLITS if (folder / known).is_dir()]
        raise UserError(
            f"The data set {folder} has no split {split!r}; it has: {', '.join(there) or 'none'}. "
            f"Put the images at {folder / split}/CLASS/*.png (or .jpg), or make it again "
            f"with `python preprocess/preprocess.py --datasets {folder.name}`."
        )
    return folder / split


def _writable(folders: list[Path]) -> Path:
    for folder in folders:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    tried = " or ".join(map(str, folders))
    raise UserError(f"Cannot write the image cache to {tried}. Set XDG_CACHE_HOME to a writable folder.")


def _load(stem: Path, listing: Listing, image_shape: ImageShape) -> Cached | None:
    """Return the cache, or None if it is missing, damaged or made from other files."""
    channels, height, width = image_shape
    try:
        text = stem.with_suffix(".json").read_bytes()
        with stem.with_suffix(".npy").open("rb") as file:
            file.seek(-hashlib.sha256().digest_size, os.SEEK_END)
            if file.read() != hashlib.sha256(text).digest():
                return None
        meta = parsed_json(text)
        if (meta["format"], meta["fingerprint"]) != (FORMAT, listing.fingerprint):
            return None
        images = np.load(stem.with_suffix(".npy"), mmap_mode="r")
        fits = images.shape == (sum(meta["class_sizes"].values()), height, width, channels) and images.dtype == np.uint8
        place = stem.with_suffix(".npy"), images.offset, images.nbytes, stem.with_suffix(".npy").stat().st_mtime_ns
        if not fits or (IS_FIRST and _checksum(*place) != meta["checksum"]):
            log.warning("the image cache %s is damaged and is built anew", stem.with_suffix(".npy"))
            return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # or its description is of another kind
        return None
    return images, meta


@cache
def _checksum(file_name: Path, offset: int, left: int, written: int) -> int:
    """Return the CRC-32 of the pixels in a cache's file as it was `written`, which is read once in a process.

    It is read in pieces: a map would count as this process's memory.
    """
    checksum = 0
    with file_name.open("rb") as file:
        file.seek(offset)
        while piece := file.read(min(left, 2**20)):
            checksum, left = zlib.crc32(piece, checksum), left - len(piece)
    return checksum


def _build(stem: Path, listing: Listing, image_shape: ImageShape, skip_bad_images: bool, workers: int | None) -> Cached:
    """Write the array, then its metadata, and return both.

    The metadata hold the checksum of the pixels. The array's file ends with the hash of the metadata; so a pair left
    by two builders that saw different files is noticed. Builders that saw the same files write the same bytes.
    """
    needed, free = len(listing.files) * math.prod(image_shape), shutil.disk_usage(stem.parent).free
    if free < needed:
        raise UserError(
            f"Disk full: the image cache in {stem.parent} takes {needed / 1e6:,.2f} MB, of which only "
            f"{free / 1e6:,.2f} are free. Free some space and run again."
        )
    skipped: list[tuple[str, str]] = []
    counts, checksum = np.zeros((image_shape[0], 256), np.int64), 0
    with replace_file(stem.with_suffix(".npy")) as out:
        _write_header(out, len(listing.files), image_shape)
        bar = tqdm(total=len(listing.files), desc=f"Reading {listing.root}", unit=" images", disable=None)
        with bar, closing(decode_all(listing, image_shape, workers)) as pieces:
            for piece in pieces:
                if piece.bad and not skip_bad_images:
                    raise UserError(f"{_unreadable(listing.root, piece.bad)}. Mend or remove what is named, or "
                                    "go on without unreadable images: --skip_bad_images true")  # fmt: skip
                out.write(data := piece.images.tobytes())
                checksum = zlib.crc32(data, checksum)
                counts += piece.counts
                skipped += piece.bad
                bar.update(len(piece.images) + len(piece.bad))
        sizes = Counter(listing.class_sizes) - Counter(file.split("/")[0] for file, _ in skipped)
        if empty := [name for name in listing.class_sizes if name not in sizes]:
            raise UserError(f"No image in the class folder {listing.root / empty[0]} can be read: remove it.")
        _write_header(out, sizes.total(), image_shape)
        values, total = np.arange(256) / 255, counts.sum(axis=1)
        mean = (counts * values).sum(axis=1) / total
        std = np.sqrt((counts * (values - mean[:, None]) ** 2).sum(axis=1) / total)
        meta = {
            "format": FORMAT, "fingerprint": listing.fingerprint, "class_sizes": sizes,
            "mean": mean.tolist(), "std": std.tolist(), "skipped": skipped, "checksum": checksum,
        }  # fmt: skip
        text = json.dumps(meta).encode()
        out.write(hashlib.sha256(text).digest())
        out.flush()
        images = np.load(out.name, mmap_mode="r")  # remains this builder's file, whoever renames last
    with replace_file(stem.with_suffix(".json")) as out:
        out.write(text)
    return images, meta


def _write_header(out: IO[bytes], images: int, image_shape: ImageShape) -> None:
    """Write the header of an .npy file to its start, then go to its end.

    numpy pads the header to one length for any number of images.
    """
    channels, height, width = image_shape
    shape = (images, height, width, channels)
    out.seek(0)
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    out.seek(0, os.SEEK_END)


def _unreadable(root: Path, bad: Sequence[Sequence[str]]) -> str:
    named = "; ".join(f"{root / file} ({reason})" for file, reason in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"{len(bad)} unreadable image{'s' if len(bad) > 1 else ''}: {named}{more}"
