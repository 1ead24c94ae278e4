"""A run keeps its report up to date by itself, and no failure of it ends the run."""

from pathlib import Path

import pytest
import torch

from tests.test_experiment_builder import command, final_weights, folder_of, history
from train_maml_system import main
from utils import observer
from utils.figures import Picture
from utils.records import Run, read_diagnostics, read_run


@pytest.mark.usefixtures("reports")
def test_a_run_leaves_a_report_with_its_numbers_and_test_and_a_test_alone_draws_it_anew(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of which the console shows nothing: it stays a line an epoch, without colours."""
    main(command(toy_data, tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["epoch"] * 3 + ["test"] * 2
    assert not any("\x1b" in line for line in lines)
    folder = folder_of(tmp_path)
    file = folder / "logs" / "report.html"
    page = file.read_text(encoding="utf-8")
    assert "Trained to epoch 3, iteration 12" in page and "Test episode: toy" in page
    assert "Gamma: what contextual scaling chooses" in page and "Confusion between classes: toy 1shot" in page
    assert [record["epoch"] for record in read_diagnostics(folder)] == [1, 2, 3]
    assert {path.stem for path in (folder / "visual_outputs").glob("*.png")} >= {"learning", "gammas", "gradient_norms"}
    file.unlink()
    main(command(toy_data, tmp_path, "--evaluate_on_test_set_only", "true"))
    assert file.is_file()


def test_the_report_is_drawn_as_often_as_time_allows_and_at_the_end(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def note(run: Run) -> list[Picture]:
        drawn.append(len(run.epochs))
        return []

    monkeypatch.setattr(observer, "update_report", note)
    main(command(toy_data, tmp_path))
    assert drawn == [3]  # after the test, as the epochs were short
    monkeypatch.setattr(observer, "DRAW_EVERY_SECONDS", 0.0)
    drawn.clear()
    main(command(toy_data, tmp_path, "--continue_from_epoch", "from_scratch"))
    assert drawn == [1, 2, 3, 3]


def test_a_failure_is_one_warning_and_changes_no_weight(
    finished: Path, toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("diagnose", "update_report"):
        monkeypatch.setattr(observer, name, lambda *_: 1 / 0)
    monkeypatch.setattr(observer, "DRAW_EVERY_SECONDS", 0.0)
    main(command(toy_data, tmp_path))
    output = capsys.readouterr().out
    for what in ("diagnostics", "report"):
        warning = f"warning: the {what} cannot be kept up to date (ZeroDivisionError: division by zero)"
        assert output.count(warning) == 1
    assert history(tmp_path) == history(finished)
    assert all(torch.equal(tensor, final_weights(tmp_path)[name]) for name, tensor in final_weights(finished).items())


def test_a_rehearsal_ends_with_the_error_that_a_run_would_warn_of(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observer, "diagnose", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(command(toy_data, tmp_path, "--dry_run"))


def test_going_on_from_an_earlier_epoch_forgets_the_other_branch(toy_data: Path, tmp_path: Path) -> None:
    main(command(toy_data, tmp_path, "--max_models_to_save", "3"))
    words = ["--max_models_to_save", "3", "--continue_from_epoch", "1", "--total_epochs", "2"]
    main(command(toy_data, tmp_path, *words))
    run = read_run(folder_of(tmp_path))
    assert [record["epoch"] for record in run.diagnostics] == [epoch.epoch for epoch in run.epochs] == [1, 2]
