"""Omniglot (Lake et al., 2015) has 1623 characters of 50 alphabets, each a class of 20 drawings.

28x28, one channel, dark ink (0) on light paper (255) as in the originals. The split has MAML++'s sizes; which
characters its authors drew is not published, so it is a seeded draw of our own.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from preprocess.archives import members, open_zip
from preprocess.sources import DataSet, Published, Source, check
from preprocess.writing import Picture
from utils.errors import UserError
from utils.images import open_image

ARCHIVES = {"images_background": 964, "images_evaluation": 659}  # folder, also the zip's name: characters
SPLIT_SIZES = {"train": 1150, "val": 50, "test": 423}  # characters
SPLIT_SEED = 0
IMAGES_PER_CLASS = 20
DRAWN_SIDE, SIDE = 105, 28  # pixels
MAX_BYTES = 2**16  # an original takes about 200
ORIGIN = "Omniglot's two archives, Lake et al. 2015; folder python/ of https://github.com/brendenlake/omniglot"
MD5 = {  # as its authors published the archives
    "images_background.zip": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation.zip": "6b91aef0f799c5bb55b94e3f2daec811",
}
ADDRESSES = {name: (f"https://github.com/brendenlake/omniglot/raw/master/python/{name}",) for name in MD5}
# Folder, alphabet, character, file.
MEMBER = re.compile(r"(?:.*/)?(\w+)/([\w()-]+)/(character\d+)/(\w+\.png)", re.ASCII)


def pictures(archives: Path) -> Iterator[Picture]:
    """Yield the drawings of both archives, made small, of classes ALPHABET_characterNN.

    UserError, before the first, where an archive has not all its characters and drawings, or one that is in both.
    """
    drawings = {path: _drawings(path) for path in (archives / f"{archive}.zip" for archive in ARCHIVES)}
    images = Counter(class_name for of_archive in drawings.values() for class_name, _ in of_archive.values())
    split_of = draw_split(images.keys())
    contents = {split: {name: images[name] for name in images if split_of[name] == split} for split in SPLIT_SIZES}
    check("omniglot", contents, PUBLISHED)
    for path, of_archive in drawings.items():
        for name, content in members(path, ORIGIN, of_archive.__contains__, MAX_BYTES):
            class_name, file = of_archive[name]
            yield Picture(split_of[class_name], class_name, file, np.asarray(shrink(content, f"{name!r} in {path}")))


def draw_split(names: Collection[str]) -> dict[str, str]:
    """Return class name -> split: a permutation of the sorted names, cut at 1150 and 1200. UserError if not 1623."""
    wanted = sum(SPLIT_SIZES.values())
    if len(names) != wanted:
        shared = f"{' and '.join(ARCHIVES)} share {wanted - len(names)} characters"
        raise UserError(f"{shared}: one of the zips is not Lake's. Fetch {ORIGIN}")
    order = np.random.RandomState(SPLIT_SEED).permutation(wanted)  # its streams are the same in every numpy
    splits = np.repeat(list(SPLIT_SIZES), list(SPLIT_SIZES.values()))
    return dict(zip(np.array(sorted(names))[order].tolist(), splits.tolist(), strict=True))


def shrink(png: bytes, name: str) -> Image.Image:
    """Return the drawing at 28x28, one channel. UserError, which names it, if it is no readable image of 105x105."""
    try:
        with open_image(BytesIO(png)) as drawing:
            if drawing.size != (DRAWN_SIDE, DRAWN_SIDE):
                raise ValueError("its size is {}x{}".format(*drawing.size))
            return drawing.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    except Exception as error:  # Pillow's readers raise nearly any type on a damaged file
        what = f"{name} is not a drawing of {DRAWN_SIDE}x{DRAWN_SIDE} pixels"
        raise UserError(f"{what} ({error}). Fetch the archive again") from error


def _drawings(path: Path) -> dict[str, tuple[str, str]]:
    """Return member name -> class and file name. UserError if the archive has not all its characters."""
    with open_zip(path, ORIGIN) as opened:
        matches = [match for match in map(MEMBER.fullmatch, opened.namelist()) if match and match[1] == path.stem]
    drawings = {match[0]: (f"{match[2]}_{match[3]}", match[4]) for match in matches}
    found, wanted = len({class_name for class_name, _ in drawings.values()}), ARCHIVES[path.stem]
    if found != wanted:
        where = f"at {path.stem}/ALPHABET/characterNN/*.png"
        raise UserError(f"{path} must hold {wanted} characters {where}, but it has {found}. Fetch {ORIGIN}")
    return drawings


PUBLISHED = Published(SPLIT_SIZES, IMAGES_PER_CLASS)
DATA_SETS = (DataSet("omniglot", (Source(tuple(MD5), ORIGIN, pictures, MD5, ADDRESSES),), PUBLISHED),)
