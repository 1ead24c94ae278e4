"""CIFAR-FS (Bertinetto et al., 2019) and FC100 (Oreshkin et al., 2018) split the classes of CIFAR-100 in two ways.

CIFAR-FS takes 64/16/20 classes at random; FC100 60/20/20, by superclass: no superclass is in two splits.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from preprocess import array_files
from preprocess.archives import members
from preprocess.pickles import loads
from preprocess.sources import DataSet, Published, Source, split_of_classes
from preprocess.writing import Picture
from utils.errors import UserError

ZIP = "cifar100.zip"
ZIP_ORIGIN = (
    "the CIFAR-FS archive of Bertinetto et al., which has all of CIFAR-100 (60,000 PNGs, about 134 MB), distributed "
    "with R2D2: https://github.com/bertinetto/r2d2"
)
ZIP_ADDRESS = f"https://zenodo.org/records/7978538/files/{ZIP}"
OFFICIAL = "cifar-100-python.tar.gz"
OFFICIAL_ORIGIN = "CIFAR-100, Python version, 169 MB: https://www.cs.toronto.edu/~kriz/cifar.html"
OFFICIAL_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
OFFICIAL_ADDRESS = f"https://www.cs.toronto.edu/~kriz/{OFFICIAL}"
OFFICIAL_BYTES = 2**28  # its largest member takes 155 MB
PICKLES_ORIGIN = "MetaOptNet's pickles of it: https://github.com/kjunelee/MetaOptNet"


def from_zip(name: str, archives: Path) -> Iterator[Picture]:
    """Yield the images at cifar100/data/CLASS/*.png. UserError where the zip has none."""
    split_of = split_of_classes(name)
    found = False
    for member, content in members(archives / ZIP, ZIP_ORIGIN, lambda member: class_of(member) in split_of):
        found = True
        yield Picture(split_of[class_of(member)], class_of(member), _last(member), content)
    if not found:
        raise UserError(f"{archives / ZIP} has no cifar100/data/CLASS/*.png. Fetch {ZIP_ORIGIN}")


def class_of(member: str) -> str:
    """Return the class of a member …/data/CLASS/IMAGE.png; empty for any other, and for what macOS adds."""
    match member.split("/"):
        case [*above, "data", class_name, file] if "__MACOSX" not in above and file.lower().endswith(".png"):
            return "" if file.startswith(".") else class_name
    return ""


def from_official(name: str, archives: Path) -> Iterator[Picture]:
    """Yield the images of both its parts: 500 images of each class from `train` and 100 from `test`."""
    path = archives / OFFICIAL
    parts = ("meta", "train", "test")
    contents = members(path, OFFICIAL_ORIGIN, lambda member: _last(member) in parts, OFFICIAL_BYTES)
    found = {_last(member): content for member, content in contents}
    if missing := [f"cifar-100-python/{part}" for part in parts if part not in found]:
        raise UserError(f"{path} lacks {', '.join(missing)}. Fetch {OFFICIAL_ORIGIN}")
    meta, *read = (loads(found[part], f"cifar-100-python/{part} in {path}") for part in parts)
    split_of = split_of_classes(name)
    try:
        for part in read:
            pixels = part["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # (N, 32, 32, 3)
            for file, label, image in zip(part["filenames"], part["fine_labels"], pixels, strict=True):
                class_name = meta["fine_label_names"][label]
                if class_name in split_of:
                    yield Picture(split_of[class_name], class_name, file, np.ascontiguousarray(image))
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise UserError(f"{path} is not laid out as CIFAR-100 is ({error!r}). Fetch {OFFICIAL_ORIGIN}") from error


def _last(member: str) -> str:
    return member.rpartition("/")[2]


def _declare(name: str, **classes: int) -> DataSet:
    sources = (
        Source((ZIP,), ZIP_ORIGIN, partial(from_zip, name), addresses={ZIP: (ZIP_ADDRESS,)}),
        Source(
            (OFFICIAL,),
            OFFICIAL_ORIGIN,
            partial(from_official, name),
            {OFFICIAL: OFFICIAL_MD5},
            {OFFICIAL: (OFFICIAL_ADDRESS,)},
        ),
        array_files.source(PICKLES_ORIGIN, array_files.data_and_labels, f"{name}_{{}}.pickle"),
    )
    return DataSet(name, sources, Published(classes, 600))


DATA_SETS = (_declare("CIFAR_FS", train=64, val=16, test=20), _declare("FC100", train=60, val=20, test=20))
