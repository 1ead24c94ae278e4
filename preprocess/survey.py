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
from PIL import Image
from tqdm import tqdm

from utils.errors import UserError
from utils.images import Listing, in_processes, open_image, plain_image

THUMBNAIL = 16  # pixels to a side
ALIKE = 0.99  # correlation of two thumbnails; in CIFAR-FS every pair above it shows one photo, stored differently
PIECE = 64  # files that a process measures at a time
BLOCK = 4096  # thumbnails compared with as many others at a time


# What is kept of a picture: width and height of the upright picture; a number that is equal for equal upright pixels of
# equal size; 16x16 grey pixels.
MEASURED = np.dtype([("size", np.int32, 2), ("digest", np.uint64), ("thumbnail", np.uint8, THUMBNAIL**2)])


class Pictures(NamedTuple):
    """These are the readable pictures of a split or of a part of one."""

    files: list[str]  # CLASS/FILE
    kinds: Counter[str]  # how the files are stored, such as "JPEG RGB"
    measured: np.ndarray  # (N,) of MEASURED
    counts: np.ndarray  # (3, 256) how often each channel has each value, at the pictures' own sizes
    bad: list[tuple[str, str]]  # (file, reason) of the unreadable ones

    @property
    def sizes(self) -> np.ndarray:
        return self.measured["size"]

    @property
    def digests(self) -> np.ndarray:
        return self.measured["digest"]

    @property
    def thumbnails(self) -> np.ndarray:
        return self.measured["thumbnail"]

    @property
    def mean(self) -> np.ndarray:
        """Return (3,) in [0, 1], over all pixels."""
        return self.counts @ (np.arange(256) / 255) / self.counts.sum(axis=1)

    @property
    def std(self) -> np.ndarray:
        squares = self.counts @ (np.arange(256) / 255) ** 2 / self.counts.sum(axis=1)
        return np.sqrt(np.maximum(squares - self.mean**2, 0))


# --- measuring ---------------------------------------------------------------------------------------------


def survey(listing: Listing, workers: int | None = None) -> Pictures:
    """Measure every picture of the listing. UserError where not one can be read."""
    files, kinds, measured, bad = list[str](), Counter[str](), list[np.ndarray](), list[tuple[str, str]]()
    counts = np.zeros((3, 256), np.int64)
    with tqdm(total=len(listing.files), desc=f"Reading {listing.root}", unit=" images", disable=None) as bar:
        for piece in in_processes(partial(measure_files, listing.root), listing, PIECE, workers):
            files += piece.files
            kinds += piece.kinds
            measured.append(piece.measured)
            counts += piece.counts
            bad += piece.bad
            bar.update(len(piece.files) + len(piece.bad))
    if not files:
        raise UserError(f"None of the {len(bad)} images in {listing.root} can be read: {bad[0][1]}")
    return Pictures(files, kinds, np.concatenate(measured), counts, bad)


def measure_files(root: Path, files: list[str]) -> Pictures:
    good, kinds, bad = list[str](), Counter[str](), list[tuple[str, str]]()
    measured, counts = np.empty(len(files), MEASURED), np.zeros((3, 256), np.int64)
    for file in files:
        try:
            kind, pixels = _read(root / file)
        except MemoryError:  # says nothing about the file
            raise
        except Exception as error:  # Pillow's readers raise nearly any type on a damaged file
            bad.append((file, f"{type(error).__name__}: {error}"))
            continue
        height, width, _ = pixels.shape
        digest = hashlib.blake2b(pixels.data, digest_size=8, salt=f"{width}x{height}".encode()).digest()
        grey = Image.fromarray(pixels).convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
        measured[len(good)] = (width, height), int.from_bytes(digest, "little"), np.asarray(grey).ravel()
        counts += [np.bincount(pixels[..., channel].ravel(), minlength=256) for channel in range(3)]
        kinds[kind] += 1
        good.append(file)
    return Pictures(good, kinds, measured[: len(good)], counts, bad)


def _read(path: Path) -> tuple[str, np.ndarray]:
    """Return how the file is stored and the (H, W, 3) uint8 pixels of the upright picture."""
    with open_image(path) as image:
        kind = f"{image.format} {image.mode}"
        return kind, np.ascontiguousarray(plain_image(image))


# --- what is there twice -----------------------------------------------------------------------------------


def identical(splits: Mapping[str, Pictures]) -> list[list[str]]:
    """Return groups of pictures with the same pixels, as SPLIT/CLASS/FILE, in the order of their first members."""
    paths = [f"{split}/{file}" for split, pictures in splits.items() for file in pictures.files]
    digests = np.concatenate([pictures.digests for pictures in splits.values()])
    _, group_of, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    groups: dict[int, list[str]] = {}
    for index in np.flatnonzero(sizes[group_of] > 1):
        groups.setdefault(int(group_of[index]), []).append(paths[index])
    return list(groups.values())


def count_pairs(groups: Iterable[Sequence[str]]) -> tuple[int, int, int]:
    """Return how many pairs in the groups are in one class, in two classes of a split, and in two splits."""
    everywhere = in_splits = in_classes = 0
    for group in groups:
        everywhere += math.comb(len(group), 2)
        in_splits += _pairs(path.partition("/")[0] for path in group)
        in_classes += _pairs(path.rpartition("/")[0] for path in group)
    return in_classes, in_splits - in_classes, everywhere - in_splits


def _pairs(labels: Iterable[str]) -> int:
    """Return the number of pairs with the same label."""
    return sum(math.comb(count, 2) for count in Counter(labels).values())


class NearPair(NamedTuple):
    correlation: float
    one: str  # SPLIT/CLASS/FILE
    other: str


def near_duplicates(splits: Mapping[str, Pictures], shown: int) -> tuple[int, list[NearPair]]:
    """Return the number of pairs from two splits that are nearly but not quite identical, and the `shown` most alike.

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
    """Yield indices into `one`, into `other` and correlations, block by block: memory does not grow with them."""
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
    """Return (N, 256) float32 of mean 0 and length 1: a scalar product is a correlation. 0 for a single colour."""
    centred = thumbnails - thumbnails.mean(axis=1, keepdims=True, dtype=np.float32)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
