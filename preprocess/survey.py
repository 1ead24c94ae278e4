"""This module measures the pictures of a data set, in one pass over its files, and finds those that are in it twice.

About 400 bytes are kept of a picture: 0.3 GB for tieredImageNet's 780,000. Every picture of a split is compared with
every one of the other splits, 0.2 billion pairs per second on one core: 5 s for CIFAR-FS, about 15 minutes for those.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from utils.errors import UserError
from utils.images import Listing, in_processes, open_image, plain_image

THUMBNAIL = 16  # pixels to a side
ALIKE = 0.99  # correlation of two thumbnails; in CIFAR-FS every pair above it shows one photo, stored differently
PIECE = 64  # files that a process measures at a time
BLOCK = 4096  # thumbnails compared with as many others at a time
POWERS = np.arange(256)[:, None] ** [0, 1, 2]  # of each pixel value: (256, 3)

# What is kept of a picture: how it is stored, such as "JPEG RGB"; width and height of the upright picture; the sums of
# the powers 0, 1 and 2 of each channel's values; a number that is equal for equal upright pixels of equal size; 16x16
# grey pixels.
MEASURED = np.dtype(
    [("kind", "U16"), ("size", np.int32, 2), ("sums", np.int64, (3, 3)), ("digest", np.uint64),
     ("thumbnail", np.uint8, THUMBNAIL**2)]
)  # fmt: skip


class Pictures(NamedTuple):
    """These are the readable pictures of a split or of a part of one."""

    files: list[str]  # CLASS/FILE
    measured: np.ndarray  # (N,) of MEASURED
    bad: list[tuple[str, str]]  # (file, reason) of the unreadable ones

    def mean_and_std(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (3,) and (3,) in [0, 1], over all pixels at the pictures' own sizes."""
        count, total, squares = self.measured["sums"].sum(axis=0).T
        mean = total / count
        return mean / 255, np.sqrt(np.maximum(squares / count - mean**2, 0)) / 255


# --- measuring ---------------------------------------------------------------------------------------------


def survey(listing: Listing, workers: int | None = None) -> Pictures:
    """Measure every picture of the listing. UserError where not one can be read."""
    files, measured, bad = list[str](), list[np.ndarray](), list[tuple[str, str]]()
    with tqdm(total=len(listing.files), desc=f"Reading {listing.root}", unit=" images", disable=None) as bar:
        for piece in in_processes(partial(_measure, listing.root), listing, PIECE, workers):
            files += piece.files
            measured.append(piece.measured)
            bad += piece.bad
            bar.update(len(piece.files) + len(piece.bad))
    if not files:
        raise UserError(f"None of the {len(bad)} images in {listing.root} can be read: {bad[0][1]}")
    return Pictures(files, np.concatenate(measured), bad)


def _measure(root: Path, files: list[str]) -> Pictures:
    found = Pictures([], np.empty(len(files), MEASURED), [])
    for file in files:
        try:
            with open_image(root / file) as opened:
                kind, image = f"{opened.format} {opened.mode}", plain_image(opened)
        except MemoryError:  # says nothing about the file
            raise
        except Exception as error:  # Pillow's readers raise nearly any type on a damaged file
            found.bad.append((file, f"{type(error).__name__}: {error}"))
            continue
        digest = hashlib.blake2b(image.tobytes(), digest_size=8, salt="{}x{}".format(*image.size).encode()).digest()
        sums = np.reshape(image.histogram(), (3, 256)) @ POWERS
        grey = image.convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
        number = int.from_bytes(digest, "little")
        found.measured[len(found.files)] = kind, image.size, sums, number, np.asarray(grey).ravel()
        found.files.append(file)
    return found._replace(measured=found.measured[: len(found.files)])


# --- what is there twice -----------------------------------------------------------------------------------


def identical(splits: Mapping[str, Pictures]) -> list[list[str]]:
    """Return groups of pictures with the same pixels, as SPLIT/CLASS/FILE, in the order of their first members."""
    paths = [f"{split}/{file}" for split, pictures in splits.items() for file in pictures.files]
    digests = np.concatenate([pictures.measured["digest"] for pictures in splits.values()])
    _, group_of, sizes = np.unique(digests, return_inverse=True, return_counts=True)
    groups: dict[int, list[str]] = {}
    for index in np.flatnonzero(sizes[group_of] > 1):
        groups.setdefault(int(group_of[index]), []).append(paths[index])
    return list(groups.values())


def count_pairs(groups: Sequence[Sequence[str]]) -> tuple[int, int, int]:
    """Return how many pairs in the groups are in one class, in two classes of a split, and in two splits."""

    def pairs(depth: int) -> int:
        """Return the number of pairs that have the first `depth` parts of their paths in common."""
        counts = (Counter(tuple(path.split("/")[:depth]) for path in group) for group in groups)
        return sum(math.comb(count, 2) for of_group in counts for count in of_group.values())

    in_classes, in_splits, everywhere = pairs(2), pairs(1), pairs(0)
    return in_classes, in_splits - in_classes, everywhere - in_splits


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
    pairs = combinations(splits.items(), 2)
    blocks = [(one, other, top) for one, other in pairs for top in range(0, len(one[1].files), BLOCK)]
    for (split, pictures), (other_split, others), top in tqdm(blocks, desc="Comparing splits", disable=None):
        rows = pictures.measured[top : top + BLOCK]
        standard = standardised(rows["thumbnail"])
        for start in range(0, len(others.files), BLOCK):  # block by block: memory does not grow with them
            columns = others.measured[start : start + BLOCK]
            correlation = standard @ standardised(columns["thumbnail"]).T
            i, j = np.nonzero(correlation >= ALIKE)
            differ = rows["digest"][i] != columns["digest"][j]
            i, j = i[differ], j[differ]
            found += len(i)
            for at in np.argsort(-correlation[i, j])[:shown]:
                paths = f"{split}/{pictures.files[top + i[at]]}", f"{other_split}/{others.files[start + j[at]]}"
                best.append(NearPair(float(correlation[i[at], j[at]]), *paths))
            best = sorted(best, key=lambda pair: -pair.correlation)[:shown]
    return found, best


def standardised(thumbnails: np.ndarray) -> np.ndarray:
    """Return (N, 256) float32 of mean 0 and length 1: a scalar product is a correlation. 0 for a single colour."""
    centred = thumbnails - thumbnails.mean(axis=1, keepdims=True, dtype=np.float32)
    return centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
