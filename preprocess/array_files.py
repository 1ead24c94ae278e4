"""Some data sets come as arrays: pickles and npz files of pixels or of PNGs, with labels.

Each reader returns the images of one split, as (H, W, 3) pixels or PNG files, and the class name of each. Files are
read as views or in chunks, so memory stays flat up to tieredImageNet's 9.5 GB.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from preprocess.archives import open_zip
from preprocess.pickles import read_pickle, release
from preprocess.sources import Source
from preprocess.staging import SPLITS
from preprocess.writing import Picture
from utils.errors import UserError

CHUNK = 2**24  # bytes that are read at once
MAX_SIDE = 1024  # pixels
MAX_LABEL = 2**31
NAMED = 5  # entries of a dict that an error names
RELEASE_EVERY = 1000  # images
Images = tuple[Iterable[Any], list[str]]
Reader = Callable[..., Images]  # of the name of a split and its files


def source(origin: str, read: Reader, *patterns: str, train: str = "train") -> Source:
    """Return a source with files of its own for each split; the split's name, or `train`, takes the place of {}."""
    words = {"train": train, "val": "val", "test": "test"}
    files = {split: [pattern.format(words[split]) for pattern in patterns] for split in SPLITS}

    def from_folder(folder: Path) -> Iterator[Picture]:
        for split in SPLITS:
            yield from pictures(read, split, *(folder / file for file in files[split]))

    return Source(tuple(file for split in SPLITS for file in files[split]), origin, from_folder)


def pictures(read: Reader, split: str, *files: Path) -> Iterator[Picture]:
    images, class_names = read(split, *files)
    for index, (image, class_name) in enumerate(zip(images, class_names, strict=True)):
        if index % RELEASE_EVERY == 0:
            release(image)
        yield Picture(split, class_name, f"{index:06d}.png", _content(image, files[0]))


def data_and_labels(_: str, path: Path) -> Images:
    """Read MetaOptNet's pickles: 'data' (N, H, W, 3) and 'labels', ids that differ between splits; perhaps names."""
    content = _entries(path, "data", "labels")
    images, labels = _pixels(content["data"], path), _ids(content["labels"], path)
    names = content.get("catname2label")
    names = names if isinstance(names, dict) else {}
    name_of = {label: _text(name, path) for name, label in zip(names, _ids([*names.values()], path), strict=True)}
    _check_count(len(images), len(labels), path)
    return images, [name_of.get(label, f"class_{label:03d}") for label in labels]


def image_data_and_class_dict(_: str, path: Path) -> Images:
    """Read mini-imagenet-cache: 'image_data' (N, H, W, 3) and 'class_dict', class name -> places in it."""
    content = _entries(path, "image_data", "class_dict")
    images = _pixels(content["image_data"], path)
    if not isinstance(content["class_dict"], dict):
        raise _unexpected(path, f"a {type(content['class_dict']).__name__}")
    class_of = sorted(
        (index, _text(name, path)) for name, places in content["class_dict"].items() for index in _ids(places, path)
    )
    if [index for index, _ in class_of] != list(range(len(images))):
        raise UserError(f"{path}: class_dict does not name each of the {len(images)} images once. Fetch it again")
    return images, [name for _, name in class_of]


def npz_and_labels(split: str, npz: Path, labels: Path) -> Images:
    """Read tieredImageNet as MetaOptNet has it: 'images' in an npz, labels in a pickle."""
    class_names = _tiered_labels(labels, split)
    return _npz_rows(npz, "images", len(class_names)), class_names


def pngs_and_labels(split: str, path: Path, labels: Path) -> Images:
    """Read tieredImageNet as Ren et al. have it: a list of PNG files, labels in a second pickle."""
    class_names, pngs = _tiered_labels(labels, split), read_pickle(path)
    if not isinstance(pngs, list):
        raise UserError(f"{path} holds a {type(pngs).__name__}, not a list of PNG files")
    _check_count(len(pngs), len(class_names), path)
    return pngs, class_names


def _check_count(images: int, labels: int, path: Path) -> None:
    if images != labels:
        raise UserError(f"{path} has {images} images, but there are {labels} labels: they do not belong together")


def _tiered_labels(path: Path, split: str) -> list[str]:
    """Return the class of each image. 'labels' differ between splits, 'label_specific' starts at 0 in each."""
    content = read_pickle(path)
    if isinstance(content, dict) and "labels" in content:
        return [f"class_{label:03d}" for label in _ids(content["labels"], path)]
    content = _entries(path, "label_specific")
    labels, words = _ids(content["label_specific"], path), content.get("label_specific_str", [])
    words = words.tolist() if isinstance(words, np.ndarray) else words
    if not isinstance(words, list):
        raise _unexpected(path, f"a {type(words).__name__} of class names")
    names: dict[int, str] = {}
    for label in set(labels):
        word = re.sub(r"\W+", "_", _text(words[label], path) if label < len(words) else "")[:60]
        is_id = re.fullmatch(r"n\d{8}", word)  # of ImageNet; two classes may be called by the same other words
        names[label] = word if is_id else f"{split}_{label:03d}_{word}".rstrip("_")
    return [names[label] for label in labels]


def _entries(path: Path, *keys: str) -> dict[Any, Any]:
    """Return the dict in the pickle at `path`. UserError where it lacks one of the keys."""
    content = read_pickle(path)
    names = content if isinstance(content, dict) else {}
    for key in keys:
        if key not in names:
            texts = ", ".join([repr(name) for name in names if isinstance(name, str)][:NAMED])
            held = f"a dict of {texts or 'no names'}" if content is names else type(content).__name__
            raise UserError(f"{path} has no {key!r}: it holds {held}. It is another file of that name")
    return names


def _pixels(images: Any, path: Path) -> np.ndarray:
    if not isinstance(images, np.ndarray):
        raise _unexpected(path, type(images).__name__)
    _check_pixels(images.shape, images.dtype, path)
    return images


def _check_pixels(shape: tuple[int, ...], dtype: np.dtype, path: Path) -> None:
    """Raise UserError unless it is (N, H, W, 3) uint8."""
    if len(shape) != 4 or dtype != np.uint8 or shape[3] != 3 or not 0 < shape[1] <= MAX_SIDE >= shape[2] > 0:
        raise _unexpected(path, f"an array of shape {shape} and type {dtype}")


def _unexpected(path: Path, what: str) -> UserError:
    return UserError(f"{path} holds {what}; (N, H, W, 3) uint8 images, their labels and class names belong there")


def _ids(labels: Any, path: Path) -> list[int]:
    """Return the labels. UserError unless they are a list or an array of whole numbers from 0 on."""
    ids = labels.tolist() if isinstance(labels, np.ndarray) else labels
    # Looked at one by one: numpy would go into lists within the list, which may hold one another without end.
    if not isinstance(ids, list) or not all(type(label) is int and 0 <= label < MAX_LABEL for label in ids):
        raise _unexpected(path, "something else than a list of whole numbers")
    return ids


def _text(name: Any, path: Path) -> str:
    """Return a class name; Python 3 can keep those of Python 2 as bytes."""
    if not isinstance(name, str | bytes):
        raise _unexpected(path, f"a {type(name).__name__} as a class name")
    return name if isinstance(name, str) else name.decode("latin1")


def _content(image: Any, path: Path) -> np.ndarray | bytes:
    """Return pixels; or a PNG file, which OpenCV gives as an array of bytes, Python 2 as text."""
    if isinstance(image, np.ndarray) and image.ndim == 3:
        _check_pixels((1, *image.shape), image.dtype, path)
        return image
    if isinstance(image, str) and max(image, default="") <= "\xff":
        return image.encode("latin1")
    if isinstance(image, bytes | memoryview) or (isinstance(image, np.ndarray) and image.dtype == np.uint8):
        return bytes(image)
    raise _unexpected(path, f"a {type(image).__name__} in the place of an image")


def _npz_rows(path: Path, key: str, count: int) -> Iterator[np.ndarray]:
    """Yield the `count` images in array `key` of an npz, a few at a time in memory."""
    with open_zip(path, "it") as archive:
        if f"{key}.npy" not in archive.NameToInfo:
            held = ", ".join(map(repr, archive.namelist()[:NAMED])) or "nothing"
            raise UserError(f"{path} has no array {key!r}: it holds {held}")
        with archive.open(f"{key}.npy") as stream:
            version = np.lib.format.read_magic(stream)
            if version != (1, 0):  # the header of which takes 64 KiB at most
                raise ValueError(f"an array of format {version}")
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
            if fortran_order:
                raise _unexpected(path, "an array in Fortran's order")
            _check_pixels(shape, dtype, path)
            _check_count(shape[0], count, path)
            rows = max(1, CHUNK // math.prod(shape[1:]))
            for start in range(0, count, rows):
                wanted = min(rows, count - start) * math.prod(shape[1:])
                chunk = stream.read(wanted)
                if len(chunk) < wanted:
                    raise EOFError(f"{key!r} has fewer than the {count} images it announces")
                yield from np.frombuffer(chunk, np.uint8).reshape(-1, *shape[1:])
