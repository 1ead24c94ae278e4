"""Checkpoint files: written so that a crash leaves the old one or the new one, read without running code in them.

Models that `utils.export` has written to a folder are read here too: as the state of a checkpoint of weights only.
"""

import hashlib
import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import parse_json, replace_file

# Files of an exported model; what OPTIONS holds beside the options is in `utils.export.describe`.
WEIGHTS, OPTIONS = "model.safetensors", "options.json"


class DamagedCheckpoint(UserError):
    """The file exists but cannot be read as a checkpoint."""


def save(state: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values to `path` atomically; raises UserError when they cannot be written."""
    whole = io.BytesIO()
    torch.save(state, whole)  # in memory first, so that a failing disk and a failing torch are told apart
    with replace_file(path) as file:
        file.write(whole.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, or the folder of an exported model, onto the CPU.

    Raises UserError if it is not there, DamagedCheckpoint if it is bad.
    """
    if path.is_dir():
        return load_exported(path)
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob("[!.]*"))) if path.parent.is_dir() else ""
        raise UserError(f"there is no checkpoint {path}; in its folder: {there or 'nothing'}")
    try:
        if zipfile.is_zipfile(path):
            _check_zip(path)
        with torch.serialization.safe_globals(numpy_scalars()):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises nearly any type on bytes that are no checkpoint
        raise DamagedCheckpoint(f"{path} is damaged or not a checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or not {"network", "embedding"} & state.keys():
        raise DamagedCheckpoint(
            f"{path} holds neither a 'network' nor an 'embedding', so it is no checkpoint of this program"
        )
    if strange := [name for name, is_right in HELD.items() if name in state and not is_right(state[name])]:
        raise DamagedCheckpoint(f"{path} is damaged or not a checkpoint of this program: its {strange[0]!r} is none")
    return state


def _check_zip(path: Path) -> None:
    """Raise ValueError for a wrong checksum, which torch does not look at, and for members that unpack to more."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if any(info.compress_type for info in infos) or sum(info.file_size for info in infos) > path.stat().st_size:
            raise ValueError("torch packs nothing")
        if member := archive.testzip():
            raise ValueError(f"wrong checksum of {member}")


def _are_weights(held: Any) -> bool:
    """Return whether these are tensors by their names, all of whose numbers are there."""
    return isinstance(held, Mapping) and all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
        for name, tensor in held.items()
    )


def _are_numbers(held: Any) -> bool:
    return isinstance(held, Mapping) and all(isinstance(number, int | float) for number in held.values())


def _are_epochs(held: Any) -> bool:
    is_list = isinstance(held, list) and all(map(_are_numbers, held))
    return is_list and all({"epoch", "val_accuracy"} <= epoch.keys() for epoch in held)


# What a checkpoint may hold, and whether it is that; official programs keep other values beside it.
HELD: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("network", "embedding", "head"), _are_weights),
    "options": lambda held: isinstance(held, Mapping) and all(isinstance(name, str) for name in held),
    "history": _are_epochs,
    **dict.fromkeys(("sums", "images"), _are_numbers),
    "iterations_done": lambda held: isinstance(held, int),
    "optimizer": lambda held: isinstance(held, Mapping) and {"state", "param_groups"} <= held.keys(),
    "normalization": lambda held: held is None or (isinstance(held, tuple) and [*map(type, held)] == [tuple, tuple]),
    "form": lambda held: held is None or isinstance(held, Mapping),
}


def numpy_scalars() -> list[Any]:
    """What the numbers are made of that official checkpoints hold beside the weights; none of it runs code."""
    scalar = np.float64(0).__reduce__()[0]  # where it lives depends on numpy's version, in the file and here
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")]
    return [*((scalar, name) for name in names), np.dtype, *kinds]


# --- exported models ------------------------------------------------------------------------------------------------

PARTS = ("network", "embedding", "head")  # of a checkpoint, those that hold weights


def to_safetensors(state: Mapping[str, Any]) -> bytes:
    """Return the weights of a checkpoint's state, tensor `name` of `part` as part.name."""
    weights = {f"{part}.{name}": tensor for part in PARTS for name, tensor in state.get(part, {}).items()}
    # clone: tensors that share memory, or are laid out in another order, are refused
    return safetensors.torch.save(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    )


def load_exported(folder: Path) -> dict[str, Any]:
    """Read an exported model as a checkpoint's state: its parts, `options`, `normalization` and `iterations_done`.

    Raises UserError if the folder holds no such model, DamagedCheckpoint if a file is missing or not as it was written.
    """
    if not ((folder / OPTIONS).is_file() or (folder / WEIGHTS).is_file()):
        trained = (folder / "saved_models").is_dir()
        cure = "name one of its checkpoints: saved_models/best, for example" if trained else "utils.export makes them"
        raise UserError(f"the folder {folder} holds no exported model; {cure}")
    try:
        described, data = parse_json((folder / OPTIONS).read_text()), (folder / WEIGHTS).read_bytes()
        if hashlib.sha256(data).hexdigest() != described["weights_sha256"]:
            raise ValueError(f"{WEIGHTS} is not the file that {OPTIONS} was written with")
        weights, normalization = safetensors.torch.load(data), described["normalization"]
        state = {
            "options": dict(described["options"]),
            "normalization": normalization and tuple(map(tuple, normalization)),
            "iterations_done": described["iterations_done"],
        }
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise DamagedCheckpoint(
            f"the model in {folder} is damaged, or not one that utils.export wrote ({type(error).__name__}: {error}); "
            "get or export it again"
        ) from error
    return state | by_part(weights)


def by_part(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return what `to_safetensors` joined: part -> name -> tensor."""
    parts: dict[str, dict[str, Tensor]] = {}
    for joined, tensor in weights.items():
        part, _, name = joined.partition(".")
        parts.setdefault(part, {})[name] = tensor
    return parts
