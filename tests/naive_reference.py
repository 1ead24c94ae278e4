"""MAML and CxGrad written out task by task from the papers' formulas, sharing no code with the project's inner loop."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_loss(
    model: Any, batch: tuple[Tensor, ...], steps: int, contextual: bool, second_order: bool = True
) -> Tensor:
    """Return the loss of a meta-batch by the papers' formulas; without `second_order` as a test needs it, no graph."""
    net = dict(model.classifier.named_parameters())
    convs = [net[f"layer_dict.conv{i}.conv.weight"] for i in range(model.classifier.stages)]
    norms = [(net[f"layer_dict.conv{i}.norm_layer.{k}"]) for i in range(len(convs)) for k in ("weight", "bias")]
    start = [*convs, net["layer_dict.linear.weights"], net["layer_dict.linear.bias"]]

    def logits(w: list[Tensor], x: Tensor) -> Tensor:
        for i in range(len(convs)):
            x = F.conv2d(x, w[i], padding=1)
            x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
            x = x * norms[2 * i].view(1, -1, 1, 1) + norms[2 * i + 1].view(1, -1, 1, 1)
            x = F.max_pool2d(torch.where(x > 0, x, 0.01 * x), 2)
        return x.flatten(1) @ w[-2].T + w[-1]

    def scaled(w: list[Tensor], c: Tensor) -> list[Tensor]:
        gamma = model.rules["CxGrad"].generator(c)
        return [g * v / v.pow(2).sum().sqrt() for g, v in zip(gamma, w[:-2], strict=True)] + w[-2:]

    context_rate = model.options.context_params_learning_rate
    total = batch[0].new_zeros(())
    for xs, xq, ys, yq in zip(*(part.flatten(1, 2) for part in batch), strict=True):
        w, c = start, xs.new_zeros(model.options.num_context_params, requires_grad=True)
        if contextual:
            c = c - context_rate * torch.autograd.grad(F.cross_entropy(logits(scaled(w, c), xs), ys), c)[0]
            c = c.detach().requires_grad_()
        for _ in range(steps):
            w = scaled(w, c) if contextual else w
            wanted = [*w, c] if contextual else w
            grads = torch.autograd.grad(F.cross_entropy(logits(w, xs), ys), wanted, create_graph=second_order)
            c = c - context_rate * grads[-1] if contextual else c
            w = [v - model.options.init_inner_loop_learning_rate * g for v, g in zip(w, grads, strict=False)]
        with torch.set_grad_enabled(second_order):
            total = total + F.cross_entropy(logits(w, xq), yq) / len(batch[0])
    return total
