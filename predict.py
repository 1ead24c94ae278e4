"""Say which class images belong to, from a few images of each class and a trained model.

python predict.py --load models/glyphs_CxGrad --support docs/example_images/support --query docs/example_images/query
python predict.py --load experiments/CIFAR_FS_5way_5shot/CxGrad_4conv/saved_models/best --support pets --query new/*.jpg

--support holds a folder for each class, with a few of its images; classes may differ in their numbers of images.
Results go to predictions.csv (file, class, probability of each) and predictions.png. docs/predicting.md says more.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from predictor import Estimate, Predictor
from utils import entry
from utils.errors import UserError
from utils.files import new_folder, replace_file, write_csv
from utils.images import list_classes, list_images
from utils.prediction_sheet import Answered, prediction_sheet
from utils.progress import set_up_logging

log = logging.getLogger(__name__)

CSV, SHEET = "predictions.csv", "predictions.png"


def parse_command(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = "checkpoint of a training, or a folder that utils.export wrote"
    parser.add_argument("--load", type=Path, required=True, metavar="MODEL", help=model)
    parser.add_argument("--support", type=Path, required=True, metavar="FOLDER", help="images as FOLDER/CLASS/*")
    query = "images to classify: files, and folders with all that is in them"
    parser.add_argument("--query", type=Path, nargs="+", required=True, metavar="PATH", help=query)
    out = "where results go (predictions, or where that exists predictions_2, ...)"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=out)
    parser.add_argument("--one_by_one", action="store_true", help="no answer depends on the other query images")
    parser.add_argument("--gpu", metavar="ID", help="a GPU's number, or cpu (the first GPU if there is one, else cpu)")
    return parser.parse_args(argv)


def query_files(paths: Sequence[Path]) -> list[Path]:
    """Return the files among `paths` and in folders among them; UserError for one that is not there or has no image."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"there is no {path} to classify; --query takes image files and folders of them")
        if not (path.is_dir() or path.is_file()):
            raise UserError(f"{path} is neither a file nor a folder; --query takes image files and folders of them")
        found = list_images(path) if path.is_dir() else [path]
        if not found:
            raise UserError(f"there are no images in {path} to classify")
        files += found
    return files


def check_free(out: Path) -> None:
    """Raise UserError where `out` is a file, or a folder that holds results already."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a folder with --out")
    if there := [name for name in (CSV, SHEET) if os.path.lexists(out / name)]:
        raise UserError(f"{out} holds {there[0]} already; move it away, or name another folder with --out")


def check_apart(files: Sequence[Path], pixels: np.ndarray, others: Sequence[Path], other_pixels: np.ndarray) -> None:
    """Raise UserError if a support image is there twice, or is among the query images, as a file or as a picture."""
    known: dict[bytes, Path] = {}
    for path, picture in zip(files, pixels, strict=True):
        if (first := known.setdefault(picture.tobytes(), path)) is not path:
            raise UserError(f"the support images {first} and {path} are the same picture; remove one of them")
    for path, picture in zip(others, other_pixels, strict=True):
        if same := known.get(picture.tobytes()):
            problem = f"the query image {path} is also a support image ({same}), whose class is known"
            raise UserError(f"{problem}; take it out of one of the two")


def in_words(estimate: Estimate | None, alone: Sequence[str]) -> str:
    """Say what the leave-one-out estimate is, and which classes are `alone`, with one image that has to stay."""
    if estimate is None:
        return (
            "no estimate of the accuracy: each class has one support image, and without it nothing is left of a class"
        )
    low, high = estimate.ci95
    without = f". Never left out, as they are alone in their class: the images of {', '.join(alone)}" if alone else ""
    return (
        f"leave-one-out accuracy on the support: {estimate.accuracy:.0%}, {estimate.right} of {estimate.of} images "
        f"(95 % interval {low:.0%} to {high:.0%}), classified after a fit to the others, where each class has one less"
        f"{without}"
    )


def note_batch_norm(predictor: Predictor, queries: int) -> None:
    """State which batch norm is used, and warn where answers depend on what else is in the batch."""
    if not predictor.transductive:
        log.info("batch norm: %s statistics; no answer depends on other query images", predictor.options.batch_norm)
    elif predictor.one_by_one:
        log.info("batch norm: each query image together with the support images; no answer depends on other ones")
    else:
        log.warning(
            "batch norm: transductive, %d query image%s at once, so answers depend on what else is among them; for few "
            "images, or when most are of one class, take --one_by_one",
            queries,
            "s" * (queries != 1),
        )


def write_results(
    folder: Path, names: Sequence[str], support: dict[str, list[Path]], queries: Sequence[Path], found: np.ndarray
) -> None:
    """Write the table and the picture of probabilities `found`, (queries, classes), and say how many are of a class."""
    taken: dict[str, list[tuple[Path, float]]] = {name: [] for name in names}
    rows = []
    for path, probabilities in zip(queries, found.tolist(), strict=True):
        best = names[int(np.argmax(probabilities))]
        taken[best].append((path, max(probabilities)))
        each = {f"probability of {plain(name)}": f"{p:.6f}" for name, p in zip(names, probabilities, strict=True)}
        rows.append({"file": plain(str(path)), "class": plain(best), **each})
    write_csv(folder / CSV, rows)
    sheet = prediction_sheet([Answered(name, support[name], taken[name]) for name in names])
    with replace_file(folder / SHEET) as file:
        sheet.save(file, format="PNG")
    log.info("%s", ", ".join(f"{plain(name)}: {len(taken[name])}" for name in names))
    log.info("written: %s, %s", folder / CSV, folder / SHEET)


def plain(name: str) -> str:
    """Return a name as Unicode, which names of files need not be."""
    return name.encode(errors="replace").decode()


def main(argv: Sequence[str] | None = None) -> None:
    set_up_logging()
    asked = parse_command(argv)
    if asked.out:
        check_free(asked.out)
    listing, queries = list_classes(asked.support), query_files(asked.query)
    files = [listing.root / file for file in listing.files]
    labels = [file.partition("/")[0] for file in listing.files]
    predictor = Predictor.load(asked.load, asked.gpu, asked.one_by_one)
    pixels, query_pixels = predictor.pixels(files), predictor.pixels(queries)
    check_apart(files, pixels, queries, query_pixels)
    predictor.fit(pixels, labels)
    if aside := [path for path in list_images(asked.support) if path not in {*files}]:
        log.warning(
            "%s is no support image, as it does not lie directly in a class folder (%d such)", aside[0], len(aside)
        )
    many = "s" * (len(queries) != 1)
    log.info("%d classes, %d support images, %d query image%s", len(predictor.classes_), len(files), len(queries), many)
    alone = [name for name, size in listing.class_sizes.items() if size == 1]
    log.info("%s", plain(in_words(predictor.leave_one_out(), alone)))
    note_batch_norm(predictor, len(queries))
    support = {name: [file for file, label in zip(files, labels, strict=True) if label == name] for name in labels}
    found = predictor.predict_proba(query_pixels)
    out = asked.out or new_folder(Path("predictions"))
    write_results(out, list(map(str, predictor.classes_)), support, queries, found)


if __name__ == "__main__":
    sys.exit(entry.run(main))
