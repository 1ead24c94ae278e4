"""CUB-200-2011 (Wah et al., 2011) is 11,788 photos of 200 species of birds, split 100/50/50 by class number."""

import re
from collections.abc import Iterator
from pathlib import Path

from preprocess.archives import members
from preprocess.sources import DataSet, Published, Source, split_of_classes
from preprocess.staging import first_of
from preprocess.writing import Picture
from utils.errors import UserError

ARCHIVE = "CUB_200_2011.tgz"
ORIGIN = "Caltech-UCSD Birds-200-2011 (1.1 GB), from https://data.caltech.edu/records/65de6-vp158"
MD5 = "97eceeb196236b17998738112f37df78"
ADDRESSES = (
    f"https://data.caltech.edu/records/65de6-vp158/files/{ARCHIVE}",
    f"https://zenodo.org/records/8000562/files/{ARCHIVE}",
)
IMAGES = 11_788
LIST = re.compile(r"(?:.*/)?CUB_200_2011/images\.txt")
IMAGE = re.compile(r"(?:.*/)?CUB_200_2011/images/((\d{3})\.[^/]+)/([^./][^/]*)")  # class, its number, file


def photos(archives: Path) -> Iterator[Picture]:
    """Yield the photos of `archives`/CUB_200_2011.tgz, of classes NNN.Species, in one pass.

    UserError where one that its images.txt lists is missing, or a class is not in the split.
    """
    path, split_of = archives / ARCHIVE, split_of_classes("CUB")
    listed: list[str] = []
    found = set()
    for name, content in members(path, ORIGIN, lambda name: bool(LIST.fullmatch(name) or IMAGE.fullmatch(name))):
        image = IMAGE.fullmatch(name)
        if image is None:  # the list: a number and CLASS/FILE in each line
            listed = re.findall(r"^\S* +(.*?)\s*$", content.decode(errors="replace"), re.MULTILINE)
        elif image[2] not in split_of:
            raise UserError(f"{path} has a class {image[1]!r}, which is none of CUB's 200. Fetch {ORIGIN}")
        else:
            found.add(f"{image[1]}/{image[3]}")
            yield Picture(split_of[image[2]], image[1], image[3], content)
    if missing := [repr(name) for name in listed if name not in found]:
        raise UserError(
            f"{ARCHIVE} lacks {len(missing):,} of the {len(listed):,} photos that its images.txt lists: "
            f"{first_of(missing, 3)}. Fetch {ORIGIN}"
        )


# Photos per split are not published.
PUBLISHED = Published({"train": 100, "val": 50, "test": 50}, {"all": IMAGES})
SOURCE = Source((ARCHIVE,), ORIGIN, photos, {ARCHIVE: MD5}, {ARCHIVE: ADDRESSES})
DATA_SETS = (DataSet("CUB", (SOURCE,), PUBLISHED),)
