"""Backbones as functions of (parameters, images), for many tasks at once.

Every task has weights of its own, so a parameter carries a leading task dimension and tasks ride in the channel
dimension: images are (n, tasks*C, H, W) and a convolution has one group per task. With one task this is the plain
network. `Conv4` only *holds* the meta-parameters, under the official names; `forward` reads none of them.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Parameters = Mapping[str, Tensor]

LEAKY_RELU_SLOPE = 0.01
BATCH_NORM_EPS = 1e-5
BATCH_NORM_MOMENTUM = 0.1


class BatchStatistics(NamedTuple):
    """What one forward pass saw in one batch-norm layer, for the running statistics."""

    layer: str
    step: int
    mean: Tensor  # (tasks, channels)
    variance: Tensor  # (tasks, channels), unbiased


class Conv4(nn.Module):
    """Blocks of [3x3 conv, batch norm, leaky ReLU, 2x2 max-pool], then a linear classifier (MAML++'s 4-conv network).

    With `max_pooling` off, convolutions have stride 2 and the last map is averaged. Batch norm always uses the
    statistics of the images at hand, so query images of a task are normalised together (transductive).

    Args:
        image_shape: (C, H, W) of one image.
        way: outputs of the classifier.
        step_rows: rows of per-step batch-norm weights and running statistics; None: one shared weight, no statistics.
        shared_norm_weights: keep one batch-norm weight although statistics are per step (inner loop moves it).
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        way: int,
        *,
        filters: int = 48,
        stages: int = 4,
        padding: bool = True,
        max_pooling: bool = True,
        bias: bool = False,
        step_rows: int | None = None,
        shared_norm_weights: bool = False,
        learnable_norm: tuple[bool, bool] = (True, True),
    ) -> None:
        super().__init__()
        self.stages, self.padding, self.max_pooling = stages, int(padding), max_pooling
        self.layer_dict = nn.ModuleDict()
        channels, height, width = image_shape
        for stage in range(stages):
            norm = BatchNormParameters(filters, step_rows, shared_norm_weights, learnable_norm)
            conv = ConvParameters(channels, filters, bias)
            self.layer_dict[f"conv{stage}"] = nn.ModuleDict({"conv": conv, "norm_layer": norm})
            channels, height, width = filters, self._reduced(height), self._reduced(width)
            if min(height, width) < 1:
                raise ValueError(f"images of {image_shape[1]}x{image_shape[2]} are too small for {stages} stages")
        features = filters * height * width if max_pooling else filters
        self.layer_dict["linear"] = LinearParameters(features, way)

    def _reduced(self, size: int) -> int:
        size += 2 * self.padding - 2
        return size // 2 if self.max_pooling else (size + 1) // 2

    def forward(
        self, parameters: Parameters, images: Tensor, step: int, statistics: list[BatchStatistics] | None = None
    ) -> Tensor:
        """Logits (tasks, n, way) of images (tasks, n, C, H, W) under parameters of shape (tasks, ...).

        `step` chooses the row of per-step batch norm; what each layer's batch norm saw is appended to `statistics`.
        """
        tasks, n = images.shape[:2]
        x = images.transpose(0, 1).flatten(1, 2)  # (n, tasks*C, H, W)
        for stage in range(self.stages):
            x = self._block(f"layer_dict.conv{stage}", parameters, x, step, statistics)
        if not self.max_pooling:
            x = x.mean((2, 3), keepdim=True)
        features = x.reshape(n, tasks, -1).transpose(0, 1)  # (tasks, n, features)
        weight, bias = parameters["layer_dict.linear.weights"], parameters["layer_dict.linear.bias"]
        return torch.baddbmm(bias.unsqueeze(1), features, weight.transpose(1, 2))

    def _block(
        self, name: str, parameters: Parameters, x: Tensor, step: int, statistics: list[BatchStatistics] | None
    ) -> Tensor:
        weight = parameters[f"{name}.conv.weight"]  # (tasks, out, in, 3, 3)
        bias = parameters.get(f"{name}.conv.bias")
        stride = 1 if self.max_pooling else 2
        x = F.conv2d(
            x, weight.flatten(0, 1), None if bias is None else bias.flatten(), stride, self.padding, groups=len(weight)
        )
        x = batch_norm(f"{name}.norm_layer", parameters, x, step, statistics)
        x = F.leaky_relu(x, LEAKY_RELU_SLOPE)
        return F.max_pool2d(x, 2) if self.max_pooling else x


def batch_norm(
    name: str, parameters: Parameters, x: Tensor, step: int, statistics: list[BatchStatistics] | None
) -> Tensor:
    """Normalise x (n, tasks*C, H, W) by its own mean and biased variance, per task and channel."""
    weight, bias = (
        (p[:, step] if p.dim() == 3 else p).flatten()
        for p in (parameters[f"{name}.weight"], parameters[f"{name}.bias"])
    )
    if statistics is None:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=BATCH_NORM_EPS)
    mean, variance = torch.zeros_like(weight), torch.zeros_like(weight)  # momentum 1 fills them with the batch's own
    out = F.batch_norm(x, mean, variance, weight, bias, training=True, momentum=1.0, eps=BATCH_NORM_EPS)
    tasks = len(parameters[f"{name}.weight"])
    statistics.append(BatchStatistics(name, step, mean.view(tasks, -1), variance.view(tasks, -1)))
    return out


class ConvParameters(nn.Module):
    """A 3x3 convolution's weight (out, in, 3, 3), Xavier-uniform, and optional zero bias (out,)."""

    def __init__(self, channels_in: int, channels_out: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(channels_out, channels_in, 3, 3)))
        if bias:
            self.bias = nn.Parameter(torch.zeros(channels_out))


class LinearParameters(nn.Module):
    """The classifier's weights (way, features), Xavier-uniform, and zero bias (way,)."""

    def __init__(self, features: int, way: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(nn.init.xavier_uniform_(torch.empty(way, features)))
        self.bias = nn.Parameter(torch.zeros(way))


class BatchNormParameters(nn.Module):
    """Scale 1 and shift 0 of shape (C,), or (steps, C) with running statistics of the same shape."""

    def __init__(self, channels: int, steps: int | None, shared_weights: bool, learnable: tuple[bool, bool]) -> None:
        super().__init__()
        shape = (channels,) if steps is None or shared_weights else (steps, channels)
        self.weight = nn.Parameter(torch.ones(shape), requires_grad=learnable[0])
        self.bias = nn.Parameter(torch.zeros(shape), requires_grad=learnable[1])
        if steps is not None:
            self.register_buffer("running_mean", torch.zeros(steps, channels))
            self.register_buffer("running_var", torch.ones(steps, channels))


@torch.no_grad()
def update_running_statistics(network: nn.Module, seen: list[BatchStatistics]) -> None:
    """Exponential moving average (momentum 0.1) over the forward passes in `seen`, task after task, pass after pass."""
    for task in range(len(seen[0].mean) if seen else 0):
        for layer, step, mean, variance in seen:
            network.get_buffer(f"{layer}.running_mean")[step].lerp_(mean[task], BATCH_NORM_MOMENTUM)
            network.get_buffer(f"{layer}.running_var")[step].lerp_(variance[task], BATCH_NORM_MOMENTUM)
