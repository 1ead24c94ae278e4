"""The built-in data set digits: scikit-learn's real handwritten digits, 8x8 pixels, a test split only.

Enlarged to 32x32 and inverted to dark ink on light paper, as glyphs has it: a model trained on glyphs meets
other shapes by other hands, not a negative.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from preprocess.staging import Contents

SIDE = 32
INK_LEVELS = 16  # load_digits has 0 (paper) to 16 (full ink)


def write_digits(folder: Path) -> Contents:
    """Write `folder`/test/0 to 9, 174 to 183 images each."""
    from sklearn.datasets import (
        load_digits,
    )  # here, because entry points import this module and most never need it

    digits = load_digits()
    counts = {str(digit): 0 for digit in range(10)}
    for class_name in counts:
        (folder / "test" / class_name).mkdir(parents=True)
    for image, label in tqdm(
        zip(digits.images, digits.target, strict=True), "digits", len(digits.target), disable=None
    ):
        grey = np.rint(255 * (1 - image / INK_LEVELS)).astype(np.uint8)
        class_name = str(label)
        picture = Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
        picture.save(folder / "test" / class_name / f"{counts[class_name]:03d}.png")
        counts[class_name] += 1
    return {"test": counts}
