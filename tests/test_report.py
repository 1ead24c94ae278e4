import re
import sys
from pathlib import Path

import pytest

from tests.browser import Browser
from tests.forked import run_forked
from tests.made_runs import (
    CSV_HEADER,
    ROWS,
    result,
    write_confusion,
    write_episode,
    write_inside,
    write_options,
    write_results,
    write_run,
)
from utils.records import read_run
from utils.report import update_report, write_report

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An experiment of three epochs, the second the best, that is not tested yet."""
    return write_run(tmp_path / "glyphs_5way1shot" / "CxGrad_4conv")


def report_of(folder: Path) -> str:
    return write_report(read_run(folder))


# ---------------------------------------------------------------- text


def test_heading_names_the_run_its_length_and_its_best_epoch(folder: Path) -> None:
    heading, validation, *_ = report_of(folder).splitlines()
    assert heading == "glyphs_5way1shot/CxGrad_4conv: trained to epoch 3, iteration 1,500, in 3.0 min"
    assert validation == "Best validation accuracy 73.46 ± 1.11 % (95 % CI per episode), epoch 2"


def test_heading_says_how_many_iterations_were_left_out(tmp_path: Path) -> None:
    rows = [f"{row},{skipped}" for row, skipped in zip(ROWS, ("", 0, 2), strict=True)]
    folder = write_run(tmp_path / "glyphs_5way1shot" / "CxGrad_4conv", rows, f"{CSV_HEADER},skipped")
    heading, *_ = report_of(folder).splitlines()
    assert heading.endswith("iteration 1,500, 2 of them left out (not finite), in 3.0 min")


def test_table_has_a_row_per_data_set_with_both_models_side_by_side(folder: Path) -> None:
    write_results(
        folder,
        result("glyphs", 0.7803),
        result("glyphs", 0.7954, ensemble=True, ci95_per_episode=0.0129),
        result("digits", 0.6),
        result("digits", 0.6125, ensemble=True),
    )
    lines = report_of(folder).splitlines()
    assert "glyphs 78.03 ± 1.31 % ± 0.42 % 79.54 ± 1.29 % ± 0.42 %" in [" ".join(line.split()) for line in lines]
    assert "digits 60.00 ± 1.31 % ± 0.42 % 61.25 ± 1.31 % ± 0.42 %" in [" ".join(line.split()) for line in lines]
    table = [line for line in lines if line.startswith(("data set", "glyphs  ", "digits"))]
    assert len({len(line) for line in table}) == 1  # aligned
    assert max(map(len, lines)) <= 100


def test_text_names_both_intervals_the_protocol_and_the_chance_level(folder: Path) -> None:
    write_results(folder, result("glyphs", 0.7803), result("glyphs", 0.7954, ensemble=True))
    text = " ".join(report_of(folder).split())
    assert "accuracy ± 95 % CI" in text and "per episode" in text and "per query" in text
    assert "600 episodes of the test split, 5-way 1-shot, 15 query images per class" in text
    assert "3 inner steps, transductive batch norm, seed 7; chance level 20.00 %" in text
    assert "single best: epoch_2 top-3 ensemble: epoch_2, epoch_3, epoch_1" in text


def test_a_test_with_changed_options_says_so(folder: Path) -> None:
    write_results(folder, result("glyphs", 0.78), result("glyphs", 0.5, changed="init_inner_loop_learning_rate=5.0"))
    before, after = report_of(folder).split("not as trained: init_inner_loop_learning_rate=5.0")
    assert "78.00" in before and "50.00" in after and "78.00" not in after


def test_results_of_another_protocol_get_their_own_table(folder: Path) -> None:
    write_results(folder, result("glyphs", 0.7803), result("glyphs", 0.9, episodes=2000))
    before, after = report_of(folder).split("Meta-test: 2,000 episodes")
    assert "78.03" in before and "90.00" not in before
    assert "90.00" in after and "78.03" not in after


def test_an_ensemble_that_was_not_tested_leaves_a_dash(folder: Path) -> None:
    write_results(folder, result("glyphs", 0.78), result("glyphs", 0.79, ensemble=True), result("digits", 0.6))
    row = next(line for line in report_of(folder).splitlines() if line.startswith("digits"))
    assert row.split()[-2:] == ["–", "–"]


def test_before_the_meta_test_the_text_says_how_to_test(folder: Path) -> None:
    assert "TEST=1 bash experiment_scripts/" in report_of(folder)


# ---------------------------------------------------------------- page


@pytest.fixture(scope="session")
def tested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything that a page can show, and its page; tests leave both as they are."""
    folder = write_run(tmp_path_factory.mktemp("tested") / "glyphs_5way1shot" / "CxGrad_4conv")
    write_options(folder, experiment_name="<CxGrad> & more")
    write_results(folder, result("glyphs", 0.7803), result("glyphs", 0.7954, ensemble=True), result("digits", 0.6))
    write_episode(folder, "glyphs", wrong=2)
    write_episode(folder, "digits")
    write_confusion(folder, classes=6)
    write_inside(folder)
    update_report(read_run(folder))
    return folder


def page_of(folder: Path) -> str:
    return (folder / "logs" / "report.html").read_text(encoding="utf-8")


def headings(page: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", page)


ALWAYS = ["Test", "Loss and accuracy", "Learning rate, time and memory"]


def test_page_has_a_section_for_everything_that_is_known(tested: Path) -> None:
    assert headings(page_of(tested)) == [
        *ALWAYS,
        "Accuracy after each inner step",
        "Gradient norms in the inner loop",
        "Gamma: what contextual scaling chooses",
        "Test episode: glyphs",
        "Test episode: digits",
        "Confusion between classes: glyphs 1shot",
        "Options",
    ]


def test_page_of_an_older_run_leaves_sections_out(folder: Path) -> None:
    update_report(read_run(folder))
    page = page_of(folder)
    assert headings(page) == ALWAYS
    assert "Not tested yet" in page


def test_page_of_a_head_shows_the_head(folder: Path) -> None:
    write_inside(folder, head=True)
    update_report(read_run(folder))
    assert headings(page_of(folder)) == [*ALWAYS, "The head"]


def test_page_holds_its_pictures_and_asks_the_network_for_nothing(tested: Path) -> None:
    page = page_of(tested)
    assert not re.search(r"https?:|<link|<script|src=\"(?!data:)|url\(", page)
    pictures = {path.name for path in (tested / "visual_outputs").glob("*.png")}
    assert len(pictures) == page.count("<img") == 8
    assert {"learning.png", "gammas.png", "episode_glyphs.png", "confusion_glyphs_1shot.png"} < pictures


def test_page_shows_names_and_options_as_they_are(tested: Path) -> None:
    page = page_of(tested)
    assert "&lt;CxGrad&gt; &amp; more" in page
    assert "<tr><th>meta_learning_rate</th><td>0.001</td></tr>" in page
    assert "<tr><th>num_context_params</th><td>100</td></tr>" in page
    assert "<td>78.03 ± 1.31 %</td><td>± 0.42 %</td><td>79.54 ± 1.31 %</td>" in page


def test_browser_shows_the_text_and_every_picture(tested: Path, browser: Browser) -> None:
    shown = browser.open(tested / "logs" / "report.html")
    assert "Best validation accuracy 73.46 ± 1.11 % (95 % CI per episode), epoch 2" in shown.text
    assert "digits\t60.00 ± 1.31 %\t± 0.42 %\t–\t–" in shown.text
    assert len(shown.pictures) == 8
    assert all(width > 300 and height > 100 for width, height in shown.pictures)
    assert shown.overflow == 0


# ---------------------------------------------------------------- script


def test_script_prints_the_table_and_then_the_picture(folder: Path) -> None:
    finished = run_forked([sys.executable, "utils/report.py", str(folder)])
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(report_of(folder))
    picture = folder / "visual_outputs" / "report.png"
    page = folder / "logs" / "report.html"
    assert finished.stdout.endswith(f"Picture: {picture}\nPage: {page}\n")
    assert picture.stat().st_size > 10_000 and page.stat().st_size > 10_000


def test_script_prints_an_error_without_a_traceback(tmp_path: Path) -> None:
    finished = run_forked([sys.executable, "utils/report.py", str(tmp_path)])
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: there is no ") and finished.stderr.count("\n") == 1
