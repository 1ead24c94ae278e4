"""What a data set can be made from, and what it must hold then."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from preprocess.staging import SPLITS, Contents
from preprocess.writing import Picture, write_images
from utils.errors import UserError

SAMPLE = 0.1  # share of the published images up to which a set of fewer classes counts as a sample, not as damaged


class Source(NamedTuple):
    """One form in which a data set is in circulation."""

    needs: tuple[str, ...]  # files or folders, all of them, in the folder of archives
    origin: str  # what to fetch and where from
    unpack: Callable[[Path, Path], Contents]  # folder of archives, empty folder to fill -> what is now in it
    md5: tuple[tuple[str, str], ...] = ()  # of files in `needs`, where the publisher's is known


class Published(NamedTuple):
    """What the paper says a data set holds."""

    classes: dict[str, int]  # split -> number of classes
    images: int | dict[str, int]  # of each class, or in each split

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

    UserError, where there is none, that lists each of the recipe's forms and what to fetch for it.
    """
    for source in (*recipe.sources, *others):
        if not _missing(source, dataset_dir):
            return source
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
    return [name for name in source.needs if not (dataset_dir / name).exists()]


def _form(source: Source, dataset_dir: Path) -> str:
    missing = _missing(source, dataset_dir)
    there = f" ({dataset_dir / missing[0]} is missing)" if len(missing) < len(source.needs) else ""
    return f"{' and '.join(source.needs)}{there}: {source.origin}"


def check(name: str, contents: Contents, published: Published | None) -> None:
    """Compare what a source held with what the paper says. UserError with the differences.

    A small sample, which many people cut for their tests, is taken with a note that says so.
    """
    _check_overlap(name, contents)
    if published is None:
        return
    differences = _differences(contents, published)
    if differences and _is_sample(contents, published):
        print(f"note: this is a sample of {name}, not the published data set: {differences[0]}")
    elif differences:
        shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if len(differences) > 5 else "")
        raise UserError(
            f"{name} does not hold what was published: {shown}. Its archive is incomplete or another one; "
            "it is untouched, and nothing was made of it. Fetch it again, or another form of it"
        )


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
    return found + [
        f"{split} has {_less_or_more(sum(contents.get(split, {}).values()), images, 'images')}"
        for split, images in published.images.items()
        if sum(contents.get(split, {}).values()) != images
    ]


def _less_or_more(found: int, wanted: int, what: str) -> str:
    return f"{found} {what}, {abs(found - wanted)} {'fewer' if found < wanted else 'more'} than {wanted}"


def _is_sample(contents: Contents, published: Published) -> bool:
    """Every split has fewer classes than published, and all of them together few images."""
    found = sum(sum(classes.values()) for classes in contents.values())
    fewer = all(0 < len(contents.get(split, {})) < published.classes[split] for split in SPLITS)
    return fewer and found <= SAMPLE * published.total
