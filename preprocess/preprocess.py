"""Makes data sets ready for training: DATASET_DIR/NAME/{train,val,test}/CLASS/*.

python preprocess/preprocess.py --datasets CIFAR_FS FC100 mini_imagenet tiered_imagenet CUB omniglot
python preprocess/preprocess.py --datasets CIFAR_FS --download
python preprocess/preprocess.py --datasets glyphs digits glyphs_colour
python preprocess/preprocess.py --datasets flowers --from_folder DIR --split 0.64 0.16 0.2

A data set that is there already is left alone. What needs an archive says which, and where to put it; the second line
fetches it (docs/data.md), the last makes a data set of your own images. Any other NAME is made from an archive of class
folders, NAME.zip or NAME.tar.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

if not __package__:  # run as a script: Python looks for modules in this folder, not in the repository's root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from preprocess import class_archives, class_folders, fetching, staging
from preprocess.sources import DataSet, check, choose, note, note_checksums
from preprocess.staging import Maker
from preprocess.writing import write_images
from utils import entry
from utils.errors import UserError
from utils.images import list_classes
from utils.names import KNOWN, canonical_name, find_dataset, is_plain
from utils.progress import set_up_logging

log = logging.getLogger(__name__)


def declared(name: str) -> DataSet:
    """Return the declaration of a data set, in any spelling; archives of class folders are sources of every one."""
    data_set = DataSet(canonical_name(name), ())
    if data_set.name in KNOWN:
        module = import_module(f"preprocess.{KNOWN[data_set.name].module}")
        data_set = next(known for known in module.DATA_SETS if known.name == data_set.name)
    return data_set._replace(sources=data_set.sources + class_archives.any_source(data_set.name))


def prepare(name: str, dataset_dir: Path, make: Maker | None = None) -> Path:
    """Make data set `name`, in any spelling, in `dataset_dir`, where its archive lies, and return its folder.

    `make` fills it in the place of what is declared. UserError for an unknown name, a missing or damaged archive, one
    that holds other than what was published, a full disk, a folder that is incomplete, and one that is there but was
    made from something other than what `make` takes.
    """
    target = find_dataset(dataset_dir, name)
    if staging.is_present(target):
        log.info("%s is there already and left alone: %s", target, staging.check_complete(target))
        if make:
            staging.check_made(target, make.made)
    else:
        staging.build(target, *(make or maker(name, dataset_dir)))
        log.info("%s is ready: %s", target, staging.check_complete(target))
    if difference := published_note(target):
        log.warning(difference)
    return target


def published_note(target: Path) -> str:
    """Return a line on how the data set at `target` differs from the published one; empty if it does not."""
    data_set = declared(target.name)
    return note(data_set.name, staging.count_images(target), data_set.published) if data_set.published else ""


def maker(name: str, dataset_dir: Path) -> Maker:
    """Return what fills a folder with data set `name`. UserError for an unknown name and for a missing archive."""
    if not is_plain(name):
        raise UserError(f"--datasets {name!r} cannot be the name of a folder in {dataset_dir}")
    data_set = declared(name)
    archives = [dataset_dir / file for source in data_set.sources for file in source.needs]
    if data_set.name not in KNOWN and not any(map(os.path.lexists, archives)):
        lower = {known.lower(): known for known in KNOWN}
        nearest = lower[get_close_matches(name.lower(), lower, n=1, cutoff=0)[0]]
        raise UserError(
            f"no recipe for data set {name!r}; did you mean {nearest}? Known: {', '.join(KNOWN)}. "
            f"For any other, put {name}.zip or {name}.tar with class folders {{train,val,test}}/CLASS/* into "
            f"{dataset_dir}, or split class folders of your own with --from_folder DIR --split 0.64 0.16 0.2"
        )
    source = choose(data_set, dataset_dir)

    def make(folder: Path) -> staging.Contents:
        note_checksums(source, dataset_dir)
        total = data_set.published and data_set.published.total
        contents = write_images(folder, source.pictures(dataset_dir), data_set.name, total)
        check(data_set.name, contents, data_set.published)
        if not source.needs:
            from preprocess.contact_sheet import contact_sheet  # here, because matplotlib takes long to import

            sheet = contact_sheet(folder, {split: list_classes(folder / split).files for split in contents})
            sheet.save(folder / "contact_sheet.png")
        return contents

    return Maker(make, " and ".join(source.needs))


def ensure_builtin(name: str, dataset_dir: Path) -> None:
    """Make `name` if it is a built-in data set that is not in `dataset_dir` yet."""
    if declared(name).is_built_in and not staging.is_present(find_dataset(dataset_dir, name)):
        prepare(name, dataset_dir)


def main(arguments: Sequence[str] | None = None) -> int:
    set_up_logging()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", nargs="+", required=True, metavar="NAME", help=", ".join(KNOWN))
    parser.add_argument(
        "--dataset_dir", type=Path, default=Path("datasets"), help="archives and data sets (%(default)s)"
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch missing archives into --dataset_dir; docs/data.md says from where",
    )
    class_folders.add_options(parser)
    options = parser.parse_args(arguments)
    return entry.run(lambda: _run(options), "interrupted: no half data set is left; run the same command again")


def _run(options: argparse.Namespace) -> None:
    """Make all data sets; before the first, which may take long, fetch archives and look whether each can be made."""
    from_folder = class_folders.maker(options)
    if from_folder and options.download:
        raise UserError("--download has nothing to fetch for a data set --from_folder: leave one of them out")
    reasons = []
    for name in options.datasets if not from_folder else ():
        try:
            if not is_plain(name) or not staging.is_present(find_dataset(options.dataset_dir, name)):
                if options.download and is_plain(name):
                    fetching.fetch(declared(name), options.dataset_dir)
                maker(name, options.dataset_dir)
        except UserError as error:
            reasons.append(str(error))
    if reasons:
        raise UserError("\n".join(reasons))
    for name in options.datasets:
        prepare(name, options.dataset_dir, from_folder)


if __name__ == "__main__":
    sys.exit(main())
