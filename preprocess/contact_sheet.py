"""A picture of a data set: some classes of each split, a row of images of each."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.images import open_image, plain_image
from utils.report import short_name

CLASSES, IMAGES = 6, 10  # shown of a split; of a class
SIDE, GAP = 72, 4  # pixels: longer side of an image; between two
NAME, HEADING, LINE = 118, 26, 13  # pixels: width of a class name; height of a split's heading, of a name's line
INK, FAINT, PAPER = "#111827", "#4b5563", "#e5e7eb"  # paper darker than white: one sees where an image ends

Item = TypeVar("Item")


def contact_sheet(folder: Path, files: Mapping[str, Sequence[str]]) -> Image.Image:
    """Return a sheet of evenly spread classes and images from the readable CLASS/FILEs, class by class, of each split.

    Small images are enlarged by whole factors.
    """
    classes = {
        split: [list(of_class) for _, of_class in groupby(of_split, lambda file: file.partition("/")[0])]
        for split, of_split in files.items()
    }
    height = sum(HEADING + min(CLASSES, len(of_split)) * (SIDE + GAP) for of_split in classes.values())
    sheet = Image.new("RGB", (NAME + IMAGES * (SIDE + GAP), height + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = 0
    for split, of_split in classes.items():
        heading = f"{split}: {len(of_split):,} classes, {len(files[split]):,} images"
        draw.text((GAP, top + 6), heading, fill=INK, font=_font(13))
        top += HEADING
        for of_class in spread(of_split, CLASSES):
            _draw_name(draw, top, of_class[0].partition("/")[0])
            for column, file in enumerate(spread(of_class, IMAGES)):
                image = _load(folder / split / file)
                left = NAME + column * (SIDE + GAP)
                sheet.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))
            top += SIDE + GAP
    return sheet


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return `count` of the items at even distances, or all if they are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _draw_name(draw: ImageDraw.ImageDraw, top: int, class_name: str) -> None:
    lines = short_name(class_name.encode(errors="replace").decode()).split("\n")  # a name need not be valid Unicode
    for line, text in enumerate(lines):
        middle = top + SIDE / 2 + (line - (len(lines) - 1) / 2) * LINE
        draw.text((NAME - GAP, middle), text, fill=FAINT, font=_font(11), anchor="rm")


def _load(path: Path) -> Image.Image:
    """Return the picture, in its own proportions, at most SIDE pixels wide and high."""
    with open_image(path) as opened:
        image = plain_image(opened)
    longer = max(image.size)
    if longer > SIDE:
        width, height = (max(1, round(side * SIDE / longer)) for side in image.size)
        return image.resize((width, height), Image.Resampling.LANCZOS)
    factor = SIDE // longer
    return Image.fromarray(np.asarray(image).repeat(factor, axis=0).repeat(factor, axis=1))


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's font, which has more scripts than Pillow's own."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
