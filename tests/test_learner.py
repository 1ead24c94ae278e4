"""What every learner sees to by itself, however it is made."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import few_shot_learning_system
import learner
from experiment_builder import iterations_between_readings
from few_shot_learning_system import SECOND_ORDER, MAMLFewShotClassifier, Plan
from learner import Form
from tests.test_few_shot_learning_system import tiny_batch, tiny_model
from utils import devices, measurement


def test_a_gradient_learner_on_a_gpu_computes_in_full_float32() -> None:
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for tf32 in (True, False):
            devices.prepare_device(torch.device("cuda"), tf32)
            assert [backend.allow_tf32 for backend in backends] == [tf32, tf32]
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def test_a_learner_prepares_its_device_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[tuple[str, bool, bool]] = []
    monkeypatch.setattr(learner, "prepare_device", lambda device, *settings: prepared.append((device.type, *settings)))
    tiny_model()
    tiny_model(deterministic=True)
    assert prepared == [("cpu", False, False), ("cpu", False, True)]


# --- the form of a pass, chosen by measurement ---------------------------------------------------------------------


def measured(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> list[int]:
    """Have an iteration with so many tasks per pass take so long; return the list of those that are computed."""
    now, computed = [0.0], list[int]()
    meta_gradients = MAMLFewShotClassifier._meta_gradients

    def timed(self: MAMLFewShotClassifier, plan: Plan, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        computed.append(plan.tasks_per_pass)
        if seconds[plan.tasks_per_pass] == math.inf:
            raise torch.OutOfMemoryError("full")
        now[0] += seconds[plan.tasks_per_pass]
        return meta_gradients(self, plan, *inputs)

    monkeypatch.setattr(measurement.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(MAMLFewShotClassifier, "_meta_gradients", timed)
    return computed


def four_tasks() -> tuple[Tensor, ...]:
    return tiny_batch(tasks=4)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [({1: 1, 2: 0.8, 4: 0.5}, 4), ({1: 1, 2: 0.8, 4: math.inf}, 2), ({1: 1, 2: 0.95, 4: 3}, 1), ({1: 0.09}, None)],
)
def test_the_fastest_number_of_tasks_per_pass_is_used_and_nothing_else_changes(
    seconds: dict[int, float], chosen: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(per_step_bn_statistics=True, first_order_to_second_order_epoch=3, total_epochs=5)
    model.run_train_iter(four_tasks(), 0)
    before, random_state = copy.deepcopy((model.state_dict(), model.optimizer.state_dict())), torch.get_rng_state()
    computed = measured(monkeypatch, seconds)
    assert model.choose_form(four_tasks) == (chosen is not None)
    torch.testing.assert_close((model.state_dict(), model.optimizer.state_dict()), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state) and all(p.grad is None for p in model.parameters())
    computed.clear()
    model.run_train_iter(four_tasks(), 0)
    assert computed == [chosen or 1] and (model.form is None) == (chosen is None)


def test_the_measurement_is_of_the_epoch_that_takes_most_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    monkeypatch.setattr(MAMLFewShotClassifier, "_meta_gradients", lambda self, plan, *_: plans.append(plan[:2]))
    multi_step: dict[str, Any] = {"use_multi_step_loss_optimization": True, "multi_step_loss_num_epochs": 4}
    tiny_model(first_order_to_second_order_epoch=2, total_epochs=9, **multi_step).choose_form(four_tasks)
    assert set(plans) == {(SECOND_ORDER, (True, True))}


@pytest.mark.parametrize("changes", [{"tasks_per_pass": 2}, {"deterministic": True}, {"dry_run": True}])
def test_nothing_is_measured_where_the_form_is_fixed(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner, "prepare_device", lambda *_: None)
    model, computed = tiny_model(**changes), measured(monkeypatch, {1: 1, 2: 0.1, 4: 0.1})
    assert not model.choose_form(four_tasks) and not tiny_model().choose_form(lambda: tiny_batch(tasks=1))
    assert not computed and model.form is None


def test_a_form_that_a_cpu_has_no_memory_for_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    computed, model = measured(monkeypatch, {1: 1, 2: 0.8, 4: 0.5}), tiny_model()
    monkeypatch.setattr(few_shot_learning_system, "peak_memory_gib", lambda _: 3.0 * max(computed, default=0))
    monkeypatch.setattr(few_shot_learning_system, "host_memory_gib", lambda: 16.0)
    assert model.choose_form(four_tasks) and model.form == (2, False)
    assert set(computed) == {1, 2}


def test_a_resumed_run_keeps_the_form_that_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed, model = measured(monkeypatch, {1: 1, 2: 0.8, 4: 0.5}), tiny_model()
    model.choose_form(four_tasks)
    model.save_model(tmp_path / "run_latest", {})
    for option, tasks_per_pass in ((None, 4), (2, 2)):
        resumed = tiny_model(tasks_per_pass=option)
        resumed.load_model(tmp_path, "run", "latest")
        computed.clear()
        assert not resumed.choose_form(four_tasks) and not computed
        resumed.run_train_iter(four_tasks(), 0)
        assert computed == [tasks_per_pass]


def test_a_form_that_was_measured_on_another_kind_of_device_is_not_kept(tmp_path: Path) -> None:
    """A CPU's, which is never captured, would keep a GPU at one task per pass without a word."""
    model = tiny_model()
    model.form = Form(2, captured=False)
    model.save_model(tmp_path / "run_latest", {})
    resumed = tiny_model()
    state = resumed.load_model(tmp_path, "run", "latest")
    assert resumed.form == model.form
    resumed.load_state({**state, "device": "cuda"}, tmp_path)
    assert resumed.form is None


@pytest.mark.parametrize(("seconds", "iterations"), [(200.0, 1), (4.0, 1), (0.3, 3), (0.001, 50), (0.0, 50)])
def test_metrics_and_stop_requests_are_read_about_once_a_second(seconds: float, iterations: int) -> None:
    assert iterations_between_readings(seconds) == iterations
