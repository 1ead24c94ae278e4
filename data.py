"""A split of a data set as one uint8 array on disk, and the endless sequence of tasks drawn from it.

`open_split` decodes DATASET_DIR/NAME/{train,val,test}/CLASS/* once, into a cache that is memory-mapped.
`sample_task` draws one task: a pure function of its seed, equal to the official sampler's.
`Episodes.batch` gathers the images of some tasks by index and scales them as one tensor.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from augmentation import Draws, augment, draw
from utils.errors import UserError
from utils.images import ImageShape, Listing, decode_all, list_classes
from utils.names import find_dataset, missing_dataset

log = logging.getLogger(__name__)

SEED_OFFSET = {"train": 0, "val": 2**30, "test": 2**31}
CACHE_FORMAT = 1  # raise it when the same files would give other bytes


@dataclass
class Split:
    """The images of one split; class k is images[class_starts[k] : class_starts[k + 1]]."""

    images: np.ndarray  # (N, H, W, C) uint8, a read-only memory map
    class_names: list[str]  # sorted
    class_starts: np.ndarray  # (classes + 1,) int64
    name: str  # the data set's folder
    split: str  # train, val or test
    mean: tuple[float, ...]  # per channel, over all pixels of the split, in [0, 1]
    std: tuple[float, ...]

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
    """The split at `image_shape`, from its cache, which is built first if missing, damaged or out of date.

    Raises UserError for a missing data set or split, an empty class, an unreadable image, a full disk.
    """
    root = _split_folder(dataset_dir, name, split)
    listing = list_classes(root)
    folders = _cache_folders(dataset_dir, root.parent.name)
    stem = f"{split}_{'x'.join(map(str, image_shape))}"
    for folder in folders:
        cached = _load(folder / stem, listing, image_shape)
        if cached and (skip_bad_images or not cached.meta["skipped"]):
            break
    else:
        cached = _build(_writable(folders) / stem, listing, image_shape, skip_bad_images, workers)
    return _as_split(cached, root)


def _split_folder(dataset_dir: Path, name: str, split: str) -> Path:
    """Raises UserError that says what to put where."""
    folder = find_dataset(dataset_dir, name)
    if not folder.is_dir():
        raise missing_dataset(dataset_dir, name)
    if not (folder / split).is_dir():
        there = [known for known in SEED_OFFSET if (folder / known).is_dir()]
        raise UserError(
            f"The data set {folder} has no split {split!r}; it has: {', '.join(there) or 'none'}. "
            f"Put the images at {folder / split}/CLASS/*.png (or .jpg), or make it again "
            f"with `python preprocess/preprocess.py --datasets {folder.name}`."
        )
    return folder / split


# --- the cache: .cache/NAME/SPLIT_CxHxW.npy, and .json beside it --------------------------------------------


class Cached(NamedTuple):
    images: np.ndarray  # (N, H, W, C)
    meta: dict[str, Any]  # the JSON file, see _write_images


def _as_split(cached: Cached, root: Path) -> Split:
    images, meta = cached
    if meta["skipped"]:
        log.warning("Going on without %s", _unreadable(root, meta["skipped"]))
    return Split(
        images=images,
        class_names=list(meta["class_sizes"]),
        class_starts=np.cumsum([0, *meta["class_sizes"].values()], dtype=np.int64),
        name=root.parent.name,
        split=root.name,
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
    )


def _cache_folders(dataset_dir: Path, name: str) -> list[Path]:
    """Beside the data sets; failing that (a read-only disk), in the user's own cache folder."""
    own = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return [dataset_dir / ".cache" / name, own / "fewshot" / name]


def _writable(folders: list[Path]) -> Path:
    for folder in folders:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                return folder
    tried = " or ".join(map(str, folders))
    raise UserError(f"Cannot write the image cache to {tried}. Set XDG_CACHE_HOME to a writable folder.")


def _load(stem: Path, listing: Listing, image_shape: ImageShape) -> Cached | None:
    """None if the cache is missing, damaged or made from other files."""
    channels, height, width = image_shape
    try:
        text = stem.with_suffix(".json").read_bytes()
        with stem.with_suffix(".npy").open("rb") as file:
            file.seek(-hashlib.sha256().digest_size, os.SEEK_END)
            if file.read() != hashlib.sha256(text).digest():
                return None
        images = np.load(stem.with_suffix(".npy"), mmap_mode="r")
        meta = json.loads(text)
    except (OSError, ValueError):
        return None
    if (meta["format"], meta["fingerprint"]) != (CACHE_FORMAT, listing.fingerprint):
        return None
    fits = images.shape == (sum(meta["class_sizes"].values()), height, width, channels)
    return Cached(images, meta) if fits else None


def _build(stem: Path, listing: Listing, image_shape: ImageShape, skip_bad_images: bool, workers: int | None) -> Cached:
    """Write the array, then its metadata.

    The array's file ends with the hash of the metadata. So a truncated array is noticed, and so is a pair
    left by two builders that saw different files. Builders that saw the same files write the same bytes.
    """
    _remove_leftovers(stem.parent)
    needed, free = len(listing.files) * math.prod(image_shape), shutil.disk_usage(stem.parent).free
    if free < needed:
        raise _disk_full(stem.parent, f"takes {needed / 1e6:,.2f} MB, of which only {free / 1e6:,.2f} are free")
    with _new_file(stem.with_suffix(".npy")) as out:
        meta = _write_images(out, listing, image_shape, skip_bad_images, workers)
        text = json.dumps(meta).encode()
        out.write(hashlib.sha256(text).digest())
        out.flush()
        images = np.load(out.name, mmap_mode="r")  # remains this builder's file, whoever renames last
    with _new_file(stem.with_suffix(".json")) as out:
        out.write(text)
    return Cached(images, meta)


def _write_images(
    out: IO[bytes], listing: Listing, image_shape: ImageShape, skip_bad_images: bool, workers: int | None
) -> dict[str, Any]:
    """Stream the images into `out` as an .npy array; returns the metadata."""
    skipped: list[tuple[str, str]] = []
    counts = np.zeros((image_shape[0], 256), np.int64)
    _write_header(out, len(listing.files), image_shape)
    bar = tqdm(total=len(listing.files), desc=f"Reading {listing.root}", unit=" images", disable=None)
    with bar, closing(decode_all(listing, image_shape, workers)) as pieces:
        for piece in pieces:
            if piece.bad and not skip_bad_images:
                raise UserError(f"{_unreadable(listing.root, piece.bad)}. Mend or remove what is named, or "
                                "go on without unreadable images: --skip_bad_images true")  # fmt: skip
            out.write(piece.images.tobytes())
            counts += piece.counts
            skipped += piece.bad
            bar.update(len(piece.images) + len(piece.bad))
    sizes = _sizes_without(listing, skipped)
    _write_header(out, sum(sizes.values()), image_shape)
    mean, std = _mean_and_std(counts)
    return {
        "format": CACHE_FORMAT, "fingerprint": listing.fingerprint, "class_sizes": sizes,
        "mean": mean, "std": std, "skipped": skipped,
    }  # fmt: skip


def _sizes_without(listing: Listing, skipped: list[tuple[str, str]]) -> dict[str, int]:
    sizes = dict(listing.class_sizes)
    for file, _ in skipped:
        name = file.split("/")[0]
        sizes[name] -= 1
        if sizes[name] == 0:
            raise UserError(f"No image in the class folder {listing.root / name} can be read: remove it.")
    return sizes


def _write_header(out: IO[bytes], images: int, image_shape: ImageShape) -> None:
    """At the start of the file, then go to its end. numpy pads it to one length for any number of images."""
    channels, height, width = image_shape
    shape = (images, height, width, channels)
    out.seek(0)
    np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
    out.seek(0, os.SEEK_END)


def _mean_and_std(counts: np.ndarray) -> tuple[list[float], list[float]]:
    """Per channel, of pixels scaled to [0, 1], from (C, 256) counts of pixel values."""
    values, total = np.arange(256) / 255, counts.sum(axis=1)
    mean = (counts * values).sum(axis=1) / total
    variance = (counts * (values - mean[:, None]) ** 2).sum(axis=1) / total
    return mean.tolist(), np.sqrt(variance).tolist()


def _unreadable(root: Path, bad: Sequence[Sequence[str]]) -> str:
    named = "; ".join(f"{root / file} ({reason})" for file, reason in bad[:3])
    more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"{len(bad)} unreadable image{'s' if len(bad) > 1 else ''}: {named}{more}"


def _disk_full(folder: Path, why: str = "does not fit") -> UserError:
    return UserError(f"Disk full: the image cache in {folder} {why}. Free some space and run again.")


@contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears as `path` complete or not at all, also when several processes write it at once."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT):
            raise _disk_full(path.parent) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Temporary files of builders that were killed; a living builder's was written to within the hour."""
    for file in folder.glob(".*.tmp"):
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > 3600:
                file.unlink()


# --- tasks -------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    classes: np.ndarray  # (way,) indices into the sorted class names
    rotations: np.ndarray  # (way,) anticlockwise 90° turns, 0..3; drawn even if not wanted, as official
    positions: np.ndarray  # (way, shot + query) places within each class, support first


def sample_task(seed: int, class_sizes: np.ndarray, way: int, shot: int, query: int) -> Task:
    """The official sampler's task of `seed` (0 <= seed < 2**32): the same draws in the same order."""
    rng = np.random.RandomState(seed)
    classes = rng.choice(len(class_sizes), size=way, replace=False)
    rng.shuffle(classes)
    rotations = rng.randint(0, 4, size=way)
    positions = [rng.choice(class_sizes[k], size=shot + query, replace=False) for k in classes]
    return Task(classes, rotations, np.stack(positions))


def base_seed(seed: int, split: str) -> int:
    """The seed of task 0 of a split; task i has this plus i.

    For train it is the official program's. There, validation and test share their seeds, with training too
    where train_seed = val_seed. Here they start 2**30 and 2**31 further on: no stream reaches another one
    within 10**9 tasks.
    """
    return int(np.random.RandomState(seed).randint(1, 999999)) + SEED_OFFSET[split]


class Batch(NamedTuple):
    x_support: torch.Tensor  # (tasks, way, shot, C, H, W) float
    x_target: torch.Tensor  # (tasks, way, query, C, H, W) float
    y_support: torch.Tensor  # (tasks, way, shot) int64, 0..way-1 in the order of the task's classes
    y_target: torch.Tensor  # (tasks, way, query) int64


class Episodes:
    """The fixed, endless sequence of tasks of one split: task i depends on (seed, i) only.

    Images are scaled to [0, 1] and, if `mean` and `std` (one number per channel) are given, normalised.
    With `rotate_classes`, a class turned by 0, 90, 180 or 270 degrees counts as four: each class of a task comes
    at the turn drawn for it, support and query alike. With `augment_padding`, images are moved by up to so many
    pixels, colour-jittered and flipped at random (see `augmentation`).
    Raises UserError if the split is too small for such tasks, or its images are not square and to be turned.
    """

    def __init__(
        self,
        split: Split,
        way: int,
        shot: int,
        query: int,
        seed: int,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        rotate_classes: bool = False,
        augment_padding: int | None = None,
    ) -> None:
        _check_size(split, way, shot, query)
        self.split, self.way, self.shot, self.query = split, way, shot, query
        self.first_seed = base_seed(seed, split.split)
        self.device, self.dtype, self.augment_padding = device, dtype, augment_padding
        # Of pixels in 0..255, so that (x/255 - mean) / std takes two passes.
        self._shift: torch.Tensor | None = None
        if mean is not None and std is not None:
            self._shift = 255 * torch.tensor(mean, dtype=dtype, device=device).view(-1, 1, 1)
            self._factor = 1 / (255 * torch.tensor(std, dtype=dtype, device=device).clamp_min(1e-3).view(-1, 1, 1))
        self._host = np.asarray(split.images)
        self._resident = _to_device(self._host, device)
        self._turned = _turned_pixels(split).to(device) if rotate_classes else None

    def indices(self, task: int) -> np.ndarray:
        """(way, shot + query) rows of `split.images`, support first."""
        return self._rows(self._draw(task))

    def batch(self, first_task: int, tasks: int) -> Batch:
        """Tasks first_task .. first_task + tasks - 1; does not wait for the device."""
        drawn = [self._draw(first_task + i) for i in range(tasks)]
        rows = np.stack([self._rows(task) for task in drawn])  # (tasks, way, shot + query)
        draws = self._draws(range(first_task, first_task + tasks))
        x_support, x_target = (
            self._images(rows[:, :, part], draws and draws.take(self._places(tasks)[:, :, part].ravel()))
            for part in (slice(self.shot), slice(self.shot, None))
        )
        if self._turned is not None:
            pixels = self._turned[self._send(np.stack([task.rotations for task in drawn]))]  # (tasks, way, H*W)
            x_support, x_target = _rearrange(x_support, pixels), _rearrange(x_target, pixels)
        labels = torch.arange(self.way, device=self.device)[:, None]
        return Batch(x_support, x_target, labels.repeat(tasks, 1, self.shot), labels.repeat(tasks, 1, self.query))

    def _draw(self, task: int) -> Task:
        return sample_task(self.first_seed + task, self.split.class_sizes, self.way, self.shot, self.query)

    def _rows(self, task: Task) -> np.ndarray:
        return self.split.class_starts[task.classes, None] + task.positions

    def _draws(self, tasks: range) -> Draws | None:
        """What chance does to the images of some tasks: a function of their seeds, like the tasks themselves."""
        if self.augment_padding is None:
            return None
        images = self.way * (self.shot + self.query)
        return draw([self.first_seed + task for task in tasks], images, self.augment_padding)

    def _places(self, tasks: int) -> np.ndarray:
        """(tasks, way, shot + query): where each image stands in a row of all."""
        shape = (tasks, self.way, self.shot + self.query)
        return np.arange(math.prod(shape)).reshape(shape)

    def _images(self, rows: np.ndarray, draws: Draws | None) -> torch.Tensor:
        """(*rows.shape, C, H, W). Only the indices travel if the split is on the device."""
        if self._resident is not None:
            pixels = self._resident.index_select(0, self._send(rows.reshape(-1)))
        else:
            pixels = self._send(self._host[rows.reshape(-1)])
        if draws is None or self.augment_padding is None:
            images = pixels.permute(0, 3, 1, 2).to(self.dtype, memory_format=torch.contiguous_format)
        else:
            images = augment(pixels, draws, self.augment_padding, self._send).to(self.dtype)
        if self._shift is None:
            images.div_(255)
        else:
            images.sub_(self._shift).mul_(self._factor)
        return images.view(*rows.shape, *images.shape[1:])

    def _send(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":  # a copy from pinned memory does not make the host wait
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def _to_device(images: np.ndarray, device: torch.device) -> torch.Tensor | None:
    """The whole split on a CUDA device, if that takes at most half of the memory free there."""
    if device.type != "cuda" or 2 * images.nbytes > torch.cuda.mem_get_info(device)[0]:
        return None
    resident = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), 4096):  # in pieces: the split may be larger than the host's memory
        resident[start : start + 4096].copy_(torch.from_numpy(np.array(images[start : start + 4096])))
    return resident


def _turned_pixels(split: Split) -> torch.Tensor:
    """(4, H*W): for each number of anticlockwise 90° turns, which pixel comes to each place.

    UserError if the images are not square.
    """
    height, width = split.images.shape[1:3]
    if height != width:
        raise UserError(
            f"Classes can be turned by 90° only if images are square, but those of {split.name}/{split.split} are read "
            f"{height} high and {width} wide: give --image_height and --image_width the same value."
        )
    places = torch.arange(height * width).view(height, width)
    return torch.stack([places.rot90(turns).flatten() for turns in range(4)])


def _rearrange(images: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Images (tasks, way, n, C, H, W) with their pixels taken from the given places, (tasks, way, H*W).

    One gather, which is several times faster than four turned copies to choose from.
    """
    sources = pixels[:, :, None, None].expand(*images.shape[:4], -1)
    return images.flatten(4).gather(-1, sources).view_as(images)


def _check_size(split: Split, way: int, shot: int, query: int) -> None:
    where, classes, needed = f"{split.name}/{split.split}", len(split.class_names), shot + query
    if way > classes:
        raise UserError(
            f"{way}-way tasks need {way} classes, but {where} has {classes}: "
            "lower the way (--num_classes_per_set, --test_way) or add classes."
        )
    small = np.flatnonzero(split.class_sizes < needed)
    if len(small):
        first, size = split.class_names[small[0]], split.class_sizes[small[0]]
        raise UserError(
            f"The class {first!r} of {where} has {size} images, but {shot} shots + {query} targets need "
            f"{needed} ({len(small)} of {classes} classes are too small): "
            "lower the shot or the queries (--num_samples_per_class, --num_target_samples; in evaluation --val_shot, "
            "--val_query, --test_shots), or add images."
        )
