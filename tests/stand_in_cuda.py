"""CUDA tensors without a GPU: shapes, dtypes and devices are real, values are not.

torch's FakeTensorMode knows devices and shapes. Alone it cannot run a backward pass on "cuda" without a GPU, since the
C++ engine asks the CUDA runtime for streams; so C++ is shown the device "lazy", for which the engine uses the CPU's
queue, while Python sees "cuda:0". What would make a host wait for a GPU raises `HostWaits`: a value that is read, a
shape that follows from values, indices that lie on the host, a copy that is not from pinned memory. Not seen this way:
cuDNN's choices, values, memory, autocast's casts, NCCL.
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

CUDA, LAZY = torch.device("cuda", 0), torch.device("lazy")
DEVICE = torch.ops.prim.device.default
READS_VALUES = {"_local_scalar_dense", "item", "equal", "is_nonzero"}
WAITS = READS_VALUES | {
    *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"),  # shapes from values
    *(
        "_linalg_check_errors",
        "linalg_eigh",
        "_linalg_eigh",
        "linalg_lstsq",
        "_linalg_svd",
        "linalg_eig",
    ),  # status codes
}


LAUNCHES_NOTHING = {
    *(
        "view",
        "_unsafe_view",
        "as_strided",
        "expand",
        "permute",
        "transpose",
        "t",
        "select",
        "slice",
        "split",
        "unbind",
    ),
    *("squeeze", "unsqueeze", "detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "collapse_view"),
    "split_dim",
}


class HostWaits(RuntimeError):
    """On a GPU this call would make the host wait for the device."""


def on_cuda(x: object) -> bool:
    return isinstance(x, FakeTensor) and x.fake_device.type == "cuda"


def without_lazy(x: object) -> object:
    return CUDA if isinstance(x, torch.device) and x.type == "lazy" else x


def tensors_in(values: Iterable[object]) -> list[Tensor]:
    """Operators take and return tensors and lists of them; torch's functions for trees of any kind take far longer."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [x for x in value if isinstance(x, Tensor)]
    return found


class StandIn(FakeTensorMode):
    """Inside, device "cuda" exists; `calls` counts what launches kernels, `waits` names what the host waits for."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.forbid, self.inside, self.calls, self.waits = False, False, Counter[str](), list[str]()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to make sure of that takes time in each call

    def wait(self, what: str) -> None:
        self.waits.append(what)
        if self.forbid:
            raise HostWaits(what)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE and on_cuda(args[0]) and not self.in_kernel_invocation:
            return LAZY
        args = tuple(map(without_lazy, args))
        kwargs = {name: without_lazy(x) for name, x in kwargs.items()} if kwargs else {}
        tensors, base = tensors_in((*args, *kwargs.values())), func.name().removeprefix("aten::").split(".")[0]
        here = any(map(on_cuda, tensors))
        if base in READS_VALUES and not here:
            return 1.0 if tensors[0].is_floating_point() else 1  # such as Adam's step counters, which lie on the host
        if here and base in WAITS:
            self.wait(base)
        if here and base in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [i for i in args[1] if isinstance(i, Tensor)]
            if any(i.dtype in (torch.bool, torch.uint8) or not on_cuda(i) for i in indices):
                self.wait(f"{base} by a mask or by indices on the host")
        if base in ("_to_copy", "copy_"):
            self.check_copy(base, args, kwargs)
        if here and base == "native_batch_norm_backward" and args[2] is None and any(args[9][1:]):
            raise RuntimeError(f"{base}: CUDA's kernel allocates the gradients of weight and bias like the weight")
        outer, self.inside = self.inside, True  # what shapes are derived from by decomposition is one call on a GPU
        try:
            result = self.dispatch(func, types, args, kwargs)
        finally:
            self.inside = outer
        if (
            not self.inside
            and base.split("::")[-1] not in LAUNCHES_NOTHING
            and (here or any(map(on_cuda, tensors_in([result]))))
        ):
            self.calls[base] += 1
        return result

    def check_copy(self, base: str, args: Any, kwargs: Any) -> None:
        source, target = (args[1], args[0].device) if base == "copy_" else (args[0], kwargs.get("device"))
        to_device = target is not None and torch.device(target).type == "cuda"
        if target is None or on_cuda(source) == to_device:
            return
        non_blocking = kwargs.get("non_blocking") or (base == "copy_" and len(args) > 2 and args[2])
        if not non_blocking or (to_device and not getattr(source, "_pinned_here", False)):
            self.wait(f"copy of {tuple(source.shape)} {'to the device' if to_device else 'to the host'}")


def move(module: nn.Module, *args: Any, memory_format: torch.memory_format | None = None, **kwargs: Any) -> nn.Module:
    """`Module.to` without swapping tensors, which stand-ins refuse while something refers to them weakly."""
    for part in module.modules():
        tensors: Any
        for tensors in (part._parameters, part._buffers):
            for name, tensor in [(n, t) for n, t in tensors.items() if t is not None]:
                moved = tensor.detach().to(*args, **kwargs)
                if memory_format is not None and moved.dim() == 4:
                    moved = moved.contiguous(memory_format=memory_format)
                is_parameter = isinstance(tensor, nn.Parameter)
                tensors[name] = nn.Parameter(moved, tensor.requires_grad) if is_parameter else moved
    return module


@contextlib.contextmanager
def stand_in_cuda() -> Iterator[StandIn]:
    original = FakeTensor.__dict__["__torch_dispatch__"].__func__

    def device_for_cpp(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE and on_cuda(args[0]) and not args[0].fake_mode.in_kernel_invocation:
            return LAZY
        return original(cls, func, types, args, kwargs or {})

    def pin(self: Tensor) -> Tensor:
        self._pinned_here = True  # type: ignore[attr-defined]
        return self

    with (
        mock.patch.object(FakeTensor, "__torch_dispatch__", classmethod(device_for_cpp)),
        mock.patch.object(FakeTensor, "is_cuda", property(on_cuda), create=True),
        mock.patch.object(Tensor, "pin_memory", pin),
        mock.patch.object(nn.Module, "to", move),
        mock.patch.object(torch.cuda, "mem_get_info", lambda *_: (80 << 30, 80 << 30)),
        StandIn() as mode,
    ):
        yield mode
