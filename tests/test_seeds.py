"""--num_seeds runs several seeds one after the other, each as if it were alone, and goes on where it was stopped."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from few_shot_learning_system import MAMLFewShotClassifier
from tests.test_experiment_builder import TINY
from train_maml_system import main
from utils import checkpoints
from utils.errors import UserError
from utils.results import read_rows
from utils.synthetic import write_dataset

WORDS = [*TINY, "--total_epochs", "1", "--top_n_models", "1", "--seed", "7", "--train_seed", "20"]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("of_seeds")
    write_dataset(folder / "toy", 2, 4, (8, 8))
    return folder


def run(data: Path, results: Path, *words: str) -> Path:
    """Run the command and return the folder of its experiment."""
    main([*WORDS, "--dataset_dir", str(data), "--experiments_dir", str(results), *words])
    return results / "toy_2way_1shot" / "experiment"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(folder / "saved_models" / "latest")["network"]


def accuracy(folder: Path) -> float:
    return json.loads((folder / "logs" / "test_summary.json").read_text())[0]["accuracy"]


@pytest.fixture(scope="session")
def two_seeds(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(data, tmp_path_factory.mktemp("two"), "--num_seeds", "2")


def test_a_seed_among_several_ends_as_it_does_alone(two_seeds: Path, data: Path, tmp_path: Path) -> None:
    alone = run(data, tmp_path, "--seed", "8", "--train_seed", "21")
    among = weights(two_seeds / "seed_2")
    assert all(torch.equal(among[name], tensor) for name, tensor in weights(alone).items())
    assert not all(torch.equal(among[name], tensor) for name, tensor in weights(two_seeds / "seed_1").items())
    assert accuracy(two_seeds / "seed_2") == accuracy(alone)


def test_mean_and_standard_deviation_are_reported_and_written(
    two_seeds: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(data, two_seeds.parents[1], "--num_seeds", "2", "--evaluate_on_test_set_only", "true")
    percent = [100 * accuracy(two_seeds / f"seed_{number}") for number in (1, 2)]
    mean, deviation = sum(percent) / 2, abs(percent[0] - percent[1]) / 2**0.5
    printed = capsys.readouterr().out
    assert "CxGrad, 4-CONV, toy 2-way 1-shot, in %: single best " in printed
    assert f"single best {mean:.2f} ± {deviation:.2f} (2 seeds), ensemble" in printed
    (row,) = read_rows(two_seeds / "results.csv")
    assert (row.seeds, row.single, row.single_pm) == (
        2,
        pytest.approx(mean, abs=0.011),
        pytest.approx(deviation, abs=0.011),
    )


def test_the_same_command_goes_on_with_the_seed_that_was_stopped(
    two_seeds: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_iteration = MAMLFewShotClassifier.run_train_iter

    def stop_in_the_second(self: MAMLFewShotClassifier, *arguments: Any) -> Any:
        if self.options.seed == 8 and self.iterations_done == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_iteration(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(MAMLFewShotClassifier, "run_train_iter", stop_in_the_second)
        with pytest.raises(SystemExit):
            run(data, tmp_path, "--num_seeds", "2")
    said = capsys.readouterr().out
    assert "seed 2 of 2, in " in said and "the same command goes on from here" in said
    folder = run(data, tmp_path, "--num_seeds", "2")
    said = capsys.readouterr().out
    assert "1 epochs, 4 iterations done" in said and "0 epochs, 2 iterations done" in said
    for seed in ("seed_1", "seed_2"):
        whole = weights(two_seeds / seed)
        assert all(torch.equal(whole[name], tensor) for name, tensor in weights(folder / seed).items())


def test_seeds_that_were_not_tested_alike_have_no_mean(
    two_seeds: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(data, tmp_path, "--num_seeds", "2", "--meta_learning_rate", "0.002")
    saved = json.loads((folder / "seed_2" / "logs" / "options.json").read_text())
    (folder / "seed_2" / "logs" / "options.json").write_text(json.dumps(saved | {"meta_learning_rate": 0.01}))
    run(data, tmp_path, "--num_seeds", "2", "--meta_learning_rate", "0.002", "--evaluate_on_test_set_only", "true")
    assert "not trained or tested alike, so there is no mean of them" in str(capsys.readouterr())


def test_several_seeds_in_a_folder_of_ones_own(data: Path, tmp_path: Path) -> None:
    run(data, tmp_path / "unused", "--num_seeds", "2", "--save_path", str(tmp_path / "mine"))
    assert {path.name for path in (tmp_path / "mine").iterdir()} == {"seed_1", "seed_2", "results.md", "results.csv"}
    assert not (tmp_path / "unused").exists()


def test_a_dry_run_rehearses_all_seeds(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(data, tmp_path, "--num_seeds", "2", "--dry_run", "true")
    printed = capsys.readouterr().out
    assert "seed 2 of 2" in printed and printed.endswith("dry run: trained, resumed, tested and cross-tested\n")
    assert not list(tmp_path.iterdir())


def test_seeds_beyond_the_largest_are_refused_before_anything_runs(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--seed is {2**32}; it must be from 0 to"):
        run(data, tmp_path, "--num_seeds", "2", "--seed", str(2**32 - 1))
    assert not list(tmp_path.iterdir())
