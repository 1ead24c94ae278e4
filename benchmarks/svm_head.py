"""Seconds of SVM-CS, forward and backward, by our solver and by qpth, and how far each is from the solution.

python benchmarks/svm_head.py                       8 tasks, 5-way 1-, 5- and 15-shot, 640 and 2560 dimensions
python benchmarks/svm_head.py --device cuda

Prints one table and writes it to benchmarks/results/. The solvers take turns, round by round, so that the ratio holds
on a machine whose speed drifts; a figure is the median of its rounds. Embeddings are float32 and made up:
  apart     random class means of size 1, noise of size 0.5: many dual variables on their bounds
  mixed     means 0.3, noise 1: classes that overlap
  positive  means 0.3, noise 0.6, a component common to all, negative values cut off: as after a network's last ReLU
Errors are relative to the largest entry of the exact logits, or of the exact gradient with respect to the support.
Exact is a dense float64 solution of the optimality conditions of all n * way variables for a given active set, accepted
only if it satisfies the rest of them.
"""

import argparse
import itertools
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import Failed, Row, attempt, command_line, compare, finish, start, synchronise  # noqa: E402
from classification_heads import ClassificationHead, one_hot_of_ranks  # noqa: E402
from qp_solvers import crammer_singer, solve  # noqa: E402

TASKS, WAY, QUERY, C = 8, 5, 6, 0.1  # as in MetaOptNet's training; queries per class
KINDS = {"apart": (1.0, 0.5), "mixed": (0.3, 1.0), "positive": (0.3, 0.6)}  # size of class means, of noise
SOLVERS: dict[str, dict[str, Any]] = {
    "structured": {"solver": "structured"},
    "qpth32": {"solver": "qpth"},
    "qpth64": {"solver": "qpth", "double_precision": True},
}


class Data(NamedTuple):
    """A batch of episodes, and the fixed weights of loss = sum(logits * weight)."""

    query: Tensor
    support: Tensor
    labels: Tensor
    weight: Tensor


def episodes(kind: str, shot: int, dim: int, device: str) -> Data:
    generator = torch.Generator().manual_seed(shot * dim)
    mean, noise = KINDS[kind]
    means = mean * torch.randn(TASKS, WAY, dim, generator=generator)
    common = torch.randn(dim, generator=generator).abs() if kind == "positive" else torch.zeros(dim)

    def images(labels: Tensor) -> Tensor:
        points = means.gather(1, labels.unsqueeze(2).expand(-1, -1, dim)) + common
        points = points + noise * torch.randn(points.shape, generator=generator)
        return points.relu() if kind == "positive" else points

    labels = torch.stack([torch.randperm(WAY * shot, generator=generator) % WAY for _ in range(TASKS)])
    query, support = images(torch.arange(WAY).repeat(TASKS, QUERY)), images(labels)
    weight = torch.randn(TASKS, WAY * QUERY, WAY, generator=generator)
    return Data(*(t.to(device) for t in (query, support, labels, weight)))


def run(data: Data, options: dict[str, Any]) -> tuple[Tensor, Tensor, float]:
    """Logits, gradient of the support, and seconds."""
    query, support = (t.clone().requires_grad_() for t in (data.query, data.support))
    head = ClassificationHead("SVM-CS").to(query.device)
    synchronise(query.device)
    begin = time.perf_counter()
    logits = head(query, support, data.labels, WAY, support.shape[1] // WAY, C_reg=C, **options)
    (logits * data.weight).sum().backward()
    synchronise(query.device)
    assert support.grad is not None
    return logits.detach(), support.grad, time.perf_counter() - begin


def exact(data: Data) -> tuple[Tensor, Tensor]:
    """Logits and support gradient of the exact solution, in float64."""
    wide = [t.double().cpu() for t in (data.query, data.support, data.weight)]
    one_hot = one_hot_of_ranks(data.labels.cpu(), WAY)
    kernel = wide[1] @ wide[1].mT
    guess = solve(crammer_singer(kernel, one_hot, C)).x.mT
    found = [dense(*parts) for parts in zip(*wide, kernel, one_hot, guess, strict=True)]
    return torch.stack([logits for logits, _ in found]), torch.stack([gradient for _, gradient in found])


def dense(
    query: Tensor, support: Tensor, weight: Tensor, kernel: Tensor, one_hot: Tensor, guess: Tensor
) -> tuple[Tensor, Tensor]:
    """One task by a dense system of all n * way variables and n row sums; `guess` gives the active set only."""
    n = len(kernel)
    upper = (C * one_hot).flatten()
    free = (guess.flatten() - upper).abs() > 1e-13
    hessian = torch.kron(kernel + torch.eye(n, dtype=kernel.dtype), torch.eye(WAY, dtype=kernel.dtype))
    sums = torch.kron(torch.eye(n, dtype=kernel.dtype), torch.ones(1, WAY, dtype=kernel.dtype))

    def solve(right: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
        corner = torch.zeros(n, n, dtype=kernel.dtype)
        system = torch.cat(
            [torch.cat([hessian[free][:, free], sums[:, free].T], 1), torch.cat([sums[:, free], corner], 1)]
        )
        found = torch.linalg.solve(system, torch.cat([right[free], totals]))
        x = torch.zeros_like(upper)
        x[free] = found[: int(free.sum())]
        return x, found[int(free.sum()) :]

    held = upper.where(~free, 0)
    moved, nu = solve(one_hot.flatten() - hessian @ held, -sums @ held)
    dual = held + moved
    multipliers = one_hot.flatten() - hessian @ dual - nu @ sums
    if bool((dual > upper + 1e-11).any() or (multipliers[~free] < -1e-9).any()):
        raise Failed("the reference violates the optimality conditions: no exact solution to compare with")
    dual = dual.view(n, WAY)
    towards = support @ query.T @ weight  # gradient with respect to the dual
    v = solve(towards.flatten(), torch.zeros(n, dtype=kernel.dtype))[0].view(n, WAY)
    by_kernel = -(v @ dual.T + dual @ v.T) @ support
    return query @ support.T @ dual, by_kernel + dual @ weight.T @ query


def measure(kind: str, shot: int, dim: int, options: argparse.Namespace) -> list[Row]:
    """Return a row for each solver, in turns."""
    data = episodes(kind, shot, dim, options.device)
    logits, gradient = exact(data)

    def once(settings: dict[str, Any]) -> Row:
        found, found_gradient, seconds = run(data, settings)
        errors = {"logits_error": error(found, logits), "gradient_error": error(found_gradient, gradient)}
        return {"seconds": seconds, **errors}

    solvers = {name: partial(once, settings) for name, settings in SOLVERS.items()}
    case = {"embeddings": kind, "shot": shot, "dim": dim}
    compare(case, solvers, rounds=1)  # warms up
    return compare(case, solvers, options.rounds)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the largest entry."""
    return float((found.double().cpu() - expected).abs().max() / expected.abs().max())


def main() -> None:
    parser = command_line(__doc__, threads=1)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5, 15])
    parser.add_argument("--dims", type=int, nargs="+", default=[640, 2560])
    parser.add_argument("--rounds", type=int, default=9, help="[%(default)s]")
    options = start(parser)
    rows: list[Row] = []
    for kind, shot, dim in itertools.product(KINDS, options.shots, options.dims):
        case = {"embeddings": kind, "shot": shot, "dim": dim}
        rows += attempt(partial(measure, kind, shot, dim, options), case)
    finish("svm_head", options, {f"SVM-CS, {TASKS} tasks, {WAY}-way, {QUERY} queries per class": rows})


if __name__ == "__main__":
    main()
