"""The endless sequences of few-shot tasks that training, validation and meta-test draw from the splits of a data set.

`sample_task` draws one task: a pure function of its seed, equal to the official sampler's.
`Episodes.batch` gathers the images of some tasks by index and scales them as one tensor.
`training_episodes` and `evaluation_episodes` build the sequences that an experiment's options describe.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from augmentation import augment, crop_padding, draw
from utils import distributed
from utils.devices import send
from utils.errors import UserError
from utils.image_cache import Split, open_split
from utils.names import turns_classes
from utils.options import Options

SEED_OFFSET = {"train": 0, "val": 2**30, "test": 2**31}

# (mean, std) of each channel; None: pixels in [0, 1] are used as they are
Normalization = tuple[tuple[float, ...], tuple[float, ...]] | None


class Task(NamedTuple):
    classes: np.ndarray  # (way,) indices into the sorted class names
    rotations: np.ndarray  # (way,) anticlockwise 90° turns, 0..3; drawn even if not wanted, as official
    positions: np.ndarray  # (way, shot + query) places within each class, support first


def sample_task(seed: int, class_sizes: np.ndarray, way: int, shot: int, query: int) -> Task:
    """Draw the official sampler's task of `seed` (0 <= seed < 2**32): the same draws in the same order."""
    rng = np.random.RandomState(seed)
    classes = rng.choice(len(class_sizes), size=way, replace=False)
    rng.shuffle(classes)
    rotations = rng.randint(0, 4, size=way)
    positions = [rng.choice(class_sizes[k], size=shot + query, replace=False) for k in classes]
    return Task(classes, rotations, np.stack(positions))


def base_seed(seed: int, split: str) -> int:
    """Return the seed of task 0 of a split; task i has this plus i.

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


class Scaling:
    """A scaling brings pixels in 0..255 to [0, 1] and, given mean and std of each channel there, normalises them."""

    def __init__(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, device: torch.device, dtype: torch.dtype
    ) -> None:
        # Of pixels in 0..255, so that (x/255 - mean) / std takes two passes.
        self._shift: torch.Tensor | None = None
        if mean is not None and std is not None:
            self._shift = 255 * torch.tensor(mean, dtype=dtype, device=device).view(-1, 1, 1)
            self._factor = 1 / (255 * torch.tensor(std, dtype=dtype, device=device).clamp_min(1e-3).view(-1, 1, 1))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Scale images (..., C, H, W) of a float type in place, and return them."""
        return images.div_(255) if self._shift is None else images.sub_(self._shift).mul_(self._factor)


class Episodes:
    """Episodes are the fixed, endless sequence of tasks of one split: task i depends on (seed, i) only.

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
        check_size(split, way, shot, query)
        self.split, self.way, self.shot, self.query = split, way, shot, query
        self.first_seed = base_seed(seed, split.split)
        self.device, self.dtype, self.augment_padding = device, dtype, augment_padding
        self._scaled = Scaling(mean, std, device, dtype)
        self._host = np.asarray(split.images)
        self._resident = _to_device(self._host, device)
        self._turned = _turned_pixels(split).to(device) if rotate_classes else None

    def indices(self, task: int) -> np.ndarray:
        """Return the (way, shot + query) rows of `split.images` that a task is made of, support first."""
        return self._rows(self._draw(task))

    def batch(self, first_task: int, tasks: int) -> Batch:
        """Return tasks first_task .. first_task + tasks - 1 without waiting for the device."""
        drawn = [self._draw(first_task + i) for i in range(tasks)]
        images = self._images(np.stack([self._rows(task) for task in drawn]), first_task)
        supports = tasks * self.way * self.shot
        x_support = images[:supports].view(tasks, self.way, self.shot, *images.shape[1:])
        x_target = images[supports:].view(tasks, self.way, self.query, *images.shape[1:])
        if self._turned is not None:
            pixels = self._turned[self._send(np.stack([task.rotations for task in drawn]))]  # (tasks, way, H*W)
            x_support, x_target = _rearrange(x_support, pixels), _rearrange(x_target, pixels)
        labels = torch.arange(self.way, device=self.device)[:, None]
        return Batch(x_support, x_target, labels.repeat(tasks, 1, self.shot), labels.repeat(tasks, 1, self.query))

    def _draw(self, task: int) -> Task:
        return sample_task(self.first_seed + task, self.split.class_sizes, self.way, self.shot, self.query)

    def _rows(self, task: Task) -> np.ndarray:
        return self.split.class_starts[task.classes, None] + task.positions

    def _images(self, rows: np.ndarray, first_task: int) -> torch.Tensor:
        """Return the images (n, C, H, W) of tasks' rows (tasks, way, shot + query): all supports, then all queries.

        Only the rows' numbers travel if the split is on the device. What augmentation draws is a function of the
        tasks' seeds, like the tasks.
        """
        places = np.arange(rows.size).reshape(rows.shape)
        places = np.concatenate([places[:, :, : self.shot].ravel(), places[:, :, self.shot :].ravel()])
        wanted = rows.ravel()[places]
        if self._resident is not None:
            pixels = self._resident.index_select(0, self._send(wanted))
        else:
            pixels = self._send(self._host[wanted])
        if self.augment_padding is None:
            images = pixels.permute(0, 3, 1, 2).to(self.dtype, memory_format=torch.contiguous_format)
        else:
            seeds = range(self.first_seed + first_task, self.first_seed + first_task + len(rows))
            draws = draw(seeds, rows[0].size, self.augment_padding).take(places)
            images = augment(pixels, draws, self.augment_padding, self._send).to(self.dtype)
        return self._scaled(images)

    def _send(self, array: np.ndarray) -> torch.Tensor:
        return send(torch.from_numpy(array), self.device)


def _to_device(images: np.ndarray, device: torch.device) -> torch.Tensor | None:
    """Copy the whole split to a CUDA device, if that takes at most half of the memory free there."""
    if device.type != "cuda" or 2 * images.nbytes > torch.cuda.mem_get_info(device)[0]:
        return None
    resident = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), 4096):  # in pieces: the split may be larger than the host's memory
        resident[start : start + 4096].copy_(torch.from_numpy(np.array(images[start : start + 4096])))
    return resident


def _turned_pixels(split: Split) -> torch.Tensor:
    """Return (4, H*W): for each number of anticlockwise 90° turns, which pixel comes to each place.

    Raises UserError if the images are not square.
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
    """Return images (tasks, way, n, C, H, W) with their pixels taken from the places `pixels`, (tasks, way, H*W).

    One gather is several times faster than four turned copies to choose from.
    """
    sources = pixels[:, :, None, None].expand(*images.shape[:4], -1)
    return images.flatten(4).gather(-1, sources).view_as(images)


def check_size(split: Split, way: int, shot: int, query: int) -> None:
    """Raise UserError if a split has too few classes or images for such tasks."""
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


# --- what an experiment's options describe -----------------------------------------------------------------


def open_dataset(options: Options, name: str, split: str) -> Split:
    """Open a split at the experiment's image size; the main process builds the cache, the others then find it."""
    folder, workers = Path(options.dataset_dir), options.num_dataprovider_workers
    with distributed.main_first():
        return open_split(folder, name, split, options.image_shape, options.skip_bad_images, workers)


def training_episodes(split: Split, options: Options, device: torch.device, normalization: Normalization) -> Episodes:
    """Return the endless training tasks of a split."""
    turned = turns_classes(options.dataset_name) if options.rotate_classes is None else options.rotate_classes
    padding = crop_padding(options.image_height) if options.augment else None
    task, (mean, std) = options.training_task, normalization or (None, None)
    return Episodes(split, *task, options.train_seed, mean, std, device, rotate_classes=turned, augment_padding=padding)


def evaluation_episodes(split: Split, options: Options, device: torch.device, normalization: Normalization) -> Episodes:
    """Return the endless validation or test tasks of a split."""
    mean, std = normalization or (None, None)
    return Episodes(split, *options.evaluation_task, options.val_seed, mean, std, device)


def check_tests(options: Options) -> None:
    """Raise UserError if a data set to test on is missing, or too small for the way, shots and queries to test."""
    way, _, query = options.evaluation_task
    for name in options.test_dataset_list:
        split = open_dataset(options, name, "test")
        for shot in options.test_shot_list:
            check_size(split, way, shot, query)
