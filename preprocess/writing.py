"""This module writes the images of a data set, each checked to decode, several at a time, few of them in memory."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from preprocess.staging import Contents, first_of
from utils.errors import UserError
from utils.images import IMAGE_FORMATS, in_order, open_image, plain_image, usable_cpus
from utils.names import is_plain

NAMED = 20  # unreadable images that an error names
MOST_THREADS = 4  # Pillow and the disk work outside Python's lock; more threads would wait for it
AHEAD = 16  # pieces that are under way
PIECE = 32  # images that a thread takes at once, fewer if they are large
PIECE_BYTES = 2**22
PNG_START = b"\x89PNG\r\n\x1a\n"
ARCHIVE_CURE = (
    "Fetch the archive again. To do without them, unpack it yourself to class folders and train with "
    "--skip_bad_images true"
)


class Picture(NamedTuple):
    """A picture is an image and its place in the data set."""

    split: str
    class_name: str
    file: str
    # An image file as it is; (H, W, 3) or (H, W) uint8 to be stored as PNG; or a file to link to, which is not opened.
    content: bytes | np.ndarray | Path


def write_images(
    folder: Path, pictures: Iterable[Picture], name: str, total: int | None = None, cure: str = ARCHIVE_CURE
) -> Contents:
    """Write each picture to `folder`/SPLIT/CLASS/FILE, and return how many each class has.

    UserError, which names them, for images that do not decode, for two of one name in a class, and for a class or
    file name that is no plain name. `total` is for the progress bar; `cure` says what to do about unreadable images.
    """
    contents: Contents = {}
    bad: list[str] = []
    Image.init()  # here, because threads that meet a rare format at once would not all find it
    with (
        ThreadPoolExecutor(min(MOST_THREADS, usable_cpus())) as pool,
        tqdm(total=total, desc=name, unit=" images", disable=None) as bar,
    ):
        pieces = (pool.submit(_write, folder, piece) for piece in _pieces(folder, pictures, contents))
        for unreadable, done in in_order(pieces, AHEAD):
            bad += unreadable
            bar.update(done)
    if bad:
        images = "images" if len(bad) > 1 else "image"
        raise UserError(f"{name}: {len(bad)} {images} cannot be read: {first_of(bad, NAMED)}. {cure}")
    return contents


def _pieces(folder: Path, pictures: Iterable[Picture], contents: Contents) -> Iterator[list[Picture]]:
    """Yield the pictures, several at a time; their classes are counted, and get a folder, on the way."""
    piece: list[Picture] = []
    size = 0
    for picture in pictures:
        split, class_name, file, content = picture
        classes = contents.setdefault(split, {})
        is_new = class_name not in classes
        for name in (class_name, file) if is_new else (file,):
            if not is_plain(name):
                raise UserError(f"{name!r} cannot be the name of a class or an image: rename it in its source")
        if is_new:
            (folder / split / class_name).mkdir(parents=True, exist_ok=True)
        classes[class_name] = classes.get(class_name, 0) + 1
        piece.append(picture)
        size += len(content) if isinstance(content, bytes) else getattr(content, "nbytes", 0)
        if len(piece) == PIECE or size > PIECE_BYTES:
            yield piece
            piece, size = [], 0
    yield piece


def _write(folder: Path, pictures: list[Picture]) -> tuple[list[str], int]:
    """Return place and reason of each unreadable image, and the number of all."""
    bad = []
    for split, class_name, file, content in pictures:
        path = os.path.join(folder, split, class_name, file)  # a Path would take longer
        try:
            if isinstance(content, Path):
                os.symlink(content, path)
                continue
            with open(path, "xb") as out:
                if isinstance(content, np.ndarray):
                    Image.fromarray(content).save(out, "PNG", compress_level=1)
                    continue
                out.write(content)
        except FileExistsError as error:
            raise UserError(f"class {class_name!r} has two images named {file}") from error
        if reason := why_unreadable(content):
            bad.append(f"{split}/{class_name}/{file} ({reason})")
    return bad, len(pictures)


def why_unreadable(content: bytes) -> str:
    """Return an empty text if the image decodes to its end, to what the cache takes, else the reason.

    JPEGs are decoded at an eighth of their size, which reads them all.
    """
    try:
        if content.startswith(PNG_START):
            with open_image(BytesIO(content)) as image:
                image.verify()  # the checksums, which are not looked at in decoding
        with open_image(BytesIO(content)) as image:
            image.draft(None, (1, 1))
            plain_image(image)
    except MemoryError:  # says nothing about the image
        raise
    except UnidentifiedImageError:
        return f"not an image, or none of {', '.join(IMAGE_FORMATS)}"
    except Exception as error:  # Pillow's readers raise nearly any type on a damaged file
        return f"{type(error).__name__}: {error}"
    return ""
