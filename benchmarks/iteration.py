"""Seconds and peak memory of one training iteration (all inner loops, outer backward, Adam), against a naive loop.

python benchmarks/iteration.py                      the published 84x84 rows, 1- and 5-shot, on this machine
python benchmarks/iteration.py --device cuda --rounds 5

Prints one table and writes it to benchmarks/results/. Every figure comes from processes of their own that take turns,
so that the ratio holds on a machine whose speed drifts; a process counts its fastest iteration.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from few_shot_learning_system import MAMLFewShotClassifier  # noqa: E402
from tests.naive_reference import naive_loss  # noqa: E402
from utils.devices import keep_freed_memory, peak_memory_gib  # noqa: E402
from utils.tables import aligned  # noqa: E402

WARM_UP, ITERATIONS = 1, 3  # in each process
BATCH_SIZES = {1: 4, 5: 2}  # shot -> meta-batch, as in the published recipe


def measure(variant: str, method: str, shot: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the fastest iteration, and peak GiB, of `variant` (ours or naive) in this process."""
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    if device.type == "cpu":
        keep_freed_memory()  # for both, as in training
    tasks = BATCH_SIZES[shot]
    args = SimpleNamespace(
        contextual_grad=method == "CxGrad",
        num_samples_per_class=shot,
        batch_size=tasks,
        cnn_num_filters=options.filters,
    )
    model = MAMLFewShotClassifier((tasks, 3, options.size, options.size), device, args)
    images = [torch.rand(tasks, 5, n, 3, options.size, options.size, device=device) for n in (shot, 15)]
    labels = [torch.arange(5, device=device).view(1, 5, 1).repeat(tasks, 1, n) for n in (shot, 15)]
    seconds = []
    for _ in range(WARM_UP + ITERATIONS):
        start = time.perf_counter()
        if variant == "ours":
            model.run_train_iter((*images, *labels), 0)
        else:
            model.optimizer.zero_grad()
            naive_loss(model, (*images, *labels), 5, method == "CxGrad").backward()
            model.optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds[WARM_UP:]), "peak_gib": peak_memory_gib(device)}


def in_turns(method: str, shot: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table: ours and naive in alternating processes."""
    found: dict[str, list[dict[str, float]]] = {"ours": [], "naive": []}
    for _ in range(options.rounds):
        for variant, results in found.items():
            child = [sys.executable, __file__, *sys.argv[1:], "--child", f"{variant},{method},{shot}"]
            results.append(json.loads(subprocess.run(child, check=True, capture_output=True, text=True).stdout))
    ratios = [n["seconds"] / o["seconds"] for o, n in zip(found["ours"], found["naive"], strict=True)]
    row: dict[str, Any] = {"method": method, "shot": shot, "tasks": BATCH_SIZES[shot]}
    for variant, results in found.items():
        row[f"{variant}_seconds"] = round(statistics.median(r["seconds"] for r in results), 4)
        row[f"{variant}_peak_gib"] = round(max(r["peak_gib"] for r in results), 2)
    return row | {"naive_over_ours": [round(ratio, 2) for ratio in sorted(ratios)]}


def machine(device: str) -> dict[str, str]:
    """What a figure must say about where it was taken."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    name = torch.cuda.get_device_name() if device != "cpu" else f"CPU, {os.cpu_count()} cores"
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {"device": name, "torch": torch.__version__, "python": platform.python_version(), "commit": commit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    parser.add_argument("--size", type=int, default=84, help="pixels [%(default)s]")
    parser.add_argument("--filters", type=int, default=48, help="[%(default)s]")
    parser.add_argument("--shots", type=int, nargs="+", choices=BATCH_SIZES, default=list(BATCH_SIZES))
    parser.add_argument("--threads", type=int, help="of the CPU; default: all cores")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each variant [%(default)s]")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        variant, method, shot = options.child.split(",")
        print(json.dumps(measure(variant, method, int(shot), options)))
        return

    where = machine(options.device)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    threads = f", {options.threads} threads" if options.threads else ""
    print(
        f"{options.size}x{options.size}, {options.filters} filters, 5-way, 15 targets, 5 steps, second order{threads}"
    )
    rows = [in_turns(method, shot, options) for method in ("CxGrad", "MAML") for shot in options.shots]
    names = ("method", "shot", "tasks", "ours_seconds", "naive_seconds", "ours_peak_gib", "naive_peak_gib")
    table = [
        [*(row[name] for name in names), f"{min(row['naive_over_ours'])} .. {max(row['naive_over_ours'])}"]
        for row in rows
    ]
    print(*aligned([[*names, "naive/ours"], *table]), sep="\n")
    settings = {name: value for name, value in vars(options).items() if name != "child"}
    kind = "cpu" if options.device == "cpu" else where["device"].replace(" ", "_")
    file = ROOT / "benchmarks" / "results" / f"iteration_{options.size}_{kind}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"machine": where, "settings": settings, "rows": rows}, indent=2) + "\n")
    print(f"written to {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
