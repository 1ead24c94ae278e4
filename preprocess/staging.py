"""Every data set is built beside its place, checked, then moved there in one step.

A data set is a folder NAME/{train,val,test}/CLASS/IMAGE with a `contents.json` that says how many images each
class was built with, and from what. Whatever interrupts a build, NAME is either absent or whole; nothing that this
module did not make is ever removed.
"""

import errno
import glob
import json
import os
import platform
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError
from utils.files import parse_json

Contents = dict[str, dict[str, int]]  # split -> class_name -> number of images
SPLITS = ("train", "val", "test")
SPLIT_WORDS = {split: split for split in SPLITS} | {"valid": "val", "validation": "val"}  # in lower case
CONTENTS_FILE = "contents.json"
MADE = "made from"  # its key beside the splits; older files have none


class Maker(NamedTuple):
    """A maker fills the folder of a data set."""

    fill: Callable[[Path], Contents]  # an empty folder -> what must be in it now
    made: str  # what from, in words; it is recorded, and another one is another data set


def first_of(items: Sequence[str], most: int, separator: str = "; ") -> str:
    """Join the first items and the number of the others: "a; b; and 7 more"."""
    more = [f"and {len(items) - most:,} more"] if len(items) > most else []
    return separator.join([*items[:most], *more])


def build(target: Path, fill: Callable[[Path], Contents], made: str = "") -> None:
    """Make the data set folder `target`: `fill` writes into an empty folder and returns what must be in it.

    UserError where images are missing then, or the disk is full or not writable; nothing is left behind. Where another
    process built the same data set meanwhile, its folder stays and ours goes.
    """
    staging = target.with_name(f"{_staging_prefix(target)}{os.getpid()}")
    try:
        _remove_leftovers(target)
        staging.mkdir(parents=True)
        expected = fill(staging)
        if missing := shortfall(expected, count_images(staging)):
            raise UserError(f"{target.name} came out incomplete and was not kept: {missing}")
        (staging / CONTENTS_FILE).write_text(json.dumps(expected | ({MADE: made} if made else {}), indent=1))
        try:
            staging.rename(target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = "the disk is full. Free some space" if is_full else f"{error}. Mend that"
        raise UserError(
            f"cannot build {target}: {cure} or choose another folder with --dataset_dir, then run the same command "
            "again; nothing was left behind"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _staging_prefix(target: Path) -> str:
    # The host is part of the name: a process id says nothing about builds of other hosts on a shared disk.
    return f".{target.name}.partial-{platform.node()}-"


def _remove_leftovers(target: Path) -> None:
    """Remove what killed builds of `target` on this host left; those of running processes stay."""
    prefix = _staging_prefix(target)
    for path in target.parent.glob(glob.escape(prefix) + "*"):
        number = path.name.removeprefix(prefix)
        if number.isdecimal() and not _is_another_process(int(number)):
            shutil.rmtree(path, ignore_errors=True)


def _is_another_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def is_present(target: Path) -> bool:
    """Return whether there is a data set at `target`, or anything else that must not be written over."""
    return target.is_file() or target.is_symlink() or (target.is_dir() and any(target.iterdir()))


def check_complete(target: Path) -> str:
    """Return one line on what `target` holds. UserError where images are missing, with the first of them."""
    found, record = count_images(target), _read_record(target)
    if record and (missing := shortfall(record[0], found)):
        raise UserError(
            f"{target} is there but not complete: {missing}. Nothing was changed: "
            "move it away or delete it, then run the same command again"
        )
    images = {split: sum(classes.values()) for split, classes in found.items()}
    if not any(images.values()):
        raise UserError(f"{target} {_why_no_images(target)}. Nothing was changed")
    held = "; ".join(
        f"{split} {len(found[split])} classes, {images[split]} images" if found.get(split) else f"no {split}"
        for split in SPLITS
    )
    if record is None:
        return f"{held}{_misnamed(target)} (not built by this program: not checked further)"
    return held + (f" (made from {record[1]})" if record[1] else "")


def check_made(target: Path, made: str) -> None:
    """Raise UserError where the data set at `target` is known to be made from something else."""
    record = _read_record(target)
    was = record[1] if record else "files that were put there"
    if was and was != made:
        raise UserError(
            f"{target} is there already, made from {was}; this command asks for {made}. Nothing was changed: "
            "give the new one another --datasets name"
        )


def _read_record(target: Path) -> tuple[Contents, str] | None:
    """Return the contents.json: what was built, and from what, empty if that is not known. UserError if it is damaged.

    None where there is none, as in a data set that was not built here.
    """
    file = target / CONTENTS_FILE
    if not file.is_file():
        return None
    try:
        content = parse_json(file.read_text())
        made = content.pop(MADE, "")
        if not all(isinstance(images, int) for classes in content.values() for images in classes.values()):
            raise ValueError("its counts are no numbers")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged ({error}), so the images of {target} cannot be checked. Put a copy of it back; or, "
            "to go on unchecked, move that one file away. Nothing was changed"
        ) from error
    return content, str(made)


def _why_no_images(target: Path) -> str:
    """Return in words what is at `target` in the place of {train,val,test}/CLASS/*."""
    if target.is_symlink() and not target.exists():
        return f"is a link to {os.readlink(target)}, which is not there"
    if not target.is_dir():
        return "is a file, not a folder"
    folders = [path.name for path in target.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if any(name.lower() not in SPLIT_WORDS for name in folders):
        return (
            "has no images in train/, val/ or test/. If these are class folders that are not split, make a data set "
            f"of another name of them: --datasets NAME --from_folder {target} --split 0.64 0.16 0.2"
        )
    return f"has no images in train/, val/ or test/ (archives belong into {target.parent}){_misnamed(target)}"


def _misnamed(target: Path) -> str:
    """Return in words which splits have folders of another name; empty if none has."""
    words = {path.name: SPLIT_WORDS.get(path.name.lower()) for path in sorted(target.iterdir()) if path.is_dir()}
    return "".join(
        f"; {name}/ is not read, rename it to {split}/" for name, split in words.items() if split not in (None, name)
    )


def count_images(folder: Path) -> Contents:
    """Return the number of files per class of each split that exists, hidden files left out."""
    return {
        split: {
            entry.name: sum(not file.name.startswith(".") for file in os.scandir(entry))
            for entry in os.scandir(folder / split)
            if entry.is_dir()
        }
        for split in SPLITS
        if (folder / split).is_dir()
    }


def shortfall(expected: Contents, found: Contents) -> str:
    """Return in words the first three classes with fewer images than expected; empty if there are none."""
    short = [
        f"{split}/{class_name} has {has} of {images} images"
        for split, classes in expected.items()
        for class_name, images in classes.items()
        if (has := found.get(split, {}).get(class_name, 0)) < images
    ]
    return first_of(short, 3, ", ")
