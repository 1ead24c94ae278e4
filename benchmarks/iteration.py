"""Seconds and peak memory of one training iteration: all inner loops, the outer backward pass and Adam.

python benchmarks/iteration.py                      the published 84x84 rows, 1- and 5-shot, on this machine
python benchmarks/iteration.py --size 32 --shots 5  CIFAR-FS's images
python benchmarks/iteration.py --device cuda --rounds 5

"ours" is `run_train_iter`; "naive" is `tests.naive_reference`, a loop over tasks by torch's own operations; MAML is
also run by the libraries of `benchmarks/peers.py`. Every variant first has to show the naive loop's loss and outer
gradient in float64 on two tasks of 16x16 images. Every figure comes from processes that take turns, so that ratios hold
on a machine whose speed drifts; a process warms up with one iteration, on a GPU with five, so that "ours" has captured
its graph, and counts the next. Prints one table and writes it to benchmarks/results/.
"""

import argparse
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import Row, command_line, compare, finish, run_child, start, timed_alone  # noqa: E402
from benchmarks.peers import PACKAGES, STEPS, Batch, check_parity, interpreter  # noqa: E402
from few_shot_learning_system import MAMLFewShotClassifier  # noqa: E402
from tests.naive_reference import naive_loss  # noqa: E402

BATCH_SIZES = {1: 4, 5: 2}  # shot -> meta-batch, as in the published recipe
METHODS = ("CxGrad", "MAML")
PARITY_SIZE, PARITY_TASKS = 16, 2  # little memory, so that the peak is that of what is timed


def build(
    method: str, shot: int, options: argparse.Namespace, size: int, tasks: int = 0
) -> tuple[MAMLFewShotClassifier, Batch]:
    """Return a learner and a meta-batch (tasks, way, images, C, H, W) of random images, the same ones every time."""
    tasks = tasks or BATCH_SIZES[shot]
    args = SimpleNamespace(
        contextual_grad=method == "CxGrad",
        num_samples_per_class=shot,
        batch_size=tasks,
        cnn_num_filters=options.filters,
    )
    model = MAMLFewShotClassifier((tasks, 3, size, size), torch.device(options.device), args)
    random = torch.Generator().manual_seed(0)
    support, query = (torch.rand(tasks, 5, n, 3, size, size, generator=random) for n in (shot, options.targets))
    labels = [torch.arange(5).view(1, 5, 1).repeat(tasks, 1, n) for n in (shot, options.targets)]
    return model, tuple(part.to(options.device) for part in (support, query, *labels))  # type: ignore[return-value]


def train(variant: str, method: str, model: MAMLFewShotClassifier, batch: Batch) -> float | Tensor:
    """Make one outer update by our code or by the naive loop's."""
    if variant == "ours":
        losses, _ = model.run_train_iter(batch, 0)
        loss: Tensor = losses["loss"]
        return loss
    model.optimizer.zero_grad()
    loss = naive_loss(model, batch, STEPS, method == "CxGrad")
    loss.backward()
    model.optimizer.step()
    return loss.detach()


def parity_case(method: str, shot: int, options: argparse.Namespace) -> tuple[MAMLFewShotClassifier, Batch]:
    """Return a learner and a small meta-batch in float64."""
    model, batch = build(method, shot, options, PARITY_SIZE, PARITY_TASKS)
    return model.double(), (batch[0].double(), batch[1].double(), batch[2], batch[3])


def gradients(model: MAMLFewShotClassifier) -> dict[str, Tensor]:
    """Return the outer gradients by the names of `peer_name`."""
    return {peer_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}


def peer_name(name: str) -> str:
    """Return what a parameter is called in the networks of `benchmarks/peers.py`."""
    name = re.sub(r"^classifier\.layer_dict\.conv(\d)\.conv\.", r"backbone.conv\1.", name)
    name = re.sub(r"^classifier\.layer_dict\.conv(\d)\.norm_layer\.", r"backbone.norm\1.", name)
    return re.sub(r"^classifier\.layer_dict\.linear\.(weight|bias)s?$", r"head.linear.\1", name)


def measure(options: argparse.Namespace, variant: str, method: str, shot: int, file: str) -> Row:
    """Check `variant` (ours or naive) against the case in `file`, then time it, in this process."""
    model, batch = parity_case(method, shot, options)
    loss = train(variant, method, model, batch)
    check_parity(float(loss), gradients(model), torch.load(file, weights_only=True)["parity"])
    model, batch = build(method, shot, options, options.size)
    return timed_alone(lambda: train(variant, method, model, batch), options.device)


def write_cases(method: str, shot: int, options: argparse.Namespace, file: str) -> None:
    """Write the tasks that other libraries get, and the naive loop's loss and outer gradient of the small ones."""
    made = {"parity": parity_case(method, shot, options), "timing": build(method, shot, options, options.size)}
    cases: dict[str, dict[str, Any]] = {}
    for case, (model, batch) in made.items():
        weights = {peer_name(name): parameter.detach().clone().cpu() for name, parameter in model.named_parameters()}
        cases[case] = {"weights": weights, "batch": tuple(part.flatten(1, 2).cpu() for part in batch)}
    cases["parity"]["loss"] = float(train("naive", method, *made["parity"]))
    cases["parity"]["gradients"] = {name: g.cpu() for name, g in gradients(made["parity"][0]).items()}
    torch.save(cases, file)


def by_peer(library: str, options: argparse.Namespace, file: str) -> Row:
    """Return what a library's own process measures."""
    threads = ["--threads", str(options.threads)] if options.threads else []
    script = str(ROOT / "benchmarks" / "peers.py")
    return run_child(library, file, command=[interpreter(library), script, "--device", options.device, *threads])


def rows(method: str, shot: int, options: argparse.Namespace, folder: Path) -> list[Row]:
    """Return the rows of all variants of one method and shot."""
    file = str(folder / "cases.pt")
    write_cases(method, shot, options, file)
    variants = {name: partial(run_child, name, method, shot, file) for name in ("ours", "naive")}
    if method == "MAML":
        variants |= {library: partial(by_peer, library, options, file) for library in options.peers}
    return compare({"method": method, "shot": shot, "tasks": BATCH_SIZES[shot]}, variants, options.rounds)


def gradient_command_line(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of the benchmarks of gradient learners."""
    parser = command_line(description)
    parser.add_argument("--size", type=int, default=84, help="pixels [%(default)s]")
    parser.add_argument("--filters", type=int, default=48, help="[%(default)s]")
    parser.add_argument("--targets", type=int, default=15, help="query images of a class [%(default)s]")
    parser.add_argument("--shots", type=int, nargs="+", choices=BATCH_SIZES, default=list(BATCH_SIZES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=2, help="processes of each variant [%(default)s]")
    return parser


def main() -> None:
    parser = gradient_command_line(__doc__)
    parser.add_argument("--peers", nargs="*", choices=PACKAGES, default=list(PACKAGES), help="other libraries to run")
    options = start(parser, measure)
    with tempfile.TemporaryDirectory() as folder:
        table = [
            row
            for method in options.methods
            for shot in options.shots
            for row in rows(method, shot, options, Path(folder))
        ]
    question = f"A training iteration, {options.size}x{options.size}, {STEPS} steps, second order, float32"
    finish("iteration", options, {question: table}, str(options.size))


if __name__ == "__main__":
    main()
