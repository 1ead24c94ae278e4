"""What MetaOptNet's programs fix by convention: their flags' names, their recipe, their pixel statistics."""

from collections.abc import Mapping
from typing import Any

from utils.names import canonical_name

# MetaOptNet's flags (with '_' for '-') that have another name here; the others have the same.
FLAGS = {
    "dataset": "dataset_name",
    "network": "backbone",
    "num_epoch": "total_epochs",
    "episodes_per_batch": "batch_size",
    "train_way": "num_classes_per_set",
    "train_shot": "num_samples_per_class",
    "train_query": "num_target_samples",
    "val_episode": "num_evaluation_tasks",
    "eps": "label_smoothing",
}
# Defaults with --learner head, where they differ: MetaOptNet's recipe.
DEFAULTS: dict[str, Any] = {
    "head": "ProtoNet",
    "backbone": "conv64",
    "resnet_widths": "64-160-320-640",
    "batch_norm": "running",
    "batch_size": 8,
    "num_samples_per_class": 15,
    "num_target_samples": 6,
    "val_shot": 5,
    "val_query": 15,
    "augment": True,
    "meta_learning_rate": 0.1,
    "min_learning_rate": 0.0,
    "outer_weight_decay": 0.0005,
    "lr_schedule": "steps_official",
    "total_epochs": 60,
    "total_iter_per_epoch": 1000,
    "num_evaluation_tasks": 2000,
    "save_epoch": 10,
}
# Multiplier of the learning rate from the start, and after so many whole epochs.
RATE_STEPS = {0: 1.0, 20: 0.06, 40: 0.012, 50: 0.0024}

_IMAGENET = ((120.39586422, 115.59361427, 104.54012653), (70.68188272, 68.27635443, 72.54505529))
_CIFAR = ((129.37731888, 124.10583864, 112.47758569), (68.20947949, 65.43124043, 70.45866994))
_STATISTICS = {"mini_imagenet": _IMAGENET, "tiered_imagenet": _IMAGENET, "CIFAR_FS": _CIFAR, "FC100": _CIFAR}


def defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of a head learner's options beside those that the user chose."""
    dataset = canonical_name(str(values.get("dataset_name", "mini_imagenet")))
    size = 32 if dataset in ("CIFAR_FS", "FC100") else 84
    normalization = "published" if dataset in _STATISTICS else "channel"
    return DEFAULTS | {"image_height": size, "image_width": size, "normalization": normalization}


def published_statistics(dataset: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return mean and deviation of each channel in [0, 1], as MetaOptNet's loaders hold them; None: no such data."""
    if (statistics := _STATISTICS.get(canonical_name(dataset))) is None:
        return None
    mean, std = (tuple(value / 255 for value in values) for values in statistics)
    return mean, std


def learning_rate(start: float, epoch: int, official: bool) -> float:
    """Return the rate of epoch `epoch` (from 0). The official program makes each step one epoch early."""
    finished = epoch + 1 if official else epoch
    return start * next(factor for epochs, factor in reversed(RATE_STEPS.items()) if finished >= epochs)
