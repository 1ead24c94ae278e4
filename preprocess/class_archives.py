"""A data set that comes as an archive of class folders: …/{train,val,test}/CLASS/IMAGE in a zip or tar."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from preprocess.archives import members
from preprocess.sources import Source, of_pictures
from preprocess.staging import SPLITS
from preprocess.writing import Picture
from utils.errors import UserError
from utils.images import NOT_IMAGES

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def source(name: str, archive: str, origin: str, total: int | None = None) -> Source:
    """Data set `name` from the file `archive`."""
    return of_pictures(name, (archive,), origin, lambda folder: pictures(folder / archive, origin), total)


def any_source(name: str) -> tuple[Source, ...]:
    """Data set `name` from NAME.zip, NAME.tar and so on."""
    origin = "an archive of class folders {train,val,test}/CLASS/*"
    return tuple(source(name, f"{name}{suffix}", origin) for suffix in SUFFIXES)


def pictures(path: Path, origin: str) -> Iterator[Picture]:
    """The images in an archive's class folders, whatever folders these lie in. UserError if there are none."""
    found = False
    for name, content in members(path, origin, lambda name: place(name) is not None):
        if spot := place(name):
            found = True
            yield Picture(*spot, content)
    if not found:
        raise UserError(f"{path} has no images at …/{{train,val,test}}/CLASS/IMAGE, so it is not {origin}")


def place(name: str) -> tuple[str, str, str] | None:
    """Split, class and file of a member; None for what is no image, and for what file managers leave in archives.

    Only the last three parts count, so a class may be called `train` too.
    """
    parts = PurePosixPath(name).parts
    if len(parts) < 3 or parts[-3] not in SPLITS or "__MACOSX" in parts:
        return None
    hidden = parts[-1].startswith(".") or parts[-2].startswith(".")
    return None if hidden or PurePosixPath(name).suffix.lower() in NOT_IMAGES else (parts[-3], parts[-2], parts[-1])
