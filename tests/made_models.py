"""Small models, trained in seconds on made-up images of one colour per class, and such images to use them on."""

import shlex
from pathlib import Path

from train_maml_system import main
from utils.synthetic import write_dataset

COMMON = shlex.split(
    "--dataset_name colours --image_height 16 --image_width 16 --normalization channel --num_classes_per_set 3 "
    "--num_samples_per_class 2 --num_target_samples 3 --val_shot 2 --val_query 3 --batch_size 2 --total_epochs 2 "
    "--total_iter_per_epoch 15 --num_evaluation_tasks 5 --max_models_to_save 2 --top_n_models 2 --gpu cpu"
)
CXGRAD = shlex.split(
    "--cnn_num_filters 6 --num_stages 2 --num_context_params 3 --contextual_grad true --meta_learning_rate 0.01 "
    "--number_of_training_steps_per_iter 3 --number_of_evaluation_steps_per_iter 3 --init_inner_loop_learning_rate 0.1 "
    "--tasks_per_pass 1"
)
RIDGE = shlex.split("--learner head --head Ridge --backbone conv64 --augment false")


def arguments(folder: Path, *options: str) -> list[str]:
    """Make FOLDER/datasets/colours and return the arguments that train a model of its 3-way 2-shot tasks."""
    if not (folder / "datasets").exists():
        write_dataset(folder / "datasets" / "colours", classes=8, images=12, size=(20, 20))
    places = ["--dataset_dir", str(folder / "datasets"), "--experiments_dir", str(folder / "experiments")]
    return [*COMMON, *options, *places]


def train(folder: Path, *options: str) -> Path:
    """Train and meta-test such a model, and return the experiment's folder."""
    main(arguments(folder, *options))
    (experiment,) = (folder / "experiments").glob("*/experiment")
    return experiment


def best(experiment: Path) -> Path:
    """Return the best checkpoint of an experiment."""
    (checkpoint,) = (experiment / "saved_models").glob("best*")
    return checkpoint


def write_classes(folder: Path, *sizes: int, seed: int = 5) -> Path:
    """Write class folders class_0, class_1, ... with so many images each to `folder` and return it."""
    write_dataset(folder.parent, len(sizes), max(sizes), (20, 20), [folder.name], seed)
    for k, size in enumerate(sizes):
        for i in range(size, max(sizes)):
            (folder / f"class_{k}" / f"{i}.png").unlink()
    return folder
