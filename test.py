"""Score checkpoints, ours or the official programs', on any data set, shot, query, steps and number of episodes.

python test.py --load experiments/CIFAR_FS_5way_5shot/CxGrad_4conv/saved_models/best --dataset CUB --shot 5
python test.py --load saved_models/epoch_90 saved_models/epoch_95 --episode 1000      the first, and their ensemble
python test.py --load train_model_42 --config mini_imagenet-CxGrad.json               an official checkpoint
python test.py --load best_model.pth --head SVM --network ResNet --dataset miniImageNet --shot 1       MetaOptNet's
python test.py --load saved_models/best --head Ridge --way 10         a head on the body of a gradient-trained network

An ensemble averages logits. Images are resized and normalised as the model was trained. Results are added to
logs/test_summary.{json,csv} of the checkpoint's experiment, or of the checkpoint's own folder.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import train_maml_system
from data import Normalization, open_dataset
from dry_run import shrink, write_images
from experiment_builder import MUST_STAY
from few_shot_learning_system import build_learner
from meta_test import meta_test
from preprocess.preprocess import ensure_builtin
from utils import checkpoints, entry
from utils.devices import choose_device
from utils.errors import UserError
from utils.metaoptnet import published_statistics
from utils.official_checkpoints import infer_embedding, infer_options
from utils.options import Options, read_json
from utils.progress import set_up_logging, tell


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", type=Path, nargs="+", default=[], help="checkpoint files, the best one first")
    parser.add_argument("--config", type=Path, help="JSON file of options an official checkpoint was trained with")
    parser.add_argument(
        "--dataset", "--test_datasets", help="data set to test on, or several: CUB,glyphs; default: the one trained on"
    )
    parser.add_argument("--dataset_dir", default="datasets", help="folder that holds the data sets [%(default)s]")
    parser.add_argument("--episode", type=int, default=1000, help="tasks [%(default)s]")
    parser.add_argument("--way", type=int, help="classes in a task; default: as trained")
    parser.add_argument("--shot", type=int, help="support images per class; default: as trained")
    parser.add_argument("--query", type=int, default=15, help="query images per class [%(default)s]")
    parser.add_argument("--head", help="ProtoNet, Ridge, R2D2, SVM (SVM-CS), SVM-He or SVM-WW; default: as trained")
    parser.add_argument("--network", help="embedding of an official MetaOptNet file; default: what its weights tell")
    parser.add_argument("--svm_solver", help="structured or qpth; default: as trained")
    parser.add_argument("--svm_max_iter", type=int, help="qpth's iterations; MetaOptNet's test program has 3 [15]")
    parser.add_argument("--svm_on_failure", help="error, or use: score tasks whose SVM was not solved as they are")
    parser.add_argument("--steps", type=int, help="inner steps; default: as trained")
    parser.add_argument("--batch_norm", help="transductive, per_step or running; default: as trained")
    parser.add_argument("--seed", type=int, default=0, help="of the stream of test tasks [%(default)s]")
    parser.add_argument("--gpu", help="a GPU id or cpu; default: the first GPU if there is one")
    parser.add_argument("--dry_run", action="store_true", help="train and score a tiny model on made-up images")
    given = parser.parse_args(argv)
    if not given.load and not given.dry_run:
        parser.error("--load names the checkpoint to score")
    return given


def trained_options(state: dict[str, Any], given: argparse.Namespace) -> Options:
    """The options of training: those in the checkpoint, or what its weights tell together with --config."""
    file = str(given.load[0])
    if "options" in state:
        if given.config:
            raise UserError(
                f"{file} holds the options of its training; --config is for official checkpoints, which do not"
            )
        return Options.from_mapping(state["options"], file)
    config = read_json(given.config) if given.config else {}
    if "embedding" in state:
        return metaoptnet_options(state, config, given)
    told = infer_options(state["network"])
    if not config:
        tell(
            "warning: this checkpoint does not say how it was trained; assumed are the published recipe's shot, rate "
            f"and steps, images of {told['image_height']} pixels scaled to [0, 1]. Name its JSON file with --config"
        )
    sides = {name: config[name] for name in ("image_height", "image_width") if name in config}
    # What the weights prove wins over the file, which official programs do not follow in every key.
    return Options.from_mapping({"dataset_name": "unknown"} | config | told | sides, file)


def metaoptnet_options(state: dict[str, Any], config: dict[str, Any], given: argparse.Namespace) -> Options:
    """Those of an official MetaOptNet checkpoint, which holds weights only: the rest is its published recipe's.

    What it was trained on is --dataset, unless --config says otherwise.
    """
    if given.head is None:
        raise UserError(
            f"{given.load[0]} does not say which head it was trained with; name it: --head SVM, for example"
        )
    dataset = config.get("dataset_name", given.dataset)
    if not dataset or "," in dataset:
        raise UserError(
            f"{given.load[0]} does not say what it was trained on; name that data set with --dataset, or as "
            "dataset_name in a JSON file with --config"
        )
    if "dataset_name" not in config:
        tell(
            f"warning: this checkpoint does not say what it was trained on; assumed is {dataset}, its size and colours"
        )
    assumed = {"learner": "head", "dataset_name": dataset, "head": given.head}
    return Options.from_mapping(assumed | config | infer_embedding(state["embedding"]), str(given.load[0]))


def trained_normalization(state: dict[str, Any], options: Options, given: argparse.Namespace) -> Normalization:
    """As in the checkpoint; an official one was normalised by the statistics of its train split, if at all."""
    if "options" in state or options.normalization == "unit":
        return state.get("normalization")
    if options.normalization == "published":
        return published_statistics(options.dataset_name)
    options = dataclasses.replace(options, dataset_dir=given.dataset_dir)
    split = open_dataset(options, options.dataset_name, "train")
    return split.mean, split.std


def check_alike(states: Sequence[dict[str, Any]], files: Sequence[Path]) -> None:
    """Raise UserError if checkpoints of an ensemble adapt or normalise in different ways."""
    for state, file in zip(states[1:], files[1:], strict=True):
        given = [st.get("options") for st in (states[0], state)]
        first, other = (dataclasses.asdict(Options.from_mapping(options)) if options else {} for options in given)
        differing = [n for n in first if first[n] != other.get(n) and n in MUST_STAY - {"train_seed", "batch_size"}]
        if differing or state.get("normalization") != states[0].get("normalization"):
            named = ", ".join(differing) or "normalization"
            raise UserError(f"{file} was trained with other options than {files[0]} ({named}); test them one by one")


def test_options(trained: Options, given: argparse.Namespace) -> Options:
    """The options of training, changed by what the test asks for; raises UserError where the model cannot do that."""
    if given.batch_norm in ("per_step", "running") and not trained.tracks_statistics:
        raise UserError(
            f"--batch_norm {given.batch_norm} needs statistics that training did not keep; train with "
            "--per_step_bn_statistics true or --batch_norm running"
        )
    if given.head and given.steps:
        raise UserError("--steps counts inner steps, which --head takes the place of; leave one of them out")
    asked = {
        "head": given.head,
        "svm_on_failure": given.svm_on_failure,
        "test_way": given.way,
        "val_shot": given.shot,
        "number_of_evaluation_steps_per_iter": given.steps,
        "batch_norm": given.batch_norm,
    }
    if given.head or given.svm_solver or given.svm_max_iter:  # a solver goes with its head
        asked |= {"svm_solver": given.svm_solver or "structured"}
        trained = dataclasses.replace(trained, svm_max_iter=given.svm_max_iter)
    options = Options.from_mapping(
        dataclasses.asdict(trained)
        | {name: value for name, value in asked.items() if value is not None}
        | {"dataset_dir": given.dataset_dir, "val_query": given.query, "evaluate_on_test_set_only": True}
        | {
            "num_evaluation_tasks": given.episode,
            "val_seed": given.seed,
            "test_shots": None,
            "test_datasets": given.dataset,
        }
    )
    if given.network and Options.from_mapping(dataclasses.asdict(options) | {"backbone": given.network}) != options:
        raise UserError(f"--network {given.network} is not what was trained, which is {options.backbone}; leave it out")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    set_up_logging()
    given = parse(argv)
    if given.dry_run:
        dry_run(given)
        return
    states = [checkpoints.load(path) for path in given.load]
    check_alike(states, given.load)
    trained = trained_options(states[0], given)
    options = test_options(trained, given)
    if given.gpu and "," in given.gpu:
        tell(f"warning: testing takes one GPU, the first of {given.gpu}")
    device = choose_device(given.gpu and given.gpu.split(",")[0])
    if options.test_dataset_list == ["unknown"]:
        raise UserError("the checkpoint does not say what it was trained on; name the data set with --dataset")
    for name in options.test_dataset_list:
        ensure_builtin(name, Path(options.dataset_dir))
    model = build_learner(device, options)
    file = given.load[0].resolve()
    folder = file.parent.parent if file.parent.name == "saved_models" else file.parent
    labels = [file.name]
    if len(given.load) > 1:
        labels.append("ensemble of " + ", ".join(path.name for path in given.load))
    normalization = trained_normalization(states[0], trained, given)
    meta_test(model, options, given.load, labels, normalization, folder)


def dry_run(given: argparse.Namespace) -> None:
    """Train for two iterations on made-up images and score the checkpoint on them."""
    with tempfile.TemporaryDirectory(prefix="dry_run_") as name:
        options = shrink(Options(), Path(name))
        write_images(options)
        train_maml_system.run(options, choose_device(given.gpu))
        (best,) = Path(name).glob("experiments/*/*/saved_models/best")
        main(
            [
                "--load",
                str(best),
                "--dataset_dir",
                name,
                "--episode",
                "2",
                "--query",
                "1",
                *(["--gpu", given.gpu] if given.gpu else []),
            ]
        )


if __name__ == "__main__":
    sys.exit(entry.run(main))
