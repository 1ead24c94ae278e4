"""The same MAML step by other libraries, each in an environment of its own under benchmarks/.peers.

python benchmarks/peers.py              (make bench-peers) installs them; one that does not install leaves its reason

`benchmarks/iteration.py` runs this script with the interpreters of those environments, which hold torch and one library
only, and compares loss and outer gradient with the naive loop's before it takes any time.
"""

import shutil
import subprocess
import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import Failed, Row, command_line, start, timed_alone  # noqa: E402

FOLDER = ROOT / "benchmarks" / ".peers"
PACKAGES = {  # library -> what its environment needs beside torch
    "higher": ["higher==0.2.1"],
    "torchopt": ["torchopt==0.7.3"],
    "parallel-metalearn": ["parallel-metalearn==0.5.6"],
    "learn2learn": ["learn2learn==0.2.0", "qpth==0.0.18"],  # earlier versions of qpth have broken metadata
}
TOLERANCE = 1e-6  # of losses and gradients in float64: what float32 rounding would be
INNER_RATE, OUTER_RATE, STEPS = 0.01, 0.001, 5

Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # support and query images (tasks, n, C, H, W), their labels (tasks, n)
Step = Callable[[Batch], float]  # one outer update; returns the query loss and leaves gradients in .grad


class Body(nn.Module):
    """Four blocks of convolution, batch norm on the batch's own statistics, leaky ReLU and pooling."""

    def __init__(self, filters: int) -> None:
        super().__init__()
        for i in range(4):
            setattr(self, f"conv{i}", nn.Conv2d(filters if i else 3, filters, 3, padding=1, bias=False))
            setattr(self, f"norm{i}", nn.BatchNorm2d(filters, track_running_stats=False))

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        for i in range(4):
            x = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x))
            x = F.max_pool2d(F.leaky_relu(x), 2)
        return x.flatten(1)


class Head(nn.Module):
    """A linear layer that takes and ignores the named arguments of parallel-metalearn."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 5)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        logits: Tensor = self.linear(x)
        return logits


def network(weights: Mapping[str, Tensor]) -> nn.Sequential:
    """Return Conv4 with the weights; its names are those of `weights`."""
    body, head = Body(len(weights["backbone.conv0.weight"])), Head(weights["head.linear.weight"].shape[1])
    net = nn.Sequential(OrderedDict(backbone=body, head=head))
    net.load_state_dict(weights)
    return net


def moved(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return what inner steps move: all but batch norm's weights, as in the published recipe."""
    return {name: p for name, p in net.named_parameters() if ".norm" not in name}


def by_higher(net: nn.Sequential) -> Step:
    import higher

    outer = torch.optim.Adam(net.parameters(), OUTER_RATE)
    inner = torch.optim.SGD(moved(net).values(), INNER_RATE)

    def task_loss(xs: Tensor, xq: Tensor, ys: Tensor, yq: Tensor) -> Tensor:
        with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (fast, inner_steps):
            for _ in range(STEPS):
                inner_steps.step(F.cross_entropy(fast(xs), ys))
            return F.cross_entropy(fast(xq), yq)

    return lambda batch: task_by_task(task_loss, outer, batch)


def by_torchopt(net: nn.Sequential) -> Step:
    import torchopt

    outer, names = torch.optim.Adam(net.parameters(), OUTER_RATE), list(moved(net))

    def loss(weights: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, dict(zip(names, weights, strict=True)), (x,)), y)

    def task_loss(xs: Tensor, xq: Tensor, ys: Tensor, yq: Tensor) -> Tensor:
        inner, weights = torchopt.FuncOptimizer(torchopt.sgd(lr=INNER_RATE)), tuple(moved(net).values())
        for _ in range(STEPS):
            weights = inner.step(loss(weights, xs, ys), weights)
        return loss(weights, xq, yq)

    return lambda batch: task_by_task(task_loss, outer, batch)


def task_by_task(task_loss: Callable[..., Tensor], outer: torch.optim.Optimizer, batch: Batch) -> float:
    """Make an outer update; each task's graph is freed before the next one's is built."""
    outer.zero_grad()
    total = 0.0
    for task in zip(*batch, strict=True):
        loss = task_loss(*task) / len(batch[0])
        loss.backward()
        total += loss.item()
    outer.step()
    return total


def by_parallel_metalearn(net: nn.Sequential) -> Step:
    from metalearn.algorithms import MAML
    from metalearn.inner_optimizers import InnerSGD
    from metalearn.loss import CategoricalAccuracy, CrossEntropy
    from metalearn.model_wrappers import MAML_Model

    model = MAML_Model(net.backbone, net.head, fast_weights_names=list(moved(net)))
    device = next(net.parameters()).device
    inner = InnerSGD(model.get_fast_weights(), inner_lr=INNER_RATE, max_inner_steps=STEPS, learn_lr=False)
    for rate in inner.to(next(net.parameters()).dtype).parameters():
        rate.fill_(INNER_RATE)  # it was rounded to float32
    algorithm = MAML(
        model=model,
        optimizer=torch.optim.Adam(net.parameters(), OUTER_RATE),
        inner_optimizer=inner,
        support_loss_fn=CrossEntropy(metric_fn=CategoricalAccuracy()),
        inner_steps=STEPS,
        device=device,
    )

    def step(batch: Batch) -> float:
        xs, xq, ys, yq = batch
        loss, _ = algorithm.step(iter([(xs, {"labels": ys}, xq, {"labels": yq})]))
        return float(loss)

    return step


LIBRARIES: dict[str, Callable[[nn.Sequential], Step]] = {
    "higher": by_higher,
    "torchopt": by_torchopt,
    "parallel-metalearn": by_parallel_metalearn,
}


def check_parity(loss: float, gradients: Mapping[str, Tensor], expected: Mapping[str, Any]) -> None:
    """Raise Failed unless loss and every gradient are those expected, relative to the largest entry of each."""
    gap = abs(loss - expected["loss"]) / abs(expected["loss"])
    if not gap <= TOLERANCE:
        raise Failed(f"no parity: its loss is {loss:.8g}, not {expected['loss']:.8g}")
    for name, wanted in expected["gradients"].items():
        gap = float((gradients[name].cpu() - wanted).abs().max() / wanted.abs().max())
        if not gap <= TOLERANCE:
            raise Failed(f"no parity: its outer gradient of {name} is off by {gap:.1e} of the largest entry")


def measure(options: Namespace, library: str, file: str) -> Row:
    """Check a library against the case in `file` in float64, then time it on the other one there in float32."""
    if library not in LIBRARIES:
        raise Failed("its step is not written here, as it did not install on any Python of this project")
    cases = torch.load(file, weights_only=True)
    small, large = cases["parity"], cases["timing"]
    for case in (small, large):
        case["batch"] = tuple(part.to(options.device) for part in case["batch"])
    net = network(small["weights"]).double().to(options.device)
    loss = LIBRARIES[library](net)(small["batch"])
    check_parity(loss, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}, small)
    step = LIBRARIES[library](network(large["weights"]).to(options.device))
    return timed_alone(lambda: step(large["batch"]), options.device)


def install() -> None:
    """Make an environment for each library with the torch of this one, or a file that says why there is none."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv"
    for library, packages in PACKAGES.items():
        home, reason = FOLDER / library, FOLDER / f"{library}.failed"
        reason.unlink(missing_ok=True)
        torch_too = [*packages, f"torch=={torch.__version__.split('+')[0]}"]
        for command in (
            ["venv", "--clear", "--quiet", "--python", sys.executable, str(home)],
            ["pip", "install", "--quiet", "--python", str(home / "bin" / "python"), *torch_too],
        ):
            done = subprocess.run([uv, *command], capture_output=True, text=True)
            if done.returncode:
                lines = [line.strip() for line in done.stderr.splitlines() if "error:" in line]
                lines.sort(key=lambda line: "fatal error:" not in line)
                reason.write_text(f"does not install here: {lines[0] if lines else 'no reason given'}")
                shutil.rmtree(home, ignore_errors=True)
                break
        print(f"{packages[0]}: {reason.read_text() if reason.exists() else 'installed'}", flush=True)


def interpreter(library: str) -> str:
    """Return the Python that has the library; raises Failed if there is none."""
    python, reason = FOLDER / library / "bin" / "python", FOLDER / f"{library}.failed"
    if not python.exists():
        raise Failed(reason.read_text() if reason.exists() else "not installed; make bench-peers installs it")
    return str(python)


def main() -> None:
    if len(sys.argv) == 1:
        install()
    else:
        start(command_line(__doc__), measure)


if __name__ == "__main__":
    main()
