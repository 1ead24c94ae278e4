"""Which device a process computes on, and the settings that make it fast there."""

import ctypes
import logging
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

import torch

from utils.errors import UserError

log = logging.getLogger(__name__)

CONTROL_GROUP = Path("/sys/fs/cgroup")  # says on Linux what a container may take
STATUS = Path("/proc/self/status")  # says on Linux what this process has taken
CLEAR = Path("/proc/self/clear_refs")  # forgets on Linux the peak of that, when 5 is written to it


def choose_device(gpu: str | None) -> torch.device:
    """Return the device of this process: ``cpu``, or the GPU of `gpu` ("0", "0,1") that belongs to its local rank.

    With None it is the first GPU if there is one, or one per process. Raises UserError for an id that this machine does
    not have.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # on this machine
    if gpu is None:
        gpu = ",".join(map(str, range(processes))) if torch.cuda.is_available() else "cpu"
    if gpu.lower() == "cpu":
        return torch.device("cpu")
    ids = gpu_ids(gpu)
    if processes != len(ids):
        raise UserError(
            f"--gpu {gpu} names {len(ids)} GPUs but {processes} process(es) were started; name one GPU, or train: "
            "train_maml_system.py starts a process for each by itself"
        )
    device = torch.device("cuda", ids[int(os.environ.get("LOCAL_RANK", "0"))])
    torch.cuda.set_device(device)
    return device


def prepare_device(device: torch.device, tf32: bool = False, deterministic: bool = False) -> None:
    """Set this process up to compute on `device`; every learner does it.

    `tf32` lets a GPU's convolutions and matrix products round to ten bits. Without it they are full float32: CxGrad's
    context follows from differences that ten bits do not hold. `deterministic` makes a GPU add up in the same order
    every time; without it cuDNN tries its kernels and takes the fastest.
    """
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = not deterministic, deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
        torch.use_deterministic_algorithms(True)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to `device`; the host does not wait for a GPU, as the copy is from pinned memory."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def gpu_ids(gpu: str) -> list[int]:
    """Return the ids in "0,1"; raises UserError for one that this machine does not have."""
    ids, count = [part.strip() for part in gpu.split(",")], torch.cuda.device_count()
    if missing := [i for i in ids if i not in map(str, range(count))]:
        there = f"it has GPU {', '.join(map(str, range(count)))}" if count else "PyTorch sees no GPU on it"
        if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
            there += f" (CUDA_VISIBLE_DEVICES={visible} hides others and counts these from 0)"
        raise UserError(f"GPU {', '.join(missing)} does not exist on this machine: {there}; 'cpu' runs without one")
    return [int(i) for i in ids]


def keep_freed_memory() -> None:
    """Let glibc reuse freed blocks instead of returning them to the system: every iteration allocates the same ones."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library, which has no such settings
        return
    trim_threshold, mmap_max = -1, -4  # not the threshold of mmap, which older versions limit to 32 MiB
    if not (mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1)):
        log.warning("the C library refuses to keep freed memory; iterations on the CPU take longer")


def forget_peak(device: torch.device) -> None:
    """Give unused memory back, and count the peak of memory from here on."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
        with suppress(OSError):  # where /proc is read-only, the peak stays
            CLEAR.write_text("5")


def host_memory_gib() -> float:
    """Return how much memory this process and its like on other devices may take together, in GiB."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in (CONTROL_GROUP / "memory.max", CONTROL_GROUP / "memory" / "memory.limit_in_bytes"):  # versions 2 and 1
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits) / 2**30


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory held so far, in GiB: on the GPU, or by this process for the CPU (Linux, macOS)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if STATUS.is_file():  # on Linux getrusage has the peak of the process that started this one, if that is higher
        return int(STATUS.read_text().partition("VmHWM:")[2].split()[0]) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30
