"""Makes data sets ready for training: DATASET_DIR/NAME/{train,val,test}/CLASS/*.

python preprocess/preprocess.py --datasets CIFAR_FS omniglot glyphs digits glyphs_colour

A data set that is there already is left alone. What needs an archive says which, and where to put it.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path

if not __package__:  # run as a script: Python looks for modules in this folder, not in the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from preprocess import cifar_fs, digits, glyphs, omniglot, staging
from utils.errors import UserError
from utils.names import canonical_name, find_dataset

# What needs no download: folder to fill -> what is now in it.
BUILT_IN: dict[str, Callable[[Path], staging.Contents]] = {
    "glyphs": glyphs.draw_glyphs,
    "glyphs_colour": glyphs.draw_glyphs_colour,
    "digits": digits.write_digits,
}
# What is made from an archive: folder of archives, folder to fill -> what is now in it.
FROM_ARCHIVE: dict[str, Callable[[Path, Path], staging.Contents]] = {
    "CIFAR_FS": cifar_fs.unpack,
    "omniglot": omniglot.unpack,
}


def prepare(name: str, dataset_dir: Path) -> Path:
    """Make data set `name`, in any spelling, in `dataset_dir`, where its archive lies. Returns its folder.

    UserError for an unknown name, a missing or damaged archive, a full disk, and a folder that is incomplete.
    """
    known = known_name(name)
    target = find_dataset(dataset_dir, name)
    if staging.is_present(target):
        print(f"{target} is there already and left alone: {staging.check_complete(target)}")
    else:
        staging.build(target, BUILT_IN.get(known) or partial(FROM_ARCHIVE[known], dataset_dir))
        print(f"{target} is ready: {staging.check_complete(target)}")
    return target


def ensure_builtin(name: str, dataset_dir: Path) -> None:
    """Make `name` if it is a built-in data set that is not in `dataset_dir` yet."""
    if canonical_name(name) in BUILT_IN and not staging.is_present(find_dataset(dataset_dir, name)):
        prepare(name, dataset_dir)


def known_name(name: str) -> str:
    """The canonical name of a data set that can be made. UserError with the nearest, and all, for others."""
    names = [*FROM_ARCHIVE, *BUILT_IN]
    if canonical_name(name) in names:
        return canonical_name(name)
    lower = {known.lower(): known for known in names}
    nearest = lower[get_close_matches(name.lower(), lower, n=1, cutoff=0)[0]]
    raise UserError(
        f"no recipe for data set {name!r}; did you mean {nearest}? Known: {', '.join(names)}. "
        "Any other data set needs no preprocessing as class folders: NAME/{train,val,test}/CLASS/*"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--datasets", nargs="+", required=True, metavar="NAME", help=", ".join([*FROM_ARCHIVE, *BUILT_IN])
    )
    parser.add_argument(
        "--dataset_dir", type=Path, default=Path("datasets"), help="archives and data sets (%(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        for name in [known_name(name) for name in options.datasets]:
            prepare(name, options.dataset_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
