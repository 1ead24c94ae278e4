"""How every data set comes to be: built beside its place, checked, then moved there in one step.

A data set is a folder NAME/{train,val,test}/CLASS/IMAGE with a `contents.json` that says how many images each
class was built with. Whatever interrupts a build, NAME is either absent or whole; nothing that this module
did not make is ever removed.
"""

import errno
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError

Contents = dict[str, dict[str, int]]  # split -> class_name -> number of images
SPLITS = ("train", "val", "test")
CONTENTS_FILE = "contents.json"


def build(target: Path, write_images: Callable[[Path], Contents]) -> None:
    """Make the data set folder `target`: `write_images` fills an empty folder and says what must be in it.

    UserError where images are missing then, or the disk is full or not writable; nothing is left behind.
    """
    with _staged(target) as folder:
        expected = write_images(folder)
        missing = shortfall(expected, count_images(folder))
        if missing:
            raise UserError(f"{target.name} came out incomplete and was not kept: {missing}")
        (folder / CONTENTS_FILE).write_text(json.dumps(expected, indent=1))


def is_present(target: Path) -> bool:
    """Whether there is a data set at `target`, or anything else that must not be written over."""
    return target.is_file() or (target.is_dir() and any(target.iterdir()))


def check_complete(target: Path) -> str:
    """One line on what `target` holds. UserError where images are missing, with the first of them."""
    found = count_images(target)
    record = target / CONTENTS_FILE
    missing = shortfall(json.loads(record.read_text()), found) if record.is_file() else ""
    if missing or not any(sum(classes.values()) for classes in found.values()):
        missing = missing or f"it has no images in train/, val/ or test/ (archives belong into {target.parent})"
        raise UserError(
            f"{target} is there but not complete: {missing}. Nothing was changed: "
            "move it away or delete it, then run the same command again"
        )
    return summary(found) + ("" if record.is_file() else " (not built by this program: not checked further)")


def count_images(folder: Path) -> Contents:
    """Files per class of each split that exists, hidden files left out."""
    return {
        split: {entry.name: _count_files(entry.path) for entry in os.scandir(folder / split) if entry.is_dir()}
        for split in SPLITS
        if (folder / split).is_dir()
    }


def _count_files(folder: str) -> int:
    return sum(not entry.name.startswith(".") for entry in os.scandir(folder))


def shortfall(expected: Contents, found: Contents) -> str:
    """The classes with fewer images than expected, in words, the first three; empty if there are none."""
    short = [
        f"{split}/{class_name} has {found.get(split, {}).get(class_name, 0)} of {images} images"
        for split, classes in expected.items()
        for class_name, images in classes.items()
        if found.get(split, {}).get(class_name, 0) < images
    ]
    more = f" and {len(short) - 3} more classes" if len(short) > 3 else ""
    return ", ".join(short[:3]) + more


def summary(contents: Contents) -> str:
    """For example: train 64 classes, 38400 images; val 16 classes, 9600 images."""
    return "; ".join(
        f"{split} {len(classes)} classes, {sum(classes.values())} images" for split, classes in contents.items()
    )


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """An empty folder beside `target` that takes its place when the block ends; an error removes it."""
    staging = target.with_name(f"{_staging_prefix(target)}{os.getpid()}")
    try:
        _remove_leftovers(target)
        staging.mkdir(parents=True)
        yield staging
        _publish(staging, target)
    except OSError as error:
        raise UserError(_explain(error, target)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _staging_prefix(target: Path) -> str:
    # The host is part of the name: a process id says nothing about builds of other hosts on a shared disk.
    return f".{target.name}.partial-{platform.node()}-"


def _remove_leftovers(target: Path) -> None:
    """Remove what killed builds of `target` on this host left; those of running processes stay."""
    pattern = re.compile(re.escape(_staging_prefix(target)) + r"(\d+)")
    for path in target.parent.iterdir() if target.parent.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and not _is_another_process(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_another_process(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _publish(staging: Path, target: Path) -> None:
    """Rename; where another process built the same data set meanwhile, its folder stays and ours goes."""
    try:
        staging.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _explain(error: OSError, target: Path) -> str:
    cannot = f"cannot build {target}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"{cannot}: the disk is full. Free some space or choose another disk with --dataset_dir, "
            "then run the same command again; nothing was left behind"
        )
    return f"{cannot}: {error}. Mend that, or choose another folder with --dataset_dir"
