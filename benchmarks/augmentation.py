"""MetaOptNet's training augmentation: torchvision image by image, as the official loader does, against ours.

python benchmarks/augmentation.py                      one thread of this machine's CPU
python benchmarks/augmentation.py --device cuda

Both start from the 8-bit images of 8 episodes: 55 each at 32x32 (5-shot), 105 at 84x84 (15-shot), 5-way, 6 queries.
"augmented": crop, jitter and flip, to 8 bits. "normalised": the same up to the batch of normalised floats that the
network gets. The two ways take turns within one process; drawing the random numbers counts in both.
Prints one table and writes it to benchmarks/results/.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from augmentation import JITTER, augment, draw  # noqa: E402
from benchmarks.common import Row, command_line, compare, finish, start, timed  # noqa: E402

TASKS = 8
CASES = {32: (4, 55), 84: (8, 105)}  # pixels -> padding, images of a task
MEAN, STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)  # of CIFAR-FS; any will do


def torchvision_way(images: np.ndarray, padding: int) -> dict[str, Callable[[], object]]:
    """Images (n, H, W, 3) uint8."""
    chance = [
        transforms.RandomCrop(images.shape[1], padding=padding),
        transforms.ColorJitter(JITTER, JITTER, JITTER),
        transforms.RandomHorizontalFlip(),
        np.array,
    ]
    change = transforms.Compose(chance)
    whole = transforms.Compose([*chance, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    return {
        "augmented": lambda: [change(Image.fromarray(image)) for image in images],
        "normalised": lambda: torch.stack([whole(Image.fromarray(image)) for image in images]),
    }


def our_way(images: np.ndarray, padding: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Images (n, H, W, 3) uint8, which lie on the device."""
    pixels = torch.from_numpy(images).to(device)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))

    def send(array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    def augmented() -> torch.Tensor:
        return augment(pixels, draw(range(TASKS), len(images) // TASKS, padding), padding, send)

    return {"augmented": augmented, "normalised": lambda: augmented().div_(255).sub_(mean).div_(std)}


def measure(size: int, padding: int, images_per_task: int, options: argparse.Namespace) -> list[Row]:
    """Return four rows of the table: each result in both ways."""
    images, rows = textures(TASKS * images_per_task, size), []
    ours, theirs = our_way(images, padding, torch.device(options.device)), torchvision_way(images, padding)
    for result in ours:
        case = {"result": result, "pixels": size, "images": len(images)}
        ways = {
            name: partial(timed, way[result], options.device, warm_up=0)
            for name, way in (("ours", ours), ("torchvision", theirs))
        }
        compare(case, ways, rounds=1)  # warms up
        rows += compare(case, ways, options.rounds, count="images", of=len(images))
    return rows


def textures(images: int, size: int) -> np.ndarray:
    """(images, size, size, 3) uint8: smooth blobs with some noise. What is in them changes no time here."""
    random = np.random.default_rng(0)
    blobs = torch.from_numpy(random.random((images, 3, 6, 6), dtype=np.float32))
    smooth = torch.nn.functional.interpolate(blobs, size=(size, size), mode="bicubic").permute(0, 2, 3, 1).numpy()
    return (255 * smooth + random.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.uint8)


def main() -> None:
    parser = command_line(__doc__, threads=1)
    parser.add_argument("--rounds", type=int, default=15, help="[%(default)s]")
    parser.add_argument("--sizes", type=int, nargs="+", choices=CASES, default=list(CASES), help="pixels [%(default)s]")
    options = start(parser)
    rows = [row for size in options.sizes for row in measure(size, *CASES[size], options)]
    finish("augmentation", options, {f"Augmentation of {TASKS} episodes": rows})


if __name__ == "__main__":
    main()
