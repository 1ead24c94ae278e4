"""A data set that comes as an archive of class folders: …/{train,val,test}/CLASS/IMAGE in a zip or tar.

`valid` and `validation` are val, and capitals do not matter.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from preprocess.archives import members
from preprocess.sources import Source, of_pictures
from preprocess.staging import SPLIT_WORDS
from preprocess.writing import Picture
from utils.errors import UserError
from utils.images import NOT_IMAGES, image_suffixes

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def source(name: str, archive: str, origin: str, total: int | None = None) -> Source:
    """Return the source of data set `name` in the file `archive`."""
    return of_pictures(name, (archive,), origin, lambda folder: pictures(folder / archive, origin), total)


def any_source(name: str) -> tuple[Source, ...]:
    """Return the sources of data set `name` in NAME.zip, NAME.tar and so on."""
    origin = "an archive of class folders {train,val,test}/CLASS/*"
    return tuple(source(name, f"{name}{suffix}", origin) for suffix in SUFFIXES)


def pictures(path: Path, origin: str) -> Iterator[Picture]:
    """Yield the images in an archive's class folders, whatever folders these lie in. UserError if there are none.

    Prints how many images lie elsewhere in the archive, and the first of them.
    """
    found, others = False, []

    def wanted(name: str) -> bool:
        if place(name) is None and _is_image(name):
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
        print(f"note: {path} has images that are not {where} and were left out: {left}")


def place(name: str) -> tuple[str, str, str] | None:
    """Return split, class and file of a member; None for what is no image or left by file managers.

    Only the last three parts count, so a class may be called `train` too.
    """
    parts = PurePosixPath(name).parts
    if len(parts) < 3 or parts[-3].lower() not in SPLIT_WORDS or not _is_data(name):
        return None
    return SPLIT_WORDS[parts[-3].lower()], parts[-2], parts[-1]


def _is_data(name: str) -> bool:
    """Return whether a member may be an image, by its name; file managers leave others."""
    path = PurePosixPath(name)
    hidden = path.name.startswith(".") or path.parent.name.startswith(".") or "__MACOSX" in path.parts
    return not hidden and path.name != "Icon\r" and path.suffix.lower() not in NOT_IMAGES


def _is_image(name: str) -> bool:
    return _is_data(name) and PurePosixPath(name).suffix.lower() in image_suffixes()
