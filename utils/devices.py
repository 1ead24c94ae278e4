"""Which device a process computes on, and the settings that make it fast there."""

import ctypes
import os

import torch

from utils.errors import UserError


def choose_device(gpu: str | None) -> torch.device:
    """The device of this process: ``cpu``, or the GPU of `gpu` ("0", "0,1") that belongs to its local rank.

    None takes the first GPU if there is one. Raises UserError for an id that this machine does not have.
    """
    if gpu is None:
        gpu = "0" if torch.cuda.is_available() else "cpu"
    if gpu.lower() == "cpu":
        return torch.device("cpu")
    ids = gpu_ids(gpu)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes != len(ids):
        raise UserError(
            f"--gpu {gpu} names {len(ids)} GPUs but {processes} process(es) were started; name one GPU, or train: "
            "train_maml_system.py starts a process for each by itself"
        )
    device = torch.device("cuda", ids[int(os.environ.get("LOCAL_RANK", "0"))])
    torch.cuda.set_device(device)
    return device


def prepare_device(device: torch.device, tf32: bool = False) -> None:
    """Set this process up to compute on `device`; every learner does it.

    `tf32` lets a GPU's convolutions and matrix products round to ten bits. Without it they are full float32: CxGrad's
    context follows from differences that ten bits do not hold.
    """
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32


def gpu_ids(gpu: str) -> list[int]:
    """The ids in "0,1"; raises UserError for one that this machine does not have."""
    ids, count = [part.strip() for part in gpu.split(",")], torch.cuda.device_count()
    if missing := [i for i in ids if not i.isdigit() or int(i) >= count]:
        there = f"it has GPU {', '.join(map(str, range(count)))}" if count else "PyTorch sees no GPU on it"
        raise UserError(f"GPU {', '.join(missing)} does not exist on this machine: {there}; 'cpu' runs without one")
    return [int(i) for i in ids]


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks instead of returning them to the system: every iteration allocates the same ones."""
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library, which has no such thresholds
        return
    trim_threshold, mmap_threshold, largest = -1, -3, 2**31 - 1
    libc.mallopt(mmap_threshold, largest)
    libc.mallopt(trim_threshold, largest)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far, in GiB: on the GPU, or by this process for the CPU (Linux, macOS)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
