"""Meta-train, validate and meta-test. The scripts in experiment_scripts/ call this; by hand, for example

python train_maml_system.py --dataset_name glyphs --image_height 32 --image_width 32 --contextual_grad true
python train_maml_system.py --dry_run true
python train_maml_system.py --num_seeds 3
python train_maml_system.py --help
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data import check_tests
from dry_run import dry_run
from experiment_builder import Experiment, experiment_folder
from few_shot_learning_system import build_learner
from preprocess.preprocess import ensure_builtin
from utils import distributed, entry, seeds
from utils.devices import choose_device, gpu_ids
from utils.options import Options, parse_args
from utils.progress import set_up_logging
from utils.records import read_tests

log = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    set_up_logging()
    options = parse_args(argv)
    if "WORLD_SIZE" not in os.environ:
        processes = len(gpu_ids(options.gpu)) if options.gpu and options.gpu.lower() != "cpu" else 1
        if processes > 1 or "PET_NNODES" in os.environ:
            return distributed.launch(processes)
    device = choose_device(options.gpu)
    with distributed.processes(device):
        if options.dry_run:
            dry_run(run, options, device)
        else:
            run(options, device)


def run(options: Options, device: torch.device, test: bool = True) -> None:
    """Train if that is asked for, then meta-test: once, or with each of --num_seeds seeds and then their mean.

    `test` false leaves out the meta-test.
    """
    for name in {options.dataset_name, *options.test_dataset_list} if distributed.is_main() else ():
        ensure_builtin(name, Path(options.dataset_dir))
    distributed.barrier()

    for number, of_seed in enumerate(seeds.each(options), 1):
        if options.num_seeds > 1:
            log.info("seed %d of %d, in %s", number, options.num_seeds, experiment_folder(of_seed))
        run_seed(of_seed, device, test)
    if test and options.num_seeds > 1 and distributed.is_main():
        seeds.report(options)


def run_seed(options: Options, device: torch.device, test: bool = True) -> None:
    """Train if that is asked for, then meta-test, unless `test` is false."""
    experiment = Experiment(options, build_learner(device, options))
    if not options.evaluate_on_test_set_only:
        check_tests(options)  # what is wrong with them should not come out after the training
        read_tests(experiment.folder / "logs" / "test_summary.json")
        experiment.train()
    if test:
        experiment.meta_test()


if __name__ == "__main__":
    sys.exit(entry.run(main, "interrupted; training goes on from the last checkpoint"))
