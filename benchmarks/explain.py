"""What a training iteration has to compute, from shapes alone, and how far the measured one is from the limit.

python benchmarks/explain.py                        CxGrad's published rows: 1-shot x 4 tasks, 5-shot x 2 tasks, 84x84
python benchmarks/explain.py --device cuda

The iteration runs on tensors without values (torch's fake tensors; CUDA ones are stand-ins and need no GPU) and every
call is counted. FLOPs are those of convolutions and matrix products, two for each multiplication and addition; bytes
are each call's inputs read once and its outputs written once. A call takes at least max(FLOPs / peak, bytes /
bandwidth); the sum over the calls is the floor of these operations. Peak and bandwidth of this machine are measured,
those of an H100 are stated constants and its floors are a model, not a measurement:
  in a graph   floor + 1.5 us for each call
  eager        the same, or 4 us of the host for each call if that is longer
A CPU's caches can hold small tensors, so that a floor from bytes is a rule of thumb there. Prints the tables and writes
them to benchmarks/results/.
"""

import argparse
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import Row, finish, start, synchronise, timed  # noqa: E402
from benchmarks.iteration import BATCH_SIZES, build, gradient_command_line, train  # noqa: E402
from tests.stand_in_cuda import LAUNCHES_NOTHING, move, stand_in_cuda  # noqa: E402

KINDS = {  # what an operation's name holds -> its kind, the first that fits
    "convolution": ("convolution",),
    "matrix product": ("mm", "bmm", "dot", "linear"),
    "normalisation": ("batch_norm",),
    "pooling": ("pool",),
    "optimiser": ("foreach", "adam"),
    "reduction": ("sum", "mean", "var", "amax", "argmax", "softmax", "nll_loss", "norm", "any", "all"),
    "copy": ("copy", "clone", "cat", "stack", "fill", "zero", "ones", "full", "pad", "scatter", "index"),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """How fast a machine can be."""

    flops: float  # per second, float32
    bytes: float  # per second
    host: float = 0.0  # seconds in which the host launches one call
    gap: float = 0.0  # seconds between one call's kernel and the next


H100 = Limits(flops=67e12, bytes=3.35e12, host=4e-6, gap=1.5e-6)  # float32 without tensor cores; HBM3


class Call(NamedTuple):
    """One operation that computes something."""

    kind: str
    flops: int
    bytes: int


class Counting(TorchDispatchMode):
    """Inside, `calls` collects every operation on a device ("cpu", "cuda") that is more than a view."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.calls = device, list[Call]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().split("::")[-1].split(".")[0]
        if func.namespace == "aten" and name not in LAUNCHES_NOTHING:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            if any(device_of(t).type == self.device for t in tensors):
                self.calls.append(Call(kind(name), flops(func, args, kwargs or {}, result), sum(map(size, tensors))))
        return result


def device_of(tensor: Tensor) -> torch.device:
    """Return what `tensor.device` is, which for a fake tensor would be a call that is dispatched like any other."""
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def kind(name: str) -> str:
    """Return the kind of the operation `name`."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "elementwise")


def size(tensor: Tensor) -> int:
    """Return the bytes that the tensor's elements take in memory; what is expanded counts once."""
    elements = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride or not length else 1
    return elements


def flops(func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any) -> int:
    """Return the FLOPs of a convolution or a matrix product, else 0.

    torch's own counter is right for products; for the gradients of a grouped convolution it is not.
    """
    packet = func.overloadpacket
    if packet is torch.ops.aten.convolution_backward:
        (gradient, images, weight), transposed, wanted = args[:3], args[7], args[10]
        return sum(wanted[:2]) * convolution_flops(images, gradient, weight, transposed)
    if packet is torch.ops.aten.convolution:
        return convolution_flops(args[0], result, args[1], args[6])
    count = flop_registry.get(packet)
    return count(*args, **kwargs, out_val=result) if count else 0


def convolution_flops(images: Tensor, maps: Tensor, weight: Tensor, transposed: bool) -> int:
    """Return two FLOPs for each product of a weight (out, in / groups, kH, kW) with each place of a map."""
    return 2 * (images if transposed else maps).numel() * weight[0].numel()


@contextlib.contextmanager
def counting(device: str) -> Iterator[Counting]:
    """Count the calls on tensors without values, on the CPU or on a CUDA device that need not exist."""
    with contextlib.ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(mock.patch.object(nn.Module, "to", move))
            stack.enter_context(FakeTensorMode())
        else:
            stack.enter_context(stand_in_cuda())
        yield stack.enter_context(Counting(device))


def calls_of_iteration(method: str, shot: int, options: argparse.Namespace, device: str) -> list[Call]:
    """Return the calls of one training iteration."""
    options = argparse.Namespace(**{**vars(options), "device": device})
    with counting(device) as count:
        model, batch = build(method, shot, options, options.size)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        model.optimizer.step()  # makes Adam's state, as the iterations before this one would have
        count.calls.clear()
        train("ours", method, model, batch)
    return count.calls


def seconds_at(limits: Limits, calls: Sequence[Call]) -> float:
    """Return the least time in which a machine can execute the calls, without launching them."""
    return sum(max(call.flops / limits.flops, call.bytes / limits.bytes) for call in calls)


def floors(limits: Limits, calls: Sequence[Call]) -> tuple[float, float]:
    """Return the least seconds launched one by one, and in a graph."""
    graph = seconds_at(limits, calls) + limits.gap * len(calls)
    return max(graph, limits.host * len(calls)), graph


def measured_limits(device: str) -> Limits:
    """Return the best rates of a matrix product or convolution and of a sum of long vectors on this machine."""
    a, b = (torch.rand(2048, 2048, device=device) for _ in range(2))
    images, weight = torch.rand(75, 48, 42, 42, device=device), torch.rand(48, 48, 3, 3, device=device)
    x, y = (torch.rand(2**26, device=device) for _ in range(2))
    out = torch.empty_like(x)
    product, convolution, moved = (
        fastest(work, device)
        for work in (lambda: a @ b, lambda: F.conv2d(images, weight, padding=1), lambda: torch.add(x, y, out=out))
    )
    rate = max(2 * 2048**3 / product, convolution_flops(images, images, weight, False) / convolution)
    limits = Limits(flops=rate, bytes=3 * size(x) / moved)
    if device == "cpu":
        return limits
    tiny = torch.zeros(1, device=device)
    return dataclasses.replace(limits, host=fastest(lambda: [tiny.add_(1) for _ in range(1000)], device) / 1000)


def fastest(work: Callable[[], Any], device: str) -> float:
    """Return the seconds of the fastest of some repetitions within about half a second."""
    best, end = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < end:
        begin = time.perf_counter()
        work()
        synchronise(device)
        best = min(best, time.perf_counter() - begin)
    return best


def by_kind(case: Row, calls: Sequence[Call], limits: Limits) -> list[Row]:
    """Return a row for each kind of call, the longest first, and one for all."""
    kinds: dict[str, list[Call]] = {}
    for call in calls:
        kinds.setdefault(call.kind, []).append(call)
    rows = [{**case, "kind": name, **sums(of_kind, limits)} for name, of_kind in kinds.items()]
    return [*sorted(rows, key=lambda row: -row["floor_ms"]), {**case, "kind": "all", **sums(calls, limits)}]


def sums(calls: Sequence[Call], limits: Limits) -> Row:
    """Return number, work and least milliseconds of some calls."""
    total = {"GFLOP": sum(call.flops for call in calls) / 1e9, "GB": sum(call.bytes for call in calls) / 1e9}
    return {"calls": len(calls), **total, "floor_ms": 1000 * seconds_at(limits, calls)}


def explain(method: str, shot: int, options: argparse.Namespace, here: Limits) -> dict[str, list[Row]]:
    """Return the rows of one method and shot for each question."""
    case: Row = {"method": method, "shot": shot, "tasks": BATCH_SIZES[shot]}
    kind_of_device = "cpu" if options.device == "cpu" else "cuda"
    calls = calls_of_iteration(method, shot, options, kind_of_device)
    on_cuda = calls if kind_of_device == "cuda" else calls_of_iteration(method, shot, options, "cuda")
    model, batch = build(method, shot, options, options.size)
    measured = timed(lambda: train("ours", method, model, batch), options.device, repetitions=2)["seconds"]
    gaps = []
    for machine, limits, of_machine in (("this machine", here, calls), ("H100, a model", H100, on_cuda)):
        eager, graph = floors(limits, of_machine)
        row = case | {"floor_of": machine, "calls": len(of_machine), "floor_ms": 1000 * seconds_at(limits, of_machine)}
        row |= {"eager_ms": 1000 * eager, "graph_ms": 1000 * graph} if limits.host else {}
        gaps.append(row | {"measured_here_ms": 1000 * measured, "measured_over_floor": measured / eager})
    return {"gaps": gaps, "here": by_kind(case, calls, here), "H100": by_kind(case, on_cuda, H100)}


def main() -> None:
    parser = gradient_command_line(__doc__)
    parser.set_defaults(methods=["CxGrad"])
    options = start(parser)
    here = measured_limits(options.device)
    device = "CPU" if options.device == "cpu" else "GPU"
    limits = f"{here.flops / 1e9:.0f} GFLOP/s, {here.bytes / 1e9:.1f} GB/s"
    questions = {
        "gaps": f"A training iteration, {options.size}x{options.size}, against its floors",
        "here": f"Its operations on the {device}, floors at {limits} (measured)",
        "H100": "Its operations on CUDA, floors at 67 TFLOP/s, 3350 GB/s (H100; a model, not measured)",
    }
    tables: dict[str, list[Row]] = {question: [] for question in questions.values()}
    for method in options.methods:
        for shot in options.shots:
            for part, rows in explain(method, shot, options, here).items():
                tables[questions[part]] += rows
    finish("explain", options, tables, str(options.size))


if __name__ == "__main__":
    main()
