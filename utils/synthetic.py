"""Made-up data sets of class folders, for dry runs and tests."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def write_dataset(
    folder: Path,
    classes: int,
    images: int,
    size: tuple[int, int] = (8, 8),
    splits: Iterable[str] = ("train", "val", "test"),
    seed: int = 0,
) -> None:
    """Write FOLDER/SPLIT/class_K/I.png: noisy RGB images of `size` (height, width), one colour per class."""
    rng = np.random.default_rng(seed)
    for split in splits:
        for k in range(classes):
            class_folder = folder / split / f"class_{k}"
            class_folder.mkdir(parents=True)
            colour = rng.integers(0, 200, 3)
            for i in range(images):
                pixels = colour + rng.integers(0, 56, (*size, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(class_folder / f"{i}.png")
