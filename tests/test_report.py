import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils import report
from utils.errors import UserError
from utils.options import Options
from utils.report import draw, short_name, write_report

ROOT = Path(__file__).resolve().parents[1]
CSV_HEADER = (
    "epoch,iterations,train_loss,train_accuracy,val_loss,val_accuracy,val_ci95_per_episode,learning_rate,seconds"
)
HEAD: dict[str, object] = {"learner": "head", "test_shots": "1,5"}
GREEN, RED = (46, 158, 91), (208, 52, 44)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An experiment of three epochs, the second the best, that is not tested yet."""
    folder = tmp_path / "glyphs_5way1shot" / "CxGrad_4conv"
    (folder / "logs").mkdir(parents=True)
    rows = ["1,500,1.2,0.50,1.3,0.4812,0.0123,0.003,60.5", "2,1000,1,0.60,1.1,0.7346,0.0111,0.003,60.5"]
    rows.append("3,1500,0.9,0.70,1.2,0.7101,0.0101,0.003,60.5")
    (folder / "logs" / "summary_statistics.csv").write_text("\n".join([CSV_HEADER, *rows, ""]))
    return folder


def result(dataset: str, accuracy: float, ensemble: bool = False, **changes: object) -> dict[str, object]:
    return {
        "dataset": dataset,
        "split": "test",
        "model": "top-3 ensemble" if ensemble else "single best",
        "checkpoints": ["epoch_2", "epoch_3", "epoch_1"] if ensemble else ["epoch_2"],
        "accuracy": accuracy,
        "ci95_per_episode": 0.0131,
        "ci95_per_query": 0.0042,
        **{"episodes": 600, "way": 5, "shot": 1, "query": 15, "steps": 3, "seed": 7},
        **{"batch_norm": "transductive", "normalization": "channel", "trained_on": "glyphs"},
        **changes,
    }


def write_results(folder: Path, *results: dict[str, object]) -> None:
    (folder / "logs" / "test_summary.json").write_text(json.dumps(results))


def write_options(folder: Path, **changes: object) -> None:
    (folder / "logs" / "options.json").write_text(json.dumps(asdict(Options()) | changes))


def write_episode(
    folder: Path,
    dataset: str = "glyphs",
    way: int = 5,
    shot: int = 1,
    query: int = 6,
    channels: int = 3,
    wrong: int = 0,
) -> None:
    """A task of black images with the first `wrong` query images of class 0 taken for the last class."""
    predictions = np.repeat(np.arange(way)[:, None], query, 1)
    predictions[0, :wrong] = way - 1
    (folder / "visual_outputs").mkdir(exist_ok=True)
    np.savez_compressed(
        folder / "visual_outputs" / f"sample_episode_{dataset}.npz",
        support=np.zeros((way, shot, 28, 28, channels), np.uint8),
        query=np.zeros((way, query, 28, 28, channels), np.uint8),
        predictions=predictions,
        class_names=np.array([f"U+053{k}_ARMENIAN_CAPITAL_LETTER_NO_{k}" for k in range(way)]),
    )


def drawn(folder: Path) -> np.ndarray:
    """Pixels of the report's picture (H, W, 3)."""
    path = draw(folder, folder / "visual_outputs" / "report.png")
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def frames(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    """How many images are framed in this colour: a frame has two upright bars of at least 100 pixels."""
    below = (pixels == colour).all(2).cumsum(0)
    bars = np.pad(below[100:] - below[:-100] == 100, 1)
    corners = bars[1:, 1:] & ~bars[:-1, 1:] & ~bars[1:, :-1]  # the upper left one of each bar
    return corners.sum() / 2


# ---------------------------------------------------------------- text


def test_heading_names_the_run_its_length_and_its_best_epoch(folder: Path) -> None:
    heading, validation, *_ = write_report(folder).splitlines()
    assert heading == "glyphs_5way1shot/CxGrad_4conv: trained to epoch 3, iteration 1,500, in 3.0 min"
    assert validation == "Best validation accuracy 73.46 ± 1.11 % (95 % CI per episode), epoch 2"


def test_table_has_a_row_per_data_set_with_both_models_side_by_side(folder: Path) -> None:
    write_results(
        folder,
        result("glyphs", 0.7803),
        result("glyphs", 0.7954, ensemble=True, ci95_per_episode=0.0129),
        result("digits", 0.6),
        result("digits", 0.6125, ensemble=True),
    )
    lines = write_report(folder).splitlines()
    assert "glyphs 78.03 ± 1.31 % ± 0.42 % 79.54 ± 1.29 % ± 0.42 %" in [" ".join(line.split()) for line in lines]
    assert "digits 60.00 ± 1.31 % ± 0.42 % 61.25 ± 1.31 % ± 0.42 %" in [" ".join(line.split()) for line in lines]
    table = [line for line in lines if line.startswith(("data set", "glyphs  ", "digits"))]
    assert len({len(line) for line in table}) == 1  # aligned
    assert max(map(len, lines)) <= 100


def test_text_names_both_intervals_the_protocol_and_the_chance_level(folder: Path) -> None:
    write_results(folder, result("glyphs", 0.7803), result("glyphs", 0.7954, ensemble=True))
    text = " ".join(write_report(folder).split())
    assert "accuracy ± 95 % CI" in text and "per episode" in text and "per query" in text
    assert "600 episodes of the test split, 5-way 1-shot, 15 query images per class" in text
    assert "3 inner steps, transductive batch norm, seed 7; chance level 20.00 %" in text
    assert "single best: epoch_2 top-3 ensemble: epoch_2, epoch_3, epoch_1" in text


def test_results_of_another_protocol_get_their_own_table(folder: Path) -> None:
    write_results(folder, result("glyphs", 0.7803), result("glyphs", 0.9, episodes=2000))
    before, after = write_report(folder).split("Meta-test: 2,000 episodes")
    assert "78.03" in before and "90.00" not in before
    assert "90.00" in after and "78.03" not in after


def test_an_ensemble_that_was_not_tested_leaves_a_dash(folder: Path) -> None:
    write_results(folder, result("glyphs", 0.78), result("glyphs", 0.79, ensemble=True), result("digits", 0.6))
    row = next(line for line in write_report(folder).splitlines() if line.startswith("digits"))
    assert row.split()[-2:] == ["–", "–"]


def test_before_the_meta_test_the_text_says_how_to_test(folder: Path) -> None:
    assert "TEST=1 bash experiment_scripts/" in write_report(folder)


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
    assert f"TEST=1 bash experiment_scripts/{script} GPU_ID" in write_report(folder)


# ---------------------------------------------------------------- errors


def test_missing_csv_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    folder = tmp_path / "nothing_5way1shot" / "here"
    for make in (lambda: write_report(folder), lambda: draw(folder, tmp_path / "report.png")):
        with pytest.raises(UserError, match=r"here/logs/summary_statistics.csv.*bash experiment_scripts/.*GPU_ID"):
            make()


def test_csv_without_a_finished_epoch_is_an_error(folder: Path) -> None:
    (folder / "logs" / "summary_statistics.csv").write_text(CSV_HEADER + "\n")
    with pytest.raises(UserError, match="no epoch is finished"):
        write_report(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("logs/summary_statistics.csv", "epoch,iterations\n1,2\n"),
        ("logs/summary_statistics.csv", CSV_HEADER + "\n1,500,1.2\n"),
        ("logs/options.json", '{"test_way": 5'),
        ("logs/options.json", "[5]"),
        ("logs/options.json", "{}"),
        ("logs/test_summary.json", '[{"dataset": "glyphs"'),
        ("logs/test_summary.json", '[{"dataset": "glyphs"}]'),
        ("visual_outputs/sample_episode_glyphs.npz", "PK\x03\x04 cut short"),
        ("visual_outputs/sample_episode_glyphs.npz", ""),
    ],
)
def test_damaged_file_is_named(folder: Path, name: str, content: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=Path(name).name):
        write_report(folder)
        draw(folder, folder / "report.png")


def test_picture_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder / "visual_outputs").write_text("a file where the folder belongs")
    with pytest.raises(UserError, match=r"cannot write .*report.png"):
        draw(folder, folder / "visual_outputs" / "report.png")


# ---------------------------------------------------------------- picture


@pytest.mark.parametrize(("shot", "columns"), [(1, 1), (5, 5), (9, 6)])
@pytest.mark.parametrize("channels", [1, 3])
def test_picture_shows_support_and_at_most_six_queries(folder: Path, shot: int, columns: int, channels: int) -> None:
    write_episode(folder, shot=shot, query=15, channels=channels, wrong=2)
    pixels = drawn(folder)
    inches = 5.5 + 0.8 * (1.85 + columns + 0.3 + 6), 1.75 + 0.8 * 5
    assert (pixels.shape[1], pixels.shape[0]) == pytest.approx([150 * side for side in inches], abs=1)
    assert frames(pixels, GREEN) == 5 * 6 - 2
    assert frames(pixels, RED) == 2


def test_picture_without_an_episode_is_the_curve_alone(folder: Path) -> None:
    pixels = drawn(folder)
    assert pixels.shape[1] == pytest.approx(150 * 5.5, abs=1)
    validation = (pixels == (31, 95, 168)).all(2)
    assert validation.sum() > 500


@pytest.mark.parametrize(("test_way", "chance"), [(None, 20), (10, 10)])
def test_chance_is_that_of_the_validation_whatever_the_folder_is_called(
    folder: Path, monkeypatch: pytest.MonkeyPatch, test_way: int | None, chance: float
) -> None:
    drawn_with = []
    monkeypatch.setattr(report, "_draw_curve", lambda axes, epochs, chance: drawn_with.append(chance))
    write_options(folder, num_classes_per_set=5, test_way=test_way)
    for name in ("glyphs_5way1shot", "my_folder", "glyphs_99way"):
        folder = folder.parent.rename(folder.parent.parent / name) / folder.name
        draw(folder, folder / "report.png")
    assert drawn_with == [chance] * 3


def test_picture_prefers_the_data_set_trained_on(folder: Path) -> None:
    write_results(folder, result("digits", 0.6), result("glyphs", 0.78))
    write_episode(folder, "digits", wrong=4)
    assert frames(drawn(folder), RED) == 4
    write_episode(folder, "glyphs", wrong=1)
    assert frames(drawn(folder), RED) == 1


@pytest.mark.filterwarnings("error")
def test_one_epoch_two_ways_and_odd_names_are_drawn_without_a_warning(folder: Path) -> None:
    csv = folder / "logs" / "summary_statistics.csv"
    csv.write_text("\n".join(csv.read_text().splitlines()[:2]) + "\n")
    write_episode(folder, "a$b$_{", way=2, query=1)
    assert drawn(folder).std() > 10


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("U+0531_ARMENIAN_CAPITAL_LETTER_AYB", "Armenian\ncapital ayb"),
        ("n01532829", "n01532829"),
        ("aquarium_fish", "aquarium fish"),
        ("001.Black_footed_Albatross", "001.Black\nfooted\nAlbatross"),
        ("$x_{", "$x {"),
    ],
)
def test_class_names_are_shortened(name: str, short: str) -> None:
    assert short_name(name) == short


def test_long_class_name_keeps_to_three_short_lines() -> None:
    lines = short_name("U+1F7E_" + "VERY_LONG_" * 20 + "x" * 100).split("\n")
    assert len(lines) == 3 and max(map(len, lines)) <= 15 and lines[-1].endswith("…")


# ---------------------------------------------------------------- script


def run_script(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "utils/report.py", str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_script_prints_the_table_and_then_the_picture(folder: Path) -> None:
    finished = run_script(folder)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(write_report(folder))
    picture = folder / "visual_outputs" / "report.png"
    assert finished.stdout.endswith(f"Picture: {picture}\n") and picture.stat().st_size > 10_000


def test_script_prints_an_error_without_a_traceback(tmp_path: Path) -> None:
    finished = run_script(tmp_path)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: there is no ") and finished.stderr.count("\n") == 1
