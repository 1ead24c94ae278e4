"""Backbones as functions of (parameters, images), for many tasks at once.

Every task has weights of its own, so a parameter carries a leading task dimension and tasks ride in the channel
dimension: images are (n, tasks*C, H, W) and a convolution has one group per task. With one task this is the plain
network. The modules only *hold* the meta-parameters, under the official names; `forward` reads none of them.
"""

from collections.abc import Mapping, Sequence
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


class NormSettings(NamedTuple):
    """How a backbone's batch norm is parametrised.

    Statistics of the images at hand normalise them, unless `forward` is given running ones among its parameters.
    """

    steps: int = 0  # rows of running statistics, one per inner step; 0: one row for all steps
    tracked: bool = False  # keep running statistics
    shared_weights: bool = False  # one scale and shift although statistics are per step (the inner loop moves them)
    learnable: tuple[bool, bool] = (True, True)  # scale, shift


SHARED_NORM = NormSettings()


class Backbone(nn.Module):
    """Holds the meta-parameters of an embedding and a linear classifier under ``layer_dict``."""

    layer_dict: nn.ModuleDict

    def forward(
        self, parameters: Parameters, images: Tensor, step: int, statistics: list[BatchStatistics] | None = None
    ) -> Tensor:
        """Logits (tasks, n, way) of images (tasks, n, C, H, W) under parameters of shape (tasks, ...).

        `step` chooses the row of per-step batch norm; what each layer's batch norm saw is appended to `statistics`.
        """
        tasks, n = images.shape[:2]
        x = self.embed(parameters, images.transpose(0, 1).flatten(1, 2), step, statistics)
        features = x.reshape(n, tasks, -1).transpose(0, 1)  # (tasks, n, features)
        weight, bias = parameters["layer_dict.linear.weights"], parameters["layer_dict.linear.bias"]
        return torch.baddbmm(bias.unsqueeze(1), features, weight.transpose(1, 2))

    def embed(self, parameters: Parameters, x: Tensor, step: int, statistics: list[BatchStatistics] | None) -> Tensor:
        """Images (n, tasks*C, H, W) -> maps (n, tasks*channels, h, w)."""
        raise NotImplementedError


class Conv4(Backbone):
    """Blocks of [3x3 conv, batch norm, leaky ReLU, 2x2 max-pool], then a linear classifier (MAML++'s 4-conv network).

    With `max_pooling` off, convolutions have stride 2 and the last map is averaged.

    Args:
        image_shape: (C, H, W) of one image.
        way: outputs of the classifier.
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
        norm: NormSettings = SHARED_NORM,
    ) -> None:
        super().__init__()
        self.stages, self.padding, self.max_pooling = stages, int(padding), max_pooling
        self.layer_dict = nn.ModuleDict()
        channels, height, width = image_shape
        for stage in range(stages):
            self.layer_dict[f"conv{stage}"] = ConvBlock(channels, filters, 3, bias, norm)
            channels, height, width = filters, self._reduced(height), self._reduced(width)
            if min(height, width) < 1:
                raise ValueError(f"images of {image_shape[1]}x{image_shape[2]} are too small for {stages} stages")
        features = filters * height * width if max_pooling else filters
        self.layer_dict["linear"] = LinearParameters(features, way)

    def _reduced(self, size: int) -> int:
        size += 2 * self.padding - 2
        return size // 2 if self.max_pooling else (size + 1) // 2

    def embed(self, parameters: Parameters, x: Tensor, step: int, statistics: list[BatchStatistics] | None) -> Tensor:
        for stage in range(self.stages):
            stride = 1 if self.max_pooling else 2
            x = conv_norm(f"layer_dict.conv{stage}", parameters, x, step, statistics, stride, self.padding)
            x = F.leaky_relu(x, LEAKY_RELU_SLOPE)
            x = F.max_pool2d(x, 2) if self.max_pooling else x
        return x if self.max_pooling else x.mean((2, 3), keepdim=True)


class ResNet12(Backbone):
    """Four residual blocks of three 3x3 convs, each block halving the map, then a global average and the classifier.

    A block is [conv, norm, leaky ReLU] twice, [conv, norm], plus a 1x1 conv and norm of its input; then leaky ReLU and
    2x2 max-pool. Slope 0.1. ALFA and L2F report results with widths 64-128-256-512.
    """

    SLOPE = 0.1

    def __init__(
        self, image_shape: tuple[int, int, int], way: int, widths: Sequence[int], norm: NormSettings = SHARED_NORM
    ) -> None:
        super().__init__()
        self.blocks = len(widths)
        self.layer_dict = nn.ModuleDict()
        channels, *size = image_shape
        if min(size) < 2**self.blocks:
            raise ValueError(f"images of {size[0]}x{size[1]} are too small for {self.blocks} residual blocks")
        for block, width in enumerate(widths):
            for conv in range(3):
                name = f"block{block}_conv{conv}"
                self.layer_dict[name] = ConvBlock(width if conv else channels, width, 3, False, norm)
            self.layer_dict[f"block{block}_shortcut"] = ConvBlock(channels, width, 1, False, norm)
            channels = width
        self.layer_dict["linear"] = LinearParameters(channels, way)

    def embed(self, parameters: Parameters, x: Tensor, step: int, statistics: list[BatchStatistics] | None) -> Tensor:
        for block in range(self.blocks):
            name = f"layer_dict.block{block}"
            shortcut = conv_norm(f"{name}_shortcut", parameters, x, step, statistics, 1, 0)
            for conv in range(3):
                x = conv_norm(f"{name}_conv{conv}", parameters, x, step, statistics, 1, 1)
                x = F.leaky_relu(x, self.SLOPE) if conv < 2 else x + shortcut
            x = F.max_pool2d(F.leaky_relu(x, self.SLOPE), 2)
        return x.mean((2, 3), keepdim=True)


# --- layers --------------------------------------------------------------------------------------------------------


def conv_norm(
    name: str,
    parameters: Parameters,
    x: Tensor,
    step: int,
    statistics: list[BatchStatistics] | None,
    stride: int,
    padding: int,
) -> Tensor:
    """Convolution and batch norm of one ConvBlock: (n, tasks*C, H, W) -> (n, tasks*out, h, w)."""
    weight = parameters[f"{name}.conv.weight"]  # (tasks, out, in, k, k)
    bias = parameters.get(f"{name}.conv.bias")
    bias = None if bias is None else bias.flatten()
    x = F.conv2d(x, weight.flatten(0, 1), bias, stride, padding, groups=len(weight))
    return batch_norm(f"{name}.norm_layer", parameters, x, step, statistics)


def batch_norm(
    name: str, parameters: Parameters, x: Tensor, step: int, statistics: list[BatchStatistics] | None
) -> Tensor:
    """Normalise x (n, tasks*C, H, W) per task and channel.

    By running statistics if `parameters` hold them, else by x's own mean and biased variance.
    """
    tasks = len(parameters[f"{name}.weight"])

    def row(kind: str) -> Tensor:
        parameter = parameters[f"{name}.{kind}"]  # (tasks, C) or (tasks, steps, C)
        return (parameter[:, step] if parameter.dim() == 3 else parameter).flatten()

    weight, bias = row("weight"), row("bias")
    if f"{name}.running_mean" in parameters:
        return F.batch_norm(x, row("running_mean"), row("running_var"), weight, bias, eps=BATCH_NORM_EPS)
    if statistics is None:
        return F.batch_norm(x, None, None, weight, bias, training=True, eps=BATCH_NORM_EPS)
    mean, variance = torch.zeros_like(weight), torch.zeros_like(weight)  # momentum 1 fills them with the batch's own
    out = F.batch_norm(x, mean, variance, weight, bias, training=True, momentum=1.0, eps=BATCH_NORM_EPS)
    statistics.append(BatchStatistics(name, step, mean.view(tasks, -1), variance.view(tasks, -1)))
    return out


class ConvBlock(nn.ModuleDict):
    """Parameters of a convolution ("conv") and its batch norm ("norm_layer")."""

    def __init__(self, channels_in: int, channels_out: int, size: int, bias: bool, norm: NormSettings) -> None:
        conv, norm_layer = ConvParameters(channels_in, channels_out, size, bias), NormParameters(channels_out, norm)
        super().__init__({"conv": conv, "norm_layer": norm_layer})


class ConvParameters(nn.Module):
    """A convolution's weight (out, in, size, size), Xavier-uniform, and optional zero bias (out,)."""

    def __init__(self, channels_in: int, channels_out: int, size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(channels_out, channels_in, size, size)))
        if bias:
            self.bias = nn.Parameter(torch.zeros(channels_out))


class LinearParameters(nn.Module):
    """The classifier's weights (way, features), Xavier-uniform, and zero bias (way,)."""

    def __init__(self, features: int, way: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(nn.init.xavier_uniform_(torch.empty(way, features)))
        self.bias = nn.Parameter(torch.zeros(way))


class NormParameters(nn.Module):
    """Scale 1 and shift 0, and running mean 0 and variance 1 if tracked; (C,), or (steps, C) where per step."""

    def __init__(self, channels: int, settings: NormSettings) -> None:
        super().__init__()
        rows = (settings.steps, channels) if settings.steps else (channels,)
        shape = (channels,) if settings.shared_weights else rows
        self.weight = nn.Parameter(torch.ones(shape), requires_grad=settings.learnable[0])
        self.bias = nn.Parameter(torch.zeros(shape), requires_grad=settings.learnable[1])
        if settings.tracked:
            self.register_buffer("running_mean", torch.zeros(rows))
            self.register_buffer("running_var", torch.ones(rows))


@torch.no_grad()
def update_running_statistics(network: nn.Module, seen: list[BatchStatistics]) -> None:
    """Exponential moving average (momentum 0.1) over the forward passes in `seen`, task after task, pass after pass."""
    for task in range(len(seen[0].mean) if seen else 0):
        for layer, step, mean, variance in seen:
            for kind, value in (("running_mean", mean[task]), ("running_var", variance[task])):
                buffer = network.get_buffer(f"{layer}.{kind}")
                (buffer[step] if buffer.dim() == 2 else buffer).lerp_(value, BATCH_NORM_MOMENTUM)
