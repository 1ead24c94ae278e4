"""Checkpoint files: written so that a crash leaves the old one or the new one, read without running code in them.

Models that `utils.export` has written to a folder are read here too: as the state of a checkpoint of weights only.
"""

import hashlib
import io
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from utils.errors import UserError
from utils.files import parsed_json, replace_file

# Files of an exported model; what OPTIONS holds beside the options is in `utils.export.describe`.
WEIGHTS, OPTIONS = "model.safetensors", "options.json"


PARTS = ("network", "embedding", "head")  # of a checkpoint, those that hold weights


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
    check_contents(state, path)
    return state


def _check_zip(path: Path) -> None:
    """Raise ValueError for a wrong checksum, which torch does not look at, and for members that unpack to more."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
        if any(info.compress_type for info in infos) or sum(info.file_size for info in infos) > path.stat().st_size:
            raise ValueError("parts of it are compressed, which torch never does")
        if member := archive.testzip():
            raise ValueError(f"wrong checksum of {member}")


def check_contents(state: Mapping[str, Any], path: Path) -> None:
    """Raise DamagedCheckpoint if a part of a checkpoint is not what a training writes; foreign parts may be anything.

    What may stand in the options, and whether weights fit the model, is found out later.
    """
    wrong = [name for name, fits in PARTS_OF_STATE.items() if name in state and not fits(state[name])]
    if wrong:
        raise DamagedCheckpoint(
            f"{path} is damaged or not a checkpoint: its {wrong[0]!r} is not what a training writes"
        )


def _is_named(part: Any, *names: str) -> bool:
    return isinstance(part, dict) and all(isinstance(name, str) for name in part) and {*names} <= part.keys()


def _are_weights(part: Any) -> bool:
    """Return whether these are tensors by their names, all of whose numbers are there."""
    return _is_named(part) and all(
        isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"  # on "meta" there are no numbers
        and not (tensor.is_quantized or tensor.is_complex())
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
        for tensor in part.values()
    )


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63) for value in values)


def _are_named_numbers(part: Any, *names: str) -> bool:
    return _is_named(part, *names) and _are_numbers(part.values())


def _are_sums(part: Any) -> bool:
    return _are_named_numbers(part) and all(map(math.isfinite, part.values()))


def _are_statistics(pair: Any) -> bool:
    """Return whether it is mean and deviation of each channel, or None."""
    rows = isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(row, tuple) for row in pair)
    if pair is None or not rows:
        return pair is None
    values = [*pair[0], *pair[1]]
    return len(pair[0]) == len(pair[1]) in (1, 3) and _are_numbers(values) and all(map(math.isfinite, values))


def _is_history(rows: Any) -> bool:
    return isinstance(rows, list) and all(_are_named_numbers(row, "epoch", "val_accuracy") for row in rows)


def _is_form(part: Any) -> bool:
    """Return whether it is the fields of a `learner.Form`, or None."""
    if part is None or not isinstance(part, dict):
        return part is None
    size, captured = part.get("tasks_per_pass"), part.get("captured")
    return len(part) == 2 and isinstance(size, int) and size > 0 and isinstance(captured, bool)


PLAIN = str | int | float | None  # what options are
PARTS_OF_STATE: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(PARTS, _are_weights),
    "options": lambda part: _is_named(part) and all(isinstance(value, PLAIN) for value in part.values()),
    "normalization": _are_statistics,
    "history": _is_history,
    "sums": _are_sums,
    "images": _are_named_numbers,
    "optimizer": lambda part: _is_named(part, "state", "param_groups"),
    "iterations_done": lambda number: isinstance(number, int) and number >= 0,
    "form": _is_form,
}


def numpy_scalars() -> list[Any]:
    """What the numbers are made of that official checkpoints hold beside the weights; none of it runs code."""
    scalar = np.float64(0).__reduce__()[0]  # where it lives depends on numpy's version, in the file and here
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = [type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")]
    return [*((scalar, name) for name in names), np.dtype, *kinds]


# --- exported models ------------------------------------------------------------------------------------------------


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
        described, data = parsed_json((folder / OPTIONS).read_bytes()), (folder / WEIGHTS).read_bytes()
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
    whole = state | by_part(weights)
    check_contents(whole, folder)
    return whole


def by_part(weights: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return what `to_safetensors` joined: part -> name -> tensor."""
    parts: dict[str, dict[str, Tensor]] = {}
    for joined, tensor in weights.items():
        part, _, name = joined.partition(".")
        parts.setdefault(part, {})[name] = tensor
    return parts
