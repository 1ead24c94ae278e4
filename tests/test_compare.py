import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser
from tests.forked import run_forked
from tests.made_runs import ROWS, result, write_options, write_results, write_run
from utils.compare import check_comparable, draw, outcomes, read_runs, sources, table
from utils.errors import UserError
from utils.options import Options

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """MAML with test results and a published row; a method of one's own that is not tested yet."""
    folder = tmp_path / "CIFAR_FS_5way_5shot"
    maml, own = write_run(folder / "maml_4conv"), write_run(folder / "own", ROWS[:2])
    for run in (maml, own):
        write_options(run, dataset_name="CIFAR_FS", num_samples_per_class=5, experiment_name=run.name)
    of_test: dict[str, Any] = {"trained_on": "CIFAR_FS", "shot": 5}
    write_results(
        maml,
        result("CIFAR_FS", 0.74, **of_test),
        result("CIFAR_FS", 0.76, ensemble=True, **of_test),
        result("CUB", 0.5, **of_test),
    )
    return [maml, own]


def test_table_has_runs_tests_and_the_published_accuracy_of_the_row(runs: list[Path]) -> None:
    found = read_runs(runs)
    tests = outcomes(found)
    _, own_data, other_data, untested = table(found, tests)
    start = ["CIFAR_FS_5way_5shot/maml_4conv", "73.46 ± 1.11 (epoch 2)"]
    number = str(tests[0].published and tests[0].published.accuracy)
    assert own_data[:5] == [*start, "CIFAR_FS, 5-way 5-shot", "74.00 ± 1.31", "76.00 ± 1.31"]
    assert own_data[5].startswith(number)
    assert other_data == [*start, "CUB, 5-way 5-shot", "50.00 ± 1.31", "–", "–"]
    assert untested == ["CIFAR_FS_5way_5shot/own", "73.46 ± 1.11 (epoch 2)", "not tested", "–", "–", "–"]
    (source,) = sources(tests)
    assert source.startswith("MAML, 4-CONV, CIFAR-FS 5-way 5-shot: ") and number in source


def test_a_run_of_unknown_options_has_no_published_accuracy(runs: list[Path]) -> None:
    (runs[0] / "logs" / "options.json").unlink()
    assert not any(test.published for test in outcomes(read_runs(runs)))


def test_a_head_is_compared_shot_by_shot(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "CIFAR_FS_5way" / "MetaOptNet_SVM_resnet12")
    options = {"learner": "head", "dataset_name": "CIFAR_FS", "head": "SVM-CS", "backbone": "ResNet-12"}
    write_options(folder, **asdict(Options.from_mapping(options)))
    write_results(folder, *(result("CIFAR_FS", 0.7, trained_on="CIFAR_FS", shot=shot) for shot in (1, 5)))
    numbers = [
        test.published and (test.published.shot, test.published.accuracy) for test in outcomes(read_runs([folder]))
    ]
    assert [number and number[0] for number in numbers] == [1, 5]


def test_picture_shows_curves_with_intervals_and_tests(runs: list[Path]) -> None:
    found = read_runs(runs)
    axes: list[Any] = draw(found, outcomes(found)).axes
    curves, points = axes
    assert [line.get_label() for line in curves.lines] == [run.title for run in found]
    assert [len(line.get_xdata()) for line in curves.lines] == [3, 2] and len(curves.collections) == 2
    assert [label.get_text() for label in points.get_yticklabels()] == [
        "CIFAR_FS_5way_5shot/maml_4conv\nCIFAR_FS, 5-way 5-shot",
        "CIFAR_FS_5way_5shot/maml_4conv\nCUB, 5-way 5-shot",
    ]
    assert len(draw(found, []).axes) == 1


def test_runs_of_one_name_in_two_places_are_told_apart(tmp_path: Path) -> None:
    found = read_runs([write_run(tmp_path / place / "glyphs_5way_1shot" / "CxGrad_4conv") for place in ("a", "b")])
    for run in found:
        write_results(run.folder, result("glyphs", 0.7))
    found = read_runs([run.folder for run in found])
    tests = outcomes(found)
    assert [row[0] for row in table(found, tests)[1:]] == [str(run.folder) for run in found]
    axes: list[Any] = draw(found, tests).axes
    assert len({line.get_color() for line in axes[0].lines}) == 2
    assert axes[1].get_yticklabels()[0].get_text() == f"{found[0].folder}\nglyphs, 5-way 1-shot"
    write_results(found[0].folder, result("glyphs", 0.7, changed="a=1"))
    assert outcomes(read_runs([found[0].folder]))[0].name == "glyphs, 5-way 1-shot (a=1)"


def test_what_cannot_be_compared_is_an_error(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing is no experiment with a finished epoch"):
        read_runs([*runs, tmp_path / "nothing"])
    with pytest.raises(UserError, match="9 runs cannot be told apart in one picture; name at most 8"):
        read_runs([tmp_path / str(number) for number in range(9)])
    with pytest.raises(UserError, match=r"nothing to compare .*own with: it is not tested yet\. Name a second"):
        check_comparable(read_runs([runs[1], runs[1]]), [])
    write_results(runs[1], result("CIFAR_FS", 0.7))
    own = read_runs(runs[1:])
    with pytest.raises(UserError, match="no accuracy is published for its row"):
        check_comparable(own, outcomes(own))
    check_comparable(found := read_runs(runs[:1]), outcomes(found))


def compare(*words: object) -> subprocess.CompletedProcess[str]:
    return run_forked([sys.executable, "-m", "utils.compare", *map(str, words)])


def test_program_prints_the_table_and_a_browser_shows_the_page(
    runs: list[Path], tmp_path: Path, browser: Browser
) -> None:
    page = tmp_path / "pages" / "both.html"
    finished = compare(*runs, "--to", page)
    assert finished.returncode == 0, finished.stderr
    assert "CIFAR_FS_5way_5shot/own" in finished.stdout
    assert finished.stdout.endswith(f"Picture: {page.with_suffix('.png')}\nPage: {page}\n")
    shown = browser.open(page)
    assert "CIFAR_FS_5way_5shot/own\t73.46 ± 1.11 (epoch 2)\tnot tested" in shown.text
    assert [width > 1000 for width, _ in shown.pictures] == [True]
    assert shown.overflow == 0


def test_program_prints_errors_without_a_traceback(runs: list[Path], tmp_path: Path) -> None:
    for words, message in (
        ([tmp_path], "error: "),
        ([*runs, "--to", tmp_path / "page.png"], "error: --to is "),
    ):
        finished = compare(*words)
        assert finished.returncode == 2
        assert finished.stderr.startswith(message) and finished.stderr.count("\n") == 1
