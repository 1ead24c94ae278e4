"""A user's own images become a data set: class folders split at random, or images that CSV files split.

The images are copied, so the data set stays whole whatever becomes of the originals, and those are never changed.
"""

import argparse
import csv
import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from preprocess.staging import SPLIT_WORDS, SPLITS, Contents, Maker, first_of
from preprocess.writing import Picture, write_images
from utils.errors import UserError
from utils.images import Listing, image_suffixes, list_classes
from utils.names import find_dataset, is_plain, leads_out

log = logging.getLogger(__name__)

NAMED = 5  # missing files that an error names
CURE = "Mend what is named, or move it out of the way, then run the same command again"  # of unreadable images


# --- the command line --------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a data set from your own images, which are copied and never changed")
    group.add_argument("--from_folder", type=Path, metavar="DIR", help="class folders DIR/CLASS/*, or images for --csv")
    group.add_argument(
        "--split", type=float, nargs=3, metavar=("TRAIN", "VAL", "TEST"),
        help="share of the classes in each split, drawn at random; for example 0.64 0.16 0.2",
    )  # fmt: skip
    group.add_argument("--seed", type=int, help="of that draw, 0 to 2**32 - 1 (0)")
    group.add_argument(
        "--csv", type=Path, nargs="+", metavar="FILE",
        help="train.csv val.csv test.csv with columns filename,label; or one file with filename,label,split",
    )  # fmt: skip


def maker(options: argparse.Namespace) -> Maker | None:
    """Return what fills an empty folder as the options say; None without --from_folder. UserError for bad options."""
    source, split, seed, csv_files = options.from_folder, options.split, options.seed, options.csv
    if source is None:
        if any(value is not None for value in (split, seed, csv_files)):
            raise UserError("--split, --seed and --csv say how to split --from_folder DIR: give that too")
        return None
    _check_place(source, options.datasets, options.dataset_dir)
    if (split is None) == (csv_files is None):
        raise UserError("--from_folder needs either --split TRAIN VAL TEST or --csv FILE ..., and not both")
    made = f"--from_folder {source.resolve()}"
    if split is None:
        if seed is not None:
            raise UserError("--seed goes with --split: CSV files leave nothing to chance")
        files = " ".join(str(_locate(source, path).resolve()) for path in csv_files)
        return Maker(partial(from_csv, source, csv_files), f"{made} --csv {files}")
    seed = seed or 0
    if not all(share > 0 for share in split) or not math.isclose(sum(split), 1, abs_tol=1e-6):
        shares = " ".join(f"{share:g}" for share in split)
        needed = "three positive shares that sum to 1, as 0.64 0.16 0.2 do"
        raise UserError(f"--split {shares} sums to {sum(split):g}: it needs {needed}")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed} is not between 0 and 2**32 - 1")
    shares = " ".join(map(str, split))
    return Maker(partial(split_folder, source, split, seed), f"{made} --split {shares} --seed {seed}")


def _check_place(source: Path, names: Sequence[str], dataset_dir: Path) -> None:
    if len(names) != 1 or not is_plain(names[0]):
        raise UserError(f"--from_folder makes one data set: give --datasets one name, not {' '.join(names)}")
    if not source.is_dir():
        raise UserError(f"--from_folder {source} is not a folder")
    target = find_dataset(dataset_dir, names[0])
    if source.resolve().is_relative_to(target.resolve()):
        where, cure = f"lies where the data set would be made, {target},", "give another --datasets name"
    elif dataset_dir.resolve().is_relative_to(source.resolve()):
        where, cure = f"has the folder of data sets, {dataset_dir}, in it", "choose another --dataset_dir"
    else:
        return
    raise UserError(f"--from_folder {source} {where} and must stay as it is: {cure}")


# --- class folders -----------------------------------------------------------------------------------------


def split_folder(source: Path, fractions: Sequence[float], seed: int, folder: Path) -> Contents:
    """Copy `source`/CLASS/* to `folder`/SPLIT/CLASS/*, the classes split by `draw_split`; warn of other images.

    UserError for fewer than three classes, a class without images, unreadable images, and splits in place of classes.
    """
    folders = {path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")}
    if "train" in folders and folders <= set(SPLITS):  # a class may well be called train
        raise UserError(
            f"{source} is split already, into {', '.join(sorted(folders))}: it needs no --from_folder. "
            "Copy or link it to DATASET_DIR/NAME"
        )
    listing = list_classes(source)
    split_of = draw_split(list(listing.class_sizes), fractions, seed)
    _note_others(listing)
    places = (file.split("/", 1) for file in listing.files)
    pictures = (Picture(split_of[name], name, file, _read_image(source / name / file)) for name, file in places)
    return write_images(folder, pictures, str(source), len(listing.files), CURE)


def _note_others(listing: Listing) -> None:
    """Warn of images that are not directly in a class folder."""
    root, taken = listing.root, set(listing.files)
    images = (path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in image_suffixes())
    others = sorted(
        path
        for path in images
        if path.as_posix() not in taken
        and not any(part.startswith((".", "__MACOSX")) for part in path.parts)
        and (root / path).is_file()
    )
    if others:
        where = f"directly in a class folder {root}/CLASS"
        log.warning("%d images are not %s and are left out, %r among them", len(others), where, str(root / others[0]))


def _read_image(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the image {str(path)!r}: {error.strerror}. {CURE}") from error


def draw_split(class_names: Sequence[str], fractions: Sequence[float], seed: int) -> dict[str, str]:
    """Return class name -> split: the sorted names, permuted and cut where the fractions say, at least one for each.

    The same names and seed give the same split everywhere. UserError for fewer than three classes.
    """
    total = len(class_names)
    if total < len(SPLITS):
        raise UserError(f"{total} classes ({', '.join(class_names)}) are too few for train, val and test")
    order = np.random.RandomState(seed).permutation(total)  # its streams are the same in every numpy
    first = min(max(round(total * fractions[0]), 1), total - 2)
    second = min(max(round(total * (fractions[0] + fractions[1])), first + 1), total - 1)
    splits = ["train"] * first + ["val"] * (second - first) + ["test"] * (total - second)
    names = sorted(class_names)
    return {names[index]: split for index, split in zip(order, splits, strict=True)}


# --- CSV files ---------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """This is a line of a CSV file."""

    where: str  # such as "train.csv, line 5"
    file: str
    label: str
    split: str


def from_csv(source: Path, csv_files: Sequence[Path], folder: Path) -> Contents:
    """Copy the listed images, `source`/FILENAME or `source`/LABEL/FILENAME, to `folder`/SPLIT/LABEL/FILENAME.

    UserError, before an image is copied, for a missing file, a class in two splits, an image listed twice, a label
    or file name that leads out of its folder, a split without classes; with the file and line of the first.
    """
    rows = read_rows(source, csv_files)
    places = zip(rows, _find_images(source, rows), strict=True)
    pictures = (Picture(row.split, row.label, path.name, _read_image(path)) for row, path in places)
    return write_images(folder, pictures, str(source), len(rows), CURE)


def read_rows(source: Path, csv_files: Sequence[Path]) -> list[Row]:
    """Return all lines of train.csv, val.csv and test.csv, or of one file with a column `split`.

    A file that is not found as it is named is looked for in `source`.
    """
    if len(csv_files) == 1:
        return list(_read(source, csv_files[0], ("filename", "label", "split")))
    if len(csv_files) != len(SPLITS):
        found = len(csv_files)
        raise UserError(f"--csv needs train.csv val.csv test.csv, or one file with a column split; not {found}")
    rows: list[Row] = []
    for split, path in zip(SPLITS, csv_files, strict=True):
        if SPLIT_WORDS.get(path.stem.lower(), split) != split:
            raise UserError(f"--csv has {path.name} in the place of {split}: give train.csv val.csv test.csv, in order")
        rows += _read(source, path, ("filename", "label"), split)
    return rows


def _read(source: Path, path: Path, columns: Sequence[str], split: str = "") -> Iterator[Row]:
    """Yield the lines. UserError where the file or a cell is missing, or a split is none."""
    try:
        with _locate(source, path).open(newline="", encoding="utf-8-sig") as file:
            lines = csv.DictReader(file, strict=True)
            lines.fieldnames = [name.strip().lower() for name in lines.fieldnames or ()]
            if not set(columns) <= set(lines.fieldnames):
                names = ",".join(lines.fieldnames)
                raise UserError(f"{path} must start with a line {','.join(columns)}; it starts {names!r}")
            for line in lines:
                cells = [(line[column] or "").strip() for column in columns]
                where = f"{path}, line {lines.line_num}"
                if not all(cells):
                    raise UserError(f"{where}: {' or '.join(columns)} is missing")
                name, label, word = [*cells, split][:3]
                if word.lower() not in SPLIT_WORDS:
                    raise UserError(f"{where}: split {word!r} is none of {', '.join(SPLITS)}")
                yield Row(where, name, label, SPLIT_WORDS[word.lower()])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path} ({error}); it is looked for as given, then in {source}") from error


def _locate(source: Path, csv_file: Path) -> Path:
    return csv_file if csv_file.is_file() else source / csv_file


def _find_images(source: Path, rows: Sequence[Row]) -> list[Path]:
    """Return the file of each row. Images of two classes may have one name, where they lie in folders of their own.

    UserError for odd names, a class in two splits, an image that is missing, or listed or copied twice, and a split
    without classes.
    """
    found: list[Path] = []
    missing: list[str] = []
    class_rows: dict[str, Row] = {}
    listed: dict[Path | tuple[str, str], Row] = {}
    for row in rows:
        if not is_plain(row.label):
            raise UserError(f"{row.where}: label {row.label!r} cannot be the name of a folder: change it")
        if leads_out(row.file) or not is_plain(row.file.rpartition("/")[2]):
            raise UserError(f"{row.where}: file name {row.file!r} leads out of the folder of images, is hidden or odd")
        before = class_rows.setdefault(row.label, row)
        if before.split != row.split:
            both = f"{before.split} ({before.where}) and {row.split} ({row.where})"
            raise UserError(f"class {row.label!r} is in two splits, {both}: a class belongs to one of them")
        path = next(filter(Path.is_file, (source / row.file, source / row.label / row.file)), None)
        if path is None:
            missing.append(f"{row.file} ({row.where})")
            continue
        found.append(path)
        for key in (path, (row.label, path.name)):  # the second: where it would be copied to
            before = listed.setdefault(key, row)
            if before is not row:
                raise UserError(
                    f"{row.where}: {row.file} of class {row.label!r} is there already as {before.file} of class "
                    f"{before.label!r} ({before.where}): list an image once, or rename one of the two"
                )
    if missing:
        where = f"neither at {source}/FILENAME nor at {source}/LABEL/FILENAME"
        raise UserError(f"{len(missing)} of {len(rows)} listed images are {where}: {first_of(missing, NAMED)}")
    if empty := [split for split in SPLITS if split not in {row.split for row in rows}]:
        raise UserError(f"the CSV files have no class for {' and '.join(empty)}: each split needs at least one")
    return found
