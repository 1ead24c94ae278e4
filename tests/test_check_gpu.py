"""`make check-gpu` on a CPU: every section is there, a defect fails, and what raises an exception is a line."""

import faulthandler
import json
import logging
import subprocess
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

import few_shot_learning_system
import meta_neural_network_architectures as networks
from benchmarks import cases, check_gpu
from inner_loop_optimizers import RULES, chosen_rules
from tests.forked import fork_workers, run_forked
from tests.stand_in_cuda import stand_in_cuda
from utils.options import Options

CPU = torch.device("cpu")


def lines_of(folder: Path, *words: str) -> dict[str, dict[str, dict[str, Any]]]:
    """Run on the CPU and return section -> check -> line."""
    check_gpu.main(["--gpu", "cpu", "--results", str(folder), *words])
    return recorded(folder)


def recorded(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    sections = json.loads((folder / "check_gpu_cpu.json").read_text())["tables"]
    return {section: {line["check"]: line for line in lines} for section, lines in sections.items()}


@pytest.mark.usefixtures("no_coverage")
def test_a_cpu_passes_and_every_section_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = cases.head_options

    def small(device: torch.device, head: str, backbone: str = "conv64", **extra: Any) -> Options:
        size = {"image_height": 16, "image_width": 16} if backbone == "conv64" else {}
        return plain(device, head, backbone, **size, **extra)

    with (
        mock.patch.object(check_gpu, "REPEATED", 1),
        mock.patch.object(cases, "head_options", small),
        mock.patch.object(subprocess, "run", run_forked),
        mock.patch.object(faulthandler, "dump_traceback_later"),  # a fork would wait for its thread
        mock.patch.object(subprocess_handler, "Popen", subprocess_handler.Popen),  # restored at the end
    ):
        fork_workers()
        sections = lines_of(tmp_path)
    assert list(sections) == list(check_gpu.SECTIONS) and all(sections.values())
    printed = capsys.readouterr().out
    for section, lines in sections.items():
        for name, line in lines.items():
            assert f"{section:11} {name}" in printed
            assert line["verdict"] in ("ok", "measured", "not available"), line
    assert {line["verdict"] for line in sections["parity"].values()} == {"ok"}
    assert all(line["ms"] > 0 for line in sections["times"].values())
    assert sections["processes"]["CxGrad, gradient of two processes"]["verdict"] == "ok"
    assert len(sections["kernels"]) == 21


def test_every_rule_is_checked() -> None:
    chosen = {rule for extra in cases.METHODS.values() for rule in chosen_rules(cases.gradient_options(CPU, **extra))}
    assert RULES and {*RULES.values()} <= chosen


def test_a_wrong_operation_fails_parity(tmp_path: Path) -> None:
    plain: Any = networks.conv_norm_activate

    def wrong(*given: Any) -> Tensor:
        return plain(*given) * (1 + 1e-4)

    few = {name: cases.METHODS[name] for name in ("CxGrad", "MAML++")}
    with (
        mock.patch.object(cases, "METHODS", few),
        mock.patch.object(cases, "HEADS", ["Ridge"]),
        mock.patch.object(networks, "conv_norm_activate", wrong),
        pytest.raises(SystemExit) as ended,
    ):
        lines_of(tmp_path, "--only", "parity")
    assert ended.value.code == 1
    verdicts = {name: line["verdict"] for name, line in recorded(tmp_path)["parity"].items()}
    assert verdicts.pop("CxGrad") == verdicts.pop("MAML++") == "FAILED"
    assert set(verdicts.values()) == {"ok"}  # heads embed with other operations


def test_runs_that_differ_fail() -> None:
    plain: Any = few_shot_learning_system.cross_entropy
    calls = count()

    def wrong(*given: Tensor) -> Tensor:
        return plain(*given) * (1 + next(calls) / 10**6)

    options = partial(cases.gradient_options, CPU, **cases.METHODS["CxGrad"])
    with mock.patch.object(few_shot_learning_system, "cross_entropy", wrong):
        assert check_gpu.same_bits(CPU, options, False).verdict == "FAILED"


def test_an_exception_is_a_line_and_the_rest_goes_on(tmp_path: Path) -> None:
    plain = check_gpu.head_time

    def broken(device: torch.device, head: str, *more: Any) -> check_gpu.Outcome:
        if head == "SVM-CS":
            raise RuntimeError("no such kernel\nsomewhere in C++")
        return plain(device, head, *more)

    with mock.patch.object(check_gpu, "head_time", broken), pytest.raises(SystemExit) as ended:
        lines_of(tmp_path, "--only", "head_times", "precision")
    assert ended.value.code == 1
    lines = recorded(tmp_path)
    assert lines["head_times"]["ResNet-12, SVM-CS, bf16, NHWC"]["note"] == "RuntimeError: no such kernel"
    assert lines["head_times"]["ResNet-12, Ridge, bf16, NHWC"]["verdict"] == "measured"
    assert lines["precision"]


def test_what_the_time_is_too_short_for_is_said(tmp_path: Path) -> None:
    work = mock.Mock()
    assert check_gpu.outcome_of(work, deadline=0).verdict == "left out"
    work.assert_not_called()


@pytest.mark.usefixtures("no_coverage")
@pytest.mark.parametrize("waits", [False, True])
def test_a_wait_of_the_host_is_noticed(waits: bool) -> None:
    """On stand-in tensors, with their own way of noticing."""
    plain: Any = few_shot_learning_system.cross_entropy

    def copying(*given: Tensor) -> Tensor:
        plain(*given).detach().cpu()
        return plain(*given)

    with stand_in_cuda() as mode:
        device = torch.device("cuda", 0)
        options = cases.gradient_options(CPU, contextual_grad=True)

        def forbid(debug_mode: str) -> None:
            mode.forbid = debug_mode == "error"

        with (
            mock.patch.object(torch.cuda, "set_sync_debug_mode", forbid),
            mock.patch.multiple(check_gpu, WARM_UP=1, REPEATED=1),
            mock.patch.object(few_shot_learning_system, "cross_entropy", copying if waits else plain),
        ):
            outcome = check_gpu.outcome_of(
                lambda: check_gpu.never_waits(device, lambda: options), deadline=float("inf")
            )
            mode.forbid = False
    assert (outcome.verdict == "FAILED") == waits, outcome
    assert ("HostWaits" in outcome.note) == waits


@pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")
@pytest.mark.usefixtures("no_coverage")
def test_what_only_a_gpu_runs_is_run_on_stand_in_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_gpu, "WARM_UP", 0)
    monkeypatch.setattr(check_gpu, "REPEATED", 1)
    monkeypatch.setitem(cases.CXGRAD_84, "number_of_training_steps_per_iter", 1)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda _: None)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda _: 2**31)
    gpu, shape = torch.device("cuda", 0), {"num_samples_per_class": 5, "batch_size": 2, "tasks_per_pass": 2}
    with stand_in_cuda():
        found = [
            check_gpu.iteration_time(gpu, shape, captured=False, ours=True, benchmark=True),
            check_gpu.iteration_time(gpu, shape, captured=False, ours=False, benchmark=False),
            check_gpu.head_time(gpu, "Ridge", "bf16", torch.channels_last),
        ]
    assert all(outcome.verdict == "measured" and outcome.figures["GiB held"] == 2 for outcome in found), found
    assert len(dict(check_gpu.times(gpu))) == 32 and len(dict(check_gpu.head_times(gpu))) == 12


def test_a_variant_that_does_not_fit_in_memory_is_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(few_shot_learning_system.MAMLFewShotClassifier, "run_train_iter", full)
    (_, work), *_ = check_gpu.times(CPU)
    assert check_gpu.outcome_of(work, float("inf")).verdict == "not available"


def test_a_killed_run_leaves_the_sections_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(where: torch.device) -> check_gpu.Checks:
        yield "the first check", mock.Mock(side_effect=KeyboardInterrupt)

    monkeypatch.setattr(check_gpu, "SECTIONS", {"environment": check_gpu.environment, "parity": killed})
    with pytest.raises(KeyboardInterrupt):
        lines_of(tmp_path, "--only", "environment", "parity")
    assert list(recorded(tmp_path)) == ["environment"]


@pytest.mark.parametrize(("captured", "verdict"), [(True, "FAILED"), (False, "measured")])
def test_a_graph_that_is_not_captured_is_a_failure(
    captured: bool, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any) -> check_gpu.Figures:
        logging.getLogger("learner").warning("no CUDA graph: %s; going on without", "the reason")
        return {"ms": 1.0}

    monkeypatch.setattr(check_gpu, "milliseconds", refused)
    monkeypatch.setattr(
        check_gpu, "gradient_options", lambda where, cuda_graph, **more: cases.gradient_options(where, **more)
    )
    outcome = check_gpu.iteration_time(CPU, {"batch_size": 2}, captured, ours=True, benchmark=False)
    assert outcome == (verdict, {"ms": 1.0}, "no CUDA graph: the reason; going on without")
