"""How a task's weights move: the rules of the inner loop, as functions of tensors with a leading task dimension.

Weights and gradients are dicts name -> (tasks, ...), a context is (tasks, P). Nothing here is modified in place, so the
outer gradient flows through whatever the caller leaves attached to the graph. The module's parameters are the rates
that a rule learns, under the official programs' names.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


# --- contextual gradient scaling (CxGrad) --------------------------------------------------------------------------


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


# --- attenuation of the initialisation (L2F) -----------------------------------------------------------------------


def attenuation_generator(num_tensors: int) -> nn.Sequential:
    """L2F's attenuator: mean gradients (tasks, N) -> factors in (0, 1) (tasks, N), one per inner-loop tensor."""
    return nn.Sequential(
        nn.Linear(num_tensors, num_tensors), nn.ReLU(), nn.Linear(num_tensors, num_tensors), nn.Sigmoid()
    )


def multiply_each(weights: Weights, factors: Tensor) -> Weights:
    """Multiply tensor i of each task by factors[task, i] (L2F, Baik et al. 2020, equation 5)."""
    pairs = zip(weights.items(), factors.unbind(1), strict=True)
    return {name: over_task(factor, weight) * weight for (name, weight), factor in pairs}


def means(tensors: Mapping[str, Tensor]) -> Tensor:
    """Mean of each tensor: dict of N (tasks, ...) -> (tasks, N)."""
    return torch.stack([tensor.flatten(1).mean(1) for tensor in tensors.values()], 1)


def over_task(per_task: Tensor, tensor: Tensor) -> Tensor:
    """View (tasks,) so that it broadcasts over a tensor (tasks, ...)."""
    return per_task.view(-1, *[1] * (tensor.dim() - 1))


# --- update rules --------------------------------------------------------------------------------------------------


class GradientDescent(nn.Module):
    """w <- w - lr * gradient, with one fixed rate (MAML)."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate

    def update(self, weights: Weights, gradients: Weights, step: int, generated: Tensor | None = None) -> Weights:
        return {name: weights[name] - self.learning_rate * gradient for name, gradient in gradients.items()}


class LSLR(nn.Module):
    """Per-layer per-step learned rates (MAML++, Antoniou et al. 2019): one vector of steps + 1 rates per tensor.

    The last entry is never used; it is there because official checkpoints hold it.
    """

    def __init__(self, parameters: Mapping[str, Tensor], steps: int, learning_rate: float) -> None:
        super().__init__()
        self.names_learning_rates_dict = per_step(parameters, steps, learning_rate)

    def update(self, weights: Weights, gradients: Weights, step: int, generated: Tensor | None = None) -> Weights:
        rates = self.names_learning_rates_dict
        return {name: weights[name] - rates[key(name)][step] * gradient for name, gradient in gradients.items()}


class MetaSGD(nn.Module):
    """A learned rate per weight (Meta-SGD, Li et al. 2017)."""

    def __init__(self, parameters: Mapping[str, Tensor], learning_rate: float) -> None:
        super().__init__()
        self.rates = per_weight(parameters, learning_rate)

    def update(self, weights: Weights, gradients: Weights, step: int, generated: Tensor | None = None) -> Weights:
        return {name: weights[name] - self.rates[key(name)] * gradient for name, gradient in gradients.items()}


class ALFA(nn.Module):
    """Generated rates and decays (ALFA, Baik et al. 2020): w <- (1 - beta b_k) w - alpha a_k gradient.

    alpha and beta are generated per task, tensor and step by `alfa_generator`; a_k and b_k are learned per tensor and
    step. From a random, untrained initialisation the decay has a learned factor per weight too.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], steps: int, learning_rate: float, decay: float, random_init: bool
    ) -> None:
        super().__init__()
        self.names_alpha_dict = per_step(parameters, steps, learning_rate)
        self.names_beta_dict = per_step(parameters, steps, 1.0 if random_init else decay * learning_rate)
        if random_init:
            self.names_beta_dict_per_param = per_weight(parameters, decay * learning_rate)
        self.random_init = random_init

    def update(self, weights: Weights, gradients: Weights, step: int, generated: Tensor | None = None) -> Weights:
        """`generated` is (tasks, 2N): the alphas of all N tensors, then their betas."""
        if generated is None:
            raise TypeError("ALFA needs the generator's output")
        alphas, betas = generated.chunk(2, 1)
        updated = {}
        for name, alpha, beta in zip(gradients, alphas.unbind(1), betas.unbind(1), strict=True):
            weight = weights[name]
            rate = over_task(alpha * self.names_alpha_dict[key(name)][step], weight)
            decay = over_task(beta * self.names_beta_dict[key(name)][step], weight)
            if self.random_init:
                decay = decay * self.names_beta_dict_per_param[key(name)]
            updated[name] = (1 - decay) * weight - rate * gradients[name]
        return updated


def alfa_generator(num_tensors: int) -> nn.Sequential:
    """ALFA's generator: means of N weights and of their gradients (tasks, 2N) -> alphas and betas (tasks, 2N)."""
    return nn.Sequential(
        nn.Linear(2 * num_tensors, 2 * num_tensors), nn.ReLU(), nn.Linear(2 * num_tensors, 2 * num_tensors)
    )


Rule = GradientDescent | LSLR | MetaSGD | ALFA


def per_step(parameters: Mapping[str, Tensor], steps: int, value: float) -> nn.ParameterDict:
    """One learned vector of steps + 1 equal values per tensor."""
    return nn.ParameterDict({key(name): nn.Parameter(torch.full((steps + 1,), value)) for name in parameters})


def per_weight(parameters: Mapping[str, Tensor], value: float) -> nn.ParameterDict:
    """One learned value per weight."""
    full = {key(name): torch.full_like(p, value, requires_grad=False) for name, p in parameters.items()}
    return nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in full.items()})


def key(name: str) -> str:
    """A parameter's name inside a ParameterDict, where dots are not allowed."""
    return name.replace(".", "-")
