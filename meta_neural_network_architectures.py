"""Networks, in two families, and the layers that they share.

Learners with an inner loop: `Conv4` and `ResNet12`, modules that `torch.func.functional_call` runs with other weights
for every task. Those carry a leading task dimension and tasks ride in the channel dimension: images are
(n, tasks*C, H, W) and a convolution has one group per task. With one task this is the plain network. (`vmap` over a
plain network computes the same with 27 to 37 % more operations and in 1.2 times the time, one and two tasks on a CPU.)

Learners with a head: `ProtoNetConv64`, `R2D2Net` and `ResNet12Embedding`, MetaOptNet's networks. All tasks share the
weights, so these are plain modules: images (n, C, H, W) -> features (n, d), with the official state-dict names. The two
ResNet-12s are one set of residual blocks; only their layers differ, because torch has no batch norm per task and step.

`register_backbone` and `register_embedding` make a network known to --backbone.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from second_order_ops import EPS, Geometry, conv2d, conv_norm_activate, leaky_relu, max_pool_2x2
from utils.errors import UserError
from utils.options import Options, add_choice, add_plug_in

ImageShape = tuple[int, int, int]  # (C, H, W)

LEAKY_RELU_SLOPE, RESNET_SLOPE = 0.01, 0.1  # of Conv4's activations; of ResNet-12's and R2D2Net's
BATCH_NORM_MOMENTUM = 0.1


# --- layers whose weights may differ from task to task -------------------------------------------------------------


class Pass(NamedTuple):
    """What batch norm has to know of one pass of images through a network."""

    step: int = 0  # of the inner loop; chooses the row where batch norm has one per step
    use_running: bool = False  # normalise by running statistics, not by those of the images at hand
    seen: "list[BatchStatistics] | None" = None  # each layer appends what it saw, for the running statistics


class TaskConv2d(nn.Conv2d):
    """This convolution has Xavier-uniform weights and zero biases: (n, tasks*in, H, W) -> (n, tasks*out, h, w).

    Its weight is (out, in, k, k), or (tasks, out, in, k, k) under `functional_call`.

    Raises:
        ValueError: stride or padding differs between height and width, or there are dilation, groups or other paddings
            than with zeros: `second_order_ops` does not compute these.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        square = not isinstance(self.padding, str) and len({*self.stride}) == len({*self.padding}) == 1
        if not square or (self.dilation, self.groups, self.padding_mode) != ((1, 1), 1, "zeros"):
            raise ValueError("TaskConv2d has one stride and one padding, with zeros, and neither dilation nor groups")

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def grouped(self) -> tuple[Tensor, Tensor | None, Geometry]:
        """Return the weights and biases of all tasks, and stride, padding and number of groups."""
        per_task = self.weight.dim() == 5
        weight = self.weight.flatten(0, 1) if per_task else self.weight
        bias = None if self.bias is None else self.bias.flatten()
        return weight, bias, (self.stride[0], int(self.padding[0]), len(self.weight) if per_task else 1)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, *self.grouped())


class NormSettings(NamedTuple):
    """How the batch norm of a network with an inner loop is parametrised."""

    steps: int = 0  # rows of running statistics, one per inner step; 0: one row for all steps
    tracked: bool = False  # keep running statistics
    shared_weights: bool = False  # one scale and shift although statistics are per step (the inner loop moves them)
    learnable: tuple[bool, bool] = (True, True)  # scale, shift


SHARED_NORM = NormSettings()


class TaskBatchNorm(nn.Module):
    """This batch norm is per task and channel of (n, tasks*C, H, W), by the images at hand or by running statistics.

    Scale 1 and shift 0, and running mean 0 and variance 1 if tracked, are (C,), or (steps, C) where per step; under
    `functional_call` they have a task dimension in front.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, settings: NormSettings) -> None:
        super().__init__()
        rows = (settings.steps, channels) if settings.steps else (channels,)
        shape = (channels,) if settings.shared_weights else rows
        self.channels, self.per_step = channels, bool(settings.steps)
        self.weights_per_step = self.per_step and not settings.shared_weights
        self.weight = nn.Parameter(torch.ones(shape), requires_grad=settings.learnable[0])
        self.bias = nn.Parameter(torch.zeros(shape), requires_grad=settings.learnable[1])
        if settings.tracked:
            self.register_buffer("running_mean", torch.zeros(rows))
            self.register_buffer("running_var", torch.ones(rows))

    def of_step(self, step: int) -> tuple[Tensor, Tensor]:
        """Return scale and shift of all tasks at a step, (tasks*C,)."""
        per_step = self.weights_per_step
        weight, bias = (t[..., step, :] if per_step else t for t in (self.weight, self.bias))
        return weight.flatten(), bias.flatten()

    def by_running(self, x: Tensor, step: int) -> Tensor:
        """Normalise maps by the running statistics of a step."""
        mean, variance = (self.row(kind, step).flatten() for kind in ("running_mean", "running_var"))
        return F.batch_norm(x, mean, variance, *self.of_step(step), eps=EPS)

    def row(self, kind: str, step: int) -> Tensor:
        """Return running statistics at a step."""
        statistics: Tensor = getattr(self, kind)
        return statistics[..., step, :] if self.per_step else statistics


def conv_norm(
    conv: nn.Module, norm: nn.Module, x: Tensor, at: Pass | None, slope: float = 1.0, pool: bool = False
) -> Tensor:
    """A convolution, its normalisation, a 2x2 max-pool if wanted and a leaky ReLU; a slope of 1 is no activation.

    The activation is increasing, so it may follow the pooling: same values on a quarter of the elements. Layers of an
    inner loop, which `at` says, take operations that are closed under differentiation.
    """
    if at is None or not isinstance(conv, TaskConv2d) or not isinstance(norm, TaskBatchNorm):
        y = norm(conv(x))
        y = F.max_pool2d(y, 2) if pool else y
        return y if slope == 1 else F.leaky_relu(y, slope, inplace=True)
    if at.use_running:
        y = norm.by_running(conv(x), at.step)
        y = max_pool_2x2(y) if pool else y
        return y if slope == 1 else leaky_relu(y, slope)
    seen: list[tuple[Tensor, Tensor]] = []
    out = conv_norm_activate(x, *conv.grouped(), *norm.of_step(at.step), slope, pool, None if at.seen is None else seen)
    if at.seen is not None:
        mean, variance = (values.view(-1, norm.channels) for values in seen[0])
        at.seen.append(BatchStatistics(norm, at.step, mean, variance))
    return out


class BatchStatistics(NamedTuple):
    """This is what one pass saw in one batch-norm layer."""

    layer: TaskBatchNorm
    step: int
    mean: Tensor  # (tasks, channels)
    variance: Tensor  # (tasks, channels), unbiased


@torch.no_grad()
def update_running_statistics(seen: Sequence[BatchStatistics]) -> None:
    """Move averages (momentum 0.1) over the passes in `seen`, task after task, pass after pass."""
    rows: dict[tuple[TaskBatchNorm, int], list[BatchStatistics]] = {}
    for statistics in seen:
        rows.setdefault((statistics.layer, statistics.step if statistics.layer.per_step else 0), []).append(statistics)
    for (layer, step), passes in rows.items():
        for kind, values in (("running_mean", [s.mean for s in passes]), ("running_var", [s.variance for s in passes])):
            sequence = torch.stack(values, 1).flatten(0, 1)  # (tasks * passes, channels)
            ages = torch.arange(len(sequence) - 1, -1, -1, dtype=sequence.dtype, device=sequence.device)
            kept = (1 - BATCH_NORM_MOMENTUM) ** len(sequence)
            seen_mean = (BATCH_NORM_MOMENTUM * (1 - BATCH_NORM_MOMENTUM) ** ages) @ sequence
            layer.row(kind, step).mul_(kept).add_(seen_mean)


class LinearClassifier(nn.Module):
    """Turn features (tasks, n, d) into logits (tasks, n, way); weights are Xavier-uniform, the bias is zero."""

    def __init__(self, features: int, way: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(nn.init.xavier_uniform_(torch.empty(way, features)))
        self.bias = nn.Parameter(torch.zeros(way))

    def forward(self, features: Tensor) -> Tensor:
        if self.weights.dim() == 2:
            return F.linear(features, self.weights, self.bias)
        return torch.baddbmm(self.bias.unsqueeze(1), features, self.weights.transpose(1, 2))


# --- networks with an inner loop -----------------------------------------------------------------------------------


class Backbone(nn.Module):
    """A body and a linear classifier; a subclass makes the layers in ``layer_dict`` and says how images pass them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_dict = nn.ModuleDict()

    @property
    def head_names(self) -> set[str]:
        """Return the names of the classifier's parameters."""
        return {f"layer_dict.linear.{name}" for name, _ in self.layer_dict["linear"].named_parameters()}

    @property
    def norm_names(self) -> set[str]:
        """Return the names of the scales and shifts of batch norm."""
        norms = [(name, module) for name, module in self.named_modules() if isinstance(module, TaskBatchNorm)]
        return {f"{name}.{kind}" for name, _ in norms for kind in ("weight", "bias")}

    def forward(self, images: Tensor, at: Pass) -> Tensor:
        """Return logits (tasks, n, way) of images (tasks, n, C, H, W)."""
        logits: Tensor = self.layer_dict["linear"](self.features(images, at))
        return logits

    def features(self, images: Tensor, at: Pass) -> Tensor:
        """Return what the classifier sees of images (tasks, n, C, H, W): (tasks, n, d)."""
        tasks, n = images.shape[:2]
        x = self.embed(images.transpose(0, 1).flatten(1, 2), at)
        return x.reshape(n, tasks, -1).transpose(0, 1)

    def embed(self, x: Tensor, at: Pass) -> Tensor:
        """Turn images (n, tasks*C, H, W) into maps (n, tasks*channels, h, w)."""
        raise NotImplementedError


BACKBONES: dict[str, Callable[[ImageShape, Options, NormSettings, bool], Backbone]] = {}
EMBEDDINGS: dict[str, Callable[[ImageShape, Options], nn.Module]] = {}


def register_backbone(name: str) -> Callable[[Any], Any]:
    """Make a function (image shape, options, batch norm, whether convolutions have biases) -> Backbone a --backbone."""

    def add(build: Callable[[ImageShape, Options, NormSettings, bool], Backbone]) -> Any:
        add_plug_in(BACKBONES, name, build)
        add_choice("backbone", name, only={"learner": "gradient"})
        return build

    return add


def register_embedding(name: str, *aliases: str) -> Callable[[Any], Any]:
    """Make a function (image shape, options) -> module of (n, C, H, W) -> (n, d) a --backbone of head learners."""

    def add(build: Callable[[ImageShape, Options], nn.Module]) -> Any:
        add_plug_in(EMBEDDINGS, name, build)
        add_choice("backbone", name, aliases=aliases, only={"learner": "head"})
        return build

    return add


def build_backbone(image_shape: ImageShape, options: Options, official_bias: bool) -> Backbone:
    """Build the network that the options name, for an inner loop; --use_bias or `official_bias` decides on biases."""
    norm = NormSettings(
        steps=options.number_of_training_steps_per_iter if options.per_step_bn_statistics else 0,
        tracked=options.tracks_statistics,
        shared_weights=options.enable_inner_loop_optimizable_bn_params,
        learnable=(options.learnable_bn_gamma, options.learnable_bn_beta),
    )
    bias = official_bias if options.use_bias is None else options.use_bias
    return BACKBONES[options.backbone](image_shape, options, norm, bias)


def build_embedding(image_shape: ImageShape, options: Options) -> nn.Module:
    """Build the embedding of a head learner that the options name."""
    return EMBEDDINGS[options.backbone](image_shape, options)


def seen_by_tasks(network: nn.Module, tasks: int, buffers: bool) -> dict[str, Tensor]:
    """Return the parameters, and the buffers if wanted, once per task: (tasks, ...)."""
    tensors: dict[str, Tensor] = dict(network.named_parameters())
    if buffers:
        tensors |= dict(network.named_buffers())
    return {name: tensor.expand(tasks, *tensor.shape).contiguous() for name, tensor in tensors.items()}


class Conv4(Backbone):
    """MAML++ has this network: [3x3 conv, batch norm, leaky ReLU, 2x2 max-pool] four times, then a linear classifier.

    With `max_pooling` off, convolutions have stride 2 and the last map is averaged.

    Args:
        image_shape: (C, H, W) of one image.
        way: outputs of the classifier.

    Raises:
        UserError: the images are too small.
    """

    def __init__(
        self,
        image_shape: ImageShape,
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
        channels, height, width = image_shape
        stride = 1 if max_pooling else 2
        for stage in range(stages):
            conv = TaskConv2d(channels, filters, 3, stride, self.padding, bias=bias)
            self.layer_dict[f"conv{stage}"] = nn.ModuleDict({"conv": conv, "norm_layer": TaskBatchNorm(filters, norm)})
            channels, height, width = filters, self._reduced(height), self._reduced(width)
            if min(height, width) < 1:
                shape = f"{image_shape[1]}x{image_shape[2]}"
                raise UserError(
                    f"images of {shape} are too small for {stages} stages: use larger images or fewer stages"
                )
        self.layer_dict["linear"] = LinearClassifier(filters * height * width if max_pooling else filters, way)

    def _reduced(self, size: int) -> int:
        size += 2 * self.padding - 2
        return size // 2 if self.max_pooling else (size + 1) // 2

    def embed(self, x: Tensor, at: Pass) -> Tensor:
        for stage in range(self.stages):
            block: Any = self.layer_dict[f"conv{stage}"]
            x = conv_norm(block["conv"], block["norm_layer"], x, at, LEAKY_RELU_SLOPE, self.max_pooling)
        return x if self.max_pooling else x.mean((2, 3), keepdim=True)


@register_backbone("4-CONV")
def build_conv4(image_shape: ImageShape, options: Options, norm: NormSettings, bias: bool) -> Conv4:
    return Conv4(
        image_shape,
        options.num_classes_per_set,
        filters=options.cnn_num_filters,
        stages=options.num_stages,
        padding=options.conv_padding,
        max_pooling=options.max_pooling,
        bias=bias,
        norm=norm,
    )


class ResNet12(Backbone):
    """This network has residual blocks, each halving the map, then a global average and the classifier.

    ALFA and L2F report results with widths 64-128-256-512.
    """

    def __init__(
        self, image_shape: ImageShape, way: int, widths: Sequence[int], norm: NormSettings = SHARED_NORM
    ) -> None:
        super().__init__()
        pooled_size(image_shape, len(widths))
        for number, (channels_in, channels_out) in enumerate(pairwise((image_shape[0], *widths)), 1):
            norms = [TaskBatchNorm(channels_out, norm) for _ in range(4)]
            self.layer_dict[f"layer{number}"] = ResidualBlock(channels_in, channels_out, TaskConv2d, norms)
        self.layer_dict["linear"] = LinearClassifier(widths[-1], way)

    def embed(self, x: Tensor, at: Pass) -> Tensor:
        for name, block in self.layer_dict.items():
            x = block(x, at) if name != "linear" else x
        return x.mean((2, 3), keepdim=True)


@register_backbone("ResNet-12")
def build_resnet12(image_shape: ImageShape, options: Options, norm: NormSettings, bias: bool) -> ResNet12:
    return ResNet12(image_shape, options.num_classes_per_set, options.resnet_width_list, norm)


class ResidualBlock(nn.Module):
    """A block is [3x3 conv, norm, leaky ReLU] twice, [conv, norm], plus a 1x1 conv and norm; leaky ReLU, 2x2 max-pool.

    Args:
        conv: kind of the convolutions.
        norms: the four normalisations, the shortcut's last.
        drop: what follows.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        conv: type[nn.Conv2d],
        norms: Sequence[nn.Module],
        drop: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = conv(channels_in, channels_out, 3, padding=1, bias=False)
        self.bn1 = norms[0]
        self.conv2 = conv(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = norms[1]
        self.conv3 = conv(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn3 = norms[2]
        self.downsample = nn.Sequential(conv(channels_in, channels_out, 1, bias=False), norms[3])
        self.drop = drop or nn.Identity()

    def forward(self, x: Tensor, at: Pass | None = None) -> Tensor:
        """`at` says where in an inner loop the maps pass; None: nowhere, with torch's own layers."""
        shortcut = conv_norm(self.downsample[0], self.downsample[1], x, at)
        out = conv_norm(self.conv1, self.bn1, x, at, RESNET_SLOPE)
        out = conv_norm(self.conv2, self.bn2, out, at, RESNET_SLOPE)
        out = conv_norm(self.conv3, self.bn3, out, at) + shortcut
        if at is None:
            return self.drop(F.leaky_relu(F.max_pool2d(out, 2), RESNET_SLOPE, inplace=True))
        return leaky_relu(max_pool_2x2(out), RESNET_SLOPE)


# --- embeddings for a head -----------------------------------------------------------------------------------------

FINAL_DROP = 0.1  # what dropout and, at the end of its schedule, DropBlock blank of ResNet-12's maps
DROPBLOCK_RAMP = 40_000  # forward passes to DropBlock's full strength: 20 epochs x 1000 batches x (support, query)

DROPBLOCK_SCHEDULES = ("training", "official")


class PooledBlock(nn.Sequential):
    """A block is [convolution, batch norm, 2x2 max-pool] and the layers of its `ending`.

    On a CPU evaluation scales the convolution's weights in place of its maps, and takes the maximum of rows, then of
    columns: conv64 embeds 1.17 times as many images in a second.
    """

    def __init__(self, conv: nn.Conv2d, *ending: nn.Module) -> None:
        super().__init__(conv, nn.BatchNorm2d(conv.out_channels), *ending)

    def forward(self, x: Tensor) -> Tensor:
        layers: list[Any] = list(self)
        conv, norm, *ending = layers
        if norm.training or torch.is_grad_enabled() or x.device.type != "cpu":
            x = F.max_pool2d(norm(conv(x)), 2)
        else:
            scaled = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            x = F.conv2d(x, *scaled, padding=conv.padding)
            x = torch.maximum(x[:, :, :-1:2], x[:, :, 1::2])
            x = torch.maximum(x[:, :, :, :-1:2], x[:, :, :, 1::2])
        for layer in ending:
            x = layer(x)
        return x


class ProtoNetConv64(nn.Module):
    """ProtoNet has this network: four blocks of [3x3 conv, batch norm, ReLU, 2x2 max-pool].

    It makes 256 features at 32x32 and 1600 at 84x84.

    Args:
        image_shape: (C, H, W) of one image, at least 16x16.
        widths: channels of the four blocks.
    """

    def __init__(self, image_shape: ImageShape, widths: Sequence[int] = (64, 64, 64, 64)) -> None:
        super().__init__()
        height, width = pooled_size(image_shape, len(widths))
        self.out_features = widths[-1] * height * width
        self.encoder = nn.Sequential()
        for channels_in, channels_out in pairwise((image_shape[0], *widths)):
            conv = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
            # Pooling before the ReLU gives the same values and gradients on a quarter of the elements.
            self.encoder.append(nn.Sequential(OrderedDict(block=PooledBlock(conv, nn.ReLU(inplace=True)))))
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images).flatten(1)


@register_embedding("conv64", "ProtoNet")
def build_conv64(image_shape: ImageShape, options: Options) -> ProtoNetConv64:
    return ProtoNetConv64(image_shape)


class R2D2Net(nn.Module):
    """R2D2 has this network: four blocks of [3x3 conv, batch norm, 2x2 max-pool, leaky ReLU]; it uses the last two.

    8192 features at 32x32, 51200 at 84x84 (Bertinetto et al., 2019). The last block has no activation; blocks three and
    four end with dropout.

    Args:
        image_shape: (C, H, W) of one image, at least 16x16.
        widths: channels of the four blocks.
    """

    def __init__(self, image_shape: ImageShape, widths: Sequence[int] = (96, 192, 384, 512)) -> None:
        super().__init__()
        sizes = [pooled_size(image_shape, 4), pooled_size(image_shape, 3)]
        self.out_features = sum(c * h * w for c, (h, w) in zip((widths[3], widths[2]), sizes, strict=True))
        self.block1 = self._block(image_shape[0], widths[0], self._activation())
        self.block2 = self._block(widths[0], widths[1], self._activation())
        self.block3 = self._block(widths[1], widths[2], self._activation(), nn.Dropout(0.1))
        self.block4 = self._block(widths[2], widths[3], nn.Dropout(0.3))

    @staticmethod
    def _activation() -> nn.Module:
        return nn.LeakyReLU(RESNET_SLOPE, inplace=True)

    @staticmethod
    def _block(channels_in: int, channels_out: int, *ending: nn.Module) -> PooledBlock:
        return PooledBlock(nn.Conv2d(channels_in, channels_out, 3, padding=1), *ending)

    def forward(self, images: Tensor) -> Tensor:
        third = self.block3(self.block2(self.block1(images)))
        return torch.cat((third.flatten(1), self.block4(third).flatten(1)), 1)


@register_embedding("R2D2Net", "R2D2")
def build_r2d2_net(image_shape: ImageShape, options: Options) -> R2D2Net:
    return R2D2Net(image_shape)


class ResNet12Embedding(nn.Module):
    """This is MetaOptNet's ResNet-12: four wide residual blocks, regularised, the last map flattened or averaged.

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
        image_shape: ImageShape,
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
            raise UserError(f"dropblock_size {block_size}: images of {shape} leave a map that allows 1 to {side}")
        for number, (channels_in, channels_out) in enumerate(pairwise((image_shape[0], *widths)), 1):
            drop = nn.Dropout(FINAL_DROP) if number < 3 else DropBlock(block_size, dropblock_schedule)
            norms = [nn.BatchNorm2d(channels_out) for _ in range(4)]
            block = ResidualBlock(channels_in, channels_out, nn.Conv2d, norms, drop)
            self.add_module(f"layer{number}", nn.Sequential(block))
        initialise_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        x = images
        for layer in self.children():
            x = layer(x)
        return x.mean((2, 3)) if self.avg_pool else x.flatten(1)


@register_embedding("ResNet-12", "ResNet")
def build_resnet12_embedding(image_shape: ImageShape, options: Options) -> ResNet12Embedding:
    return ResNet12Embedding(
        image_shape,
        options.resnet_width_list,
        avg_pool=options.avg_pool,
        dropblock_schedule=options.dropblock_schedule,
    )


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
            raise UserError(f"DropBlock schedule {schedule!r}: choose from {', '.join(DROPBLOCK_SCHEDULES)}")
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

    def fraction(self) -> Tensor:
        """Return which fraction is blanked after n passes: min(0.1, 0.1 n / 40 000)."""
        return (self.forwards * (FINAL_DROP / DROPBLOCK_RAMP)).clamp(max=FINAL_DROP)

    def gamma(self, height: int, width: int) -> Tensor:
        """Return the probability of a hit per place and channel, such that `fraction` is blanked."""
        b = self.block_size
        return self.fraction() * (height * width / (b**2 * (height - b + 1) * (width - b + 1)))


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


def pooled_size(image_shape: ImageShape, poolings: int) -> tuple[int, int]:
    """Return height and width after so many 2x2 poolings; UserError where nothing is left."""
    _, height, width = image_shape
    if min(height, width) < 2**poolings:
        raise UserError(f"images of {height}x{width} are too small for {poolings} poolings: use larger images")
    return height >> poolings, width >> poolings


def initialise_convolutions(network: nn.Module) -> None:
    """Initialise as He et al. by fan-out: standard deviation sqrt(2 / (k*k*out))."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
