"""The gradients of a meta-batch as one CUDA graph, captured once and replayed in every later iteration.

An iteration of CxGrad launches thousands of small kernels, for which a GPU waits longer than it computes; a graph
launches them together. Captured are all inner loops, the outer backward pass and the running statistics. Outside stay
whatever makes the tasks, the mean over processes, clamping and Adam, so that learning rates, checkpoints, a resume and
NCCL need not know of it. Not measured on a GPU.
"""

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

WARM_UP = 3  # eager iterations before a capture, in which cuDNN chooses its kernels and cuBLAS takes its workspace

Results = tuple[Tensor, ...]


class Refused(RuntimeError):
    """A capture failed: an operation that graphs cannot hold, or not enough memory."""


class Recorder(Protocol):
    """A recorder captures what a function does on the device and says how to do it again."""

    def aside(self) -> AbstractContextManager[None]:
        """Return a context in which eager iterations have to run that precede a capture."""

    def record(self, function: Callable[[], Results]) -> tuple[Results, Callable[[], object]]:
        """Return the tensors of the function's results, and what fills them, and all else that it wrote, anew."""


class CudaGraphs:
    """This recorder makes CUDA graphs. Nothing may be launched on `device` by another thread during a capture."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.failed: torch.cuda.CUDAGraph | None = None

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run on a stream that is not the default one, where nothing can be captured.

        cuBLAS has a workspace for each stream, and a node that accumulates gradients remembers its stream: both have to
        be those of the capture. As either stream waits for the other one, memory may pass between them.
        """
        outside = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outside)
        with torch.cuda.stream(self.stream):
            yield
        outside.wait_stream(self.stream)

    def record(self, function: Callable[[], Results]) -> tuple[Results, Callable[[], object]]:
        gc.collect()  # autograd's nodes in dead cycles hold memory and remember other streams
        graph = torch.cuda.CUDAGraph()  # has memory of its own, which validation and all else outside never touches
        try:
            # Errors of this thread only: that of NCCL asks for its events at any time, which harms no capture. Where
            # the end of a capture fails, some versions of torch leave the graph's stream current; `aside` does not.
            with self.aside(), torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                results = function()
        except RuntimeError:
            self.failed = graph  # the allocator may ask a graph whose capture did not end properly whether it goes on
            raise
        return results, graph.replay


class Captured(NamedTuple):
    """A capture: the tensors that it reads and writes, and how to run it."""

    inputs: Results
    results: Results
    gradients: list[tuple[nn.Parameter, Tensor | None]]
    replay: Callable[[], object]


class CapturedGradients:
    """This computes `function(plan, *inputs)` by replaying a capture of it, after `WARM_UP` eager calls.

    The function sets the gradients of the parameters of `module`, which it first makes None so that they are written,
    not added to; it reads and changes tensors of `module` in place. `plan` is all that Python decides in it. A new plan
    or shape needs a new capture, and only the latest is kept: a graph holds as much memory as an eager iteration at its
    peak. Calls raise `Refused` where the capture fails; nothing has changed then.
    """

    def __init__(self, function: Callable[..., Results], module: nn.Module, recorder: Recorder) -> None:
        self.function, self.module, self.recorder = function, module, recorder
        self.captured: Captured | None = None
        self.release()

    def release(self) -> None:
        """Forget the capture, so that its memory is free once the gradients are None."""
        self.key: Hashable = None
        self.calls, self.captured = 0, None

    def __call__(self, plan: Hashable, *inputs: Tensor) -> Results:
        """Return results that are the caller's own; the gradients are overwritten by the next call."""
        key = (plan, *((tensor.shape, tensor.dtype) for tensor in inputs))
        if key != self.key:
            self.release()
            self.key = key
        self.calls += 1
        if self.calls <= WARM_UP:
            with self.recorder.aside():
                return self.function(plan, *inputs)
        if self.captured is None:
            self.captured = self._capture(plan, inputs)
        for static, tensor in zip(self.captured.inputs, inputs, strict=True):
            static.copy_(tensor, non_blocking=True)
        self.captured.replay()
        for parameter, gradient in self.captured.gradients:
            parameter.grad = gradient  # whatever has been put in its place since, such as None by zero_grad
        return tuple(result.clone() for result in self.captured.results)

    def _capture(self, plan: Hashable, inputs: Results) -> Captured:
        static = tuple(tensor.clone() for tensor in inputs)
        try:
            results, replay = self.recorder.record(lambda: self.function(plan, *static))
        except RuntimeError as error:  # that memory is short is one too
            self.release()
            raise Refused(str(error).partition("\n")[0]) from error
        return Captured(static, results, [(p, p.grad) for p in self.module.parameters()], replay)
