"""Results of meta-tests are kept together, also when several processes test one experiment."""

import csv
import dataclasses
import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from meta_test import changes_of, write_results
from utils.errors import UserError
from utils.options import changed, parse_args

FORK = multiprocessing.get_context("fork")
ROWS = 10  # of each process


def result(**changes: object) -> dict[str, Any]:
    return {
        **{"dataset": "glyphs", "split": "test", "trained_on": "glyphs", "normalization": "channel", "seed": 0},
        **{"episodes": 600, "way": 5, "shot": 1, "query": 15, "steps": 3, "batch_norm": "transductive"},
        **{"head": None, "model": "single best", "checkpoints": ["epoch_1", "epoch_2"], "accuracy": 0.5},
        **{"ci95_per_episode": 0.01, "ci95_per_query": 0.01},
        **changes,
    }


def write_many(folder: Path, seed: int, start: Any) -> None:
    start.wait(10)
    for i in range(ROWS):
        write_results(folder, [result(seed=seed + i)])


def test_two_processes_that_test_at_once_lose_no_row(tmp_path: Path) -> None:
    start = FORK.Barrier(2)
    processes = [FORK.Process(target=write_many, args=(tmp_path, seed, start)) for seed in (0, 100)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    expected = sorted([*range(ROWS), *range(100, 100 + ROWS)])
    rows = json.loads((tmp_path / "test_summary.json").read_text())
    assert sorted(row["seed"] for row in rows) == expected
    with (tmp_path / "test_summary.csv").open(newline="") as file:
        assert sorted(int(row["seed"]) for row in csv.DictReader(file)) == expected


def test_the_same_test_replaces_its_result_and_an_ensemble_that_of_fewer_epochs(tmp_path: Path) -> None:
    write_results(tmp_path, [result(accuracy=0.5), result(model="top-2 ensemble", accuracy=0.6)])
    write_results(tmp_path, [result(accuracy=0.7), result(model="top-3 ensemble", accuracy=0.8)])
    rows = json.loads((tmp_path / "test_summary.json").read_text())
    assert [(row["model"], row["accuracy"]) for row in rows] == [("single best", 0.7), ("top-3 ensemble", 0.8)]


def test_a_test_with_other_options_than_the_training_is_a_result_of_its_own(tmp_path: Path) -> None:
    write_results(tmp_path, [result(accuracy=0.5)])
    write_results(tmp_path, [result(accuracy=0.7, changed="init_inner_loop_learning_rate=5.0")])
    rows = json.loads((tmp_path / "test_summary.json").read_text())
    assert [row["accuracy"] for row in rows] == [0.5, 0.7]


def test_changes_are_what_results_do_not_say_in_another_way() -> None:
    trained = dataclasses.asdict(parse_args(["--contextual_grad", "true"]))
    words = ["--contextual_grad", "true", "--context_params_learning_rate", "0", "--init_inner_loop_learning_rate", "5"]
    options = parse_args([*words, "--num_samples_per_class", "5", "--batch_norm", "transductive", "--batch_size", "8"])
    assert changes_of(options, trained) == "init_inner_loop_learning_rate=5.0, context_params_learning_rate=0.0"
    assert changes_of(options, None) == ""
    body = changed(options, {"head": "Ridge", "lambda_reg": 3.0, "evaluate_on_test_set_only": True})
    assert changes_of(body, trained) == "", "a head has no inner steps, and its own column shows its options"


@pytest.mark.parametrize("text", ['[{"dataset"', "[" * 10**5, "5", "[5]", '{"a": 1}', '[{"model": "best"}]', "[[]]"])
def test_a_damaged_summary_is_named_and_left_as_it_is(text: str, tmp_path: Path) -> None:
    (tmp_path / "test_summary.json").write_text(text)
    with pytest.raises(UserError, match=r"test_summary.json is damaged .* move it away and test again"):
        write_results(tmp_path, [result()])
    assert (tmp_path / "test_summary.json").read_text() == text
