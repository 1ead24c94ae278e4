"""One process per device, started by torchrun; without torchrun every function here does nothing."""

import atexit
import importlib
import itertools
import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils.errors import UserError

PATIENCE = timedelta(minutes=10)  # for another process, in training and evaluation
GRACE = 10  # seconds in which the process that failed ends before one that misses it, so that torchrun names the former
PATIENCE_WITH_MAIN = timedelta(hours=6)  # for the cache of a large data set, which one process builds
_passages = itertools.count()


def launch(processes: int) -> None:
    """Run the present command in so many processes under torchrun, which passes on the signals that come here.

    Several machines take part where torchrun's variables (PET_NNODES, PET_RDZV_ENDPOINT, ...) say so.
    Raises SystemExit where processes stopped by themselves and said why, UserError where one was killed or failed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(["--nproc_per_node", str(processes), *sys.argv])
    except SignalException as stopped:
        raise SystemExit(128 + stopped.sigval) from None
    except ChildFailedError as error:
        # A signal's number is negative, 1 is a traceback; who missed such a process ended with a higher status, or by
        # the SIGTERM that torchrun sends then.
        rank, failure = min(
            error.failures.items(), key=lambda item: (item[1].exitcode == -signal.SIGTERM, item[1].exitcode)
        )
        if failure.exitcode > 1:
            raise SystemExit(failure.exitcode) from None
        how = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else "failed; its traceback is above"
        raise UserError(
            f"process {rank} (number {failure.local_rank} on {socket.gethostname()}, pid {failure.pid}) {how}. "
            "The run has ended; the same command goes on from the last checkpoint"
        ) from None


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Inside, this process belongs to the group that torchrun announced, if it did (NCCL on GPUs, gloo on CPUs).

    Raises UserError where another process of the group is lost.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # torch.optim imports this. Imported while there is a group, it would keep it for ever, as a default argument of
        # torch.distributed.nn.functional: gloo's threads would go on after _leave, and one that lets go of a tensor
        # while Python ends aborts the process.
        importlib.import_module("torch._dynamo")
        backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, timeout=PATIENCE, device_id=gpu)
    together = False
    try:
        yield
        together = True
    except SystemExit:  # all processes stop together
        together = True
        raise
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            atexit.register(time.sleep, GRACE)  # torchrun's SIGTERM cuts it short
            minutes = PATIENCE.total_seconds() / 60
            raise UserError(
                f"process {rank()} lost another one, which ended or did not answer for {minutes:g} minutes; its own "
                "messages may say why. The same command goes on from the last checkpoint"
            ) from error
        raise
    finally:
        _leave(together)


def _leave(together: bool) -> None:
    """Leave the group. After an error of its own a process must not with NCCL: it would wait there for the others."""
    if dist.is_initialized() and (together or dist.get_backend() != "nccl"):
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


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process pass the block first, then one process per machine, then the others of that machine.

    What the main process builds inside, the others find; a machine that does not share its disk builds its own.
    """
    if world_size() == 1:
        yield
        return
    machine, place = (int(os.environ.get(name, "0")) for name in ("GROUP_RANK", "LOCAL_RANK"))
    store, passage = dist.distributed_c10d._get_default_store(), next(_passages)
    if not is_main():
        store.wait([f"passage {passage} on {machine if place else 0}"], PATIENCE_WITH_MAIN)
    yield
    if place == 0:
        store.set(f"passage {passage} on {machine}", "")


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
    gathered = local.new_empty(world_size() * len(local), *local.shape[1:])
    dist.all_gather_into_tensor(gathered, local.contiguous())
    return gathered


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
