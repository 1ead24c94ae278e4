"""One process per device, started by torchrun; without torchrun every function here does nothing."""

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


def become_launcher(processes: int) -> None:
    """Replace this process by torchrun, which starts the same command once per GPU; signals then reach torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Inside, this process belongs to the group that torchrun announced, if it did (NCCL on GPUs, gloo on CPUs)."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        patience = timedelta(hours=6)  # for the cache of a large data set, which one process builds
        backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=patience, device_id=gpu)
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is the one process that writes files and prints."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over processes."""
    average([p.grad for p in parameters if p.grad is not None])


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its mean over processes, in one message."""
    if world_size() == 1 or not tensors:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world_size()
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def gather_tasks(local: Tensor) -> Tensor:
    """Concatenate equally long tensors of all processes along the first dimension, in rank order."""
    if world_size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


def largest(number: int) -> int:
    """Return the largest of all processes' numbers, so that they act alike."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(number, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers.item())


def broadcast_text(text: str) -> str:
    """Return the main process's text, in all processes."""
    if world_size() == 1:
        return text
    parts = [text]
    dist.broadcast_object_list(parts)
    return parts[0]
