"""A data set is declared by what it can be made from, and by what it must hold then."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import NamedTuple

from preprocess.staging import SPLITS, Contents, first_of
from preprocess.writing import Picture
from utils.errors import UserError

log = logging.getLogger(__name__)

# A sample, not a damaged archive: at most these shares of the published images and of the classes of each split.
SAMPLE, SAMPLE_CLASSES = 0.1, 0.5


class Source(NamedTuple):
    """A source is one form in which a data set is in circulation."""

    needs: tuple[str, ...]  # files or folders, all of them, in the folder of archives; none where it is drawn
    origin: str  # what to fetch and where from
    pictures: Callable[[Path], Iterable[Picture]]  # from the folder of archives
    md5: Mapping[str, str] = {}  # of files in `needs`, where the publisher's is known
    addresses: Mapping[str, tuple[str, ...]] = {}  # of all files in `needs`, or none: where `--download` fetches them


class Published(NamedTuple):
    """These are the numbers that the paper of a data set states."""

    classes: dict[str, int]  # split -> number of classes
    images: int | dict[str, int]  # of each class, or in each split, or in "all" of them

    @property
    def total(self) -> int:
        """Return the number of images in all."""
        per_class = self.images
        return sum(self.classes.values()) * per_class if isinstance(per_class, int) else sum(per_class.values())


class DataSet(NamedTuple):
    """A data set is declared once, in the DATA_SETS of the module that utils/names.py names for it."""

    name: str
    sources: tuple[Source, ...]  # the first whose files are there is taken
    published: Published | None = None

    @property
    def is_built_in(self) -> bool:
        """Return whether it can be made of nothing."""
        return any(not source.needs for source in self.sources)


def read_split(name: str) -> dict[str, list[str]]:
    """Return split -> class names of a data set whose split is shipped in preprocess/splits."""
    split: dict[str, list[str]] = json.loads((Path(__file__).parent / "splits" / f"{name}.json").read_text())
    return split


def split_of_classes(name: str) -> dict[str, str]:
    """Return class name -> split of a data set whose split is shipped."""
    return {class_name: split for split, classes in read_split(name).items() for class_name in classes}


# --- which source is taken ---------------------------------------------------------------------------------


def choose(data_set: DataSet, dataset_dir: Path) -> Source:
    """Return the first of the data set's sources whose files are all there.

    UserError, where there is none, that names a folder in the place of an archive or a link to nothing, or lists the
    forms and what to fetch for each.
    """
    forms: dict[str, list[str]] = {}  # origin -> files
    missing: list[Path] = []
    for source in data_set.sources:
        lacks = missing_files(source, dataset_dir)
        if not lacks:
            return source
        note = f" ({lacks[0]} is missing)" if len(lacks) < len(source.needs) else ""
        forms.setdefault(source.origin, []).append(" and ".join(source.needs) + note)
        missing += lacks
    for path in missing:
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a link to {os.readlink(path)}, which is not there: mend or remove the link")
        if path.is_dir():
            raise UserError(f"{path} is a folder, not an archive. Put the archive there as it is (do not unpack it)")
    where = f"--datasets {data_set.name} --dataset_dir {quote(str(dataset_dir))}"
    fetched = any(source.addresses for source in data_set.sources)
    raise UserError(
        f"{data_set.name} cannot be made: its archive is missing. Fetch one of these and put it into {dataset_dir} "
        "as it is:"
        + "".join(f"\n  {' or '.join(files)}: {origin}" for origin, files in forms.items())
        + (f"\nOr have it fetched:\n  python preprocess/preprocess.py {where} --download" if fetched else "")
    )


def missing_files(source: Source, dataset_dir: Path) -> list[Path]:
    """Return which of the files that a source needs are not there; folders must have no suffix."""
    paths = [dataset_dir / name for name in source.needs]
    return [path for path in paths if not path.is_file() and not (path.is_dir() and not path.suffix)]


def md5_of(path: Path) -> str:
    """Return the md5 of a file's contents, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def note_checksums(source: Source, dataset_dir: Path) -> None:
    """Log whether each archive is byte for byte the published one. Its contents decide, not this."""
    for name, published in source.md5.items():
        if (found := md5_of(dataset_dir / name)) == published:
            log.info("%s has its publisher's checksum", name)
        else:
            log.warning("%s is not the published file (md5 %s, not %s): its contents decide", name, found, published)


# --- what it must hold -------------------------------------------------------------------------------------


def check(name: str, contents: Contents, published: Published | None) -> None:
    """Raise UserError for a class in two splits, and for differences from what the paper says; a sample passes."""
    split_of: dict[str, str] = {}
    for split, class_name in chain.from_iterable(((split, each) for each in contents[split]) for split in contents):
        if split_of.setdefault(class_name, split) != split:
            both = f"{split_of[class_name]} and in {split}"
            raise UserError(f"class {class_name!r} of {name} is in {both}: splits must not overlap")
    differences = _differences(contents, published) if published else []
    if published and differences and not _is_sample(contents, published):
        raise UserError(
            f"{name} does not hold what was published: {first_of(differences, 5)}. Its archive is incomplete or "
            "another one; it is untouched, and nothing was made of it. Fetch it again, or another form of it"
        )


def note(name: str, contents: Contents, published: Published) -> str:
    """Return a line that says how data set `name` differs from the published one; empty if it has as many images."""
    differences = _differences(contents, published)
    what = f"a sample of {name}," if _is_sample(contents, published) else f"{name}, but"
    return f"this is {what} not the published data set: {first_of(differences, 5)}" if differences else ""


def _differences(contents: Contents, published: Published) -> list[str]:
    """Return each number of classes or images that is not the published one, in words."""
    counts = [(split, len(contents.get(split, {})), classes, "classes") for split, classes in published.classes.items()]
    if isinstance(published.images, int):
        counts += [
            (f"{split}/{class_name}", images, published.images, "images")
            for split, classes in contents.items()
            for class_name, images in classes.items()
        ]
    else:
        found_in = {split: sum(classes.values()) for split, classes in contents.items()}
        found_in["all"] = sum(found_in.values())
        counts += [
            ("it" if part == "all" else part, found_in.get(part, 0), wanted, "images")
            for part, wanted in published.images.items()
        ]
    return [
        f"{part} has {found} {what}, {abs(found - wanted)} {'fewer' if found < wanted else 'more'} than {wanted}"
        for part, found, wanted, what in counts
        if found != wanted
    ]


def _is_sample(contents: Contents, published: Published) -> bool:
    """Return whether every split has far fewer classes than published, and all of them together few images."""
    found = sum(sum(classes.values()) for classes in contents.values())
    few = all(0 < len(contents.get(split, {})) <= SAMPLE_CLASSES * published.classes[split] for split in SPLITS)
    return few and found <= SAMPLE * published.total
