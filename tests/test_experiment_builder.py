"""The experiment loop end to end, and what happens to it when processes die and disks fill."""

import csv
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import data
import experiment_builder
import few_shot_learning_system
import meta_test
import test as test_entry
from data import Episodes
from experiment_builder import Experiment, experiment_folder
from few_shot_learning_system import MAMLFewShotClassifier
from learner import Form
from tests.forked import ON_GPU, Command, fork_workers, run_forked, two_processes
from train_maml_system import main
from utils import checkpoints
from utils.errors import UserError
from utils.image_cache import open_split
from utils.options import Options, parse_args
from utils.results import collect
from utils.scores import score

ROOT = Path(__file__).resolve().parents[1]
TINY = shlex.split(
    "--dataset_name toy --image_height 8 --image_width 8 --num_classes_per_set 2 --num_samples_per_class 1 "
    "--num_target_samples 2 --batch_size 2 --cnn_num_filters 4 --num_stages 2 --number_of_training_steps_per_iter 1 "
    "--number_of_evaluation_steps_per_iter 1 --contextual_grad true --num_context_params 3 --total_epochs 3 "
    "--total_iter_per_epoch 4 --num_evaluation_tasks 5 --max_models_to_save 2 --top_n_models 2 --gpu cpu "
    "--tasks_per_pass 1"  # of runs that are compared bit for bit each has to use the same, also on a busy machine
)


def command(data: Path, results: Path, *extra: str) -> list[str]:
    return [*TINY, "--dataset_dir", str(data), "--experiments_dir", str(results), *extra]


def folder_of(results: Path) -> Path:
    return results / "toy_2way_1shot" / "experiment"


def final_weights(results: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(folder_of(results) / "saved_models" / "latest")["network"]


def history(results: Path) -> list[dict[str, Any]]:
    """Finished epochs without their times."""
    rows = checkpoints.load(folder_of(results) / "saved_models" / "latest")["history"]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def start(output: Path, *words: str, **variables: str) -> Command:
    """Start a script that starts others; what all of them print goes to `output`."""

    def prepare() -> None:
        os.environ.update(variables, OMP_NUM_THREADS="1")
        fork_workers()

    return Command(output, words, prepare, ON_GPU)


# --- the whole path ------------------------------------------------------------------------------------------------


def test_a_run_leaves_checkpoints_logs_and_test_results(finished: Path) -> None:
    folder = folder_of(finished)
    names = {path.name for path in (folder / "saved_models").iterdir()}
    epochs = {name for name in names if name.startswith("epoch_")}
    assert names - epochs == {"latest", "best"} and len(epochs) == 2

    rows = list(csv.DictReader((folder / "logs" / "summary_statistics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"] and rows[-1]["iterations"] == "12"

    results = json.loads((folder / "logs" / "test_summary.json").read_text())
    assert [result["model"] for result in results] == ["single best", "top-2 ensemble"]
    assert all(0 <= result["accuracy"] <= 1 and result["batch_norm"] == "transductive" for result in results)
    assert {"ci95_per_episode", "ci95_per_query", "seed", "episodes"} <= set(results[0])
    assert len(list(csv.DictReader((folder / "logs" / "test_summary.csv").open()))) == 2
    assert json.loads((folder / "logs" / "options.json").read_text())["total_iter_per_epoch"] == 4


def test_kept_epochs_are_the_best_by_validation(finished: Path) -> None:
    rows = sorted(history(finished), key=lambda row: (-row["val_accuracy"], row["epoch"]))
    kept = {path.name for path in (folder_of(finished) / "saved_models").glob("epoch_*")}
    assert kept == {f"epoch_{row['epoch']}" for row in rows[:2]}
    best = checkpoints.load(folder_of(finished) / "saved_models" / "best")
    assert best["history"][-1]["epoch"] == rows[0]["epoch"]


def test_testing_again_replaces_the_result_and_another_data_set_adds_one(finished: Path, toy_data: Path) -> None:
    file = folder_of(finished) / "logs" / "test_summary.json"
    before = json.loads(file.read_text())
    main(command(toy_data, finished, "--evaluate_on_test_set_only", "true"))
    assert json.loads(file.read_text()) == before
    other = toy_data / "other" / "test"
    if not other.exists():
        other.parent.mkdir()
        os.symlink(toy_data / "toy" / "val", other)
    main(command(toy_data, finished, "--evaluate_on_test_set_only", "true", "--test_dataset", "OTHER"))
    assert [result["dataset"] for result in json.loads(file.read_text())] == ["toy", "toy", "other", "other"]
    file.write_text(json.dumps(before))


def test_a_finished_run_is_not_trained_again(
    finished: Path, toy_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = final_weights(finished)
    main(command(toy_data, finished))
    assert "3 epochs, 12 iterations done" in capsys.readouterr().out
    assert all(torch.equal(tensor, final_weights(finished)[name]) for name, tensor in before.items())


def test_the_test_entry_scores_checkpoints_and_checks_the_way(finished: Path, toy_data: Path) -> None:
    file = folder_of(finished) / "logs" / "test_summary.json"
    before = json.loads(file.read_text())
    best = [
        "--load",
        str(folder_of(finished) / "saved_models" / "best"),
        "--dataset_dir",
        str(toy_data),
        "--gpu",
        "cpu",
    ]
    test_entry.main([*best, "--episode", "7", "--shot", "2", "--query", "3"])
    added = json.loads(file.read_text())[len(before) :]
    assert [(row["episodes"], row["shot"], row["query"], row["model"]) for row in added] == [(7, 2, 3, "best")]
    with pytest.raises(UserError, match="needs statistics that training did not keep"):
        test_entry.main([*best, "--batch_norm", "running"])
    with pytest.raises(UserError, match="cannot be tested with 3; a head can"):
        test_entry.main([*best, "--way", "3"])
    file.write_text(json.dumps(before))


def test_a_rehearsal_scores_the_checkpoint_that_is_named_and_leaves_nothing_behind(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder_of(finished) / "logs" / "test_summary.json"
    before = file.read_text()
    words = ["--gpu", "cpu", "--dataset_dir", str(tmp_path), "--dry_run"]
    best = str(folder_of(finished) / "saved_models" / "best")
    test_entry.main(["--load", best, *words, "--shot", "4", "--dataset", "CUB,glyphs"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("test on ")]
    assert [line.split(":")[0] for line in lines] == [
        f"test on {name}, 2-way 4-shot, best" for name in ("CUB", "glyphs")
    ]
    assert all("2 episodes" in line for line in lines)
    assert file.read_text() == before and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="there is no checkpoint"):
        test_entry.main(["--load", str(tmp_path / "absent"), *words])
    with pytest.raises(UserError, match="--load names the checkpoint"):
        test_entry.main([])


# --- exact resume --------------------------------------------------------------------------------------------------


def test_stopping_in_the_middle_of_an_epoch_saves_that_iteration(
    finished: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_iteration = MAMLFewShotClassifier.run_train_iter

    def stop_at_the_sixth(self: MAMLFewShotClassifier, *arguments: Any) -> Any:
        if self.iterations_done == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_iteration(self, *arguments)

    monkeypatch.setattr(MAMLFewShotClassifier, "run_train_iter", stop_at_the_sixth)
    with pytest.raises(SystemExit) as stopped:
        main(command(toy_data, tmp_path))
    assert stopped.value.code == 128 + signal.SIGTERM
    assert checkpoints.load(folder_of(tmp_path) / "saved_models" / "latest")["iterations_done"] == 6
    monkeypatch.undo()
    main(command(toy_data, tmp_path))
    assert history(tmp_path) == history(finished)
    assert all(torch.equal(tensor, final_weights(tmp_path)[name]) for name, tensor in final_weights(finished).items())


def test_a_run_killed_before_its_first_save_goes_on_in_the_form_that_was_measured(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(forms: Iterable[tuple[Form, Any]], *_: Any, **__: Any) -> Form:
        found = [form for form, run in forms if run() is None]
        assert found == [(1, False), (2, False)]
        return found[-1]

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    free = command(toy_data, tmp_path / "measured")
    del free[free.index("--tasks_per_pass") : free.index("--tasks_per_pass") + 2]
    with monkeypatch.context() as patch:
        patch.setattr(few_shot_learning_system, "fastest", measured)
        patch.setattr(MAMLFewShotClassifier, "run_train_iter", killed)
        with pytest.raises(KeyboardInterrupt):
            main(free)
    saved = checkpoints.load(folder_of(tmp_path / "measured") / "saved_models" / "latest")
    assert saved["form"] == {"tasks_per_pass": 2, "captured": False} and saved["iterations_done"] == 0
    monkeypatch.setattr(few_shot_learning_system, "fastest", killed)
    main(free)
    fixed = command(toy_data, tmp_path / "fixed")
    fixed[fixed.index("--tasks_per_pass") + 1] = "2"
    main(fixed)
    weights = final_weights(tmp_path / "measured")
    assert all(torch.equal(weights[name], tensor) for name, tensor in final_weights(tmp_path / "fixed").items())
    losses = [[row["train_loss"] for row in history(tmp_path / name)] for name in ("measured", "fixed")]
    assert losses[0] == losses[1]


def test_nothing_is_overwritten_when_no_checkpoint_can_be_read(toy_data: Path, tmp_path: Path) -> None:
    models = folder_of(tmp_path) / "saved_models"
    models.mkdir(parents=True)
    (models / "latest").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="--continue_from_epoch from_scratch"):
        main(command(toy_data, tmp_path))
    assert (models / "latest").read_bytes() == b"not a checkpoint"
    main(command(toy_data, tmp_path, "--continue_from_epoch", "from_scratch", "--total_epochs", "1"))
    (kept,) = folder_of(tmp_path).glob("saved_models_until_*")
    assert (kept / "latest").read_bytes() == b"not a checkpoint"


@pytest.mark.parametrize(
    "change", [("--batch_size", "4"), ("--total_iter_per_epoch", "2"), ("--normalization", "channel")]
)
def test_options_that_would_make_records_false_are_refused(
    finished: Path, toy_data: Path, change: tuple[str, str]
) -> None:
    before = final_weights(finished)
    with pytest.raises(UserError, match=f"{change[0]} is {change[1]}, but the run was started with"):
        main(command(toy_data, finished, *change))
    assert all(torch.equal(tensor, final_weights(finished)[name]) for name, tensor in before.items())


def test_going_on_from_an_epoch_keeps_the_other_branch_aside(toy_data: Path, tmp_path: Path) -> None:
    main(command(toy_data, tmp_path, "--max_models_to_save", "3"))
    main(command(toy_data, tmp_path, "--max_models_to_save", "3", "--continue_from_epoch", "1", "--total_epochs", "2"))
    folder = folder_of(tmp_path)
    assert {path.name for path in (folder / "saved_models").glob("[!.]*")} == {"latest", "best", "epoch_1", "epoch_2"}
    assert checkpoints.load(folder / "saved_models" / "best")["history"][-1]["epoch"] in (1, 2)
    (aside,) = folder.glob("saved_models_until_*")
    assert {"epoch_2", "epoch_3", "latest"} <= {path.name for path in aside.iterdir()}
    assert [row["epoch"] for row in history(tmp_path)] == [1, 2]


def test_testing_with_other_settings_than_trained_says_so(
    finished: Path, toy_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder_of(finished) / "logs" / "test_summary.json"
    before = file.read_text()
    test = ["--evaluate_on_test_set_only", "true", "--normalization", "channel", "--num_target_samples", "3"]
    main(command(toy_data, finished, *test))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert warnings == ["warning: --normalization is channel, but the run was started with unit; going on with unit"]
    assert json.loads(file.read_text())[-1]["normalization"] == "unit"
    file.write_text(before)


def test_a_test_with_another_inner_rate_does_not_replace_that_of_the_training(
    finished: Path, toy_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder_of(finished) / "logs" / "test_summary.json"
    before = json.loads(file.read_text())
    main(command(toy_data, finished, "--evaluate_on_test_set_only", "true", "--init_inner_loop_learning_rate", "5"))
    rows = json.loads(file.read_text())
    assert rows[:2] == before
    assert [row["changed"] for row in rows] == ["", "", *["init_inner_loop_learning_rate=5.0"] * 2]
    printed = capsys.readouterr().out
    assert "transductive batch norm, not as trained: init_inner_loop_learning_rate=5.0" in printed
    rows = [row for row in collect([finished]) if row.dataset == "toy"]
    assert [row.changed for row in rows] == ["", "init_inner_loop_learning_rate=5.0"]
    file.write_text(json.dumps(before))


def test_an_accuracy_is_printed_though_it_cannot_be_written_and_no_test_is_run_for_a_damaged_summary(
    finished: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(folder_of(finished), folder_of(tmp_path))
    test, file = (
        command(toy_data, tmp_path, "--evaluate_on_test_set_only", "true"),
        folder / "logs" / "test_summary.json",
    )
    file.write_text("[{")
    for words in (test, [*command(toy_data, tmp_path), "--continue_from_epoch", "from_scratch"]):
        with pytest.raises(UserError, match="is damaged"):
            main(words)
        printed = capsys.readouterr().out
        assert "test on toy" not in printed and "epoch 1/3" not in printed
    file.unlink()
    file.mkdir()  # so that nothing can be written there
    with pytest.raises(UserError, match="cannot write"):
        main(test)
    assert "test on toy, 2-way 1-shot, single best: " in capsys.readouterr().out


def test_a_frequent_save_changes_nothing(
    finished: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment_builder, "SAVE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(experiment_builder, "READ_EVERY_SECONDS", 0.0)
    saved: list[int] = []
    save = MAMLFewShotClassifier.save_model

    def note(self: MAMLFewShotClassifier, path: Path, state: Any) -> None:
        saved.append(self.iterations_done)
        save(self, path, state)

    monkeypatch.setattr(MAMLFewShotClassifier, "save_model", note)
    main(command(toy_data, tmp_path))
    assert set(saved) == set(range(1, 13))
    assert history(tmp_path) == history(finished)


def test_normalisation_and_seeds_reach_training_validation_and_test(toy_data: Path, tmp_path: Path) -> None:
    """A hand-made evaluation of the saved model, with the train split's statistics, gives the recorded numbers."""
    extra = ["--normalization", "channel", "--train_seed", "3", "--val_seed", "5", "--total_epochs", "2"]
    main(command(toy_data, tmp_path, *extra))
    options = parse_args(command(toy_data, tmp_path, *extra))
    train = open_split(toy_data, "toy", "train", (3, 8, 8))
    folder = folder_of(tmp_path)
    ranking = sorted(history(tmp_path), key=lambda row: (-row["val_accuracy"], row["epoch"]))

    def logits(split: str, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        model = MAMLFewShotClassifier((2, 3, 8, 8), "cpu", options)
        model.load_checkpoint(folder / "saved_models" / name)
        source = open_split(toy_data, "toy", split, (3, 8, 8))
        batch = Episodes(source, 2, 1, 2, 5, train.mean, train.std, torch.device("cpu")).batch(0, 5)
        return torch.stack(model.run_validation_iter(batch)[1]), batch.y_target.flatten(1)

    for row in ranking:
        assert score(*logits("val", f"epoch_{row['epoch']}")).loss == pytest.approx(row["val_loss"], rel=1e-6)
    results = json.loads((folder / "logs" / "test_summary.json").read_text())
    each = [logits("test", f"epoch_{row['epoch']}") for row in ranking]
    assert results[0]["loss"] == pytest.approx(score(*each[0]).loss, rel=1e-6)
    ensemble = score((each[0][0] + each[1][0]) / 2, each[0][1])
    assert results[1]["loss"] == pytest.approx(ensemble.loss, rel=1e-6) != results[0]["loss"]
    assert {result["normalization"] for result in results} == {"channel"}

    (folder / "logs" / "test_summary.json").unlink()
    main(command(toy_data, tmp_path, *extra, "--evaluate_on_test_set_only", "true"))
    assert json.loads((folder / "logs" / "test_summary.json").read_text()) == results
    best = str(folder / "saved_models" / "best")
    protocol = ["--dataset_dir", str(toy_data), "--episode", "5", "--query", "2", "--seed", "5", "--gpu", "cpu"]
    test_entry.main(["--load", best, *protocol])
    again = json.loads((folder / "logs" / "test_summary.json").read_text())
    assert again[:2] == results and again[2]["loss"] == pytest.approx(results[0]["loss"], rel=1e-6)


def test_only_training_turns_classes(toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    turned: dict[str, bool] = {}

    class Watched(Episodes):
        def __init__(self, split: Any, *arguments: Any, **options: Any) -> None:
            super().__init__(split, *arguments, **options)
            turned[split.split] = options.get("rotate_classes", False)

    monkeypatch.setattr(data, "Episodes", Watched)
    main(command(toy_data, tmp_path, "--rotate_classes", "true", "--total_epochs", "1"))
    assert turned == {"train": True, "val": False, "test": False}


def test_another_spelling_of_the_data_set_goes_on_with_the_same_run(
    finished: Path, toy_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command(toy_data, finished, "--dataset_name", "TOY"))
    output = capsys.readouterr().out
    assert "3 epochs, 12 iterations done" in output and "warning" not in output
    tested = json.loads((folder_of(finished) / "logs" / "test_summary.json").read_text())
    assert [result["trained_on"] for result in tested] == ["toy", "toy"]


def test_a_task_that_uses_an_image_twice_is_not_scored(toy_data: Path) -> None:
    class Repeating(Episodes):
        def indices(self, task: int) -> np.ndarray:
            rows = super().indices(task)
            rows[0, -1] = rows[0, 0]
            return rows

    split = open_split(toy_data, "toy", "test", (3, 8, 8))
    meta_test.check_disjoint(Episodes(split, 2, 1, 2, 0, None, None, torch.device("cpu")), 5)
    with pytest.raises(RuntimeError, match="task 0 of toy uses an image twice"):
        meta_test.check_disjoint(Repeating(split, 2, 1, 2, 0, None, None, torch.device("cpu")), 5)


def test_an_ensemble_of_unlike_models_is_refused(finished: Path, toy_data: Path, tmp_path: Path) -> None:
    main(command(toy_data, tmp_path, "--init_inner_loop_learning_rate", "0.2", "--total_epochs", "1"))
    files = [str(folder_of(results) / "saved_models" / "best") for results in (finished, tmp_path)]
    with pytest.raises(UserError, match=r"with other options than .*init_inner_loop_learning_rate"):
        test_entry.main(["--load", *files, "--dataset_dir", str(toy_data), "--gpu", "cpu"])


def test_a_run_cannot_go_on_nor_be_tested_with_another_pooling(toy_data: Path, tmp_path: Path) -> None:
    """Three stages, with pooling or with stride 2, leave one pixel of eight: all weights have the same shapes."""
    shapes = ["--num_stages", "3", "--total_epochs", "1"]
    main(command(toy_data, tmp_path / "pooled", *shapes))
    main(command(toy_data, tmp_path / "strided", *shapes, "--max_pooling", "false"))
    other = command(toy_data, tmp_path / "pooled", *shapes, "--max_pooling", "false")
    for more in ([], ["--evaluate_on_test_set_only"]):
        with pytest.raises(UserError, match="--max_pooling is False, but the run was started with True"):
            main([*other, *more])
    files = [str(folder_of(tmp_path / kind) / "saved_models" / "best") for kind in ("pooled", "strided")]
    with pytest.raises(UserError, match=r"with other options than .*max_pooling"):
        test_entry.main(["--load", *files, "--dataset_dir", str(toy_data), "--gpu", "cpu"])


def test_a_checkpoint_with_an_earlier_default_of_an_idle_option_can_be_tested_and_continued(
    finished: Path, toy_data: Path, tmp_path: Path
) -> None:
    """DropBlock's schedule, which a 4-conv network does not have, once had another default."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    files = [folder_of(tmp_path) / "saved_models" / name for name in ("epoch_1", "epoch_2")]
    for path in (files[0], folder_of(tmp_path) / "saved_models" / "latest"):
        state = checkpoints.load(path)
        state["options"] |= {"dropblock_schedule": "training", "num_context_params": 3}
        checkpoints.save(state, path)
    words = ["--dataset_dir", str(toy_data), "--gpu", "cpu", "--episode", "2", "--query", "2"]
    for loaded in (files, files[::-1]):
        test_entry.main(["--load", *map(str, loaded), *words])
    main(command(toy_data, tmp_path))


@pytest.mark.parametrize("more", [["--total_epochs", "4"], ["--evaluate_on_test_set_only", "true"]])
def test_going_on_and_testing_read_each_checkpoint_once(
    more: list[str], finished: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    read: list[str] = []
    load = checkpoints.load

    def note(path: Path) -> dict[str, Any]:
        read.append(path.name)
        return load(path)

    monkeypatch.setattr(checkpoints, "load", note)
    main(command(toy_data, tmp_path, *more))
    assert read and len(read) == len(set(read)), read


def test_all_checkpoints_of_a_test_score_a_task_that_is_made_once(
    finished: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (folder_of(tmp_path) / "logs" / "test_summary.json").unlink()
    made: list[tuple[int, int]] = []
    loaded: list[Path] = []
    batch, load = Episodes.batch, MAMLFewShotClassifier.load_state

    def note_batch(self: Episodes, first: int, tasks: int) -> data.Batch:
        made.append((first, tasks))
        return batch(self, first, tasks)

    def note_load(self: MAMLFewShotClassifier, state: Any, path: Path, **more: Any) -> None:
        loaded.append(path)
        load(self, state, path, **more)

    monkeypatch.setattr(Episodes, "batch", note_batch)
    monkeypatch.setattr(MAMLFewShotClassifier, "load_state", note_load)
    words = ["--evaluate_on_test_set_only", "true", "--test_batch_size", "2", "--test_shots", "1,2"]
    main(command(toy_data, tmp_path, *words))
    assert made == [(0, 2), (2, 2), (4, 1)] * 2
    assert len(loaded) == len(set(loaded)) == 2
    before, after = (
        json.loads((folder_of(folder) / "logs" / "test_summary.json").read_text()) for folder in (finished, tmp_path)
    )
    assert after[:2] == before and [result["shot"] for result in after] == [1, 1, 2, 2]


def test_changed_options_are_named_when_going_on(
    finished: Path, toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command(toy_data, tmp_path, "--total_epochs", "1"))
    main(command(toy_data, tmp_path, "--meta_learning_rate", "0.002"))
    assert "warning: --meta_learning_rate is 0.002, but the run was started with 0.001" in capsys.readouterr().out


# --- several processes ---------------------------------------------------------------------------------------------


TWO_PROCESSES = f"""
import contextlib, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import experiment_builder, train_maml_system, utils.observer
from few_shot_learning_system import MAMLFewShotClassifier
from utils import distributed, entry

utils.observer.update_report = lambda run: []
experiment_builder.SAVE_EVERY_SECONDS = 0.02  # so often that the two disagree on when it is due, had they not to agree
train_iteration = MAMLFewShotClassifier.run_train_iter

def run_train_iter(self, *arguments):
    if self.iterations_done == 5:
        exec(os.environ.get("AT_THE_SIXTH", ""))
    return train_iteration(self, *arguments)

def main():
    if "WORLD_SIZE" not in os.environ:
        return distributed.launch(2)
    MAMLFewShotClassifier.run_train_iter = run_train_iter
    train_maml_system.main()

try:
    status = entry.run(main)
finally:  # a thread that outlives its group may abort the process while Python ends
    threads = []
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError):  # this one has just ended
            threads.append(open(f"/proc/self/task/{{task}}/comm").read())
    assert not [name for name in threads if "gloo" in name], threads
sys.exit(status)
"""


def train_with_two(folder: Path, data: Path, *extra: str, act: str = "", launched: bool = False) -> tuple[int, str]:
    """Train in two processes, which run `act` before the sixth iteration; return the exit status and the output.

    They are forked here, unless they shall be `launched` by torchrun, which takes seconds.
    """
    entry = folder / "two_processes.py"
    entry.write_text(TWO_PROCESSES)
    words = [str(entry), *command(data, folder, *extra)]
    if not launched:
        return two_processes(folder, words, AT_THE_SIXTH=act)
    launcher = start(folder / "output", *words, AT_THE_SIXTH=act)
    return launcher.wait(180), launcher.printed()


def train_without_a_report(folder: Path) -> Path:
    """Write and return a script that does what train_maml_system.py does, but for the seconds of drawing."""
    script = folder / "without_a_report.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train_maml_system, utils.observer
from utils import entry
utils.observer.update_report = lambda run: []
sys.exit(entry.run(train_maml_system.main))
""")
    return script


@pytest.fixture(scope="session")
def finished_by_two(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("finished_by_two")
    status, output = train_with_two(results, toy_data)
    assert status == 0, output
    return results


def assert_close_to(finished: Path, results: Path) -> None:
    for name, tensor in final_weights(finished).items():
        torch.testing.assert_close(final_weights(results)[name], tensor, rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(history(results), history(finished), strict=True):
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=1e-3)
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


def assert_same(finished: Path, results: Path) -> None:
    assert history(results) == history(finished)
    assert all(torch.equal(tensor, final_weights(results)[name]) for name, tensor in final_weights(finished).items())


def test_two_processes_train_as_one_does(finished: Path, finished_by_two: Path) -> None:
    assert (folder_of(finished_by_two) / "logs" / "test_summary.json").exists()
    assert_close_to(finished, finished_by_two)


def test_a_batch_that_cannot_be_shared_is_named(toy_data: Path, tmp_path: Path) -> None:
    status, output = train_with_two(tmp_path, toy_data, "--batch_size", "3")
    assert status == 2 and "--batch_size 3 tasks cannot be shared equally over 2 GPUs" in output
    assert "Traceback" not in output


def test_the_status_of_processes_that_stopped_by_themselves_is_that_of_their_launcher(tmp_path: Path) -> None:
    script = tmp_path / "stops.py"
    script.write_text(f"""
import os, sys
if "WORLD_SIZE" in os.environ:
    sys.exit(3)
sys.path.insert(0, {str(ROOT)!r})
from utils import distributed, entry
sys.exit(entry.run(lambda: distributed.launch(2)))
""")
    launcher = start(tmp_path / "output", str(script))
    assert launcher.wait() == 3 and not re.search(r"^error:|^Traceback", launcher.printed(), re.MULTILINE)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_at_once_and_the_run_goes_on_from_its_checkpoint(
    rank: int, finished_by_two: Path, toy_data: Path, tmp_path: Path
) -> None:
    begun = time.monotonic()
    kill = f"if distributed.rank() == {rank}: os.kill(os.getpid(), signal.SIGKILL)"
    status, output = train_with_two(tmp_path, toy_data, act=kill, launched=True)
    assert status == 2 and time.monotonic() - begun < 100, output
    last = output.splitlines()[-1]
    assert last.startswith(f"error: process {rank} (number {rank} on ") and "was killed by SIGKILL" in last, output
    assert "the same command goes on from the last checkpoint" in last
    assert f"error: process {1 - rank} lost another one" in output and "Traceback" not in output
    assert checkpoints.load(folder_of(tmp_path) / "saved_models" / "latest")["iterations_done"] in (4, 5)
    status, output = train_with_two(tmp_path, toy_data)
    assert status == 0 and "going on from" in output, output
    assert_same(finished_by_two, tmp_path)


def test_processes_that_are_all_signalled_twice_save_and_stop_together(
    finished_by_two: Path, toy_data: Path, tmp_path: Path
) -> None:
    """As Slurm does: it signals every process, and the launcher passes on the signal that it got."""
    signals = "os.kill(os.getpid(), signal.SIGTERM)\nif not distributed.rank(): os.kill(os.getppid(), signal.SIGTERM)"
    status, output = train_with_two(tmp_path, toy_data, act=signals, launched=True)
    assert status == 128 + signal.SIGTERM and "stopped and saved at iteration" in output, output
    assert not re.search(r"^error:|Traceback", output, re.MULTILINE), output
    status, output = train_with_two(tmp_path, toy_data)
    assert status == 0, output
    assert_same(finished_by_two, tmp_path)


def test_a_traceback_in_one_process_is_the_one_that_is_named(toy_data: Path, tmp_path: Path) -> None:
    slowly = "import atexit, time; atexit.register(time.sleep, 2)"  # so that the other one notices long before its end
    status, output = train_with_two(
        tmp_path, toy_data, act=f"if distributed.rank() == 1: {slowly}; 1 / 0", launched=True
    )
    assert status == 2 and "ZeroDivisionError" in output
    assert re.match(r"error: process 1 .* failed; its traceback is above", output.splitlines()[-1]), output


def test_two_machines_train_as_one_does_each_with_images_of_its_own(
    finished: Path, toy_data: Path, tmp_path: Path
) -> None:
    for number in range(2):
        shutil.copytree(toy_data / "toy", tmp_path / f"data_{number}" / "toy")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = {"PET_NNODES": "2", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": f"localhost:{port}"}
    script, machines = str(train_without_a_report(tmp_path)), []
    for number in range(2):
        words = command(tmp_path / f"data_{number}", tmp_path)
        output = tmp_path / f"output_{number}"
        machines.append(start(output, script, *words, **meeting, PET_RDZV_ID="toy"))
    assert [machine.wait(180) for machine in machines] == [0, 0], [machine.printed() for machine in machines]
    assert all((tmp_path / f"data_{number}" / ".cache").exists() for number in range(2))
    assert_close_to(finished, tmp_path)


def test_a_process_that_does_not_see_the_others_checkpoints_says_so(
    finished: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment_builder.distributed, "largest", lambda number: max(number, 12))
    with pytest.raises(UserError, match="--experiments_dir on a disk that all machines of the run share"):
        main(command(toy_data, tmp_path))


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--num_classes_per_set", "5"], r"5.*4"),
        (["--num_target_samples", "8"], r"class_0.*8"),
        (["--gpu", "97"], r"GPU 97 does not exist on this machine"),
        (["--gpu", "²"], r"GPU ² does not exist on this machine"),
        (["--dataset_name", "nowhere"], r"nowhere.*preprocess"),
        (["--test_dataset", "nowhere"], r"nowhere.*preprocess"),
        (["--evaluate_on_test_set_only", "true"], r"there is no checkpoint in .*train first"),
        (["--continue_from_epoch", "9"], r"there is no checkpoint .*epoch_9"),
    ],
)
def test_bad_input_is_named(toy_data: Path, tmp_path: Path, extra: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        main(command(toy_data, tmp_path, *extra))


@pytest.mark.parametrize("part", ["options", "normalization", "history", "sums", "iterations_done"])
@pytest.mark.parametrize("more", [[], ["--evaluate_on_test_set_only"]], ids=["go on", "test"])
def test_a_checkpoint_without_a_part_of_the_training_state_is_not_continued(
    part: str, more: list[str], toy_data: Path, finished: Path, tmp_path: Path
) -> None:
    (latest,) = finished.glob("*/*/saved_models/latest")
    state = checkpoints.load(latest)
    del state[part]
    checkpoints.save(state, tmp_path / "latest")
    with pytest.raises(UserError, match="latest holds weights only, no training state"):
        main(command(toy_data, tmp_path, "--save_path", str(tmp_path), *more))


def test_a_training_state_that_no_run_leaves_is_not_continued(toy_data: Path, finished: Path, tmp_path: Path) -> None:
    (latest,) = finished.glob("*/*/saved_models/latest")
    state = checkpoints.load(latest)
    broken = {name: torch.full_like(tensor, math.nan) for name, tensor in state["network"].items()}
    for changes, message in (
        ({"iterations_done": 7}, "latest is damaged: 7 iterations do not belong to 3 finished epochs of 4"),
        ({"history": state["history"][1:]}, "latest is damaged: its epochs are not numbered 1, 2"),
        ({"network": broken}, r"latest: .* is not finite, so training cannot go on from it.*--continue_from_epoch N"),
    ):
        checkpoints.save(state | changes, tmp_path / "latest")
        with pytest.raises(UserError, match=message):
            main(command(toy_data, tmp_path, "--save_path", str(tmp_path)))


def test_errors_reach_the_user_without_a_traceback(toy_data: Path, tmp_path: Path) -> None:
    words = command(toy_data, tmp_path, "--contxtual_grad", "true")
    ended = run_forked([sys.executable, "train_maml_system.py", *words])
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: there is no option '--contxtual_grad'; did you mean '--contextual_grad'?")


def test_results_of_forgiving_names_share_a_folder() -> None:
    def folder(name: str) -> Path:
        return experiment_folder(Options(dataset_name=name))

    assert folder("cifar-fs") == folder("CIFAR_FS") == Path("experiments/CIFAR_FS_5way_1shot/experiment")


def test_a_run_of_an_earlier_version_is_named_and_not_begun_anew(
    finished: Path, toy_data: Path, tmp_path: Path
) -> None:
    earlier = tmp_path / "toy_2way1shot"
    shutil.copytree(folder_of(finished), earlier / folder_of(finished).name)
    for more in ([], ["--evaluate_on_test_set_only"]):
        with pytest.raises(UserError, match=r"an earlier version kept this run in .*toy_2way1shot"):
            main(command(toy_data, tmp_path, *more))
    folder_of(tmp_path).parent.mkdir(exist_ok=True)
    shutil.rmtree(folder_of(tmp_path), ignore_errors=True)
    (earlier / folder_of(finished).name).rename(folder_of(tmp_path))
    main(command(toy_data, tmp_path))


def test_experiment_needs_a_finished_epoch_to_test(toy_data: Path, tmp_path: Path) -> None:
    options = parse_args(command(toy_data, tmp_path))
    model = MAMLFewShotClassifier((2, 3, 8, 8), "cpu", options)
    experiment = Experiment(options, model)
    experiment._save("latest")
    with pytest.raises(UserError, match=r"no epoch of .* is finished yet"):
        experiment.meta_test()
