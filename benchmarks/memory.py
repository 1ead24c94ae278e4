"""Peak memory of one second-order iteration of ResNet-12, 5-way 5-shot at 84x84, with and without stored inner steps.

python benchmarks/memory.py                     on this machine; the variant that stores all needs about 11 GiB
python benchmarks/memory.py --device cuda

One task per pass, 15 targets, 5 inner steps, widths 64-128-256-512; each variant in a process of its own.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import Row, command_line, compare, finish, run_child, start, timed_alone  # noqa: E402
from few_shot_learning_system import MAMLFewShotClassifier  # noqa: E402


def measure(options: argparse.Namespace, variant: str) -> Row:
    """Peak GiB, seconds and loss of one training iteration on one task."""
    args = SimpleNamespace(backbone="ResNet-12", num_samples_per_class=5, batch_size=1, tasks_per_pass=1)
    args.resnet_widths, args.checkpoint_inner_steps = options.widths, variant == "recomputed"
    model = MAMLFewShotClassifier((1, 3, options.size, options.size), options.device, args)
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.rand(1, 5, n, 3, options.size, options.size, generator=generator).to(options.device) for n in (5, 15)
    ]
    labels = [torch.arange(5, device=options.device).view(1, 5, 1).repeat(1, 1, n) for n in (5, 15)]
    losses: list[float] = []
    row = timed_alone(
        lambda: losses.append(model.run_train_iter((*images, *labels), 0)[0]["loss"].item()), options.device, 0
    )
    return row | {"loss": losses[0]}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--size", type=int, default=84, help="pixels [%(default)s]")
    parser.add_argument("--widths", default="64-128-256-512", help="[%(default)s]")
    options = start(parser, measure)
    variants = {name: partial(run_child, name) for name in ("recomputed", "stored")}
    rows = compare({"network": "ResNet-12"}, variants, rounds=1)
    finish("memory", options, {"One second-order iteration with inner steps": rows}, f"resnet12_{options.size}")


if __name__ == "__main__":
    main()
