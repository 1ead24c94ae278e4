"""Images per second of training an embedding through a base learner (MetaOptNet), by memory format and precision.

python benchmarks/head_training.py                  one episode a batch, on this machine
python benchmarks/head_training.py --device cuda --tasks 8

An episode is 5-way 5-shot with 6 queries per class: 55 images. "shipped" is what the learner chooses by itself; the
others change the embedding's memory format or the precision, for this benchmark only. tf32 and bf16 are measured on
CUDA only. The memory formats of a network, head, image size and precision take turns in one process, each with its own
learner. Prints one table and writes it to benchmarks/results/.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import Row, attempt, command_line, compare, finish, run_child, start, timed  # noqa: E402
from head_learning_system import HeadFewShotClassifier  # noqa: E402
from utils.options import Options  # noqa: E402

WAY, SHOT, QUERY = 5, 5, 6
NETWORKS, HEADS, SIZES = ("conv64", "ResNet-12"), ("ProtoNet", "Ridge", "SVM-CS"), (32, 84)
COLUMNS = ("network", "head", "pixels", "precision")
FORMATS = {"shipped": None, "contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def iteration(
    options: argparse.Namespace, network: str, head: str, size: int, precision: str, memory_format: str
) -> Callable[[], Row]:
    """Return a function that times training iterations of one learner, after one to warm up."""
    named = {"learner": "head", "dataset_name": "CIFAR_FS", "backbone": network, "head": head, "precision": precision}
    tasks = {"num_classes_per_set": WAY, "num_samples_per_class": SHOT, "num_target_samples": QUERY}
    if network == "ResNet-12":
        named["resnet_widths"] = "64-160-320-640"
    chosen = Options.from_mapping(named | tasks | {"image_height": size, "image_width": size})
    model = HeadFewShotClassifier((options.tasks, 3, size, size), options.device, chosen)
    if chosen_format := FORMATS[memory_format]:
        model.embedding.to(memory_format=chosen_format)
    images = [torch.rand(options.tasks, WAY, n, 3, size, size, device=options.device) for n in (SHOT, QUERY)]
    labels = [
        torch.arange(WAY, device=options.device).view(1, WAY, 1).repeat(options.tasks, 1, n) for n in (SHOT, QUERY)
    ]
    train = partial(model.run_train_iter, (*images, *labels), 0)
    train()
    return lambda: timed(train, options.device, warm_up=0)


def measure(options: argparse.Namespace, network: str, head: str, size: int, precision: str) -> list[Row]:
    """Return a row for each memory format, in turns in this process."""
    variants = {name: iteration(options, network, head, size, precision, name) for name in FORMATS}
    case = dict(zip(COLUMNS, (network, head, size, precision), strict=True))
    return compare(case, variants, options.rounds, count="images", of=options.tasks * WAY * (SHOT + QUERY))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="pixels [%(default)s]")
    parser.add_argument("--tasks", type=int, default=1, help="episodes in a batch [%(default)s]")
    parser.add_argument("--rounds", type=int, default=2, help="iterations of each variant [%(default)s]")
    options = start(parser, measure)
    table: list[Row] = []
    precisions = ("float32", "tf32", "bf16") if options.device.startswith("cuda") else ("float32",)
    for case in itertools.product(options.networks, options.heads, options.sizes, precisions):
        table += attempt(partial(run_child, *case), dict(zip(COLUMNS, case, strict=True)))
    finish("head_training", options, {"Training through a head, forward, backward and SGD": table})


if __name__ == "__main__":
    main()
