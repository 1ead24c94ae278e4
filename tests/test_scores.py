"""Accuracy and its intervals against numbers worked out by hand."""

import math

import torch

from utils.scores import score


def test_intervals_follow_their_definitions() -> None:
    labels = torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]])
    predicted = torch.tensor([[0, 1], [0, 0], [1, 0], [0, 1]])  # accuracies 1, 1/2, 0, 1
    logits = torch.nn.functional.one_hot(predicted, 2).float()
    result = score(logits, labels)
    assert result.accuracy == 0.625
    spread = math.sqrt(((1 - 0.625) ** 2 * 2 + (0.5 - 0.625) ** 2 + 0.625**2) / 3)
    assert math.isclose(result.ci95_per_episode, 1.96 * spread / 2, rel_tol=1e-12)
    assert math.isclose(result.ci95_per_query, 1.96 * math.sqrt(0.625 * 0.375 / 8), rel_tol=1e-12)
    right, wrong = -math.log(math.e / (math.e + 1)), -math.log(1 / (math.e + 1))
    assert math.isclose(result.loss, (5 * right + 3 * wrong) / 8, rel_tol=1e-6)


def test_one_episode_has_no_interval_over_episodes() -> None:
    result = score(torch.zeros(1, 4, 2), torch.zeros(1, 4, dtype=torch.long))
    assert math.isnan(result.ci95_per_episode)
