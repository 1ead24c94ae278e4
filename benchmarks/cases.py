"""The learners that `benchmarks/check_gpu.py` checks, their tasks, and PyTorch's own operations to compare with."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import meta_neural_network_architectures as networks
from classification_heads import HEADS
from data import Episodes, training_episodes
from learner import FewShotLearner
from utils.image_cache import Split
from utils.options import Options

LSLR = "learnable_per_layer_per_step_inner_loop_learning_rate"
PER_STEP = {"per_step_bn_statistics": True, "batch_norm": "per_step"}
CXGRAD_84 = {"contextual_grad": True, "image_height": 84, "image_width": 84, "num_target_samples": 15,
             "number_of_training_steps_per_iter": 5}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "CxGrad": {"contextual_grad": True},
    "MAML": {},
    "MAML, first order": {"second_order": False},
    "MAML++": {LSLR: True, "use_multi_step_loss_optimization": True, **PER_STEP},
    "ALFA": {"alfa": True},
    "ALFA, random init": {"alfa": True, "random_init": True},
    "L2F": {"attenuate": True},
    "ANIL": {"inner_loop_part": "head"},
    "BOIL": {"inner_loop_part": "body"},
    "Meta-SGD": {"meta_sgd": True},
    "ResNet-12": {"backbone": "ResNet-12"},
}


def gradient_options(device: torch.device, **extra: Any) -> Options:
    """Return a gradient learner's options; a CPU gets a smaller network."""
    side, filters, steps = (32, 48, 3) if device.type == "cuda" else (28, 4, 2)
    small = {} if device.type == "cuda" or "backbone" not in extra else {"resnet_widths": "4-5-6-7"}
    names = ("number_of_training_steps_per_iter", "number_of_evaluation_steps_per_iter")
    usual = {"image_height": side, "image_width": side, "cnn_num_filters": filters, **dict.fromkeys(names, steps)}
    tasks = {"batch_size": 2, "num_target_samples": 3, "tasks_per_pass": 2}
    return Options.from_mapping(usual | small | tasks | extra)


def head_options(device: torch.device, head: str, backbone: str = "conv64", **extra: Any) -> Options:
    """Return a head learner's options, at 32x32; a CPU gets a smaller ResNet-12."""
    small = {} if device.type == "cuda" or backbone != "ResNet-12" else {"resnet_widths": "4-5-6-8"}
    named = {"learner": "head", "head": head, "backbone": backbone, "image_height": 32, "image_width": 32}
    tasks = {"batch_size": 2, "num_classes_per_set": 5, "num_samples_per_class": 3, "num_target_samples": 3}
    return Options.from_mapping(named | small | tasks | {"val_shot": 3, "val_query": 3, "augment": False} | extra)


def all_learners(device: torch.device) -> Iterator[tuple[str, Callable[[], Options]]]:
    """Yield the name and the options of every method and of every head."""
    for name, extra in METHODS.items():
        yield name, partial(gradient_options, device, **extra)
    for head in HEADS:
        yield f"conv64, {head}", partial(head_options, device, head)
    yield "ResNet-12, Ridge", partial(head_options, device, "Ridge", "ResNet-12")


def made_batch(options: Options, device: torch.device, seed: int = 0) -> list[Tensor]:
    """Return a meta-batch of noise, float64: images (tasks, way, n, C, H, W), support and query, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    way, tasks = options.num_classes_per_set, options.batch_size
    counts = options.training_task[1:]
    draw = partial(torch.rand, generator=generator, dtype=torch.float64)
    images = [draw(tasks, way, n, *options.image_shape).to(device) for n in counts]
    return [*images, *(torch.arange(way, device=device).view(1, way, 1).repeat(tasks, 1, n) for n in counts)]


def without_chance(model: FewShotLearner) -> FewShotLearner:
    """Take dropout out of a ResNet-12, whose draws differ from device to device."""
    for module in model.modules():
        if isinstance(module, networks.ResidualBlock):
            module.drop = nn.Identity()
    return model


@contextmanager
def torch_operations() -> Iterator[None]:
    """Run the networks of inner loops on PyTorch's own operations in place of `second_order_ops`."""

    def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[int, int, int]) -> Tensor:
        stride, padding, groups = geometry
        return F.conv2d(x, weight, bias, stride, padding, groups=groups)

    def leaky_relu(x: Tensor, slope: float) -> Tensor:
        return x if slope == 1 else F.leaky_relu(x, slope)

    def conv_norm_activate(x: Tensor, *given: Any) -> Tensor:
        *conv, weight, bias, slope, pool, seen = given
        y = conv2d(x, *conv)
        if seen is not None:
            variance, mean = torch.var_mean(y.detach(), (0, 2, 3))
            seen.append((mean, variance))
        y = leaky_relu(F.batch_norm(y, None, None, weight, bias, training=True, eps=networks.EPS), slope)
        return F.max_pool2d(y, 2) if pool else y

    def max_pool_2x2(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2)

    with ExitStack() as patches:
        for form in (conv2d, leaky_relu, conv_norm_activate, max_pool_2x2):
            patches.enter_context(mock.patch.object(networks, form.__name__, form))
        yield


def made_episodes(options: Options, device: torch.device) -> Episodes:
    """Return training tasks of made-up images."""
    images = np.random.default_rng(0).integers(0, 256, (200, *options.image_shape[1:], 3), dtype=np.uint8)
    classes = [f"class_{i}" for i in range(8)]
    split = Split(images, classes, np.arange(9, dtype=np.int64) * 25, "made", "train", (0.5,) * 3, (0.25,) * 3, 0)
    return training_episodes(split, options, device, None)
