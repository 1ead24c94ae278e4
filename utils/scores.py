"""Accuracy and its two confidence intervals, which papers of the field mix up."""

from typing import NamedTuple

import torch
from torch import Tensor


class Score(NamedTuple):
    """The score is in fractions, the loss apart. Its intervals answer different questions, so each keeps its name."""

    accuracy: float
    ci95_per_episode: float  # 1.96 * std over episodes / sqrt(episodes); as MetaOptNet reports
    ci95_per_query: float  # 1.96 * sqrt(p (1 - p) / queries); as CxGrad reports
    loss: float


def score(logits: Tensor, labels: Tensor) -> Score:
    """Return the score of logits (episodes, n, way) against labels (episodes, n)."""
    correct = (logits.argmax(2) == labels).double()
    per_episode = correct.mean(1)
    accuracy = per_episode.mean().item()
    spread = per_episode.std().item() if len(per_episode) > 1 else float("nan")
    loss = torch.nn.functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten()).item()
    return Score(
        accuracy,
        1.96 * spread / len(per_episode) ** 0.5,
        1.96 * (accuracy * (1 - accuracy) / correct.numel()) ** 0.5,
        loss,
    )


def is_ensemble(model: str) -> bool:
    """Return whether a result's `model` ("single best", "top-3 ensemble", ...) is an ensemble."""
    return "ensemble" in model
