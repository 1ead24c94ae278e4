"""MetaOptNet's training augmentation of whole batches: random crop, colour jitter, horizontal flip, in that order.

Given the same random numbers, every image becomes bit by bit what torchvision's RandomCrop(size, padding),
ColorJitter(0.4, 0.4, 0.4) and RandomHorizontalFlip() make of a PIL image: the black border of a crop takes part in the
jitter, and each step of the jitter ends in 8 bits. The random numbers of a task depend on its seed only.
"""

from collections.abc import Callable, Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

JITTER = 0.4  # factors are uniform in 1 ± this
BRIGHTNESS, CONTRAST, SATURATION = range(3)
ORDERS = list(permutations((BRIGHTNESS, CONTRAST, SATURATION)))
RED, GREEN, BLUE = 19595 / 2**16, 38470 / 2**16, 7471 / 2**16  # Pillow's weights for grey; exact in float32
HALF = torch.tensor(0.5)  # lies on the host, where a device takes single numbers from without waiting


class Draws(NamedTuple):
    """The draws hold what chance decides about n images."""

    corners: np.ndarray  # (n, 2) int64: row and column of the crop in the padded image, 0..2*padding
    flips: np.ndarray  # (n,) bool
    orders: np.ndarray  # (n,) int64: which of ORDERS the jitter takes its steps in
    factors: np.ndarray  # (n, 3) float32: of brightness, contrast and saturation

    def take(self, images: np.ndarray) -> "Draws":
        """Return the draws of some of the images, in this order."""
        return Draws(*(array[images] for array in self))


def crop_padding(image_height: int) -> int:
    """Return by how many pixels a random crop may be off; MetaOptNet has 4 at 32 pixels and 8 at 84."""
    return 8 if image_height >= 64 else 4


def draw(seeds: Sequence[int], images_per_task: int, padding: int) -> Draws:
    """Draw for all images of the first task, then of the second and so on; each task has a seed of its own."""
    chances = np.concatenate([np.random.default_rng(seed).random((images_per_task, 7)) for seed in seeds])
    return Draws(
        corners=(chances[:, :2] * (2 * padding + 1)).astype(np.int64),
        flips=chances[:, 2] < 0.5,
        orders=(chances[:, 3] * len(ORDERS)).astype(np.int64),
        factors=(1 - JITTER + 2 * JITTER * chances[:, 4:]).astype(np.float32),
    )


def augment(
    pixels: torch.Tensor, draws: Draws, padding: int, send: Callable[[np.ndarray], torch.Tensor]
) -> torch.Tensor:
    """Turn (n, H, W, C) uint8, C = 1 or 3, into augmented (n, C, H, W) float32 of whole numbers, 0..255.

    `send` brings an array to the device of `pixels`; it is called once. The images that take the steps of the jitter
    in one order are worked on together. The host sorts them, so it never waits for the device.
    """
    order = np.lexsort((draws.flips, draws.orders))
    draws = draws.take(order)
    # The number of each crop's first pixel among the pixels of all images, padded as `_crop` does.
    height, width = (side + 2 * padding for side in pixels.shape[1:3])
    first = (order * (height + 1) + draws.corners[:, 0]) * width + draws.corners[:, 1]
    table = send(np.column_stack([np.argsort(order), first, draws.factors]))  # float64: exact to 2**53
    (places, first_pixels), factors = table[:, :2].long().unbind(1), table[:, 2:].float()[..., None, None, None]

    images = _crop(pixels, first_pixels, padding)
    alike = np.bincount(draws.orders, minlength=len(ORDERS)).tolist()
    unflipped = np.bincount(draws.orders[~draws.flips], minlength=len(ORDERS)).tolist()
    for steps, group, factor, plain in zip(ORDERS, images.split(alike), factors.split(alike), unflipped, strict=True):
        for step in steps:
            _jitter(group, step, factor[:, step])
        flipped = group[plain:]
        flipped.copy_(flipped.flip(-1))
    return images.index_select(0, places)


def _crop(pixels: torch.Tensor, first_pixels: torch.Tensor, padding: int) -> torch.Tensor:
    """Return (crops, C, H, W) float32 from images (n, H, W, C) uint8 with a black border.

    A crop is copied in one piece: H rows of the padded image, counted from its first pixel. The last of them ends up
    to 2*padding pixels beyond the others, hence one more row below.
    """
    _, height, width, channels = pixels.shape
    padded = F.pad(pixels, (0, 0, padding, padding, padding, padding + 1))
    row = padded.shape[2]
    pieces = padded.flatten().unfold(0, height * row * channels, channels).index_select(0, first_pixels)
    crops = pieces.view(-1, height, row, channels)[:, :, :width].permute(0, 3, 1, 2)
    return crops.to(torch.float32, memory_format=torch.contiguous_format)


def _jitter(images: torch.Tensor, step: int, factor: torch.Tensor) -> None:
    """Blend images (n, C, H, W) in place with black, their mean grey or their grey selves, as Pillow computes it."""
    if step == BRIGHTNESS:
        images.mul_(factor)
    elif step == CONTRAST:
        total = _grey(images).sum(dim=(1, 2, 3), keepdim=True)  # exact up to 256x256 pixels
        mean = total.div_(images.shape[2] * images.shape[3]).add_(0.5).floor_()
        images.sub_(mean).mul_(factor).add_(mean)
    elif images.shape[1] == 3:
        grey = _grey(images)
        images.sub_(grey).mul_(factor).add_(grey)
    images.clamp_(0, 255).floor_()


def _grey(images: torch.Tensor) -> torch.Tensor:
    """Return the grey values, rounded, as (n, 1, H, W)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return HALF.add(red, alpha=RED).add_(green, alpha=GREEN).add_(blue, alpha=BLUE).floor_()
