"""Small archives of the structure of those in circulation, for tests."""

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TAR_MODES = {".tar": "w:", ".tar.gz": "w:gz", ".tgz": "w:gz", ".tar.bz2": "w:bz2", ".tar.xz": "w:xz"}


def pixels(seed: int, side: int = 8) -> np.ndarray:
    """(side, side, 3) uint8, another picture for each seed."""
    return np.random.RandomState(seed).randint(0, 256, (side, side, 3)).astype(np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, kind, **options)
    return out.getvalue()


def png(seed: int, side: int = 8) -> bytes:
    return encoded(pixels(seed, side))


def pack(path: Path, files: Mapping[str, bytes]) -> Path:
    """A zip or tar, as the suffix says, with `files` in their order."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    mode: Any = TAR_MODES["".join(path.suffixes[-2:]) if ".tar." in path.name else path.suffix]
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def mapped() -> int:
    """KiB of files that this process holds in memory; Linux only."""
    return int(Path("/proc/self/status").read_text().split("RssFile:")[1].split()[0])


def left_in(folder: Path) -> list[str]:
    """The data sets in the folder, hidden staging folders too."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir())
