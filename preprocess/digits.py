"""The built-in data set digits is scikit-learn's real handwritten digits, 8x8 pixels, a test split only.

Enlarged to 32x32 and inverted to dark ink on light paper, as glyphs has it: a model trained on glyphs meets
other shapes by other hands, not a negative.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from preprocess.sources import DataSet, Source
from preprocess.writing import Picture

SIDE = 32
INK_LEVELS = 16  # load_digits has 0 (paper) to 16 (full ink)


def digits(_: Path) -> Iterator[Picture]:
    """Yield test/0 to 9, 174 to 183 images each."""
    from sklearn.datasets import load_digits  # here, because it takes a while

    counts: Counter[str] = Counter()
    for image, label in zip(*load_digits(return_X_y=True), strict=True):
        grey = np.rint(255 * (1 - image.reshape(8, 8) / INK_LEVELS)).astype(np.uint8)
        picture = Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
        yield Picture("test", str(label), f"{counts[str(label)]:03d}.png", np.asarray(picture))
        counts[str(label)] += 1


DATA_SETS = (DataSet("digits", (Source((), "", digits),)),)
