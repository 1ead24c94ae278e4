"""NaN and Inf put into pixels, losses, gradients, heads and weights: they are named, and stop a run or are left out."""

import csv
import dataclasses
import json
import math
import re
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import captured_gradients
import experiment_builder
import meta_test
from data import Episodes
from experiment_builder import Experiment
from few_shot_learning_system import MAMLFewShotClassifier, build_learner
from head_learning_system import HeadFewShotClassifier
from learner import FewShotLearner, Tasks, Veto
from meta_test import query_logits
from tests.test_captured_gradients import captured_model
from tests.test_experiment_builder import assert_same, command, final_weights, folder_of, history, train_with_two
from tests.test_few_shot_learning_system import tiny_batch, tiny_model
from tests.test_head_learning_system import batch as batch_of_heads
from tests.test_head_learning_system import learner as head_learner
from tests.test_stand_in_cuda import made_split
from train_maml_system import main
from utils import checkpoints
from utils.errors import UserError
from utils.image_cache import Split
from utils.official_checkpoints import to_official
from utils.options import Options, parse_args

Undo = Callable[[], None]

METHODS: dict[str, dict[str, Any]] = {
    "MAML": {"batch_norm": "running"},
    "CxGrad": {"contextual_grad": True},
    "ALFA": {"alfa": True},
    "Ridge": {"head": "Ridge"},
    "SVM-CS": {"head": "SVM-CS"},
}


def made(method: str, **more: Any) -> FewShotLearner:
    options = METHODS[method] | more
    return head_learner(**options) if "head" in options else tiny_model(torch.float32, **options)


def batch_for(model: FewShotLearner, seed: int) -> list[Tensor]:
    """Return two tasks."""
    is_head = isinstance(model, HeadFewShotClassifier)
    return batch_of_heads(seed=seed) if is_head else list(tiny_batch(seed=seed, dtype=torch.float32))


def second_layer(model: FewShotLearner) -> tuple[str, Tensor]:
    """Return the weight of the network's second convolution, with its name."""
    return [(name, p) for name, p in model.named_parameters() if p.dim() == 4][1]


# --- faults: each is put into the model or into the batch, and returns what takes it out of the model again --------


def bad_pixel(model: FewShotLearner, batch: list[Tensor]) -> Undo:
    batch[0][1, 2, 0, 0, 3, 4] = -math.inf
    return lambda: None


def huge_pixels(model: FewShotLearner, batch: list[Tensor]) -> Undo:
    """They are finite, but the first convolution's sums are not."""
    batch[1][1] *= 1e38
    return lambda: None


def bad_gradient(model: FewShotLearner, batch: list[Tensor]) -> Undo:
    return second_layer(model)[1].register_hook(lambda gradient: gradient * math.nan).remove


def huge_gradient(model: FewShotLearner, batch: list[Tensor]) -> Undo:
    """It is finite, but its square, which Adam adds up, is not."""
    return second_layer(model)[1].register_hook(lambda gradient: torch.full_like(gradient, 1e25)).remove


def degenerate_embeddings(model: FewShotLearner, batch: list[Tensor]) -> Undo:
    """The support images of the second task are all the same one; all embeddings are large, and finite."""
    batch[0][1] = batch[0][1][:1, :1]
    embedding = model.get_submodule("embedding")
    return embedding.register_forward_hook(lambda module, images, features: features * 1e18).remove


Fault = Callable[[FewShotLearner, list[Tensor]], Undo]
CASES: list[tuple[str, Fault, str, int | None]] = [
    *((method, bad_pixel, "a pixel is inf", 1) for method in METHODS),
    *((method, bad_gradient, "the gradient of NAME is nan", None) for method in METHODS),
    *((method, huge_gradient, "the gradient of NAME is inf", None) for method in ("CxGrad", "Ridge")),
    *((method, huge_pixels, "the loss is nan", 1) for method in ("MAML", "CxGrad", "ALFA")),
    # The images of all tasks are one batch of an embedding's batch norm, so there is no single task to blame.
    *((method, huge_pixels, "an embedding is nan", None) for method in ("Ridge", "SVM-CS")),
    *((method, degenerate_embeddings, f"the {method} was not solved", 1) for method in ("Ridge", "SVM-CS")),
]


def with_fault(model: FewShotLearner, fault: Fault, number: int) -> Veto | None:
    """Run iteration `number` with the fault; return what the learner says of it."""
    batch = batch_for(model, number)
    undo = fault(model, batch)
    report, _ = model.run_train_iter(batch, 0)
    undo()
    return model.veto({name: report[name].tolist() for name in model.checked})


def everything(model: FewShotLearner) -> list[Tensor]:
    """Return weights, statistics and the optimiser's state."""
    states = model.optimizer.state_dict()["state"].values()
    return [*model.state_dict().values(), *(value for state in states for value in state.values())]


def test_the_limit_of_gradients_comes_before_their_check() -> None:
    """As in MAML++'s program: an infinite entry becomes the limit, and NaN stays NaN."""
    for value, problem in ((math.inf, None), (math.nan, "the gradient of NAME is nan")):
        model = made("MAML", clamp_outer_gradients=10.0)
        name, weight = second_layer(model)
        weight.register_hook(lambda gradient, value=value: torch.full_like(gradient, value))
        report, _ = model.run_train_iter(batch_for(model, 0), 0)
        veto = model.veto({name: report[name].tolist() for name in model.checked})
        assert (veto.problem if veto else None) == (problem.replace("NAME", name) if problem else None)


@pytest.mark.parametrize(("method", "fault", "problem", "task"), CASES)
def test_a_fault_is_named_and_when_left_out_leaves_everything_as_it_was(
    method: str, fault: Fault, problem: str, task: int | None
) -> None:
    model, untouched = made(method, on_nonfinite="skip"), made(method)
    for number in range(4):
        if number == 1:
            veto = with_fault(model, fault, number)
            untouched.iterations_done += 1
            continue
        for one in (model, untouched):
            one.run_train_iter(batch_for(one, number), 0)
    assert veto is not None and veto.cure
    assert (veto.problem, veto.task) == (problem.replace("NAME", second_layer(model)[0]), task)
    assert model.iterations_done == untouched.iterations_done == 4
    assert len(everything(model)) > len(model.state_dict())
    assert all(map(torch.equal, everything(model), everything(untouched)))
    stopping = made(method)
    assert with_fault(stopping, fault, 1) == with_fault(made(method, on_nonfinite="skip"), fault, 1)


def test_a_replayed_iteration_is_left_out_as_an_eager_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_gradients, "WARM_UP", 1)
    options: dict[str, Any] = {"on_nonfinite": "skip", "batch_norm": "running", "tasks_per_pass": 2}
    (replayed, recorder), untouched = captured_model(**options), tiny_model(torch.float32, **options)
    for number in range(4):
        if number == 2:
            assert with_fault(replayed, bad_pixel, number) is not None
            untouched.iterations_done += 1
            continue
        for one in (replayed, untouched):
            one.run_train_iter(batch_for(one, number), 0)
    assert recorder.replays == 3
    assert all(map(torch.equal, everything(replayed), everything(untouched)))


# --- runs ----------------------------------------------------------------------------------------------------------


def train(data: Path, results: Path, *extra: str) -> None:
    """Train as `main` does, without its test."""
    options = parse_args(command(data, results, *extra))
    Experiment(options, build_learner("cpu", options)).train()


def spoil_image(monkeypatch: pytest.MonkeyPatch, split: str, data: Path, tasks: int) -> int:
    """Make one image in the cache of a split no numbers; return the first of `tasks` that uses it, a late one."""
    options = parse_args(command(data, data))
    opened = experiment_builder.open_dataset(options, "toy", split)
    episodes = Episodes(opened, *options.training_task, 0, None, None, torch.device("cpu"))
    first_use: dict[int, int] = {}
    for task in range(tasks):
        for row in episodes.indices(task).flat:
            first_use.setdefault(row, task)
    image, task = max(first_use.items(), key=itemgetter(1))
    images = opened.images.astype(np.float32)
    images[image] = math.nan
    open_dataset = experiment_builder.open_dataset

    def spoilt(options: Options, name: str, wanted: str) -> Split:
        found = open_dataset(options, name, wanted)
        return dataclasses.replace(found, images=images) if wanted == split else found

    for module in (experiment_builder, meta_test):
        monkeypatch.setattr(module, "open_dataset", spoilt)
    return task


def spoil_gradients(monkeypatch: pytest.MonkeyPatch, *iterations: int) -> None:
    """Make the gradient of a weight no numbers in these iterations."""
    set_gradients = MAMLFewShotClassifier._set_gradients

    def spoilt(self: MAMLFewShotClassifier, tasks: Tasks, epoch: int) -> Any:
        answer = set_gradients(self, tasks, epoch)
        if self.iterations_done in iterations:
            gradient = second_layer(self)[1].grad
            assert gradient is not None
            gradient.fill_(math.nan)
        return answer

    monkeypatch.setattr(MAMLFewShotClassifier, "_set_gradients", spoilt)


def test_a_run_stops_at_the_task_with_a_bad_image_and_without_it_goes_on_exactly(
    finished: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        task = spoil_image(patch, "train", toy_data, tasks=24)
        assert task >= 8, "it is not in the first epoch"
        place = f"at iteration {task // 2} (training task {task}, --train_seed 0)"
        with pytest.raises(UserError, match=re.escape(f"a pixel is nan {place}; training has stopped")):
            train(toy_data, tmp_path)
    assert all(tensor.isfinite().all() for tensor in final_weights(tmp_path).values())
    train(toy_data, tmp_path)
    assert_same(finished, tmp_path)


def test_a_loss_that_grows_without_bound_stops_the_run(toy_data: Path, tmp_path: Path) -> None:
    message = r"(loss|gradient) .*is (nan|inf) at iteration \d+ \(training tasks? \d+.*in a new experiment --init_inner"
    with pytest.raises(UserError, match=message):
        train(toy_data, tmp_path, "--contextual_grad", "false", "--init_inner_loop_learning_rate", "1e30")


def test_iterations_that_are_left_out_are_counted_over_a_resume_up_to_their_limit(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(experiment_builder, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(experiment_builder, "READ_EVERY_SECONDS", 0.0)
    spoil_gradients(monkeypatch, 2, 6)
    through, stopped = tmp_path / "through", tmp_path / "stopped"
    train(toy_data, through, "--on_nonfinite", "skip", "--max_skipped", "2")
    assert "at iteration 6 (training tasks 12 to 13, --train_seed 0); left out, 2 of at most 2" in caplog.text
    with (folder_of(through) / "logs" / "summary_statistics.csv").open() as file:
        assert [row["skipped"] for row in csv.DictReader(file)] == ["1", "1", "0"]
    with pytest.raises(UserError, match="2 iterations would be left out, more than --max_skipped 1"):
        train(toy_data, stopped, "--on_nonfinite", "skip", "--max_skipped", "1")
    assert checkpoints.load(folder_of(stopped) / "saved_models" / "latest")["iterations_done"] == 6
    train(toy_data, stopped, "--on_nonfinite", "skip", "--max_skipped", "2")
    assert_same(through, stopped)


def test_an_epoch_of_which_nothing_is_left_keeps_the_weights_and_has_no_loss(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_gradients(monkeypatch, *range(4))
    words = command(toy_data, tmp_path, "--total_epochs", "1", "--on_nonfinite", "skip")
    main(words)
    initial = to_official(build_learner("cpu", parse_args(words)).state_dict())
    assert all(torch.equal(tensor, initial[name]) for name, tensor in final_weights(tmp_path).items())
    (row,) = history(tmp_path)
    assert row["skipped"] == 4 and math.isnan(row["train_loss"]) and math.isfinite(row["val_loss"])


def test_means_of_an_epoch_go_over_the_iterations_that_counted(toy_data: Path, tmp_path: Path) -> None:
    options = parse_args(command(toy_data, tmp_path))
    experiment = Experiment(options, build_learner("cpu", options))
    experiment.sums |= {"loss": 6.0, "accuracy": 1.5, "skipped": 1.0}
    experiment.model.iterations_done = 2 * options.total_iter_per_epoch
    assert experiment._means() == (2.0, 0.5)


@pytest.mark.parametrize(
    ("words", "updates"), [(["--on_nonfinite", "stop"], 4), (["--on_nonfinite", "skip", "--max_skipped", "0"], 2)]
)
def test_weights_that_are_not_finite_stop_the_run_and_are_not_saved(
    words: list[str], updates: int, toy_data: Path, tmp_path: Path
) -> None:
    """They are lost by the last update of an epoch, after which only saving would see it, or before an iteration."""
    options = parse_args(command(toy_data, tmp_path, *words))
    model = build_learner("cpu", options)
    name, weight = second_layer(model)
    left = [updates]

    def lose(*_: Any) -> None:
        left[0] -= 1
        if not left[0]:
            weight.data[0, 0] = math.inf

    model.optimizer.register_step_post_hook(lose)
    with pytest.raises(UserError, match=rf"^{name} is not finite after \d iterations"):
        Experiment(options, model).train()
    assert not (folder_of(tmp_path) / "saved_models" / "latest").exists()


def test_answers_that_are_not_finite_have_no_accuracy(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = spoil_image(monkeypatch, "val", toy_data, tasks=5)
    message = rf"validation: answers to \d of 5 tasks are not finite numbers, the first to task {task} \(--val_seed 0\)"
    with pytest.raises(UserError, match=message):
        train(toy_data, tmp_path, "--total_epochs", "1")
    train(toy_data, tmp_path, "--total_epochs", "1", "--on_nonfinite", "skip")
    assert re.search(f"{message}; they count as guesses", caplog.text)
    assert math.isfinite(history(tmp_path)[0]["val_loss"])


def test_a_test_result_counts_the_tasks_that_were_guessed(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image spoils some tasks of every model; then the ensemble's second model has diverged, too."""
    words = command(toy_data, tmp_path, "--total_epochs", "2", "--on_nonfinite", "skip")
    spoil_image(monkeypatch, "test", toy_data, tasks=5)
    main(words)
    summary = folder_of(tmp_path) / "logs" / "test_summary.json"
    single, ensemble = json.loads(summary.read_text())
    assert 1 <= single["guessed"] == ensemble["guessed"] < 5
    assert capsys.readouterr().out.count(f"transductive batch norm, {single['guessed']} tasks guessed\n") == 2
    second = folder_of(tmp_path) / "saved_models" / ensemble["checkpoints"][1]
    state = checkpoints.load(second)
    for tensor in state["network"].values():
        tensor.fill_(math.nan)
    checkpoints.save(state, second)
    main([*words, "--evaluate_on_test_set_only", "true"])
    assert [result["guessed"] for result in json.loads(summary.read_text())] == [single["guessed"], 5]


@pytest.mark.parametrize("method", ["CxGrad", "Ridge", "SVM-CS"])
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_model_of_an_ensemble_that_has_diverged_is_named_or_guesses(method: str, on_nonfinite: str) -> None:
    models = [made(method, on_nonfinite=on_nonfinite, num_evaluation_tasks=3) for _ in range(2)]
    second_layer(models[1])[1].data.fill_(math.nan)
    options, side = models[0].options, models[0].image_shape[1]
    episodes = Episodes(made_split(side), *options.evaluation_task, 0, None, None, torch.device("cpu"))
    if on_nonfinite == "stop":
        with pytest.raises(UserError, match=r"test: answers to 3 of 3 tasks are .* the first of model 2 to task 0"):
            query_logits(models, episodes, options, "test")
        return
    (good, bad), _, lost = query_logits(models, episodes, options, "test")
    assert good.isfinite().all() and good.any() and not bad.any()
    assert lost.tolist() == [[False] * 3, [True] * 3]


@pytest.mark.slow
def test_two_processes_leave_out_an_iteration_together(toy_data: Path, tmp_path: Path) -> None:
    """The loss of the second one is no number, all gradients are: the first one could make the update."""
    spoil = """
def spoilt(tasks, epoch, model=self, set_gradients=self._set_gradients):
    del model._set_gradients
    report, logits = set_gradients(tasks, epoch)
    return report | {"losses": report["losses"] * float("nan")}, logits
if distributed.rank() == 1:
    self._set_gradients = spoilt
self.optimizer.register_step_post_hook(lambda *_: print("updated\\n", end=""))
"""
    status, output = train_with_two(tmp_path, toy_data, "--total_epochs", "2", "--on_nonfinite", "skip", act=spoil)
    assert status == 0 and output.count("updated") == 2 * 2, output  # of three iterations each
    left_out = "the loss is nan at iteration 5 (training task 11, --train_seed 0); left out, 1 of at most 10 iterations"
    assert output.count(left_out) == 1, output
