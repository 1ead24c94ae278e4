"""What a data set can be made from, and what it must hold then."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from preprocess.staging import SPLITS, Contents
from preprocess.writing import Picture, write_images
from utils.errors import UserError

# A sample, not a damaged archive: at most these shares of the published images and of the classes of each split.
SAMPLE, SAMPLE_CLASSES = 0.1, 0.5


class Source(NamedTuple):
    """One form in which a data set is in circulation."""

    needs: tuple[str, ...]  # files or folders, all of them, in the folder of archives
    origin: str  # what to fetch and where from
    unpack: Callable[[Path, Path], Contents]  # folder of archives, empty folder to fill -> what is now in it
    md5: tuple[tuple[str, str], ...] = ()  # of files in `needs`, where the publisher's is known


class Published(NamedTuple):
    """What the paper says a data set holds."""

    classes: dict[str, int]  # split -> number of classes
    images: int | dict[str, int]  # of each class, or in each split, or in "all" of them

    @property
    def total(self) -> int:
        """Images in all."""
        per_class = self.images
        return sum(self.classes.values()) * per_class if isinstance(per_class, int) else sum(per_class.values())


class Recipe(NamedTuple):
    sources: tuple[Source, ...]  # the first whose files are there is taken
    published: Published | None = None


def choose(name: str, recipe: Recipe, others: Sequence[Source], dataset_dir: Path) -> Source:
    """The first of the recipe's sources, then of the `others`, whose files are all there.

    UserError, where there is none, that names a folder in the place of an archive or a link to nothing, or lists each
    of the recipe's forms and what to fetch for it.
    """
    for source in (*recipe.sources, *others):
        if not _missing(source, dataset_dir):
            return source
    for source in (*recipe.sources, *others):
        _refuse_odd(source, dataset_dir)
    forms = [_form(source, dataset_dir) for source in recipe.sources]
    forms += [f"{' or '.join(source.needs[0] for source in others)}: {others[0].origin}"] if others else []
    listed = "".join(f"\n  {form}" for form in forms)
    raise UserError(
        f"{name} cannot be made: its archive is missing. Fetch one of these and put it into {dataset_dir} as it "
        f"is:{listed}"
    )


def of_pictures(
    name: str,
    needs: Iterable[str],
    origin: str,
    pictures: Callable[[Path], Iterable[Picture]],
    total: int | None = None,
) -> Source:
    """A source whose images come one by one: `pictures` takes the folder of archives."""
    return Source(tuple(needs), origin, lambda archives, folder: write_images(folder, pictures(archives), name, total))


def read_split(name: str) -> dict[str, list[str]]:
    """Split -> class names, of a data set whose split is shipped in preprocess/splits."""
    split: dict[str, list[str]] = json.loads((Path(__file__).parent / "splits" / f"{name}.json").read_text())
    return split


def note_checksums(source: Source, dataset_dir: Path) -> None:
    """Print a note for each archive that is not byte for byte the published one. Its contents decide, not this."""
    for name, published in source.md5:
        with (dataset_dir / name).open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if found == published:
            print(f"{name} has its publisher's checksum")
        else:
            print(f"note: {name} is not the published file (md5 {found}, not {published}): its contents are checked")


def _missing(source: Source, dataset_dir: Path) -> list[str]:
    return [name for name in source.needs if not _is_there(dataset_dir / name)]


def _is_there(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and not path.suffix)


def _refuse_odd(source: Source, dataset_dir: Path) -> None:
    """UserError where what it needs is a link to nothing, or a folder in the place of an archive."""
    for path in (dataset_dir / name for name in _missing(source, dataset_dir)):
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path} is a link to {os.readlink(path)}, which is not there: mend or remove the link")
        if path.is_dir():
            raise UserError(f"{path} is a folder, not an archive. Put the archive there as it is (do not unpack it)")


def _form(source: Source, dataset_dir: Path) -> str:
    missing = _missing(source, dataset_dir)
    there = f" ({dataset_dir / missing[0]} is missing)" if len(missing) < len(source.needs) else ""
    return f"{' and '.join(source.needs)}{there}: {source.origin}"


def check(name: str, contents: Contents, published: Published | None) -> None:
    """Compare what a source held with what the paper says. UserError with the differences; a small sample passes."""
    _check_overlap(name, contents)
    differences = _differences(contents, published) if published else []
    if published and differences and not _is_sample(contents, published):
        raise UserError(
            f"{name} does not hold what was published: {_shown(differences)}. Its archive is incomplete or another "
            "one; it is untouched, and nothing was made of it. Fetch it again, or another form of it"
        )


def note(name: str, contents: Contents, published: Published) -> str:
    """A line that says how data set `name` differs from the published one; empty if it has as many images."""
    differences = _differences(contents, published)
    if not differences:
        return ""
    what = f"a sample of {name}," if _is_sample(contents, published) else f"{name}, but"
    return f"note: this is {what} not the published data set: {_shown(differences)}"


def _shown(differences: list[str]) -> str:
    return "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")


def _check_overlap(name: str, contents: Contents) -> None:
    splits = Counter(class_name for classes in contents.values() for class_name in classes)
    for class_name, times in splits.items():
        if times > 1:
            where = [split for split in contents if class_name in contents[split]]
            raise UserError(f"class {class_name!r} of {name} is in {' and in '.join(where)}: splits must not overlap")


def _differences(contents: Contents, published: Published) -> list[str]:
    found = [
        f"{split} has {_less_or_more(len(contents.get(split, {})), classes, 'classes')}"
        for split, classes in published.classes.items()
        if len(contents.get(split, {})) != classes
    ]
    if isinstance(published.images, int):
        return found + [
            f"{split}/{class_name} has {_less_or_more(images, published.images, 'images')}"
            for split, classes in contents.items()
            for class_name, images in classes.items()
            if images != published.images
        ]
    images = {split: sum(classes.values()) for split, classes in contents.items()}
    images["all"] = sum(images.values())
    return found + [
        f"{'it' if part == 'all' else part} has {_less_or_more(images.get(part, 0), wanted, 'images')}"
        for part, wanted in published.images.items()
        if images.get(part, 0) != wanted
    ]


def _less_or_more(found: int, wanted: int, what: str) -> str:
    return f"{found} {what}, {abs(found - wanted)} {'fewer' if found < wanted else 'more'} than {wanted}"


def _is_sample(contents: Contents, published: Published) -> bool:
    """Every split has far fewer classes than published, and all of them together few images."""
    found = sum(sum(classes.values()) for classes in contents.values())
    few = all(0 < len(contents.get(split, {})) <= SAMPLE_CLASSES * published.classes[split] for split in SPLITS)
    return few and found <= SAMPLE * published.total
