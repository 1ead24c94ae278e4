"""Makes data sets ready for training: DATASET_DIR/NAME/{train,val,test}/CLASS/*.

python preprocess/preprocess.py --datasets CIFAR_FS FC100 mini_imagenet tiered_imagenet CUB omniglot
python preprocess/preprocess.py --datasets glyphs digits glyphs_colour
python preprocess/preprocess.py --datasets flowers --from_folder DIR --split 0.64 0.16 0.2

A data set that is there already is left alone. What needs an archive says which, and where to put it; the third
line makes one of your own images. Any other NAME is made from an archive of class folders, NAME.zip or NAME.tar.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

if not __package__:  # run as a script: Python looks for modules in this folder, not in the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from preprocess import cifar100, class_archives, class_folders, cub, digits, glyphs, imagenet, omniglot, staging
from preprocess.sources import Recipe, check, choose, note, note_checksums
from preprocess.staging import Maker
from utils import entry
from utils.errors import UserError
from utils.names import canonical_name, find_dataset, is_plain

# What needs no download.
BUILT_IN: dict[str, Callable[[Path], staging.Contents]] = {
    "glyphs": glyphs.draw_glyphs,
    "glyphs_colour": glyphs.draw_glyphs_colour,
    "digits": digits.write_digits,
}
# What is made from an archive.
RECIPES: dict[str, Recipe] = {
    "mini_imagenet": imagenet.MINI_IMAGENET,
    "tiered_imagenet": imagenet.TIERED_IMAGENET,
    "CIFAR_FS": cifar100.CIFAR_FS,
    "FC100": cifar100.FC100,
    "CUB": cub.RECIPE,
    "omniglot": omniglot.RECIPE,
}


def prepare(name: str, dataset_dir: Path, make: Maker | None = None) -> Path:
    """Make data set `name`, in any spelling, in `dataset_dir`, where its archive lies. Returns its folder.

    `make` fills it in the place of the recipe of that name. UserError for an unknown name, a missing or damaged
    archive, one that holds other than what was published, a full disk, a folder that is incomplete, and one that is
    there but was made from something other than what `make` takes.
    """
    target = find_dataset(dataset_dir, name)
    if staging.is_present(target):
        print(f"{target} is there already and left alone: {staging.check_complete(target)}")
        if make:
            staging.check_made(target, make.made)
    else:
        staging.build(target, *(make or maker(name, dataset_dir)))
        print(f"{target} is ready: {staging.check_complete(target)}")
    if difference := published_note(target):
        print(difference)
    return target


def published_note(target: Path) -> str:
    """A line that says how the data set at `target` differs from the published one; empty if it does not."""
    known = canonical_name(target.name)
    published = RECIPES[known].published if known in RECIPES else None
    return note(known, staging.count_images(target), published) if published else ""


def maker(name: str, dataset_dir: Path) -> Maker:
    """What fills a folder with data set `name`. UserError for an unknown name and for a missing archive."""
    if not is_plain(name):
        raise UserError(f"--datasets {name!r} cannot be the name of a folder in {dataset_dir}")
    known = canonical_name(name)
    if known in BUILT_IN:
        return Maker(BUILT_IN[known], "")
    others = class_archives.any_source(known)
    if known not in RECIPES and not any(os.path.lexists(dataset_dir / source.needs[0]) for source in others):
        raise UserError(_no_recipe(name, dataset_dir))
    recipe = RECIPES.get(known, Recipe(()))
    source = choose(known, recipe, others, dataset_dir)

    def make(folder: Path) -> staging.Contents:
        note_checksums(source, dataset_dir)
        contents = source.unpack(dataset_dir, folder)
        check(known, contents, recipe.published)
        return contents

    return Maker(make, " and ".join(source.needs))


def _check_all(names: Sequence[str], dataset_dir: Path) -> None:
    """UserError that says of each data set which cannot be made why; before the first, which may take long."""
    reasons = []
    for name in names:
        try:
            if not is_plain(name) or not staging.is_present(find_dataset(dataset_dir, name)):
                maker(name, dataset_dir)
        except UserError as error:
            reasons.append(str(error))
    if reasons:
        raise UserError("\n".join(reasons))


def _no_recipe(name: str, dataset_dir: Path) -> str:
    names = [*RECIPES, *BUILT_IN]
    lower = {known.lower(): known for known in names}
    nearest = lower[get_close_matches(name.lower(), lower, n=1, cutoff=0)[0]]
    return (
        f"no recipe for data set {name!r}; did you mean {nearest}? Known: {', '.join(names)}. "
        f"For any other, put {name}.zip or {name}.tar with class folders {{train,val,test}}/CLASS/* into "
        f"{dataset_dir}, or split class folders of your own with --from_folder DIR --split 0.64 0.16 0.2"
    )


def ensure_builtin(name: str, dataset_dir: Path) -> None:
    """Make `name` if it is a built-in data set that is not in `dataset_dir` yet."""
    if canonical_name(name) in BUILT_IN and not staging.is_present(find_dataset(dataset_dir, name)):
        prepare(name, dataset_dir)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", required=True, metavar="NAME", help=", ".join([*RECIPES, *BUILT_IN]))
    parser.add_argument(
        "--dataset_dir", type=Path, default=Path("datasets"), help="archives and data sets (%(default)s)"
    )
    class_folders.add_options(parser)
    options = parser.parse_args(arguments)
    return entry.run(lambda: _run(options), "interrupted: no half data set is left; run the same command again")


def _run(options: argparse.Namespace) -> None:
    from_folder = class_folders.maker(options)
    if not from_folder:
        _check_all(options.datasets, options.dataset_dir)
    for name in options.datasets:
        prepare(name, options.dataset_dir, from_folder)


if __name__ == "__main__":
    sys.exit(main())
