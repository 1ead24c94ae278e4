"""A picture of a data set: some classes of each split, a row of images of each."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from preprocess.survey import Pictures
from utils.images import decode_image
from utils.report import short_name

CLASSES, IMAGES = 6, 10  # shown of a split; of a class
SIDE, GAP = 72, 4  # pixels: longer side of an image; between two
NAME, HEADING, LINE = 118, 26, 13  # pixels: width of a class name; height of a split's heading, of a name's line
INK, FAINT, PAPER = "#111827", "#4b5563", "#e5e7eb"  # paper darker than white: one sees where an image ends

Item = TypeVar("Item")


def contact_sheet(folder: Path, splits: Mapping[str, Pictures]) -> Image.Image:
    """Classes and images are evenly spread over the sorted ones; small images are enlarged by whole factors."""
    rows = {split: _spread(sorted(_by_class(pictures).items()), CLASSES) for split, pictures in splits.items()}
    height = sum(HEADING + len(classes) * (SIDE + GAP) for classes in rows.values())
    sheet = Image.new("RGB", (NAME + IMAGES * (SIDE + GAP), height + GAP), PAPER)
    top = 0
    for split, classes in rows.items():
        all_classes, images = len(_by_class(splits[split])), len(splits[split].files)
        heading = f"{split}: {all_classes:,} classes, {images:,} images"
        ImageDraw.Draw(sheet).text((GAP, top + 6), heading, fill=INK, font=_font(13))
        top += HEADING
        for class_name, of_class in classes:
            _draw_class(sheet, top, class_name, _load(folder / split, splits[split], _spread(of_class, IMAGES)))
            top += SIDE + GAP
    return sheet


def _by_class(pictures: Pictures) -> dict[str, list[int]]:
    """Class name -> indices of its pictures."""
    classes: dict[str, list[int]] = {}
    for index, file in enumerate(pictures.files):
        classes.setdefault(file.partition("/")[0], []).append(index)
    return classes


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _load(root: Path, pictures: Pictures, indices: Sequence[int]) -> list[Image.Image]:
    """The pictures, in their own proportions, at most SIDE pixels wide and high."""
    images = []
    for index in indices:
        width, height = (int(side) for side in pictures.sizes[index])
        factor = max(1, SIDE // max(width, height))
        shrink = min(1.0, SIDE / max(width, height))
        shape = (3, max(1, round(height * shrink)), max(1, round(width * shrink)))
        pixels = decode_image(root / pictures.files[index], shape)
        images.append(Image.fromarray(np.repeat(np.repeat(pixels, factor, axis=0), factor, axis=1)))
    return images


def _draw_class(sheet: Image.Image, top: int, class_name: str, images: Sequence[Image.Image]) -> None:
    lines = short_name(class_name.encode(errors="replace").decode()).split("\n")  # a name need not be valid Unicode
    for line, text in enumerate(lines):
        middle = top + SIDE / 2 + (line - (len(lines) - 1) / 2) * LINE
        ImageDraw.Draw(sheet).text((NAME - GAP, middle), text, fill=FAINT, font=_font(11), anchor="rm")
    for column, image in enumerate(images):
        left = NAME + column * (SIDE + GAP)
        sheet.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))


def _font(size: int) -> ImageFont.FreeTypeFont:
    """matplotlib's, which knows more scripts than Pillow's own."""
    import matplotlib  # here, because it takes a while and most of a description does without

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
