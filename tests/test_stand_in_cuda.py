"""Learners iterate on stand-in CUDA tensors without a wait of the host, within a budget of calls."""

import itertools
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

import few_shot_learning_system
from augmentation import crop_padding
from data import Episodes
from few_shot_learning_system import build_learner
from tests.stand_in_cuda import CUDA, HostWaits, on_cuda, stand_in_cuda
from utils.image_cache import Split
from utils.options import Options

# Every call of torch passes through Python code here, which coverage would make twice as slow.
pytestmark = pytest.mark.usefixtures("no_coverage")

LSLR = "learnable_per_layer_per_step_inner_loop_learning_rate"
MAMLPP = {LSLR: True, "per_step_bn_statistics": True, "use_multi_step_loss_optimization": True}
RESNET = {"backbone": "ResNet-12", "resnet_widths": "4-5", "checkpoint_inner_steps": True}
SMALL = {"num_classes_per_set": 5, "num_target_samples": 2, "batch_size": 2}
GRADIENT: dict[str, dict[str, Any]] = {
    "MAML": {}, "MAML first order": {"second_order": False}, "CxGrad": {"contextual_grad": True},
    "CxGrad first order": {"contextual_grad": True, "second_order": False},
    "CxGrad recomputed": {"contextual_grad": True, "checkpoint_inner_steps": True},
    "CxGrad task by task": {"contextual_grad": True, "tasks_per_pass": 1},
    "MAML++": {**MAMLPP, "batch_norm": "per_step", "clamp_outer_gradients": 10.0},
    "MAML++ transductive": MAMLPP, "CxGrad MAML++": {**MAMLPP, "contextual_grad": True},
    "running statistics": {"batch_norm": "running"},
    "ALFA": {"alfa": True}, "ALFA random init": {"alfa": True, "random_init": True},
    "L2F": {"attenuate": True}, "ALFA+L2F": {"alfa": True, "attenuate": True},
    "ANIL": {"inner_loop_part": "head"}, "BOIL": {"inner_loop_part": "body"}, "Meta-SGD": {"meta_sgd": True},
    "norm moved": {"enable_inner_loop_optimizable_bn_params": True}, "strides": {"max_pooling": False},
    "ResNet-12": RESNET, "ResNet-12 CxGrad": {**RESNET, "contextual_grad": True}, "rotated": {"rotate_classes": True},
}  # fmt: skip


def made_split(side: int) -> Split:
    images = np.random.default_rng(0).integers(0, 256, (200, side, side, 3), dtype=np.uint8)
    starts = np.arange(9, dtype=np.int64) * 25
    return Split(images, [f"class_{i}" for i in range(8)], starts, "made", "train", (0.5,) * 3, (0.25,) * 3, 0)


def iterate(options: Options, epochs: Sequence[int] = (0,), validate: bool = True) -> list[int]:
    """A training iteration in each of the epochs and one of validation; the number of calls of each."""
    with stand_in_cuda() as mode:
        model = build_learner("cuda", options)
        assert all(on_cuda(t) for t in (*model.parameters(), *model.buffers()))
        split, channels = made_split(options.image_height), ((0.5,) * 3, (0.25,) * 3)
        padding = crop_padding(options.image_height) if options.augment else None
        training, validation = (
            Episodes(split, *task, 0, *channels, torch.device("cuda"), rotate_classes=turned, augment_padding=pixels)
            for task, turned, pixels in (
                (options.training_task, bool(options.rotate_classes), padding),
                (options.evaluation_task, False, None),
            )
        )
        mode.forbid, calls = True, []
        for epoch in epochs:
            mode.calls.clear()
            losses, logits = model.run_train_iter(training.batch(epoch, 2), epoch)
            calls.append(mode.calls.total())
            assert losses["loss"].device == CUDA and all(task.device == CUDA for task in logits)
        if validate:
            mode.calls.clear()
            model.run_validation_iter(validation.batch(0, 2))
            calls.append(mode.calls.total())
        return calls


def gradient_options(**extra: Any) -> Options:
    steps = dict.fromkeys(("number_of_training_steps_per_iter", "number_of_evaluation_steps_per_iter"), 2)
    return Options.from_mapping(
        {**SMALL, **steps, "image_height": 28, "image_width": 28, "cnn_num_filters": 4, "num_stages": 2, **extra}
    )


def head_options(backbone: str, head: str, **extra: Any) -> Options:
    widths = {"resnet_widths": "4-5-6-8"} if backbone == "ResNet-12" else {}
    named = {"learner": "head", "dataset_name": "CIFAR_FS", "backbone": backbone, "head": head}
    return Options.from_mapping(
        {**named, **SMALL, "num_samples_per_class": 3, "val_shot": 3, "val_query": 2, **widths, **extra}
    )


@pytest.mark.parametrize("method", GRADIENT)
def test_a_gradient_learner_never_waits(method: str) -> None:
    """A second iteration is of interest for MAML, whose Adam then has moments, and after the end of MSL."""
    again = method == "MAML" or "MAML++" in method
    iterate(gradient_options(**GRADIENT[method]), epochs=(0, 20) if again else (0,))


@pytest.mark.parametrize(
    ("backbone", "head"), [*itertools.product(("conv64", "R2D2Net", "ResNet-12"), ("ProtoNet", "Ridge", "R2D2"))]
)
def test_a_closed_form_head_never_waits(backbone: str, head: str) -> None:
    iterate(head_options(backbone, head))


def test_a_closed_form_head_on_a_gradient_trained_body_never_waits() -> None:
    iterate(gradient_options(head="Ridge", evaluate_on_test_set_only=True), epochs=())


def test_a_published_cxgrad_iteration_keeps_to_its_budget_of_calls() -> None:
    """Both tasks of a meta-batch in one pass, five inner steps: 2,228 calls were counted, Adam's included."""
    options = Options.from_mapping({"contextual_grad": True, "batch_size": 2})
    _, training = iterate(options, epochs=(0, 20), validate=False)
    assert training <= 2250


def test_the_stand_in_notices_values_hosts_and_copies() -> None:
    options, plain = gradient_options(contextual_grad=True), few_shot_learning_system.cross_entropy
    with (
        mock.patch.object(
            few_shot_learning_system, "cross_entropy", lambda *a: plain(*a) * float(plain(*a).detach().sum())
        ),
        pytest.raises(HostWaits),
    ):
        iterate(options)
    with (
        mock.patch.object(few_shot_learning_system, "cross_entropy", lambda *a: plain(*a) * torch.ones(1)),
        pytest.raises(RuntimeError),
    ):
        iterate(options)
    with mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor), stand_in_cuda() as mode:
        mode.forbid = True
        with pytest.raises(HostWaits):
            torch.ones(3).to("cuda")
