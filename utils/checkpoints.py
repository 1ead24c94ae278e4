"""Checkpoint files: written so that a crash leaves the old one or the new one, read without running code in them."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from utils.errors import UserError
from utils.files import replace_file


class DamagedCheckpoint(UserError):
    """The file exists but cannot be read as a checkpoint."""


def save(state: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values to `path` atomically; raises UserError when they cannot be written."""
    whole = io.BytesIO()
    torch.save(state, whole)  # in memory first, so that a failing disk and a failing torch are told apart
    with replace_file(path) as file:
        file.write(whole.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, onto the CPU; raises UserError if it is not there, DamagedCheckpoint if it is bad."""
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob("[!.]*"))) if path.parent.is_dir() else ""
        raise UserError(f"there is no checkpoint {path}; in its folder: {there or 'nothing'}")
    try:
        if zipfile.is_zipfile(path) and (member := zipfile.ZipFile(path).testzip()):  # torch does not check the sums
            raise ValueError(f"wrong checksum of {member}")
        with torch.serialization.safe_globals(numpy_scalars()):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises nearly any type on bytes that are no checkpoint
        raise DamagedCheckpoint(f"{path} is damaged or not a checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or not {"network", "embedding"} & state.keys():
        raise DamagedCheckpoint(
            f"{path} holds neither a 'network' nor an 'embedding', so it is no checkpoint of this program"
        )
    return state


def numpy_scalars() -> list[Any]:
    """What the numbers are made of that official checkpoints hold beside the weights; none of it runs code."""
    scalar = np.float64(0).__reduce__()[0]  # where it lives depends on numpy's version, in the file and here
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")]
    return [*((scalar, name) for name in names), np.dtype, *kinds]
