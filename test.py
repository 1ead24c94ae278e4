"""Score checkpoints, ours or the official programs', on any data set, shot, query, steps and number of episodes.

python test.py --load experiments/CIFAR_FS_5way_5shot/CxGrad_4conv/saved_models/best --dataset CUB --shot 5
python test.py --load saved_models/epoch_90 saved_models/epoch_95 --episode 1000      the first, and their ensemble
python test.py --load train_model_42 --config mini_imagenet-CxGrad.json               an official checkpoint
python test.py --load models/glyphs_CxGrad --shot 5            a folder that utils.export wrote
python test.py --load best_model.pth --head SVM --network ResNet --dataset miniImageNet --shot 1       MetaOptNet's
python test.py --load saved_models/best --head Ridge --way 10         a head on the body of a gradient-trained network
python test.py --load saved_models/best --shot 5 --dry_run            a rehearsal on a few made-up images

An ensemble averages logits. Images are resized and normalised as the model was trained. Results are added to
logs/test_summary.{json,csv} of the checkpoint's experiment, or else of its own folder.
"""

import dataclasses
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import train_maml_system
from data import Normalization, open_dataset
from dry_run import shrink, write_images
from few_shot_learning_system import build_learner
from meta_test import meta_test
from preprocess.preprocess import ensure_builtin
from utils import checkpoints, entry
from utils.devices import choose_device
from utils.errors import UserError
from utils.metaoptnet import published_statistics
from utils.official_checkpoints import infer_embedding, infer_options
from utils.options import (
    Options,
    all_defaults,
    changed,
    converted,
    declaration,
    differences,
    parse,
    parser_of,
    read_json,
)
from utils.progress import set_up_logging

log = logging.getLogger(__name__)

Changes = dict[str, Any]  # the options that the command line names, and their values
# Flags, MetaOptNet's among them, and the options that they set; a head's own options have flags of their names.
FLAGS = {
    **{"dataset": "test_datasets", "test_datasets": "test_datasets", "episode": "num_evaluation_tasks"},
    **{"way": "test_way", "shot": "val_shot", "query": "val_query", "seed": "val_seed"},
    **{"steps": "number_of_evaluation_steps_per_iter", "network": "backbone", "config": "name_of_args_json_file"},
    **{name: name for name in ("dataset_dir", "head", "svm_max_iter", "batch_norm", "on_nonfinite", "gpu", "dry_run")},
}
# A test's own defaults; other options are as in training.
DEFAULTS = {
    **{"dataset_dir": "datasets", "test_datasets": None, "test_shots": None, "gpu": None, "dry_run": False},
    **{"num_evaluation_tasks": 1000, "val_query": 15, "val_seed": 0, "evaluate_on_test_set_only": True},
    "on_nonfinite": "stop",
}


def parse_command(argv: Sequence[str] | None) -> tuple[list[Path], Changes]:
    """Return the checkpoint files and the options that a command line names; raises UserError for what is not right."""
    flags = FLAGS | {name: name for name in all_defaults() if "head" in declaration(name).only}
    parser = parser_of(flags, dict.fromkeys(flags.values(), "as trained") | DEFAULTS, __doc__)
    parser.add_argument(
        "--load",
        type=Path,
        nargs="+",
        default=[],
        help="checkpoint files, or folders of utils.export, the best one first",
    )
    values = parse(parser, argv)
    files: list[Path] = values.pop("load")
    return files, converted(values)


def trained_options(state: Mapping[str, Any], file: Path, changes: Changes) -> Options:
    """Return the options of training: those in the checkpoint, or what its weights show together with --config."""
    config_file = changes.get("name_of_args_json_file")
    if "options" in state:
        if config_file:
            raise UserError(f"{file} holds its training's options; --config is for official checkpoints, which do not")
        return Options.from_mapping(state["options"], str(file), saved=True)
    config = read_json(Path(config_file)) if config_file else {}
    if "embedding" in state:
        return metaoptnet_options(state, file, config, changes)
    found = infer_options(state["network"])
    if not config:
        assumed = f"the recipe's shot, rate and steps, and images of {found['image_height']} pixels scaled to [0, 1]"
        log.warning(
            "%s does not say how it was trained; assumed are %s. Name its JSON file with --config", file, assumed
        )
    sides = {name: config[name] for name in ("image_height", "image_width") if name in config}
    # What the weights prove wins over the file, which official programs do not follow in every key.
    return Options.from_mapping({"dataset_name": "unknown"} | config | found | sides, str(file))


def metaoptnet_options(state: Mapping[str, Any], file: Path, config: dict[str, Any], changes: Changes) -> Options:
    """Return the options of an official MetaOptNet checkpoint, which holds weights only: the rest is its recipe's.

    What it was trained on is --dataset, unless --config says otherwise.
    """
    if "head" not in changes:
        raise UserError(f"{file} does not say which head it was trained with; name it: --head SVM, for example")
    dataset = config.get("dataset_name", changes.get("test_datasets"))
    if not dataset or "," in dataset:
        cure = "name that data set with --dataset, or as dataset_name in a JSON file with --config"
        raise UserError(f"{file} does not say what it was trained on; {cure}")
    if "dataset_name" not in config:
        log.warning("%s does not say what it was trained on; assumed is %s, its size and colours", file, dataset)
    assumed = {"learner": "head", "dataset_name": dataset, "head": changes["head"]}
    return Options.from_mapping(assumed | config | infer_embedding(state["embedding"]), str(file))


def trained_normalization(state: Mapping[str, Any], options: Options) -> Normalization:
    """Return the checkpoint's; an official one was normalised by its train split's statistics, if at all."""
    if "options" in state or options.normalization == "unit":
        return state.get("normalization")
    if options.normalization == "published":
        return published_statistics(options.dataset_name)
    split = open_dataset(options, options.dataset_name, "train")
    return split.mean, split.std


def check_alike(states: Sequence[Mapping[str, Any]], files: Sequence[Path]) -> None:
    """Raise UserError if checkpoints of an ensemble adapt or normalise in different ways."""
    first = Options.from_mapping(states[0].get("options", {}), str(files[0]), saved=True)
    for state, file in zip(states[1:], files[1:], strict=True):
        differing = [found.name for found in differences(state.get("options", {}), first, "test")]
        if differing or state.get("normalization") != states[0].get("normalization"):
            named = ", ".join(differing) or "normalization"
            raise UserError(f"{file} was trained with other options than {files[0]} ({named}); test them one by one")


def test_options(trained: Options, changes: Changes) -> Options:
    """Return the options of training, with a test's changes; UserError where the model cannot do that."""
    if (norm := changes.get("batch_norm", "transductive")) != "transductive" and not trained.tracks_statistics:
        cure = "train with --per_step_bn_statistics true or --batch_norm running"
        raise UserError(f"--batch_norm {norm} needs statistics that training did not keep; {cure}")
    if "head" in changes and "number_of_evaluation_steps_per_iter" in changes:
        raise UserError("--steps counts inner steps, which --head takes the place of; leave one of them out")
    if (network := changes.get("backbone", trained.backbone)) != trained.backbone:
        raise UserError(f"--network {network} is not what was trained, which is {trained.backbone}; leave it out")
    return changed(trained, DEFAULTS | changes)


def score(files: Sequence[Path], changes: Changes, rehearsal: Path | None = None) -> None:
    """Score checkpoint files as the command line says; with `rehearsal` on made-up images, and all results there."""
    states = [checkpoints.load(path) for path in files]
    check_alike(states, files)
    options = test_options(trained_options(states[0], files[0], changes), changes)
    if rehearsal:
        options = dataclasses.replace(options, dataset_dir=str(rehearsal), num_evaluation_tasks=2, val_query=1)
        write_images(options, {options.dataset_name, *options.test_dataset_list})
    elif options.test_dataset_list == ["unknown"]:
        raise UserError("the checkpoint does not say what it was trained on; name the data set with --dataset")
    if options.gpu and "," in options.gpu:
        log.warning("testing takes one GPU, the first of %s", options.gpu)
    device = choose_device(options.gpu and options.gpu.split(",")[0])
    for name in options.test_dataset_list:
        ensure_builtin(name, Path(options.dataset_dir))
    model = build_learner(device, options)
    first = files[0].resolve()
    own = first if first.is_dir() else first.parent
    folder = rehearsal or (own.parent if own.name == "saved_models" else own)
    labels = [first.name, "ensemble of " + ", ".join(path.name for path in files)][: len(files)]
    loaded = list(zip(files, states, strict=True))
    meta_test(model, options, loaded, labels, trained_normalization(states[0], options), folder)


def main(argv: Sequence[str] | None = None) -> None:
    set_up_logging()
    files, changes = parse_command(argv)
    if not changes.pop("dry_run", False):
        if not files:
            raise UserError("--load names the checkpoint to score")
        score(files, changes)
        return
    with tempfile.TemporaryDirectory(prefix="dry_run_") as name:
        score(files or [made_up_checkpoint(Path(name), changes.get("gpu"))], changes, Path(name) / "test")


def made_up_checkpoint(folder: Path, gpu: str | None) -> Path:
    """Train a tiny model for two iterations on made-up images in `folder` and return its best checkpoint."""
    options = shrink(Options(), folder)
    write_images(options, [options.dataset_name])
    train_maml_system.run(options, choose_device(gpu), test=False)
    (best,) = folder.glob("experiments/*/*/saved_models/best")
    return best


if __name__ == "__main__":
    sys.exit(entry.run(main))
