"""Any data set may come as an archive of class folders: …/{train,val,test}/CLASS/IMAGE in a zip or tar.

`valid` and `validation` are val, and capitals do not matter.
"""

import logging
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from preprocess.archives import members
from preprocess.sources import Source
from preprocess.staging import SPLIT_WORDS
from preprocess.writing import Picture
from utils.errors import UserError
from utils.images import NOT_IMAGES, image_suffixes

log = logging.getLogger(__name__)

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def source(archive: str, origin: str = "an archive of class folders {train,val,test}/CLASS/*") -> Source:
    return Source((archive,), origin, lambda folder: pictures(folder / archive, origin))


def any_source(name: str) -> tuple[Source, ...]:
    """Return the sources of data set `name` in NAME.zip, NAME.tar and so on."""
    return tuple(source(name + suffix) for suffix in SUFFIXES)


def pictures(path: Path, origin: str) -> Iterator[Picture]:
    """Yield the images in an archive's class folders, whatever folders these lie in. UserError if there are none.

    A warning says how many images lie elsewhere in the archive, and names the first of them.
    """
    found, others = False, []

    def wanted(name: str) -> bool:
        if place(name) is None and _is_data(name) and PurePosixPath(name).suffix.lower() in image_suffixes():
            others.append(name)
        return place(name) is not None

    for name, content in members(path, origin, wanted):
        if spot := place(name):
            found = True
            yield Picture(*spot, content)
    where = "at …/{train,val,test}/CLASS/IMAGE"
    left = f"{len(others)} elsewhere, such as {others[0]!r}" if others else ""
    if not found:
        cure = f". It has {left}: unpack it and split its class folders with --from_folder" if others else ""
        raise UserError(f"{path} has no images {where}, so it is not {origin}{cure}")
    if others:
        log.warning("%s has images that are not %s and were left out: %s", path, where, left)


def place(name: str) -> tuple[str, str, str] | None:
    """Return split, class and file of a member; None for what is no image or left by file managers.

    Only the last three parts count, so a class may be called `train` too.
    """
    match PurePosixPath(name).parts:
        case [*_, split, class_name, file] if split.lower() in SPLIT_WORDS and _is_data(name):
            return SPLIT_WORDS[split.lower()], class_name, file
    return None


def _is_data(name: str) -> bool:
    """Return whether a member may be an image, by its name; file managers leave others."""
    path = PurePosixPath(name)
    hidden = path.name.startswith(".") or path.parent.name.startswith(".") or "__MACOSX" in path.parts
    return not hidden and path.name != "Icon\r" and path.suffix.lower() not in NOT_IMAGES
