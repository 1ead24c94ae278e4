"""CUB-200-2011 (Wah et al., 2011): 200 species of birds, 11,788 photos, split 100/50/50 by the number of the class."""

import re
from collections.abc import Iterator
from pathlib import Path

from preprocess.archives import members
from preprocess.sources import Published, Recipe, Source, read_split
from preprocess.staging import Contents
from preprocess.writing import Picture, write_images
from utils.errors import UserError

ARCHIVE = "CUB_200_2011.tgz"
ORIGIN = "Caltech-UCSD Birds-200-2011 (1.1 GB), from https://data.caltech.edu/records/65de6-vp158"
MD5 = "97eceeb196236b17998738112f37df78"
IMAGES = 11_788
NAMED = 3  # missing photos that an error names
LIST = re.compile(r"(?:.*/)?CUB_200_2011/images\.txt")
IMAGE = re.compile(r"(?:.*/)?CUB_200_2011/images/((\d{3})\.[^/]+)/([^./][^/]*)")  # class, its number, file


def unpack(dataset_dir: Path, folder: Path) -> Contents:
    """Write the photos of `dataset_dir`/CUB_200_2011.tgz to `folder`/SPLIT/NNN.Species, in one pass.

    UserError where one that its images.txt lists is missing, or a class is not in the split.
    """
    listed: list[str] = []
    contents = write_images(folder, _photos(dataset_dir / ARCHIVE, listed), "CUB", IMAGES)
    _check_list(folder, listed, contents)
    return contents


def _photos(path: Path, listed: list[str]) -> Iterator[Picture]:
    """The photos; the lines of images.txt, wherever in the archive it comes, go to `listed`."""
    split_of = {number: split for split, numbers in read_split("CUB").items() for number in numbers}
    for name, content in members(path, ORIGIN, lambda name: bool(LIST.fullmatch(name) or IMAGE.fullmatch(name))):
        image = IMAGE.fullmatch(name)
        if image is None:
            listed += content.decode(errors="replace").splitlines()
        elif image[2] not in split_of:
            raise UserError(f"{path} has a class {image[1]!r}, which is none of CUB's 200. Fetch {ORIGIN}")
        else:
            yield Picture(split_of[image[2]], image[1], image[3], content)


def _check_list(folder: Path, listed: list[str], contents: Contents) -> None:
    """UserError for photos of images.txt, whose lines are a number and CLASS/FILE, that did not come."""
    split_of = {class_name: split for split, classes in contents.items() for class_name in classes}
    names = [line.split(" ", 1)[1].strip() for line in listed if " " in line]
    missing = [name for name in names if not (folder / split_of.get(name.partition("/")[0], "") / name).is_file()]
    if missing:
        more = f" and {len(missing) - NAMED:,} more" if len(missing) > NAMED else ""
        named = ", ".join(map(repr, missing[:NAMED]))
        raise UserError(
            f"{ARCHIVE} lacks {len(missing):,} of the {len(names):,} photos that its images.txt lists: {named}{more}. "
            f"Fetch {ORIGIN}"
        )


# Photos per split are not published.
RECIPE = Recipe(
    (Source((ARCHIVE,), ORIGIN, unpack, ((ARCHIVE, MD5),)),),
    Published({"train": 100, "val": 50, "test": 50}, images={"all": IMAGES}),
)
