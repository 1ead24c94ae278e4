"""Score checkpoints on any data set, shot, query and number of episodes.

python test.py --load experiments/CIFAR_FS_5way5shot/CxGrad_4conv/saved_models/best --dataset CUB --shot 5
python test.py --load saved_models/epoch_90 saved_models/epoch_95 --episode 1000

Several checkpoints are also scored as an ensemble (mean of their logits). Images are resized and normalised as the
model was trained. Results are added to logs/test_summary.{json,csv} of the checkpoint's experiment.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from few_shot_learning_system import MAMLFewShotClassifier
from meta_test import meta_test
from preprocess.preprocess import ensure_builtin
from utils import checkpoints
from utils.devices import choose_device
from utils.errors import UserError
from utils.options import Options


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", type=Path, nargs="+", required=True, help="checkpoint files, the best one first")
    parser.add_argument("--dataset", help="data set to test on; default: the one trained on")
    parser.add_argument("--dataset_dir", default="datasets", help="folder that holds the data sets [%(default)s]")
    parser.add_argument("--episode", type=int, default=1000, help="tasks [%(default)s]")
    parser.add_argument("--way", type=int, help="classes in a task; default: as trained")
    parser.add_argument("--shot", type=int, help="support images per class; default: as trained")
    parser.add_argument("--query", type=int, default=15, help="query images per class [%(default)s]")
    parser.add_argument("--steps", type=int, help="inner steps; default: as trained")
    parser.add_argument("--seed", type=int, default=0, help="of the stream of test tasks [%(default)s]")
    parser.add_argument("--gpu", help="a GPU id or cpu; default: the first GPU if there is one")
    return parser.parse_args(argv)


def test_options(trained: Options, given: argparse.Namespace) -> Options:
    """The options a model was trained with, changed by what the test asks for."""
    if given.way not in (None, trained.num_classes_per_set):
        raise UserError(
            f"the checkpoint classifies {trained.num_classes_per_set} ways with a linear layer, so it cannot be tested "
            f"with --way {given.way}"
        )
    changed = dataclasses.replace(
        trained,
        dataset_dir=given.dataset_dir,
        num_samples_per_class=given.shot or trained.num_samples_per_class,
        num_target_samples=given.query,
        number_of_evaluation_steps_per_iter=given.steps or trained.number_of_evaluation_steps_per_iter,
        num_evaluation_tasks=given.episode,
        val_seed=given.seed,
    )
    changed.validate()
    return changed


def main(argv: Sequence[str] | None = None) -> None:
    given = parse(argv)
    device = choose_device(given.gpu)
    state = checkpoints.load(given.load[0])
    if "options" not in state:
        raise UserError(f"{given.load[0]} does not say how it was trained; test.py reads checkpoints of this program")
    options = test_options(Options.from_mapping(state["options"], str(given.load[0])), given)
    dataset = given.dataset or options.dataset_name
    ensure_builtin(dataset, Path(options.dataset_dir))
    model = MAMLFewShotClassifier((1, *options.image_shape), device, options)
    experiment = given.load[0].resolve().parents[1]  # EXPERIMENT/saved_models/FILE
    meta_test(model, options, given.load, dataset, state["normalization"], experiment)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
