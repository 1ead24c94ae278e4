"""Which classes a test took for which: the answers of all its tasks, by the classes' own names."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from data import Episodes
from utils.files import write_csv


def write_confusion(folder: Path, episodes: Episodes, logits: Tensor) -> None:
    """Write FOLDER/confusion_DATASET_Kshot.csv from the answers (tasks, way*query, way) to the first tasks."""
    path = folder / f"confusion_{episodes.split.name}_{episodes.shot}shot.csv"
    write_csv(path, list(confusion(episodes, logits)))


def confusion(episodes: Episodes, logits: Tensor) -> Iterator[dict[str, Any]]:
    """Yield the ordered pairs of classes that met in a task, a class and itself too.

    `answers` counts the query images of `true` that were taken for `predicted`, out of `of` in tasks that have both.
    """
    names, starts = episodes.split.class_names, episodes.split.class_starts
    first = np.stack([episodes.indices(task)[:, 0] for task in range(len(logits))])  # (tasks, way)
    classes = np.searchsorted(starts, first, side="right") - 1
    predicted = logits.argmax(2).view(*classes.shape, -1).numpy()  # (tasks, way, query)
    answers, of = np.zeros((2, len(names), len(names)), int)
    for column in range(classes.shape[1]):
        pair = classes, classes[:, column, None]  # each true class of a task, and one that it may be taken for
        np.add.at(answers, pair, (predicted == column).sum(2))
        np.add.at(of, pair, predicted.shape[2])
    for true, other in zip(*of.nonzero(), strict=True):
        counts = {"answers": int(answers[true, other]), "of": int(of[true, other])}
        yield {"true": names[true], "predicted": names[other], **counts}
