"""Forgiving data-set names: CIFAR-FS, CIFAR_FS and cifar_fs are one data set, everywhere; safe names of files."""

import os
import unicodedata
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

from utils.errors import UserError


class Known(NamedTuple):
    """A data set that the program can make."""

    module: str  # of preprocess/, which declares what it is made from
    aliases: tuple[str, ...] = ()  # such as MAML++'s configurations have
    turned: bool = False  # training counts each class four times, turned by 0, 90, 180 and 270 degrees


KNOWN = {
    "mini_imagenet": Known("imagenet", ("mini_imagenet_full_size",)),
    "tiered_imagenet": Known("imagenet"),
    "CIFAR_FS": Known("cifar100"),
    "FC100": Known("cifar100"),
    "CUB": Known("cub"),
    "omniglot": Known("omniglot", ("omniglot_dataset",), turned=True),
    "glyphs": Known("glyphs"),
    "glyphs_colour": Known("glyphs"),
    "digits": Known("digits"),
}


def _fold(name: str) -> str:
    """Return the name in lower case without '-', '_' and ' '; color counts as colour."""
    return name.lower().translate(str.maketrans("", "", "-_ ")).replace("color", "colour")


_CANONICAL = {_fold(alias): name for name, known in KNOWN.items() for alias in (name, *known.aliases)}


def canonical_name(name: str) -> str:
    """Return the one spelling used for folders and results; a name that is not known comes back unchanged."""
    return _CANONICAL.get(_fold(name), name)


def same_dataset(one: str, other: str) -> bool:
    """Return whether two names are spellings of one data set."""
    return _fold(canonical_name(one)) == _fold(canonical_name(other))


def turns_classes(name: str) -> bool:
    """Return whether training on a data set turns its classes into new ones, where --rotate_classes is not set."""
    known = KNOWN.get(canonical_name(name))
    return known is not None and known.turned


def find_dataset(dataset_dir: Path, name: str) -> Path:
    """Return the folder of data set `name`, however it is spelt; where there is none, the path at which it belongs.

    A folder spelt exactly like `name` wins. UserError where only other spellings exist, and several of them.
    """
    exact = dataset_dir / name
    if exact.is_dir() or not dataset_dir.is_dir():
        return exact if exact.is_dir() else dataset_dir / canonical_name(name)
    spellings = {_fold(name), _fold(canonical_name(name))}
    folders = [path for path in dataset_dir.iterdir() if _fold(path.name) in spellings and path.is_dir()]
    if len(folders) > 1:
        spelt = " and ".join(sorted(path.name for path in folders))
        raise UserError(f"{name!r} could be {spelt}, both in {dataset_dir}: give the exact name of one of them")
    return folders[0] if folders else dataset_dir / canonical_name(name)


def missing_dataset(dataset_dir: Path, name: str) -> UserError:
    """Return the error that says what to put where, and which data sets are there."""
    folder = find_dataset(dataset_dir, name)
    there = sorted(path.name for path in dataset_dir.glob("[!.]*/")) if dataset_dir.is_dir() else []
    return UserError(
        f"No data set {name!r}: there is no folder {folder}. Put its images at "
        f"{folder}/{{train,val,test}}/CLASS/*.png (or .jpg), or its archive into {dataset_dir} and run "
        f"`python preprocess/preprocess.py --datasets {folder.name}`. "
        f"Data sets in {dataset_dir}: {', '.join(there) or 'none'}"
    )


def can_name_a_file(text: str) -> bool:
    """Return whether it is some text that a path may hold: nothing that a terminal obeys, all known to the system."""
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # half of a pair that stands for one character
        return False
    return bool(text.strip()) and all(unicodedata.category(character) != "Cc" for character in text)


def is_plain(name: str) -> bool:
    """Return whether a folder or file may be called so: no way out and not hidden."""
    return can_name_a_file(name) and not name.startswith(".") and not set(name) & set("/\\")


def leads_out(path: str) -> bool:
    """Return whether a path from elsewhere is absolute or has '..', on any system."""
    parsed = PureWindowsPath(path)  # it knows drives and backslashes too
    return bool(parsed.drive or parsed.root or ".." in parsed.parts)
