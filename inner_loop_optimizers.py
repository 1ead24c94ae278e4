"""How a task's weights move: the rules of the inner loop, as functions of tensors with a leading task dimension.

Weights are dicts name -> (tasks, ...), a context is (tasks, P). Nothing here is modified in place, so the outer
gradient flows through whatever the caller leaves attached to the graph.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


def context_generator(num_context_params: int, num_scaled: int) -> nn.Sequential:
    """CxGrad's generator of gammas: context (tasks, P) -> (tasks, L) positive numbers, one per scaled tensor."""
    return nn.Sequential(
        nn.Linear(num_context_params, num_context_params),
        nn.ReLU(),
        nn.Linear(num_context_params, num_scaled),
        nn.Softplus(),
    )


def scale_by_context(weights: Weights, names: Sequence[str], gammas: Tensor) -> Weights:
    """Contextual gradient scaling: give each named tensor the norm gamma (CxGrad, Lee et al. 2022, section 3).

    Behind batch norm the output hardly depends on a weight's norm while its gradient grows as 1/norm, so gamma sets
    the task's effective step size, lr/gamma^2, layer by layer.

    Args:
        names: the L tensors to scale, in the generator's order.
        gammas: (tasks, L).
    """
    scaled = dict(weights)
    for name, gamma in zip(names, gammas.unbind(1), strict=True):
        weight = weights[name].flatten(1)  # (tasks, numel)
        norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        norm = norm.where(norm > 0, 1)  # zeros, such as a fresh bias, have no direction and stay zero
        scaled[name] = (gamma.unsqueeze(1) * (weight / norm)).view_as(weights[name])
    return scaled


class GradientDescent(nn.Module):
    """w <- w - lr * gradient, with one fixed rate (MAML)."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate

    def update(self, weights: Weights, gradients: Weights, step: int) -> Weights:
        return {name: weights[name] - self.learning_rate * gradient for name, gradient in gradients.items()}


class LSLR(nn.Module):
    """Per-layer per-step learnable rates (MAML++, Antoniou et al. 2019): one vector of steps + 1 rates per tensor.

    The last entry is never used; it is there because official checkpoints hold it.
    """

    def __init__(self, names: Sequence[str], steps: int, learning_rate: float) -> None:
        super().__init__()
        self.names_learning_rates_dict = nn.ParameterDict(
            {_key(name): nn.Parameter(torch.full((steps + 1,), learning_rate)) for name in names}
        )

    def update(self, weights: Weights, gradients: Weights, step: int) -> Weights:
        rates = self.names_learning_rates_dict
        return {name: weights[name] - rates[_key(name)][step] * gradient for name, gradient in gradients.items()}


def _key(name: str) -> str:
    """A parameter's name inside a ParameterDict, where dots are not allowed."""
    return name.replace(".", "-")
