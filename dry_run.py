"""A rehearsal: everything that a command would do, in seconds, on made-up images."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from utils import distributed
from utils.options import Options
from utils.progress import tell
from utils.synthetic import write_dataset

ELSEWHERE = "dry_run_elsewhere"  # the data set of its cross-domain test


def dry_run(run: Callable[[Options, torch.device], None], options: Options, device: torch.device) -> None:
    """Two tiny epochs of all that `run` does, on made-up images: train, validate, save, resume, test, cross-test."""
    with tempfile.TemporaryDirectory(prefix="dry_run_") as name:
        folder = distributed.broadcast_text(name)
        tiny = shrink(options, Path(folder))
        if distributed.is_main():
            write_images(tiny)
        distributed.barrier()
        run(dataclasses.replace(tiny, total_epochs=1), device)
        run(tiny, device)
        run(dataclasses.replace(tiny, evaluate_on_test_set_only=True, test_datasets=ELSEWHERE), device)
        distributed.barrier()
    tell("dry run: trained, resumed, tested and cross-tested")


def write_images(tiny: Options) -> None:
    """Just enough made-up images for the tasks of a dry run, in two data sets."""
    tasks = (tiny.training_task, tiny.evaluation_task)
    way, images = (
        max(way for way, _, _ in tasks),
        max(max(shot, *tiny.test_shot_list) + query for _, shot, query in tasks),
    )
    for dataset in (tiny.dataset_name, ELSEWHERE):
        write_dataset(Path(tiny.dataset_dir) / dataset, way, images, (28, 28))


def shrink(options: Options, folder: Path) -> Options:
    """The same method on fewer, smaller images with a narrower network, all in `folder`."""
    ranks = distributed.world_size()
    narrow: dict[str, Any] = {} if options.learner == "head" else {"cnn_num_filters": 4, "num_context_params": 4}
    narrow |= {"resnet_widths": "2-3-4-5"} if options.backbone == "ResNet-12" else {}
    return dataclasses.replace(
        options,
        dataset_dir=str(folder),
        experiments_dir=str(folder / "experiments"),
        continue_from_epoch="latest",
        evaluate_on_test_set_only=False,
        test_datasets=None,
        image_height=32 if options.conv_padding else 64,
        image_width=32 if options.conv_padding else 64,
        save_path=options.save_path and str(folder / "run"),
        num_target_samples=1,
        val_query=options.val_query and 1,
        batch_size=ranks * min(2, -(-options.batch_size // ranks)),
        **narrow,
        total_epochs=2,
        total_iter_per_epoch=1,
        num_evaluation_tasks=2,
    )
