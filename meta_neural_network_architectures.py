"""Backbones, in two families.

Learners with an inner loop: `Conv4` and `ResNet12`, functions of (parameters, images) for many tasks at once. Every
task has weights of its own, so a parameter carries a leading task dimension and tasks ride in the channel dimension:
images are (n, tasks*C, H, W) and a convolution has one group per task. With one task this is the plain network. The
modules only *hold* the meta-parameters, under the official names; `forward` reads none of them.

Learners with a head: `ProtoNetConv64`, `R2D2Net` and `ResNet12Embedding`, MetaOptNet's networks. All tasks share the
weights, so these are plain modules: images (n, C, H, W) -> features (n, d), with the official state-dict names.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

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
        features = self.features(parameters, images, step, statistics)
        weight, bias = parameters["layer_dict.linear.weights"], parameters["layer_dict.linear.bias"]
        return torch.baddbmm(bias.unsqueeze(1), features, weight.transpose(1, 2))

    def features(
        self, parameters: Parameters, images: Tensor, step: int, statistics: list[BatchStatistics] | None = None
    ) -> Tensor:
        """What the linear classifier sees of images (tasks, n, C, H, W): (tasks, n, features)."""
        tasks, n = images.shape[:2]
        x = self.embed(parameters, images.transpose(0, 1).flatten(1, 2), step, statistics)
        return x.reshape(n, tasks, -1).transpose(0, 1)

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


# --- embeddings for a head -----------------------------------------------------------------------------------------

EMBEDDING_SLOPE = 0.1  # of the leaky ReLUs
FINAL_DROP = 0.1  # what dropout and, at the end of its schedule, DropBlock blank of ResNet-12's maps
DROPBLOCK_RAMP = 40_000  # forward passes to DropBlock's full strength: 20 epochs x 1000 batches x (support, query)

DROPBLOCK_SCHEDULES = ("training", "official")


class ProtoNetConv64(nn.Module):
    """Four blocks of [3x3 conv, batch norm, ReLU, 2x2 max-pool]: 256 features at 32x32, 1600 at 84x84 (ProtoNet).

    Args:
        image_shape: (C, H, W) of one image, at least 16x16.
        widths: channels of the four blocks.
    """

    def __init__(self, image_shape: tuple[int, int, int], widths: Sequence[int] = (64, 64, 64, 64)) -> None:
        super().__init__()
        height, width = pooled_size(image_shape, len(widths))
        self.out_features = widths[-1] * height * width
        self.encoder = nn.Sequential()
        for channels_in, channels_out in pairwise((image_shape[0], *widths)):
            conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
            # Pooling before the ReLU gives the same values and gradients on a quarter of the elements.
            block = nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.MaxPool2d(2), nn.ReLU(inplace=True))
            self.encoder.append(nn.Sequential(OrderedDict(block=block)))
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images).flatten(1)


class R2D2Net(nn.Module):
    """Four blocks of [3x3 conv, batch norm, 2x2 max-pool, leaky ReLU]; the features are the maps of the last two.

    8192 features at 32x32, 51200 at 84x84 (Bertinetto et al., 2019). The last block has no activation; blocks three and
    four end with dropout.

    Args:
        image_shape: (C, H, W) of one image, at least 16x16.
        widths: channels of the four blocks.
    """

    def __init__(self, image_shape: tuple[int, int, int], widths: Sequence[int] = (96, 192, 384, 512)) -> None:
        super().__init__()
        sizes = [pooled_size(image_shape, 4), pooled_size(image_shape, 3)]
        self.out_features = sum(c * h * w for c, (h, w) in zip((widths[3], widths[2]), sizes, strict=True))
        self.block1 = self._block(image_shape[0], widths[0], self._activation())
        self.block2 = self._block(widths[0], widths[1], self._activation())
        self.block3 = self._block(widths[1], widths[2], self._activation(), nn.Dropout(0.1))
        self.block4 = self._block(widths[2], widths[3], nn.Dropout(0.3))

    @staticmethod
    def _activation() -> nn.Module:
        return nn.LeakyReLU(EMBEDDING_SLOPE, inplace=True)

    @staticmethod
    def _block(channels_in: int, channels_out: int, *ending: nn.Module) -> nn.Sequential:
        conv = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.MaxPool2d(2), *ending)

    def forward(self, images: Tensor) -> Tensor:
        third = self.block3(self.block2(self.block1(images)))
        return torch.cat((third.flatten(1), self.block4(third).flatten(1)), 1)


class ResNet12Embedding(nn.Module):
    """MetaOptNet's ResNet-12: four wide residual blocks, regularised, the last map flattened or averaged.

    2560 features at 32x32, 16000 at 84x84, `widths[-1]` with `avg_pool`. `ResNet12` above has the same blocks without
    dropout, a global average and a classifier.

    Args:
        image_shape: (C, H, W) of one image, at least 16x16.
        widths: channels of the four blocks.
        avg_pool: average the last map over its positions, whatever its size.
        dropblock_size: side of DropBlock's squares; None: the official 5 for 84x84 and 2 for 32x32, never more than the
            last map.
        dropblock_schedule: see `DropBlock`.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        widths: Sequence[int] = (64, 160, 320, 640),
        *,
        avg_pool: bool = False,
        dropblock_size: int | None = None,
        dropblock_schedule: str = "official",
    ) -> None:
        super().__init__()
        self.avg_pool = avg_pool
        height, width = pooled_size(image_shape, len(widths))
        self.out_features = widths[-1] if avg_pool else widths[-1] * height * width
        side = min(height, width)
        block_size = (5 if side >= 5 else min(2, side)) if dropblock_size is None else dropblock_size
        if not 1 <= block_size <= side:
            shape = f"{image_shape[1]}x{image_shape[2]}"
            raise ValueError(f"dropblock_size {block_size}: images of {shape} leave a map that allows 1 to {side}")
        for number, (channels_in, channels_out) in enumerate(pairwise((image_shape[0], *widths)), 1):
            drop = nn.Dropout(FINAL_DROP) if number < 3 else DropBlock(block_size, dropblock_schedule)
            self.add_module(f"layer{number}", nn.Sequential(ResidualBlock(channels_in, channels_out, drop)))
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for layer in self.children():
            x = layer(x)
        return x.mean((2, 3)) if self.avg_pool else x.flatten(1)


class ResidualBlock(nn.Module):
    """[3x3 conv, norm, leaky ReLU] twice, [conv, norm], plus a 1x1 conv and norm; leaky ReLU, 2x2 max-pool, `drop`."""

    def __init__(self, channels_in: int, channels_out: int, drop: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.conv3 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels_out)
        shortcut = nn.Conv2d(channels_in, channels_out, 1, bias=False)
        self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels_out))
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.bn1(self.conv1(x)), EMBEDDING_SLOPE, inplace=True)
        out = F.leaky_relu(self.bn2(self.conv2(out)), EMBEDDING_SLOPE, inplace=True)
        out = self.bn3(self.conv3(out))
        out += self.downsample(x)
        # The activation is increasing, so it may follow the pooling: same values on a quarter of the elements.
        return self.drop(F.leaky_relu(F.max_pool2d(out, 2), EMBEDDING_SLOPE, inplace=True))


class DropBlock(nn.Module):
    """Blanks squares of each map in training, more of them as training goes on (Ghiasi et al., 2018, algorithm 1).

    The fraction to blank grows from 0 to 0.1 in 40 000 forward passes. `forwards` counts the passes and is saved with
    the weights; files without it (the official ones) load as 0. The "official" schedule counts passes in evaluation
    too, as the official program does: validation episodes speed the schedule up about threefold. The "training"
    schedule counts those in training mode only.
    Squares are always whole; the official ones have holes where the number of hits in the batch has a factor in common
    with the square's area, so that 15 to 23 % less is blanked there in the mean.

    Args:
        block_size: side of a square; in training, maps must be at least that large.
    """

    forwards: Tensor

    def __init__(self, block_size: int, schedule: str = "official") -> None:
        super().__init__()
        if schedule not in DROPBLOCK_SCHEDULES:
            raise ValueError(f"DropBlock schedule {schedule!r}: choose from {', '.join(DROPBLOCK_SCHEDULES)}")
        self.block_size, self.counts_evaluation = block_size, schedule == "official"
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))  # on the device: reading it needs no sync
        self.register_load_state_dict_pre_hook(missing_counter_is_zero)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.counts_evaluation:
            self.forwards += 1
        if not self.training:
            return x
        start = self.block_size - 1
        places = x[:, :, start:, start:]  # as many as squares fit in the map; rand_like takes x's memory format over
        chance = torch.rand_like(places, dtype=torch.float32)
        return blank_squares(x, chance < self.gamma(*x.shape[2:]), self.block_size)

    def gamma(self, height: int, width: int) -> Tensor:
        """Probability of a hit per place and channel, such that a fraction min(0.1, 0.1 n / 40 000) is blanked."""
        b = self.block_size
        fraction = (self.forwards * (FINAL_DROP / DROPBLOCK_RAMP)).clamp(max=FINAL_DROP)
        return fraction * (height * width / (b**2 * (height - b + 1) * (width - b + 1)))


def missing_counter_is_zero(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
    state_dict.setdefault(f"{prefix}forwards", torch.zeros((), dtype=torch.int64))


def blank_squares(x: Tensor, hits: Tensor, block_size: int) -> Tensor:
    """Zero the square that has its top-left corner at each hit, and scale the rest up by one ratio for the whole batch.

    Args:
        x: maps (n, C, H, W).
        hits: bool or 0/1, (n, C, H - block_size + 1, W - block_size + 1).
    """
    padded = F.pad(hits.to(x.dtype), (block_size - 1,) * 4)
    keep = 1 - F.max_pool2d(padded, block_size, stride=1)  # (n, C, H, W)
    kept = keep.sum(dtype=torch.float64).clamp(min=1)  # where all is blanked the result is 0, not 0/0
    return x * (keep * (keep.numel() / kept))


def pooled_size(image_shape: tuple[int, int, int], poolings: int) -> tuple[int, int]:
    """Height and width after so many 2x2 poolings.

    Raises:
        ValueError: nothing is left.
    """
    _, height, width = image_shape
    if min(height, width) < 2**poolings:
        raise ValueError(f"images of {height}x{width} are too small for {poolings} poolings")
    return height >> poolings, width >> poolings


def initialise_convolutions(network: nn.Module) -> None:
    """He's normal initialisation by fan-out: standard deviation sqrt(2 / (k*k*out))."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
