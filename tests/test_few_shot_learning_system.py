"""Parity with the recorded official program, with a naive loop, and the learner's interface."""

import copy
import gc
import math
import weakref
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from few_shot_learning_system import SECOND_ORDER, MAMLFewShotClassifier, cross_entropy, multi_step_importances
from meta_neural_network_architectures import Pass, ResNet12, TaskConv2d, seen_by_tasks
from tests.golden import load
from tests.golden_cxgrad import Golden, is_accuracy, load_cases, relative_errors
from tests.naive_reference import naive_loss
from utils.errors import UserError
from utils.options import Options

CASES = load_cases()


@cache
def golden_in_float32(case: str) -> Golden:
    """Return the case for the tests that share what it takes seconds to compute."""
    return Golden(case, CASES[case], "f32")


# --- parity with the official program ------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_coverage")
@pytest.mark.parametrize("case", CASES)
def test_float64_equals_every_recorded_array(case: str) -> None:
    golden = Golden(case, CASES[case], "f64")
    ours, recorded = golden.ours, golden.recorded()
    assert len(recorded) > 50
    assert not set(recorded) - set(ours), "recorded arrays that nothing of ours answers to"
    for name, array in recorded.items():
        # Biases in front of batch norm have no effect; Adam amplifies their rounding noise, and ALFA's rates see it.
        # Running means contain these biases: with gradients of exactly 0 they would still miss 1e-9 once, by 17 %.
        bias = name.replace("norm_layer.running_mean", "conv.bias")
        noisy = "params_after" in name and bias in recorded and bias.endswith(("conv.bias", "conv-bias"))
        slack = 1e-6 if is_accuracy(name) or noisy else 1e-12
        np.testing.assert_allclose(ours[name], array, rtol=0, atol=1e-9 * np.abs(array).max() + slack, err_msg=name)


@pytest.mark.usefixtures("no_coverage")
@pytest.mark.parametrize("case", CASES)
def test_float32_equals_recorded_arrays_within_float32_noise(case: str) -> None:
    golden = golden_in_float32(case)
    for name, error in relative_errors(golden).items():
        if name not in ("train_loss", "train_accuracy", "eval/five_batches_accuracy", "five_batches_accuracy"):
            assert error <= float32_tolerance(case, name), name
    noise = {name: array for name, array in golden.ours.items() if golden.is_rounding_noise(name)}
    assert all(np.abs(array).max() < 1e-5 for array in noise.values())


@pytest.mark.usefixtures("no_coverage")
@pytest.mark.parametrize("case", [name for name in CASES if "eval" not in name])
def test_float32_training_losses_follow_the_official_ones(case: str) -> None:
    """Where the context is lively, one activation crossing a kink moves the third loss by 1 %, in either program."""
    golden = golden_in_float32(case)
    ours, recorded = golden.ours["train_loss"], golden.recorded()["train_loss"]
    if context_is_inert(case):
        np.testing.assert_allclose(ours, recorded, rtol=2e-5 if case in ("cxgrad", "maml_second_order") else 2e-2)
    else:
        np.testing.assert_allclose(ours[:2], recorded[:2], rtol=5e-2 if "msl" in case else 1e-3)


def context_is_inert(case: str) -> bool:
    """All but CxGrad with small gammas: near 0.69 the context hardly moves (docs/arithmetic.md, section 12)."""
    return not case.startswith("cxgrad") or case in ("cxgrad", "cxgrad_eval")


def float32_tolerance(case: str, name: str) -> float:
    """About 5 times what float32 runs of the official programs differ by among themselves."""
    quantity = name.removeprefix("eval/")
    if "five_batches" in quantity:
        return 3e-2 if "per_step" in case else 1e-5 if context_is_inert(case) else 3e-4
    if quantity.startswith("context"):
        return 2e-2 if context_is_inert(case) else 2e-3
    if quantity.startswith("gamma"):
        return 2e-5 if context_is_inert(case) else 5e-4
    if quantity.startswith("outer_grad"):
        if quantity.endswith("gamma_generator.0.weight"):
            return 2e-2 if context_is_inert(case) or "msl" in case else 2e-3
        if "alfa" in case and quantity.endswith("conv.bias"):
            return 1e-3  # batch norm cancels these biases; what is left reaches the loss through ALFA's means alone
        usual = 1e-4 if context_is_inert(case) else 2e-2 if "msl" in case else 2e-3
        return 3e-2 if case == "l2f" else usual
    return 1e-5 if context_is_inert(case) else 3e-4


def test_learning_rates_follow_both_official_schedules() -> None:
    recorded = load("cxgrad", "lr_schedule")
    common = dict(TINY, meta_learning_rate=1e-3, min_learning_rate=1e-5, total_epochs=10)
    for contextual, name in ((True, "cxgrad_per_iteration"), (False, "mamlpp_per_epoch")):
        model, batch = tiny_model(**dict(common, contextual_grad=contextual)), tiny_batch()
        rates = [model.run_train_iter(batch, i // 2)[0]["learning_rate"] for i in range(25)]
        np.testing.assert_allclose(rates, recorded[f"{name}/lr_used"], rtol=1e-12)


# --- parity with the naive loop --------------------------------------------------------------------------------------


TINY: dict[str, Any] = dict(
    num_classes_per_set=3,
    num_samples_per_class=2,
    num_target_samples=3,
    batch_size=2,
    cnn_num_filters=4,
    num_stages=2,
    num_context_params=5,
    number_of_training_steps_per_iter=2,
    number_of_evaluation_steps_per_iter=2,
    init_inner_loop_learning_rate=0.05,
)


def tiny_model(dtype: torch.dtype = torch.float64, **changes: Any) -> MAMLFewShotClassifier:
    return MAMLFewShotClassifier((2, 3, 8, 8), "cpu", SimpleNamespace(**(TINY | changes))).to(dtype)


def tiny_batch(tasks: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    support, query = (torch.rand(tasks, 3, n, 3, 8, 8, generator=generator, dtype=dtype) for n in (2, 3))
    labels = [torch.arange(3).view(1, 3, 1).expand(tasks, 3, n).contiguous() for n in (2, 3)]
    return support, query, labels[0], labels[1]


@pytest.mark.parametrize("contextual", [False, True])
def test_training_equals_a_naive_loop_in_value_and_gradient(contextual: bool) -> None:
    model = tiny_model(contextual_grad=contextual, context_params_learning_rate=0.7)
    batch = tiny_batch()
    expected = naive_loss(model, batch, 2, contextual)
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected_gradients = torch.autograd.grad(expected, parameters)
    losses, _ = model.run_train_iter(batch, 0)
    torch.testing.assert_close(losses["loss"], expected.detach(), rtol=1e-12, atol=0)
    for parameter, gradient in zip(parameters, expected_gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("contextual", [False, True])
def test_outer_gradient_passes_gradcheck(contextual: bool) -> None:
    """Finite differences over the last block and the head, through both inner steps.

    The warm-up's step is a constant of the outer gradient by definition, but finite differences see it move; at a rate
    of 0 the context stays put and the two must agree.
    """
    model = tiny_model(contextual_grad=contextual, context_params_learning_rate=0.0)
    tasks = model._to_device(tiny_batch())
    names = ["layer_dict.conv1.conv.weight", "layer_dict.linear.weights"]

    def loss(*values: Tensor) -> Tensor:
        parameters = dict(model.classifier.named_parameters()) | dict(zip(names, values, strict=True))
        seen_by_tasks = {n: p.expand(2, *p.shape) for n, p in parameters.items()}
        model.task_parameters = lambda tasks, evaluation=False: seen_by_tasks  # type: ignore[method-assign]
        return model.query_losses(tasks, 0)[0].sum()

    values = [dict(model.classifier.named_parameters())[n].detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(loss, values, eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=True)


# --- learning ------------------------------------------------------------------------------------------------------


def patterned_batch(seed: int, tasks: int) -> tuple[Tensor, ...]:
    """Return tasks whose classes differ by a faint pattern in the first channel; the other two are louder noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(tasks, 3, 1, 2, 2, generator=generator).repeat_interleave(4, 3).repeat_interleave(4, 4)
    images = [torch.randn(tasks, 3, n, 3, 8, 8, generator=generator) for n in (2, 5)]
    for x in images:
        x[:, :, :, 0] = 0.3 * x[:, :, :, 0] + 0.25 * patterns
    labels = [torch.arange(3).view(1, 3, 1).expand(tasks, 3, n) for n in (2, 5)]
    return images[0], images[1], labels[0], labels[1]


@pytest.mark.parametrize("contextual", [False, True])
def test_training_raises_the_accuracy_on_new_tasks_far_above_chance(contextual: bool) -> None:
    rates = {"meta_learning_rate": 0.01, "min_learning_rate": 0.01}
    options = {"contextual_grad": contextual, "num_target_samples": 5, "cnn_num_filters": 8, "tasks_per_pass": 16}
    model = tiny_model(torch.float32, **options, **rates)
    held_out = patterned_batch(seed=999, tasks=64)
    before = model.run_validation_iter(held_out)[0]["accuracy"]
    for iteration in range(60):
        model.run_train_iter(patterned_batch(seed=iteration, tasks=16), 0)
    after = model.run_validation_iter(held_out)[0]["accuracy"]
    assert before < 0.5 and after > 0.7, "chance is 0.33"


# --- interface -----------------------------------------------------------------------------------------------------


def test_validation_changes_nothing() -> None:
    model = tiny_model(contextual_grad=True, per_step_bn_statistics=True)
    before = copy.deepcopy(model.state_dict())
    first, _ = model.run_validation_iter(tiny_batch())
    second, logits = model.run_validation_iter(tiny_batch())
    assert first["loss"] == second["loss"]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert all(p.grad is None for p in model.parameters())
    assert [tuple(task.shape) for task in logits] == [(9, 3), (9, 3)]


def test_adapt_and_predict_give_the_validation_logits() -> None:
    model = tiny_model(contextual_grad=True)
    tasks = model._to_device(tiny_batch())
    logits = model.predict(model.adapt(tasks.x_support, tasks.y_support), tasks.x_query)
    _, expected = model.run_validation_iter(tiny_batch())
    torch.testing.assert_close(logits, torch.stack(expected))


def test_arrays_and_tensors_of_any_precision_are_accepted() -> None:
    arrays = tuple(part.numpy() for part in tiny_batch())
    model = tiny_model(torch.float32)
    from_arrays, _ = model.run_validation_iter(arrays)
    from_tensors, _ = model.run_validation_iter(tiny_batch(dtype=torch.float64))
    assert from_arrays["loss"] == from_tensors["loss"]
    assert from_arrays["loss"].dtype == torch.float32


def test_the_options_of_a_head_learner_are_refused() -> None:
    with pytest.raises(UserError, match="asked of --learner head: use `build_learner`"):
        MAMLFewShotClassifier((1, 3, 32, 32), "cpu", SimpleNamespace(learner="head"))


def test_evaluation_makes_the_steps_it_is_asked_for() -> None:
    tasks = tiny_model()._to_device(tiny_batch())
    steps = [
        tiny_model(number_of_evaluation_steps_per_iter=n).adapt(tasks.x_support, tasks.y_support).step for n in (1, 3)
    ]
    assert steps == [0, 2]


def test_multi_step_loss_ends_with_its_last_epoch() -> None:
    on = tiny_model(use_multi_step_loss_optimization=True, multi_step_loss_num_epochs=3)
    off = tiny_model()
    tasks = off._to_device(tiny_batch())
    assert not torch.allclose(on.query_losses(tasks, 2)[0], off.query_losses(tasks, 2)[0])
    torch.testing.assert_close(on.query_losses(tasks, 3)[0], off.query_losses(tasks, 3)[0])


def test_batch_norm_weights_stay_put_if_not_learnable() -> None:
    model = tiny_model(learnable_bn_gamma=False)
    model.run_train_iter(tiny_batch(), 0)
    norm = {name: p for name, p in model.classifier.named_parameters() if "norm_layer" in name}
    assert all((p == 1).all() for name, p in norm.items() if name.endswith("weight"))
    assert all((p != 0).any() for name, p in norm.items() if name.endswith("bias"))


def test_evaluation_works_without_gradients_switched_on() -> None:
    model = tiny_model(contextual_grad=True)
    with torch.no_grad():
        inside, _ = model.run_validation_iter(tiny_batch())
    outside, _ = model.run_validation_iter(tiny_batch())
    assert inside["loss"] == outside["loss"]


def test_second_order_starts_after_the_annealing_epoch() -> None:
    def gradient(epoch: int, **changes: Any) -> Tensor:
        model = tiny_model(**changes)
        model.run_train_iter(tiny_batch(), epoch)
        return next(p.grad for p in model.parameters() if p.grad is not None)

    first, second = gradient(0, second_order=False), gradient(0)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(gradient(1, first_order_to_second_order_epoch=1), first)
    torch.testing.assert_close(gradient(2, first_order_to_second_order_epoch=1), second)


def test_multi_step_loss_moves_to_the_last_step() -> None:
    for steps in (1, 3, 5):
        for epoch in range(20):
            weights = multi_step_importances(steps, epoch, 15)
            assert math.isclose(sum(weights), 1.0) and weights[-1] == max(weights)


def test_learned_rates_work_together_with_contextual_scaling() -> None:
    model = tiny_model(contextual_grad=True, learnable_per_layer_per_step_inner_loop_learning_rate=True)
    model.run_train_iter(tiny_batch(), 0)
    rates = dict(model.named_parameters())["rules.LSLR.rates.layer_dict-linear-weights"]
    assert rates.grad is not None and rates.shape == (3,) and (rates.grad[:2] != 0).all() and rates.grad[2] == 0


def test_zero_biases_do_not_make_contextual_scaling_nan() -> None:
    model = tiny_model(contextual_grad=True, use_bias=True)
    losses, _ = model.run_train_iter(tiny_batch(), 0)
    assert torch.isfinite(losses["loss"])
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = tiny_model(seed=3).state_dict()
    torch.manual_seed(2)
    same, other = tiny_model(seed=3).state_dict(), tiny_model(seed=4).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(
        one["classifier.layer_dict.conv0.conv.weight"], other["classifier.layer_dict.conv0.conv.weight"]
    )


def test_saved_model_goes_on_exactly(tmp_path: Any) -> None:
    model = tiny_model(contextual_grad=True)
    model.run_train_iter(tiny_batch(seed=1), 0)
    model.save_model(tmp_path / "train_model_7", {"note": 3})
    model.run_train_iter(tiny_batch(seed=2), 0)
    other = tiny_model(contextual_grad=True, seed=5)
    state = other.load_model(tmp_path, "train_model", 7)
    assert state["note"] == 3 and other.iterations_done == 1
    other.run_train_iter(tiny_batch(seed=2), 0)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), other.parameters(), strict=True))


def test_checkpoint_of_another_architecture_is_refused(tmp_path: Any) -> None:
    tiny_model().save_model(tmp_path / "m_1", {})
    with pytest.raises(UserError, match=r"m_1 does not fit this model: another architecture.*conv0\.conv\.weight"):
        tiny_model(cnn_num_filters=6).load_model(tmp_path, "m", 1)
    with pytest.raises(UserError, match=r"there is no checkpoint .*m_2; in its folder: m_1"):
        tiny_model().load_model(tmp_path, "m", 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["param_groups"][0].update(betas=(0.9,)), "the optimiser's betas is"),
        (lambda state: state["param_groups"][0].update(amsgrad=True), "the optimiser's amsgrad is True"),
        (lambda state: state["param_groups"][0].update(lr=None), "the optimiser's lr is None"),
        (lambda state: state["param_groups"][0].update(weight_decay="a"), "the optimiser's weight_decay is 'a'"),
        (lambda state: state["param_groups"][0].pop("eps"), "'eps'"),
        (lambda state: state["state"][0].update(exp_avg=torch.zeros(2)), "the optimiser's exp_avg has the shape"),
        (
            lambda state: state["state"][0].update(exp_avg_sq=torch.tensor(1.0)),
            "the optimiser's exp_avg_sq has the shape",
        ),
        (lambda state: state["state"][0].pop("exp_avg_sq"), "'exp_avg_sq'"),
        (
            lambda state: state["state"][0].update(exp_avg=torch.zeros(4, 3, 3, 3, device="meta")),
            "Cannot copy out of meta",
        ),
        (lambda state: state["state"].update({99: state["state"][0]}), "has no attribute 'shape'"),
    ],
)
def test_an_optimiser_that_would_fail_in_its_next_step_is_refused(
    change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    model = tiny_model()
    model.run_train_iter(tiny_batch(), 0)
    state = {**model.weights(), "optimizer": copy.deepcopy(model.optimizer.state_dict())}
    model.load_state(state, tmp_path / "latest")
    change(state["optimizer"])
    with pytest.raises(UserError, match=f"latest does not fit this model: .*{message}"):
        model.load_state(state, tmp_path / "latest")
    model.run_train_iter(tiny_batch(), 0)


@pytest.mark.parametrize("groups", [3, [3], [{}], [{"params": 3}]])
def test_an_optimiser_of_another_kind_is_refused_and_changes_nothing(groups: Any, tmp_path: Path) -> None:
    model = tiny_model()
    before = model.state_dict()
    state = {**tiny_model(seed=9).weights(), "optimizer": {"state": {}, "param_groups": groups}}
    with pytest.raises(UserError, match="latest does not fit this model"):
        model.load_state(state, tmp_path / "latest")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.run_train_iter(tiny_batch(), 0)


def test_missing_attributes_take_the_defaults() -> None:
    model = MAMLFewShotClassifier((1, 3, 84, 84), "cpu", object())
    assert model.options == Options()
    assert model.classifier.layer_dict["linear"].weights.shape == (5, 48 * 5 * 5)


def test_batches_that_do_not_fit_are_refused() -> None:
    support, query, *labels = tiny_batch()
    with pytest.raises(UserError, match=r"\(2, 2, 2, 3, 8, 8\) does not fit a model of 3 ways"):
        tiny_model().run_validation_iter((support[:, :2], query[:, :2], *labels))
    with pytest.raises(UserError, match=r"images of \(3, 8, 8\)"):
        tiny_model().run_validation_iter((support[..., :7], query, *labels))


def test_too_small_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"images of 8x8 are too small for 4 stages: use larger images or fewer stages"):
        tiny_model(num_stages=4)


@pytest.mark.parametrize(
    "changes",
    [{"dilation": 2}, {"groups": 2}, {"stride": (1, 2)}, {"padding": (1, 0)}, {"padding": "same"},
     {"padding": 1, "padding_mode": "reflect"}],
)  # fmt: skip
def test_a_convolution_that_the_inner_loop_would_compute_in_another_way_is_refused(changes: dict[str, Any]) -> None:
    TaskConv2d(2, 4, 3, stride=2, padding=1)
    with pytest.raises(ValueError, match="neither dilation nor groups"):
        TaskConv2d(2, 4, 3, **changes)


@pytest.mark.parametrize(("pooling", "padding"), [(True, False), (False, True), (False, False)])
def test_network_variants_equal_plain_layers(pooling: bool, padding: bool) -> None:
    model = tiny_model(max_pooling=pooling, conv_padding=padding, num_stages=1 if pooling else 2)
    p = dict(model.classifier.named_parameters())
    images = tiny_batch()[0].flatten(1, 2)
    x = images[0]
    for i in range(model.options.num_stages):
        x = F.conv2d(x, p[f"layer_dict.conv{i}.conv.weight"], stride=1 if pooling else 2, padding=int(padding))
        x = F.leaky_relu(F.batch_norm(x, None, None, training=True), 0.01)
        x = F.max_pool2d(x, 2) if pooling else x
    x = x.flatten(1) if pooling else x.mean((2, 3))
    expected = F.linear(x, p["layer_dict.linear.weights"], p["layer_dict.linear.bias"])
    forward = model._forward(model.task_parameters(2), evaluation=False)
    torch.testing.assert_close(forward({}, images, 0, None)[0], expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"contextual_grad": True},
        {"contextual_grad": True, "second_order": False},
        {"alfa": True, "attenuate": True},
        {"meta_sgd": True, "backbone": "ResNet-12", "resnet_widths": "3-4"},
        {"per_step_bn_statistics": True, "learnable_per_layer_per_step_inner_loop_learning_rate": True},
    ],
)
def test_checkpointed_inner_steps_give_the_same_gradients_and_statistics(changes: dict[str, Any]) -> None:
    found = []
    for checkpointed in (False, True):
        model = tiny_model(checkpoint_inner_steps=checkpointed, **changes)
        model.run_train_iter(tiny_batch(), 0)
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found.append({**gradients, **dict(model.named_buffers())})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-12, atol=1e-15, msg=name)


def test_meta_sgd_learns_a_rate_per_weight_by_its_formula() -> None:
    model = tiny_model(meta_sgd=True, number_of_training_steps_per_iter=1)
    tasks = model._to_device(tiny_batch())
    (state,) = model.inner_loop(tasks.x_support, tasks.y_support, 1, SECOND_ORDER)
    logits = model._query_logits(state, tasks.x_query, None)
    rates = dict(model.rules["MetaSGD"].named_parameters())
    found = torch.autograd.grad(cross_entropy(logits, tasks.y_query).sum(), list(rates.values()), retain_graph=True)
    for (name, rate), gradient in zip(rates.items(), found, strict=True):
        weight = name.removeprefix("rates.").replace("-", ".")
        assert rate.shape == model.classifier.get_parameter(weight).shape
        before, after = state.used[weight], state.weights[weight]
        inner = (before - after) / rate  # of each task: the update is rate * inner gradient
        outer = torch.autograd.grad(cross_entropy(logits, tasks.y_query).sum(), after, retain_graph=True)[0]
        torch.testing.assert_close(gradient, -(outer * inner).sum(0), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("part", "moves"), [("head", "linear"), ("body", "conv")])
def test_anil_moves_the_head_and_boil_the_body(part: str, moves: str) -> None:
    model = tiny_model(inner_loop_part=part)
    tasks = model._to_device(tiny_batch())
    state = model.adapt(tasks.x_support, tasks.y_support)
    assert state.weights and all(moves in name for name in state.weights)
    model.run_train_iter(tiny_batch(), 0)
    assert all(p.grad is not None and (p.grad != 0).any() for p in model.parameters())


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ({"alfa": True, "meta_sgd": True}, "each set the inner learning rate"),
        ({"random_init": True}, "needs --alfa true"),
        ({"contextual_grad": True, "inner_loop_part": "head"}, "ANIL"),
        ({"contextual_grad": True, "attenuate": True}, "undoes what --attenuate"),
        ({"alfa": True, "random_init": True, "inner_loop_part": "body"}, "never moves it"),
        ({"alfa": True, "random_init": True, "inner_loop_part": "head"}, "never moves it"),
        ({"alfa": True, "contextual_grad": True, "use_bias": True}, "--use_bias false"),
        ({"alfa": True, "number_of_evaluation_steps_per_iter": 3}, "has none for the extra steps"),
        ({"batch_norm": "per_step"}, "--per_step_bn_statistics true"),
        ({"batch_norm": "running", "per_step_bn_statistics": True}, "choose --batch_norm per_step"),
        ({"backbone": "ResNet-12", "resnet_widths": "64,128"}, "64-128-256-512"),
    ],
)
def test_rules_that_make_no_sense_together_are_refused(rules: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        tiny_model(**rules)


@pytest.mark.parametrize(
    "rules",
    [
        {"learnable_per_layer_per_step_inner_loop_learning_rate": True},
        {"meta_sgd": True},
        {"alfa": True},
        {"alfa": True, "random_init": True},
        {"inner_loop_part": "body"},
        {"per_step_bn_statistics": True, "batch_norm": "per_step"},
        {"batch_norm": "running"},
        {"backbone": "ResNet-12", "resnet_widths": "3-4"},
        {"enable_inner_loop_optimizable_bn_params": True},
    ],
)
def test_contextual_scaling_goes_together_with(rules: dict[str, Any]) -> None:
    model = tiny_model(contextual_grad=True, **rules)
    model.run_train_iter(tiny_batch(), 0)
    trained = model.trained_parameters()
    assert any(name.startswith("rules.CxGrad.generator") for name in trained)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained.values())
    losses, _ = model.run_validation_iter(tiny_batch())
    assert torch.isfinite(losses["loss"])


def test_every_learned_rate_is_trained() -> None:
    for rule in ("meta_sgd", "alfa", "learnable_per_layer_per_step_inner_loop_learning_rate"):
        changes: dict[str, Any] = {rule: True}
        model = tiny_model(**changes)
        before = copy.deepcopy(model.rules.state_dict())
        model.run_train_iter(tiny_batch(), 0)
        for name, rate in model.rules.state_dict().items():
            without_effect = name.endswith("conv-bias")  # in front of batch norm
            assert without_effect or not torch.equal(rate, before[name]), name


def test_a_random_initialisation_is_not_trained() -> None:
    model = tiny_model(alfa=True, random_init=True)
    before = copy.deepcopy(model.state_dict())
    model.run_train_iter(tiny_batch(), 0)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and not any(name.startswith("classifier") for name in changed)


@pytest.mark.parametrize(
    ("changes", "inductive"),
    [
        ({}, False),
        ({"per_step_bn_statistics": True, "batch_norm": "per_step"}, True),
        ({"batch_norm": "running"}, True),
    ],
)
def test_only_transductive_batch_norm_lets_queries_influence_each_other(
    changes: dict[str, Any], inductive: bool
) -> None:
    model = tiny_model(**changes)
    model.run_train_iter(tiny_batch(), 0)
    tasks = model._to_device(tiny_batch())
    state = model.adapt(tasks.x_support, tasks.y_support)
    together, alone = model.predict(state, tasks.x_query), model.predict(state, tasks.x_query[:, :1])
    assert torch.allclose(together[:, :1], alone) is inductive
    others = torch.cat([tasks.x_support[:, :1], 1 - tasks.x_support[:, 1:]], 1)
    (first, *_), (second, *_) = (list(model.inner_loop(x, tasks.y_support, 2, 0)) for x in (tasks.x_support, others))
    assert torch.allclose(first.support_logits[:, :1], second.support_logits[:, :1]) is inductive


def test_running_statistics_are_those_of_the_training_passes() -> None:
    model = tiny_model(batch_norm="running", batch_size=1, number_of_training_steps_per_iter=1)
    batch = tiny_batch(tasks=1)
    tasks = model._to_device(batch)
    convolved = [
        F.conv2d(x[0], model.classifier.get_parameter("layer_dict.conv0.conv.weight"), padding=1)
        for x in (tasks.x_support,)
    ]
    model.query_losses(tasks, 0)
    first = 0.1 * convolved[0].mean((0, 2, 3))
    seen = model.classifier.get_buffer("layer_dict.conv0.norm_layer.running_mean")
    assert not torch.allclose(seen, first)  # the query pass counts too, with the adapted weights
    *_, state = model.inner_loop(tasks.x_support, tasks.y_support, 1, SECOND_ORDER)
    adapted = state.weights["layer_dict.conv0.conv.weight"][0]
    second = F.conv2d(tasks.x_query[0], adapted, padding=1).mean((0, 2, 3))
    torch.testing.assert_close(seen, 0.9 * first + 0.1 * second)


def test_outer_gradients_can_be_clamped() -> None:
    model = tiny_model(clamp_outer_gradients=1e-3, learnable_per_layer_per_step_inner_loop_learning_rate=True)
    model.run_train_iter(tiny_batch(), 0)
    gradients = {n: p.grad.abs().max() for n, p in model.named_parameters() if p.grad is not None}
    assert max(g for n, g in gradients.items() if n.startswith("classifier")) <= 1e-3
    assert max(g for n, g in gradients.items() if not n.startswith("classifier")) > 1e-3


def test_resnet12_has_the_published_widths_and_equals_plain_layers() -> None:
    widths = ResNet12((3, 32, 32), 5, (64, 128, 256, 512)).state_dict()
    assert widths["layer_dict.layer4.conv3.weight"].shape == (512, 512, 3, 3)
    net = ResNet12((3, 8, 8), 5, (3, 4)).double()
    x = torch.rand(6, 3, 8, 8, dtype=torch.float64)
    p = dict(net.named_parameters())

    def layer(name: str, x: Tensor) -> Tensor:
        weight = p[f"layer_dict.{name}.weight"]
        return F.batch_norm(F.conv2d(x, weight, padding=weight.shape[2] // 2), None, None, training=True)

    y = x
    for block in ("layer1", "layer2"):
        inner = F.leaky_relu(layer(f"{block}.conv1", y), 0.1)
        inner = layer(f"{block}.conv3", F.leaky_relu(layer(f"{block}.conv2", inner), 0.1))
        y = F.max_pool2d(F.leaky_relu(inner + layer(f"{block}.downsample.0", y), 0.1), 2)
    expected = F.linear(y.mean((2, 3)), p["layer_dict.linear.weights"], p["layer_dict.linear.bias"])
    found = functional_call(net, seen_by_tasks(net, 2, buffers=False), (torch.stack([x, x]), Pass()))
    torch.testing.assert_close(found, torch.stack([expected, expected]))


# --- graphs in evaluation ------------------------------------------------------------------------------------------


class Held:
    """A tensor that some graph holds for its backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()  # with its history, an output that its own node holds would never be freed


@pytest.mark.parametrize(
    "method",
    [
        {"contextual_grad": True},
        {"alfa": True, "attenuate": True},
        {"meta_sgd": True},
        {"inner_loop_part": "head"},
        {"backbone": "ResNet-12", "resnet_widths": "4-5-6-7", "contextual_grad": True},
    ],
)
def test_adapting_for_evaluation_leaves_no_graph(method: dict[str, Any]) -> None:
    steps = {"number_of_training_steps_per_iter": 2, "number_of_evaluation_steps_per_iter": 2}
    small = {"image_height": 28, "image_width": 28, "cnn_num_filters": 4}
    model = MAMLFewShotClassifier((2, 3, 28, 28), "cpu", Options.from_mapping({**steps, **small, **method}))
    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def hold(tensor: Tensor) -> Held:
        held.add(one := Held(tensor))
        return one

    with torch.autograd.graph.saved_tensors_hooks(hold, lambda one: one.tensor):
        state = model.adapt(torch.rand(1, 5, 3, 28, 28), torch.arange(5)[None])
    gc.collect()
    assert not list(held)
    of_rules = [tensor for rule in state.states.values() for tensor in rule.values()]
    kept = [*state.weights.values(), *state.used.values(), *of_rules, state.support_logits, state.support_losses]
    assert all(tensor.grad_fn is None for tensor in kept)


def test_evaluation_builds_the_graph_of_what_moves_only() -> None:
    """ANIL moves the classifier, so that the body is not recorded."""
    small = {"image_height": 28, "image_width": 28, "cnn_num_filters": 4, "inner_loop_part": "head"}
    model = MAMLFewShotClassifier((2, 3, 28, 28), "cpu", Options.from_mapping(small))
    shapes: set[torch.Size] = set()

    def note(tensor: Tensor) -> Tensor:
        shapes.add(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.adapt(torch.rand(1, 5, 3, 28, 28), torch.arange(5)[None])
    assert shapes and max(shape.numel() for shape in shapes) <= 25, "more than features and logits is held"
