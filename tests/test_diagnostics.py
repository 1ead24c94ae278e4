"""What is measured inside a task is what it is called, and measuring changes nothing."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from data import Episodes
from few_shot_learning_system import EVALUATION, MAMLFewShotClassifier
from head_learning_system import HeadFewShotClassifier
from tests.test_few_shot_learning_system import tiny_batch, tiny_model
from utils.diagnostics import TASKS, diagnose, layer, write_diagnostics
from utils.errors import UserError
from utils.options import Options
from utils.records import read_diagnostics


def fixed(batch: Any) -> Episodes:
    """A sequence of tasks that begins with those of a batch."""
    return cast(Episodes, SimpleNamespace(batch=lambda first, tasks: batch))


@pytest.fixture
def cxgrad() -> MAMLFewShotClassifier:
    return tiny_model(contextual_grad=True, num_context_params=3, number_of_evaluation_steps_per_iter=2)


def test_gamma_and_the_norms_of_both_kinds_are_those_of_the_inner_loop(cxgrad: MAMLFewShotClassifier) -> None:
    batch = tiny_batch()
    series = diagnose(cxgrad, fixed(batch), 1)["series"]
    tasks = cxgrad._to_device(batch)
    steps = list(cxgrad.inner_loop(tasks.x_support, tasks.y_support, 2, EVALUATION))
    name = next(name for name in steps[0].used if "conv0" in name and name.endswith("weight"))
    for kind, tensors in (("gamma", [s.used for s in steps]), ("gradient_norm", [s.gradients for s in steps])):
        norms = torch.stack([tensor[name].flatten(1).norm(dim=1) for tensor in tensors])  # (steps, tasks)
        assert series[f"{kind}/conv0"]["mean"] == pytest.approx(norms.mean(1).tolist(), rel=1e-4)
        assert series[f"{kind}/conv0"]["std"] == pytest.approx(norms.std(1).tolist(), rel=1e-3)
    # Behind batch norm the gradient grows as 1/norm: in the first step both kinds differ by just that.
    raw = cxgrad.classifier.get_parameter(name).norm().item()
    ratio = series["gamma/conv0"]["mean"][0] / raw
    before, after = (series[f"{kind}/conv0"]["mean"][0] for kind in ("gradient_norm_unscaled", "gradient_norm"))
    assert before == pytest.approx(after * ratio, rel=0.05) and ratio != pytest.approx(1, abs=0.1)


def test_accuracy_is_that_of_the_queries_after_each_step(cxgrad: MAMLFewShotClassifier) -> None:
    batch = tiny_batch()
    means = diagnose(cxgrad, fixed(batch), 1)["series"]["accuracy"]["mean"]
    report, _ = cxgrad.run_validation_iter(batch)
    assert len(means) == 2 and means[-1] == pytest.approx(report["accuracy"].item(), rel=1e-4)


def test_a_method_without_scaling_has_one_kind_of_norms() -> None:
    series = diagnose(tiny_model(), fixed(tiny_batch()), 1)["series"]
    kinds = {name.partition("/")[0] for name in series}
    assert kinds == {"accuracy", "gradient_norm"}


def test_training_after_a_look_goes_on_as_without(cxgrad: MAMLFewShotClassifier) -> None:
    other = tiny_model(contextual_grad=True, num_context_params=3, number_of_evaluation_steps_per_iter=2)
    before = torch.random.get_rng_state()
    diagnose(cxgrad, fixed(tiny_batch()), 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    for model in (cxgrad, other):
        model.run_train_iter(tiny_batch(), 0)
    assert [*cxgrad.rules] == [*other.rules] == ["CxGrad", "GradientDescent"]
    states = cxgrad.state_dict(), other.state_dict()
    assert [*states[0]] == [*states[1]]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_a_head_tells_its_residual_and_dropblock_and_counts_no_pass_for_it() -> None:
    sizes = {"image_height": 32, "image_width": 32, "num_classes_per_set": 2, "num_target_samples": 2}
    options = {"learner": "head", "head": "SVM", "dataset_name": "CIFAR_FS", "resnet_widths": "2-3-4-5", **sizes}
    options |= {"backbone": "ResNet-12", "lr_schedule": "steps"}
    model = HeadFewShotClassifier((2, 3, 32, 32), "cpu", Options.from_mapping(options))
    images = torch.rand(2, 2, 3, 3, 32, 32)
    labels = torch.arange(2)[:, None].expand(2, 2, 3)
    counters = [buffer for name, buffer in model.named_buffers() if name.endswith("forwards")]
    assert counters
    for counter in counters:
        counter.fill_(20_000)
    record = diagnose(model, fixed((images[:, :, :1], images[:, :, 1:], labels[:, :, :1], labels[:, :, 1:])), 4)
    assert record["dropblock_keep"] == pytest.approx(0.95)
    assert 0 <= record["series"]["residual"]["mean"][0] < 1e-6
    assert [counter.item() for counter in counters] == [20_000] * len(counters)


def test_records_are_added_and_those_of_a_dropped_branch_go(tmp_path: Path) -> None:
    for epoch in (1, 2, 3, 2):
        write_diagnostics(tmp_path, {"epoch": epoch, "iterations": 5, "tasks": 2, "series": {}})
    assert [record["epoch"] for record in read_diagnostics(tmp_path)] == [1, 2]
    lines = (tmp_path / "logs" / "diagnostics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
    (tmp_path / "logs" / "diagnostics.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"diagnostics\.jsonl"):
        write_diagnostics(tmp_path, {"epoch": 3, "iterations": 5, "tasks": 2, "series": {}})


@pytest.mark.parametrize(("validated_on", "looked_at"), [(600, TASKS), (2, 2)])
def test_the_first_tasks_are_looked_at(validated_on: int, looked_at: int) -> None:
    asked = []

    def batch(first: int, tasks: int) -> Any:
        asked.append((first, tasks))
        return tiny_batch()

    model = tiny_model(num_evaluation_tasks=validated_on)
    record = diagnose(model, cast(Episodes, SimpleNamespace(batch=batch)), 3)
    assert asked == [(0, looked_at)] and (record["epoch"], record["tasks"]) == (3, looked_at)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("layer_dict.conv0.conv.weight", "conv0"),
        ("layer_dict.linear.weights", "linear"),
        ("layer_dict.layer1.conv2.weight", "layer1.conv2"),
    ],
)
def test_layers_have_short_names(name: str, short: str) -> None:
    assert layer(name) == short
