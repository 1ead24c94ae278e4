"""A contact sheet shows some classes of each split of a data set, with a row of images of each."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TypeVar

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from utils.figures import short_name
from utils.images import open_image, plain_image

CLASSES, IMAGES = 6, 10  # shown of a split; of a class
SIDE, GAP = 72, 4  # pixels: longer side of an image; between two
NAME, HEADING = 118, 26  # pixels: width of a class name; height of a split's heading
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
    large, small = font(13), font(11)
    top = 0
    for split, of_split in classes.items():
        heading = f"{split}: {len(of_split):,} classes, {len(files[split]):,} images"
        draw.text((GAP, top + 6), heading, fill=INK, font=large)
        top += HEADING
        for of_class in spread(of_split, CLASSES):
            name = short_name(of_class[0].partition("/")[0].encode(errors="replace").decode())  # it may be no Unicode
            draw.text((NAME - GAP, top + SIDE / 2), name, fill=FAINT, font=small, anchor="rm", align="right")
            for column, file in enumerate(spread(of_class, IMAGES)):
                paste(sheet, folder / split / file, NAME + column * (SIDE + GAP), top)
            top += SIDE + GAP
    return sheet


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return `count` of the items at even distances, or all if they are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def font(size: int) -> ImageFont.FreeTypeFont:
    """Return a font that has more scripts than Pillow's own."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def paste(sheet: Image.Image, path: Path, left: int, top: int) -> None:
    """Put a picture into the middle of the square of SIDE pixels at (left, top)."""
    image = _load(path)
    sheet.paste(image, (left + (SIDE - image.width) // 2, top + (SIDE - image.height) // 2))


def _load(path: Path) -> Image.Image:
    """Return the picture, in its own proportions, at most SIDE pixels wide and high."""
    with open_image(path) as opened:
        image = plain_image(opened)
    if factor := SIDE // max(image.size):
        return image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image
