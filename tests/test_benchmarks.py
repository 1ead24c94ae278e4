"""The benchmarks run, count exactly, refuse a wrong competitor, and turn a failure into a line of the table."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import common, iteration, peers
from benchmarks.explain import Call, Counting, Limits, counting, floors
from benchmarks.peers import INNER_RATE, OUTER_RATE, STEPS, Batch, Step, moved, task_by_task
from captured_gradients import WARM_UP
from tests.forked import ON_GPU, Command, run_forked
from tests.stand_in_cuda import stand_in_cuda
from utils.synthetic import write_dataset

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--size", "16", "--filters", "4", "--targets", "2", "--shots", "1"]
SCRIPTS = {
    "iteration": [*TINY, "--rounds", "1", "--methods", "MAML", "--peers"],
    "evaluation": [*TINY, "--rounds", "1", "--methods", "CxGrad"],
    "explain": [*TINY, "--methods", "MAML", "--shots", "5"],
    "head_training": ["--networks", "conv64", "--heads", "Ridge", "--sizes", "32", "--rounds", "1"],
    "svm_head": ["--shots", "1", "--dims", "16", "--rounds", "1"],
    "augmentation": ["--sizes", "32", "--rounds", "1"],
    "memory": ["--size", "16", "--widths", "2-3-4-5"],
    "data": ["--images", "21", "--episodes", "1", "--archives", "none"],
    "methods": ["--methods", "ANIL", "--seeds", "0", "1", "--iterations", "3", "--tasks", "2", "--jobs", "1"],
}


def fork_scripts(
    printer: Path, command: Sequence[str], env: Mapping[str, str] | None = None, **_: object
) -> "subprocess.CompletedProcess[str]":
    """Do what `subprocess.run` does with a script of the project or of the shell, without new interpreters."""
    if command[0] == "bash":
        words = run_forked(command, env={**(env or {}), "PYTHON": str(printer)}).stdout.splitlines()
        command = [sys.executable, *words]
    return run_forked(command, env=env, anew=False)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_benchmark_writes_a_record_without_a_failure(script: str, printer: Path, tmp_path: Path) -> None:
    extra = ["--experiments_dir", str(tmp_path / "experiments")] if script == "methods" else []
    if script == "methods":  # its rows are of 28 pixels, 1 shot and 15 queries
        write_dataset(tmp_path / "datasets" / "glyphs", 5, 16, (28, 28))
    words = [f"benchmarks/{script}.py", *SCRIPTS[script], *extra]
    words += ["--device", "cpu", "--threads", "1", "--results", str(tmp_path)]

    def prepare() -> None:
        """Leave to the script what it has to find by itself; its processes, but for one script's first, are forked."""
        os.environ["DATASET_DIR"] = str(tmp_path / "datasets")
        for module in [name for name in sys.modules if name.startswith("benchmarks")]:
            del sys.modules[module]
        interpreters = iter([subprocess.run] if script == "memory" else [])

        def run(command: Sequence[str], **named: Any) -> "subprocess.CompletedProcess[str]":
            forked = partial(fork_scripts, printer)
            chosen = next(interpreters, forked) if command[0] == sys.executable else forked
            return chosen(command, **named)

        subprocess.run = run  # type: ignore[assignment]

    process = Command(tmp_path / "output", words, prepare, ON_GPU)
    assert process.wait(600) == 0, process.printed()
    (file,) = tmp_path.glob("*.json")
    record = json.loads(file.read_text())
    assert record["benchmark"] == script
    assert set(record["machine"]) == {"device", "torch", "python", "commit"}
    assert record["tables"] and all(record["tables"].values())
    assert not [row for rows in record["tables"].values() for row in rows if "failed" in row]
    assert script in common.markdown(tmp_path)


# --- a failing variant is a line -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('{}'); raise ValueError('no such shape')", "ValueError: no such shape"),
        ("from benchmarks.common import Failed; raise Failed('no parity: of nothing')", "no parity: of nothing"),
        ("import os; os.kill(os.getpid(), 9)", "SIGKILL"),
        ("import sys; sys.exit(3)", "exit status 3"),
    ],
)
def test_a_child_that_fails_becomes_a_line(code: str, reason: str) -> None:
    variants = {
        "good": lambda: {"seconds": 2.0},
        "bad": lambda: common.run_child(command=[sys.executable, "-c", code]),
        "slow": lambda: {"seconds": 3.0},
    }
    good, bad, slow = common.compare({"shot": 1}, variants, rounds=2, count="tasks", of=4)
    assert good == {"shot": 1, "variant": "good", "seconds": 2.0, "tasks_per_second": 2.0}
    assert bad["failed"].startswith(reason) or bad["failed"] == f"ended by {reason}; out of memory?"
    assert "seconds" not in bad
    assert slow["time_over_first"] == [1.5, 1.5, 1.5]
    header, *lines = common.cells([good, bad, slow])
    assert header[-1] == "failed" and reason in lines[1][-1] and lines[0][-1] == "–"


def test_the_others_go_on_where_the_first_variant_fails() -> None:
    rows = common.compare({}, {"first": lambda: 1 / 0, "second": lambda: {"seconds": 1.0}}, rounds=1)  # type: ignore[dict-item, return-value]
    assert rows[0]["failed"].startswith("ZeroDivisionError") and rows[1] == {"variant": "second", "seconds": 1.0}


def test_a_library_that_is_not_there_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "FOLDER", tmp_path)
    with pytest.raises(common.Failed, match="make bench-peers"):
        peers.interpreter("higher")
    (tmp_path / "higher.failed").write_text("does not install here: no wheel")
    with pytest.raises(common.Failed, match="no wheel"):
        peers.interpreter("higher")


@pytest.mark.parametrize(("device", "calls"), [("cpu", 2), ("cuda", 6)])
def test_a_gpu_has_captured_its_graph_before_a_call_counts(
    device: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "synchronise", lambda _: None)
    called: list[None] = []
    common.timed(lambda: called.append(None), device)
    assert len(called) == calls > (WARM_UP + 1 if device == "cuda" else 1)


def test_a_library_whose_step_is_not_written_says_so() -> None:
    with pytest.raises(common.Failed, match="its step is not written here"):
        peers.measure(argparse.Namespace(device="cpu"), "learn2learn", "")


# --- parity ----------------------------------------------------------------------------------------------------------


def by_hand(net: nn.Sequential) -> Step:
    """MAML as another library would do it, on the networks that libraries get."""
    outer, names = torch.optim.Adam(net.parameters(), OUTER_RATE), list(moved(net))

    def loss(weights: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, dict(zip(names, weights, strict=True)), (x,)), y)

    def task_loss(xs: Tensor, xq: Tensor, ys: Tensor, yq: Tensor) -> Tensor:
        weights: tuple[Tensor, ...] = tuple(moved(net).values())
        for _ in range(STEPS):
            gradients = torch.autograd.grad(loss(weights, xs, ys), weights, create_graph=True)
            weights = tuple(w - INNER_RATE * g for w, g in zip(weights, gradients, strict=True))
        return loss(weights, xq, yq)

    return lambda batch: task_by_task(task_loss, outer, batch)


def a_little_wrong(net: nn.Sequential) -> Step:
    step = by_hand(net)

    def wrong(batch: Batch) -> float:
        loss = step(batch)
        gradient = net.get_parameter("backbone.conv1.weight").grad
        assert gradient is not None
        gradient.mul_(1 + 1e-5)
        return loss

    return wrong


def test_a_library_is_timed_only_if_its_outer_gradient_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = argparse.Namespace(device="cpu", filters=4, targets=2, size=16)
    file = str(tmp_path / "cases.pt")
    iteration.write_cases("MAML", 1, options, file)
    monkeypatch.setitem(peers.LIBRARIES, "right", by_hand)
    monkeypatch.setitem(peers.LIBRARIES, "wrong", a_little_wrong)
    assert peers.measure(options, "right", file)["seconds"] > 0
    assert iteration.measure(options, "ours", "MAML", 1, file)["seconds"] > 0
    with pytest.raises(common.Failed, match=r"outer gradient of backbone\.conv1\.weight"):
        peers.measure(options, "wrong", file)


def test_parity_refuses_another_loss_and_what_is_not_a_number() -> None:
    expected = {"loss": 1.0, "gradients": {"w": torch.ones(2, dtype=torch.float64)}}
    peers.check_parity(1.0, {"w": torch.ones(2, dtype=torch.float64)}, expected)
    for loss, gradient in ((1.0001, 1.0), (float("nan"), 1.0), (1.0, float("nan"))):
        with pytest.raises(common.Failed, match="no parity"):
            peers.check_parity(loss, {"w": torch.full((2,), gradient, dtype=torch.float64)}, expected)


# --- counting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2])
def test_the_flops_of_a_convolution_and_its_gradients_are_exact(groups: int) -> None:
    """Each of 3 x 6 x 5 x 7 outputs takes 4 / groups x 3 x 3 products; either gradient takes as many."""
    once = 2 * (3 * 6 * 5 * 7) * (4 // groups * 3 * 3)
    for device in ("cpu", "cuda"):
        with counting(device) as count:
            x = torch.empty(3, 4, 5, 7, device=device, requires_grad=True)
            weight = torch.empty(6, 4 // groups, 3, 3, device=device, requires_grad=True)
            out = F.conv2d(x, weight, padding=1, groups=groups)
            assert work(count, "convolution") == (once, 4 * (3 * 4 * 5 * 7 + 3 * 6 * 5 * 7 + 6 * 4 // groups * 9))
            out.sum().backward()
        assert work(count, "convolution")[0] == 3 * once


def test_products_count_and_views_and_expanded_elements_do_not() -> None:
    with counting("cpu") as count:
        a, b = torch.empty(3, 4), torch.empty(4, 5)
        count.calls.clear()
        (a @ b).t()[2:].unsqueeze(0)
        assert count.calls == [Call("matrix product", 2 * 3 * 4 * 5, 4 * (12 + 20 + 15))]
        count.calls.clear()
        a.add(torch.empty(1, 4).expand(3, 4))
        assert work(count, "elementwise") == (0, 4 * (12 + 4 + 12))


def test_the_count_of_an_iteration_is_that_of_the_stand_in() -> None:
    options = argparse.Namespace(device="cuda", filters=4, targets=2, size=16)
    with stand_in_cuda() as mode, Counting("cuda") as count:
        model, batch = iteration.build("MAML", 5, options, 16)
        count.calls.clear()
        mode.calls.clear()
        iteration.train("ours", "MAML", model, batch)
    assert len(count.calls) == mode.calls.total() > 1000


def work(count: Counting, kind: str) -> tuple[int, int]:
    calls = [call for call in count.calls if call.kind == kind]
    return sum(call.flops for call in calls), sum(call.bytes for call in calls)


def test_a_floor_takes_the_slower_of_arithmetic_and_memory_and_the_launches() -> None:
    calls = [Call("convolution", 100, 1), Call("copy", 0, 30)]
    assert floors(Limits(flops=100, bytes=10), calls) == (4.0, 4.0)
    assert floors(Limits(flops=100, bytes=10, host=3, gap=0.5), calls) == (6.0, 5.0)
    assert floors(Limits(flops=100, bytes=10, host=1, gap=0.5), calls) == (5.0, 5.0)


# --- documents -------------------------------------------------------------------------------------------------------


def test_the_document_has_the_tables_of_the_records() -> None:
    document = common.DOCUMENT.read_text()
    assert document == common.with_tables(document, common.markdown()), "python benchmarks/common.py --docs"


def test_a_record_reaches_the_document(tmp_path: Path) -> None:
    options = argparse.Namespace(device="cpu", results=tmp_path, threads=None, child=None, size=84)
    common.finish("memory", options, {"Peak": [{"variant": "ours", "seconds": 1.23456, "ratio": [1.0, 2.0, 3.0]}]})
    text = common.markdown(tmp_path)
    assert "| ours | 1.235 | 2 (1 .. 3) |" in text and "size 84" in text and "threads" not in text
    page = f"before\n{common.BEGIN}old{common.END}after\n"
    assert common.with_tables(page, text).startswith("before\n") and "old" not in common.with_tables(page, text)
