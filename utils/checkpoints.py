"""Checkpoint files: written so that a crash leaves the old one or the new one, read without running code in them."""

from pathlib import Path
from typing import Any

import torch

from utils.errors import UserError
from utils.files import replace_file


class DamagedCheckpoint(UserError):
    """The file exists but cannot be read as a checkpoint."""


def save(state: dict[str, Any], path: Path) -> None:
    """Write tensors and plain values to `path` atomically; raises UserError when they cannot be written."""
    replace_file(path, lambda file: torch.save(state, file))


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, onto the CPU; raises UserError if it is not there, DamagedCheckpoint if it is bad."""
    if not path.is_file():
        there = ", ".join(sorted(p.name for p in path.parent.glob("[!.]*"))) if path.parent.is_dir() else ""
        raise UserError(f"there is no checkpoint {path}; in its folder: {there or 'nothing'}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises nearly any type on bytes that are no checkpoint
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DamagedCheckpoint(f"{path} is damaged or not a checkpoint ({reason})") from error
    if not isinstance(state, dict) or "network" not in state:
        raise DamagedCheckpoint(f"{path} holds no 'network' entry, so it is not a checkpoint of this program")
    return state
