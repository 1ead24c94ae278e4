"""What every learner sees to by itself, however it is made."""

from typing import Any

import pytest
import torch

import learner
from experiment_builder import iterations_between_readings
from tests.test_few_shot_learning_system import tiny_model
from utils import devices


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
    prepared: list[tuple[str, bool]] = []
    monkeypatch.setattr(learner, "prepare_device", lambda device, tf32: prepared.append((device.type, tf32)))
    tiny_model()
    assert prepared == [("cpu", False)]


@pytest.mark.parametrize(("seconds", "iterations"), [(200.0, 1), (4.0, 1), (0.3, 3), (0.001, 50), (0.0, 50)])
def test_metrics_and_stop_requests_are_read_about_once_a_second(seconds: float, iterations: int) -> None:
    assert iterations_between_readings(seconds) == iterations
