"""Where a run is computed, for its results to say: device, versions, commit and peak memory."""

import json
import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

from utils import distributed
from utils.devices import peak_memory_gib
from utils.errors import UserError
from utils.files import parse_json, write_text

ROOT = Path(__file__).resolve().parents[1]


@cache
def machine(device: str) -> dict[str, str]:
    """Return what a figure must say about where it was taken: device, versions and commit ("" where git is missing)."""
    cuda = device.startswith("cuda")
    where = {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
    }
    if cuda:
        where |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return where


def commit() -> str:
    """Return the commit of this checkout, with "-dirty" where files differ from it; "" where git cannot tell."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def read_environments(file: Path) -> list[dict[str, Any]]:
    """Return what `record_environment` wrote, nothing where there is no file; raises UserError if it is damaged."""
    try:
        entries: list[dict[str, Any]] = parse_json(file.read_text()) if file.exists() else []
        if not all(isinstance(entry["peak_memory_gib"], float) for entry in entries):
            raise ValueError("an entry without peak_memory_gib")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); remove it and call the command again") from error
    return entries


def record_environment(file: Path, device: torch.device) -> None:
    """Write where this process computes, and its peak of memory so far, into a run's FILE.

    It is a list: a run that goes on elsewhere, or with another version of the program, has an entry for each.
    """
    here = machine(str(device)) | {"processes": distributed.world_size()}
    others, peak = [], peak_memory_gib(device)
    for entry in read_environments(file):
        if entry == here | {"peak_memory_gib": entry["peak_memory_gib"]}:
            peak = max(peak, entry["peak_memory_gib"])
        else:
            others.append(entry)
    write_text(file, json.dumps([*others, here | {"peak_memory_gib": round(peak, 3)}], indent=2))
