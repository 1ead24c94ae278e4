import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.made_runs import (
    CSV_HEADER,
    HEAD,
    ROWS,
    result,
    write_confusion,
    write_episode,
    write_options,
    write_results,
    write_run,
)
from utils.errors import UserError
from utils.options import Options
from utils.records import command, read_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An experiment of three epochs, the second the best, that is not tested yet."""
    return write_run(tmp_path / "glyphs_5way1shot" / "CxGrad_4conv")


@pytest.mark.parametrize(
    ("changes", "script"),
    [
        (HEAD | {"experiment_name": "MetaOptNet_SVM_resnet12"}, "CIFAR_FS_5way/MetaOptNet_SVM_resnet12.sh"),
        (HEAD | {"experiment_name": "R2D2_resnet12"}, "any.sh R2D2_resnet12 CIFAR_FS 1,5"),
        ({"experiment_name": "CxGrad_4conv"}, "CIFAR_FS_5way_5shot/CxGrad_4conv.sh"),
        ({"experiment_name": "CxGrad_4conv", "dataset_name": "cifar-fs"}, "CIFAR_FS_5way_5shot/CxGrad_4conv.sh"),
        ({"experiment_name": "BOIL_4conv", "dataset_name": "mine"}, "any.sh BOIL_4conv mine 5"),
        ({"experiment_name": "my_own"}, "any.sh METHOD DATASET SHOT"),
    ],
)
def test_the_script_is_named_by_the_options_wherever_the_folder_lies(
    folder: Path, changes: dict[str, object], script: str
) -> None:
    write_options(folder, **{"dataset_name": "CIFAR_FS", "num_samples_per_class": 5} | changes)
    assert command(folder) == f"bash experiment_scripts/{script} GPU_ID"


def test_a_seed_among_several_belongs_to_the_row_and_script_of_all(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "CIFAR_FS_5way_5shot" / "CxGrad_4conv" / "seed_2")
    of_row = {"dataset_name": "CIFAR_FS", "num_samples_per_class": 5, "experiment_name": "CxGrad_4conv/seed_2"}
    write_options(folder, **of_row, num_seeds=3)
    assert command(folder) == "bash experiment_scripts/CIFAR_FS_5way_5shot/CxGrad_4conv.sh GPU_ID --num_seeds 3"
    run = read_run(folder)
    assert run.title == "CIFAR_FS_5way_5shot/CxGrad_4conv/seed_2"
    assert run.setup and run.setup.row == "CIFAR_FS_5way_5shot/CxGrad_4conv"


def test_a_run_without_a_finished_epoch_is_named_with_the_command_that_trains_it(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"here/logs/summary_statistics.csv.*bash experiment_scripts/.*GPU_ID"):
        read_run(tmp_path / "nothing_5way1shot" / "here")
    (folder / "logs" / "summary_statistics.csv").write_text(CSV_HEADER + "\n")
    with pytest.raises(UserError, match="no epoch is finished"):
        read_run(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("logs/summary_statistics.csv", "epoch,iterations\n1,2\n"),
        ("logs/summary_statistics.csv", CSV_HEADER + "\n1,500,1.2\n"),
        ("logs/summary_statistics.csv", "x" * 200_000),
        ("logs/options.json", '{"test_way": 5'),
        ("logs/options.json", "[5]"),
        ("logs/options.json", "{}"),
        ("logs/options.json", "[" * 100_000),
        ("logs/test_summary.json", '[{"dataset": "glyphs"'),
        ("logs/test_summary.json", '[{"dataset": "glyphs"}]'),
        ("logs/test_summary.json", json.dumps([result("glyphs", 0.5) | {"dataset": [1]}])),
        ("logs/test_summary.json", json.dumps([result("glyphs", 0.5) | {"accuracy": None}])),
        ("logs/test_summary.json", json.dumps([result("glyphs", 0.5) | {"accuracy": 1.5}])),
        ("logs/test_summary.json", json.dumps([result("glyphs", 0.5) | {"way": 0}])),
        ("logs/test_summary.json", json.dumps([result("glyphs", 0.5) | {"shot": "x"}])),
        ("logs/test_summary.json", json.dumps([result("glyphs", 0.5) | {"episodes": "4"}])),
        ("logs/test_summary.json", json.dumps([result("glyphs", 0.5) | {"checkpoints": [1]}])),
        ("logs/summary_statistics.csv", CSV_HEADER + "\n1,500,1.2,0.5,1.3,nan,0.01,0.003,60.5\n"),
        ("logs/summary_statistics.csv", CSV_HEADER + "\n1,500,inf,0.5,1.3,0.5,0.01,0.003,60.5\n"),
        ("logs/options.json", json.dumps(asdict(Options()) | {"num_classes_per_set": 0})),
        ("logs/diagnostics.jsonl", '{"epoch": 1}\n{"epoch":'),
        ("logs/diagnostics.jsonl", "{}\n"),
        ("logs/diagnostics.jsonl", '{"epoch": NaN, "iterations": 5, "tasks": 8, "series": {}}\n'),
        (
            "logs/diagnostics.jsonl",
            '{"epoch": 1, "iterations": 5, "tasks": 8, "series": {"accuracy": {"mean": [1, 1], "std": [1]}}}\n',
        ),
        ("logs/diagnostics.jsonl", '{"epoch": 1, "iterations": 5, "tasks": 8, "series": {}, "peak_memory_gib": NaN}\n'),
        (
            "logs/diagnostics.jsonl",
            '{"epoch": 1, "iterations": 5, "tasks": 8, "series": {"gamma/x": {"mean": ["a"], "std": [1]}}}\n',
        ),
        ("logs/confusion_glyphs_1shot.csv", "true,predicted,answers,of\na,b,0,0\n"),
        ("logs/confusion_glyphs_1shot.csv", "true,predicted,answers,of\na,b,-5,3\n"),
        ("logs/confusion_glyphs_1shot.csv", "true,predicted,answers,of\na,a,2,3\na,b,1,3\n"),
        ("logs/confusion_glyphs_1shot.csv", "true,predicted,answers,of\na,b,1\n"),
        ("visual_outputs/sample_episode_glyphs.npz", "PK\x03\x04 cut short"),
        ("visual_outputs/sample_episode_glyphs.npz", ""),
    ],
)
def test_damaged_file_is_named(folder: Path, name: str, content: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=Path(name).name):
        read_run(folder)


def test_epochs_of_before_a_column_was_recorded_have_none_of_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [f"{ROWS[0]},", f"{ROWS[1]},2"], f"{CSV_HEADER},skipped")
    assert [epoch.skipped for epoch in read_run(folder).epochs] == [None, 2]


def test_a_run_is_read_as_far_as_it_has_come(folder: Path) -> None:
    run = read_run(folder)
    assert (run.setup, run.options, run.results, run.diagnostics, run.episodes, run.confusions) == (
        None,
        {},
        [],
        [],
        {},
        {},
    )
    assert run.best.epoch == 2 and run.title == "glyphs_5way1shot/CxGrad_4conv"
    write_episode(folder, "digits")
    write_episode(folder, "glyphs")
    write_results(folder, result("digits", 0.6), result("glyphs", 0.78))
    write_confusion(folder, classes=2)
    run = read_run(folder)
    assert [*run.episodes] == ["glyphs", "digits"]  # the data set trained on comes first
    assert {pair[:2]: pair.rate for pair in run.confusions["glyphs 1shot"]} == {
        ("class 0", "class 0"): 0.5,
        ("class 0", "class 1"): 0.5,
        ("class 1", "class 0"): 0,
        ("class 1", "class 1"): 1,
    }
