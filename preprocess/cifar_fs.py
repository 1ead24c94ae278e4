"""CIFAR-FS (Bertinetto et al., 2019): 64/16/20 classes of CIFAR-100, 600 images each, from cifar100.zip."""

import shutil
from collections import Counter
from pathlib import Path
from zipfile import ZipFile

from tqdm import tqdm

from preprocess.archives import open_zip
from preprocess.staging import SPLITS, Contents
from utils.errors import UserError

ARCHIVE = "cifar100.zip"
ORIGIN = (
    "cifar100.zip, the CIFAR-FS of Bertinetto et al. (60,000 PNGs, about 134 MB uncompressed), "
    "which was distributed with R2D2: https://github.com/bertinetto/r2d2"
)
FULL_SPLIT = {"train": 64, "val": 16, "test": 20}  # classes
IMAGES_PER_CLASS = 600


def unpack(dataset_dir: Path, folder: Path) -> Contents:
    """Write the images of `dataset_dir`/cifar100.zip to `folder`/SPLIT/CLASS, as its split files say.

    UserError where archive, split files or images are missing or too few.
    """
    with open_zip(dataset_dir / ARCHIVE, ORIGIN) as archive:
        split_of = _read_splits(archive)
        members = [name for name in archive.namelist() if _class_of(name) in split_of]
        contents = _expected(split_of, Counter(map(_class_of, members)))
        for split, classes in contents.items():
            for class_name in classes:
                (folder / split / class_name).mkdir(parents=True)
        for name in tqdm(members, desc="CIFAR_FS", unit=" images", disable=None):
            class_name = _class_of(name)
            path = folder / split_of[class_name] / class_name / name.rpartition("/")[2]
            with archive.open(name) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
    return contents


def _read_splits(archive: ZipFile) -> dict[str, str]:
    """Class name -> split. UserError for a missing split file and for a class listed twice."""
    split_of: dict[str, str] = {}
    for split in SPLITS:
        name = f"cifar100/splits/bertinetto/{split}.txt"
        if name not in archive.NameToInfo:
            raise UserError(f"{archive.filename} has no {name}, so it is not the CIFAR-FS archive. Fetch {ORIGIN}")
        for class_name in archive.read(name).decode(errors="replace").split():
            if class_name in split_of:
                raise UserError(
                    f"{archive.filename} lists class {class_name!r} in {split_of[class_name]} and in {split}"
                )
            split_of[class_name] = split
    return split_of


def _class_of(name: str) -> str:
    """The class of a member cifar100/data/CLASS/IMAGE.png; empty for any other member."""
    match name.split("/"):
        case ["cifar100", "data", class_name, file] if file.endswith(".png") and not file.startswith("."):
            return class_name
    return ""


def _expected(split_of: dict[str, str], images: Counter[str]) -> Contents:
    """What the data set must hold. UserError for a class without images, or in the full split without 600."""
    contents = {
        split: {class_name: images[class_name] for class_name in split_of if split_of[class_name] == split}
        for split in SPLITS
    }
    full = {split: len(classes) for split, classes in contents.items()} == FULL_SPLIT
    for class_name, split in split_of.items():
        found = images[class_name]
        if found == 0 or (full and found != IMAGES_PER_CLASS):
            wanted = IMAGES_PER_CLASS if full else "some"
            what = f"{split} class {class_name!r} has {found} images, not {wanted}"
            raise UserError(f"{ARCHIVE} is incomplete: {what}. Fetch {ORIGIN}")
    return contents
