"""Meta-train, validate and meta-test. The scripts in experiment_scripts/ call this; by hand, for example

python train_maml_system.py --dataset_name glyphs --image_height 32 --image_width 32 --contextual_grad true
python train_maml_system.py --dry_run true
python train_maml_system.py --help
"""

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from experiment_builder import Experiment
from few_shot_learning_system import MAMLFewShotClassifier
from meta_test import open_dataset
from preprocess.preprocess import ensure_builtin
from utils import distributed
from utils.devices import choose_device
from utils.errors import UserError
from utils.options import Options, parse_args
from utils.progress import tell
from utils.synthetic import write_dataset

DRY_RUN_ELSEWHERE = "dry_run_elsewhere"  # the data set of its cross-domain test


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_args(argv)
    device = choose_device(options.gpu)
    with distributed.processes(device):
        if options.dry_run:
            dry_run(options, device)
        else:
            run(options, device)


def run(options: Options, device: torch.device) -> None:
    """Train if that is asked for, then meta-test."""
    test_dataset = options.test_dataset or options.dataset_name
    for name in {options.dataset_name, test_dataset} if distributed.is_main() else ():
        ensure_builtin(name, Path(options.dataset_dir))
    distributed.barrier()

    model = MAMLFewShotClassifier((options.batch_size, *options.image_shape), device, options)
    experiment = Experiment(options, model)
    if not options.evaluate_on_test_set_only:
        open_dataset(options, test_dataset, "test")  # what is wrong with it should not come out after the training
        experiment.train()
    experiment.meta_test(test_dataset)


def dry_run(options: Options, device: torch.device) -> None:
    """Two tiny epochs of everything on made-up images: train, validate, save, resume, test, cross-test."""
    with tempfile.TemporaryDirectory(prefix="dry_run_") as name:
        folder = distributed.broadcast_text(name)
        tiny = shrink(options, Path(folder))
        if distributed.is_main():
            write_images(tiny)
        distributed.barrier()
        run(dataclasses.replace(tiny, total_epochs=1), device)
        run(tiny, device)
        run(dataclasses.replace(tiny, evaluate_on_test_set_only=True, test_dataset=DRY_RUN_ELSEWHERE), device)
        distributed.barrier()
    tell("dry run: trained, resumed, tested and cross-tested")


def write_images(tiny: Options) -> None:
    """Just enough made-up images for the tasks of a dry run, in two data sets."""
    images = tiny.num_samples_per_class + tiny.num_target_samples
    for dataset in (tiny.dataset_name, DRY_RUN_ELSEWHERE):
        write_dataset(Path(tiny.dataset_dir) / dataset, tiny.num_classes_per_set, images, (28, 28))


def shrink(options: Options, folder: Path) -> Options:
    """The same method on fewer, smaller images with a narrower network, all in `folder`."""
    ranks = distributed.world_size()
    return dataclasses.replace(
        options,
        dataset_dir=str(folder),
        experiments_dir=str(folder / "experiments"),
        continue_from_epoch="latest",
        evaluate_on_test_set_only=False,
        test_dataset=None,
        image_height=32 if options.conv_padding else 64,
        image_width=32 if options.conv_padding else 64,
        num_target_samples=1,
        batch_size=ranks * min(2, -(-options.batch_size // ranks)),
        cnn_num_filters=4,
        resnet_widths="2-3-4-5",
        num_context_params=4,
        total_epochs=2,
        total_iter_per_epoch=1,
        num_evaluation_tasks=2,
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; training goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
