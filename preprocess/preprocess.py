"""Makes data sets ready for training: DATASET_DIR/NAME/{train,val,test}/CLASS/*.

python preprocess/preprocess.py --datasets CIFAR_FS FC100 mini_imagenet tiered_imagenet CUB omniglot
python preprocess/preprocess.py --datasets glyphs digits glyphs_colour
python preprocess/preprocess.py --datasets flowers --from_folder DIR --split 0.64 0.16 0.2

A data set that is there already is left alone. What needs an archive says which, and where to put it; the third
line makes one of your own images. Any other NAME is made from an archive of class folders, NAME.zip or NAME.tar.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

if not __package__:  # run as a script: Python looks for modules in this folder, not in the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from preprocess import cifar100, class_archives, class_folders, cub, digits, glyphs, imagenet, omniglot, staging
from preprocess.sources import Recipe, check, choose, note_checksums
from utils.errors import UserError
from utils.names import canonical_name, find_dataset

Maker = Callable[[Path], staging.Contents]  # folder to fill -> what is now in it

# What needs no download.
BUILT_IN: dict[str, Maker] = {
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
    archive, one that holds other than what was published, a full disk, and a folder that is incomplete.
    """
    target = find_dataset(dataset_dir, name)
    if staging.is_present(target):
        print(f"{target} is there already and left alone: {staging.check_complete(target)}")
    else:
        staging.build(target, make or maker(name, dataset_dir))
        print(f"{target} is ready: {staging.check_complete(target)}")
    return target


def maker(name: str, dataset_dir: Path) -> Maker:
    """What fills a folder with data set `name`. UserError for an unknown name and for a missing archive."""
    known = canonical_name(name)
    if known in BUILT_IN:
        return BUILT_IN[known]
    others = class_archives.any_source(known)
    if known not in RECIPES and not any((dataset_dir / source.needs[0]).is_file() for source in others):
        raise UserError(_no_recipe(name, dataset_dir))
    recipe = RECIPES.get(known, Recipe(()))
    source = choose(known, recipe, others, dataset_dir)

    def make(folder: Path) -> staging.Contents:
        note_checksums(source, dataset_dir)
        contents = source.unpack(dataset_dir, folder)
        check(known, contents, recipe.published)
        return contents

    return make


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
    try:
        from_folder = class_folders.maker(options)
        for name in options.datasets:  # all names and archives before the first, which may take long
            if not (from_folder or staging.is_present(find_dataset(options.dataset_dir, name))):
                maker(name, options.dataset_dir)
        for name in options.datasets:
            prepare(name, options.dataset_dir, from_folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
