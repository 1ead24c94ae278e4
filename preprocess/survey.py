"""What the pictures of a data set are like, from one pass over its files; pictures that are in it twice.

About 400 bytes are kept of a picture: 0.3 GB for tieredImageNet's 780,000. Every picture of a split is compared with
every one of the other splits, 0.2 billion pairs per second on one core: 5 s for CIFAR-FS, about 15 minutes for those.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from utils.errors import UserError
from utils.images import Listing, decode_image, in_processes, open_image

THUMBNAIL = 16  # pixels to a side
ALIKE = 0.99  # correlation of two thumbnails; in CIFAR-FS every pair above it shows one photo, stored differently
PIECE = 64  # files that a process measures at a time
BLOCK = 4096  # thumbnails compared with as many others at a time
SIDEWAYS = (5, 6, 7, 8)  # values of the EXIF orientation that swap width and height


class Pictures(NamedTuple):
    """The readable pictures of a split or of a part of one."""

    files: list[str]  # CLASS/FILE
    kinds: Counter[str]  # how the files are stored, such as "JPEG RGB"
    sizes: np.ndarray  # (N, 2) width and height of the upright picture
    digests: np.ndarray  # (N,) uint64: equal for equal upright pixels of equal size
    thumbnails: np.ndarray  # (N, 256) uint8, 16x16 grey
    counts: np.ndarray  # (3, 256) how often each channel has each value, at the pictures' own sizes
    bad: list[tuple[str, str]]  # (file, reason) of the unreadable ones

    @property
    def mean(self) -> np.ndarray:
        """(3,) in [0, 1], over all pixels."""
        return self.counts @ (np.arange(256) / 255) / self.counts.sum(axis=1)

    @property
    def std(self) -> np.ndarray:
        squares = self.counts @ (np.arange(256) / 255) ** 2 / self.counts.sum(axis=1)
        return np.sqrt(np.maximum(squares - self.mean**2, 0))


# --- measuring ---------------------------------------------------------------------------------------------


def survey(listing: Listing, workers: int | None = None) -> Pictures:
    """Measure every picture of the listing. UserError where not one can be read."""
    measured = []
    with tqdm(total=len(listing.files), desc=f"Reading {listing.root}", unit=" images", disable=None) as bar:
        for piece in in_processes(partial(measure_files, listing.root), listing, PIECE, workers):
            measured.append(piece)
            bar.update(len(piece.files) + len(piece.bad))
    pictures = _join(measured)
    if not pictures.files:
        raise UserError(f"None of the {len(pictures.bad)} images in {listing.root} can be read: {pictures.bad[0][1]}")
    return pictures


def measure_files(root: Path, files: list[str]) -> Pictures:
    bad: list[tuple[str, str]] = []
    measured = []
    for file in files:
        try:
            measured.append(_measure(root, file))
        except MemoryError:  # says nothing about the file
            raise
        except Exception as error:  # Pillow's readers raise nearly any type on a damaged file
            bad.append((file, f"{type(error).__name__}: {error}"))
    return _join([*measured, Pictures([], Counter(), *_no_arrays(), bad)])


def _no_arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.empty((0, 2), np.int32),
        np.empty(0, np.uint64),
        np.empty((0, THUMBNAIL**2), np.uint8),
        np.zeros((3, 256), np.int64),
    )


def _measure(root: Path, file: str) -> Pictures:
    with open_image(root / file) as image:
        width, height = image.size
        if image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS:
            width, height = height, width
        kind = f"{image.format} {image.mode}"
    pixels = decode_image(root / file, (3, height, width))
    digest = hashlib.blake2b(pixels.data, digest_size=8, salt=f"{width}x{height}".encode()).digest()
    grey = Image.fromarray(pixels).convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    return Pictures(
        files=[file],
        kinds=Counter([kind]),
        sizes=np.array([[width, height]], np.int32),
        digests=np.frombuffer(digest, np.uint64),
        thumbnails=np.asarray(grey).reshape(1, -1),
        counts=np.stack([np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)]),
        bad=[],
    )


def _join(parts: list[Pictures]) -> Pictures:
    return Pictures(
        files=[file for part in parts for file in part.files],
        kinds=sum((part.kinds for part in parts), Counter()),
        sizes=np.concatenate([part.sizes for part in parts]),
        digests=np.concatenate([part.digests for part in parts]),
        thumbnails=np.concatenate([part.thumbnails for part in parts]),
        counts=np.sum([part.counts for part in parts], axis=0),
        bad=[bad for part in parts for bad in part.bad],
    )


# --- what is there twice -----------------------------------------------------------------------------------


def identical(splits: Mapping[str, Pictures]) -> list[list[str]]:
    """Groups of two or more pictures with the same pixels, as SPLIT/CLASS/FILE, in the order of their first members."""
    paths = [f"{split}/{file}" for split, pictures in splits.items() for file in pictures.files]
    digests = np.concatenate([pictures.digests for pictures in splits.values()])
    _, group_of, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    groups: dict[int, list[str]] = {}
    for index in np.flatnonzero(sizes[group_of] > 1):
        groups.setdefault(int(group_of[index]), []).append(paths[index])
    return list(groups.values())


class Pairs(NamedTuple):
    """Numbers of pairs of identical pictures by what the two share."""

    one_class: int
    one_split: int  # of two classes
    across_splits: int


def count_pairs(groups: Iterable[Sequence[str]]) -> Pairs:
    one_class = one_split = across = 0
    for group in groups:
        of_class = _pairs(path.rpartition("/")[0] for path in group)
        of_split = _pairs(path.partition("/")[0] for path in group)
        one_class += of_class
        one_split += of_split - of_class
        across += math.comb(len(group), 2) - of_split
    return Pairs(one_class, one_split, across)


def _pairs(labels: Iterable[str]) -> int:
    """Pairs with the same label."""
    return sum(math.comb(count, 2) for count in Counter(labels).values())


class NearPair(NamedTuple):
    correlation: float
    one: str  # SPLIT/CLASS/FILE
    other: str


def near_duplicates(splits: Mapping[str, Pictures], shown: int) -> tuple[int, list[NearPair]]:
    """Pairs from two splits that are nearly but not quite identical: their number, and the `shown` most alike.

    Nearly: the 16x16 grey thumbnails correlate at 0.99 or more. Of copies of CIFAR images that were resized to 24 or
    84 pixels or stored as JPEG of quality 50, 99.8 % or more do, of those brightened by a fifth 89 %; one cropped by a
    pixel all around rarely does. Every pair is compared; a picture of a single colour is like no other.
    """
    found, best = 0, list[NearPair]()
    pairs = [(one, other) for one, other in combinations(splits, 2)]
    total = sum(len(splits[one].files) for one, _ in pairs)
    with tqdm(total=total, desc="Comparing splits", unit=" images", disable=None) as bar:
        for one, other in pairs:
            for rows, columns, correlations in _alike(splits[one], splits[other], bar):
                found += len(rows)
                for at in np.argsort(-correlations)[:shown]:
                    paths = f"{one}/{splits[one].files[rows[at]]}", f"{other}/{splits[other].files[columns[at]]}"
                    best.append(NearPair(float(correlations[at]), *paths))
                best = sorted(best, key=lambda pair: -pair.correlation)[:shown]
    return found, best


def _alike(one: Pictures, other: Pictures, bar: "tqdm[Any]") -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Indices into `one`, indices into `other` and correlations, block by block: memory does not grow with them."""
    for top in range(0, len(one.files), BLOCK):
        rows = slice(top, top + BLOCK)
        left = standardised(one.thumbnails[rows])
        for start in range(0, len(other.files), BLOCK):
            columns = slice(start, start + BLOCK)
            correlation = left @ standardised(other.thumbnails[columns]).T
            i, j = np.nonzero(correlation >= ALIKE)
            differ = one.digests[rows][i] != other.digests[columns][j]
            i, j = i[differ], j[differ]
            yield top + i, start + j, correlation[i, j]
        bar.update(len(left))


def standardised(thumbnails: np.ndarray) -> np.ndarray:
    """(N, 256) float32 with mean 0 and length 1, so that a scalar product is a correlation; 0 for a single colour."""
    centred = thumbnails - thumbnails.mean(axis=1, keepdims=True, dtype=np.float32)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
