"""One table of all results: what runs left on the disk is what it says, and the documents' tables are made by it."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.test_experiment_builder import TINY
from train_maml_system import main as train
from utils import published, results
from utils.environment import commit, machine
from utils.errors import UserError
from utils.options import parse_args
from utils.results import (
    DOCUMENT,
    KEPT,
    Row,
    collect,
    documents,
    headlines,
    made_anew,
    main,
    markdown,
    method_of,
    over_seeds,
    read_rows,
    recipe_iterations,
    record,
    write_rows,
)
from utils.synthetic import write_dataset

LINES = published.read()
ROW = Row(
    method="CxGrad",
    network="4-CONV",
    trained_on="mini_imagenet",
    dataset="mini_imagenet",
    way=5,
    shot=1,
    query=15,
    episodes=600,
    batch_norm="transductive",
    normalization="channel",
    adaptation="5 steps",
    changed="",
    iterations=50000,
    seeds=1,
    single=50.25,
    single_pm=0.7,
    ensemble=51.0,
    ensemble_pm=None,
    hours=2.5,
    peak_gib=None,
    device="a GPU",
    commit="",
)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real run of seconds, trained and tested."""
    folder = tmp_path_factory.mktemp("of_results")
    write_dataset(folder / "toy", 2, 4, (8, 8))
    train([*TINY, "--dataset_dir", str(folder), "--experiments_dir", str(folder / "experiments")])
    return folder / "experiments" / "toy_2way_1shot" / "experiment"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that copies the logs of a real run into a folder of this name, with other options and results."""

    def copy(name: str, changes: dict[str, Any] | None = None, add_to_accuracy: float = 0.0) -> Path:
        logs = tmp_path / name / "logs"
        shutil.copytree(finished / "logs", logs)
        options = json.loads((logs / "options.json").read_text())
        (logs / "options.json").write_text(json.dumps(options | (changes or {})))
        summary = json.loads((logs / "test_summary.json").read_text())
        for result in summary:
            result["accuracy"] += add_to_accuracy
        (logs / "test_summary.json").write_text(json.dumps(summary))
        return logs

    return copy


# --- what runs left ---------------------------------------------------------------------------------------------------


def test_a_real_run_is_one_line_with_all_that_it_cost(finished: Path) -> None:
    (row,) = (row for row in collect([finished]) if row.dataset == "toy")
    single, ensemble = json.loads((finished / "logs" / "test_summary.json").read_text())[:2]
    assert (row.single, row.ensemble) == tuple(round(100 * result["accuracy"], 2) for result in (single, ensemble))
    assert row.single_pm == round(100 * single["ci95_per_episode"], 2)
    assert (row.method, row.network, row.trained_on, row.dataset) == ("CxGrad", "4-CONV", "toy", "toy")
    assert (row.way, row.shot, row.query, row.episodes) == (2, 1, 2, 5)
    assert (row.batch_norm, row.normalization, row.adaptation) == ("transductive", "unit", "1 steps")
    assert (row.iterations, row.seeds) == (12, 1)
    assert row.hours is not None and row.hours < 0.1 and row.peak_gib is not None and row.peak_gib > 0.05
    assert (row.device, row.commit) == (machine("cpu")["device"], commit())


def test_runs_that_differ_in_their_seeds_alone_are_one_line(run: Callable[..., Path], tmp_path: Path) -> None:
    run("a")
    run("b", {"seed": 105, "train_seed": 1, "experiment_name": "b"}, add_to_accuracy=-0.04)
    run("other", {"seed": 106, "batch_size": 4})
    lines = [row for row in collect([tmp_path]) if row.dataset == "toy"]
    of_two = next(row for row in lines if row.seeds == 2)
    of_one = next(row for row in lines if row.seeds == 1)
    assert len(lines) == 2 and of_one.single is not None
    assert of_two.single == pytest.approx(of_one.single - 2, abs=0.011)
    assert of_two.single_pm == pytest.approx(2**0.5 * 2, abs=0.011)  # standard deviation of x and x - 4


def test_a_seed_that_was_run_twice_has_two_lines(run: Callable[..., Path], tmp_path: Path) -> None:
    run("a")
    run("again", add_to_accuracy=-0.05)
    rows = collect([tmp_path])
    assert [row.seeds for row in rows] == [1, 1]
    assert rows[0].single is not None
    assert rows[1].single == pytest.approx(rows[0].single - 5, abs=0.011)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("options.json", None),
        ("options.json", "{"),
        ("options.json", '{"no_option": 1}'),
        ("options.json", "null"),
        ("summary_statistics.csv", "x" * 200_000),
        ("summary_statistics.csv", None),
        ("summary_statistics.csv", "epoch\n"),
        ("test_summary.json", "[{}]"),
        ("environment.json", "[{}]"),
    ],
)
def test_a_run_that_cannot_be_read_is_named_and_does_not_hide_the_others(
    file: str, text: str | None, run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("good")
    logs = run("bad", {"batch_size": 3})
    (logs / file).unlink()
    if text is not None:
        (logs / file).write_text(text)
    assert len([row for row in collect([tmp_path]) if row.dataset == "toy"]) == 1
    assert f"{tmp_path}/bad is left out: " in str(capsys.readouterr())


def test_a_run_of_before_such_records_has_dashes(run: Callable[..., Path], tmp_path: Path) -> None:
    (run("old") / "environment.json").unlink()
    row = collect([tmp_path])[0]
    assert (row.peak_gib, row.device, row.commit) == (None, "", "")
    assert markdown([row], LINES).splitlines()[2].endswith("| 0.00 | – | – | – |")


@pytest.mark.parametrize(
    ("words", "method"),
    [
        ("", "MAML"),
        ("--contextual_grad true", "CxGrad"),
        ("--alfa true --attenuate true --use_bias true", "ALFA + L2F"),
        ("--alfa true --random_init true", "ALFA (random init)"),
        ("--inner_loop_part head", "ANIL"),
        ("--inner_loop_part body", "BOIL"),
        ("--meta_sgd true", "Meta-SGD"),
        (
            "--learnable_per_layer_per_step_inner_loop_learning_rate true --use_multi_step_loss_optimization true",
            "MAML++",
        ),
        ("--head SVM", "MetaOptNet-SVM"),
        ("--head Ridge", "MetaOptNet-RR"),
        ("--head ProtoNet", "ProtoNet"),
        ("--head R2D2 --backbone R2D2Net", "R2D2"),
    ],
)
def test_methods_have_the_names_of_the_published_table(words: str, method: str) -> None:
    assert method_of(parse_args(words.split())) == method
    assert method in {line.method for line in LINES}


def test_cxgrad_without_a_context_has_a_name_of_its_own() -> None:
    words = ["--contextual_grad", "true", "--context_params_learning_rate", "0"]
    assert method_of(parse_args(words)) == "CxGrad (zero context)"


# --- beside what was published ----------------------------------------------------------------------------------------


def test_a_published_row_stands_beside_ours_with_its_source() -> None:
    values = record(ROW, LINES)
    line = next(line for line in LINES if line.row == "mini_imagenet_5way_1shot/CxGrad_4conv")
    assert values["published"].startswith(str(line.accuracy))
    assert line.source in values["published_source"]
    assert values["recipe_iterations"] == recipe_iterations(line) == 100 * 500


def test_nothing_was_published_of_a_test_on_another_data_set_or_of_images_of_ones_own() -> None:
    assert record(replace(ROW, dataset="CUB"), LINES)["published"] == ""
    own = record(replace(ROW, trained_on="birds", dataset="birds"), LINES)
    assert (own["published"], own["recipe_iterations"]) == ("", "")


def test_every_script_says_how_long_it_trains() -> None:
    assert all(recipe_iterations(line) > 0 for line in LINES)


def test_seeds_have_mean_and_standard_deviation() -> None:
    rows = [replace(ROW, single=single, peak_gib=peak) for single, peak in ((50.0, 1.0), (53.0, 3.0), (56.0, 2.0))]
    row = over_seeds(rows)
    assert (row.seeds, row.single, row.single_pm, row.peak_gib) == (3, 53.0, 3.0, 3.0)
    assert (row.ensemble, row.ensemble_pm) == (51.0, 0.0)
    assert "| 53.00 ± 3.00 (3 seeds) |" in markdown([row], LINES)


def test_the_readme_shows_ours_where_the_whole_script_was_run() -> None:
    assert "not run yet" in headlines([], LINES).splitlines()[2]
    assert headlines([replace(ROW, iterations=49999)], LINES) == headlines([], LINES)
    assert headlines([replace(ROW, dataset="CUB")], LINES) == headlines([], LINES)
    assert headlines([replace(ROW, batch_norm="running")], LINES) == headlines([], LINES)
    assert headlines([ROW], LINES).splitlines()[2].endswith("| 50.25 ± 0.70 / not run yet |")
    changed = replace(ROW, single=21.0, changed="init_inner_loop_learning_rate=5.0")
    assert headlines([ROW, changed], LINES) == headlines([ROW], LINES)
    assert record(changed, LINES)["published"] == ""
    assert changed.title == f"{ROW.title} (init_inner_loop_learning_rate=5.0)"
    assert "| 5 steps, init_inner_loop_learning_rate=5.0 |" in markdown([changed], LINES)


# --- files ------------------------------------------------------------------------------------------------------------


def test_rows_come_back_from_their_file(tmp_path: Path) -> None:
    rows = [ROW, replace(ROW, shot=5, ensemble=None, hours=None)]
    write_rows(tmp_path / "rows.csv", rows, LINES)
    assert read_rows(tmp_path / "rows.csv") == rows


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", [ROW], LINES)
    (tmp_path / "rows.csv").write_text((tmp_path / "rows.csv").read_text().replace(",600,", ",many,"))
    with pytest.raises(UserError, match=r"rows\.csv, line 2 cannot be read"):
        read_rows(tmp_path / "rows.csv")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "rows.csv, line 0 cannot be read .there is no row"),
        (b"method,network\n", "rows.csv, line 1 cannot be read .there is no row"),
        (b"method,network\nMAML,4-C", "rows.csv cannot be read .its last line is cut off"),
        (b"method\n\xe9\n", "rows.csv cannot be read .*codec can't decode"),
        (b"method\n" + b"x" * 200_000 + b"\n", "rows.csv, line 1 cannot be read .field larger than"),
    ],
    ids=["empty", "header", "cut", "latin-1", "long"],
)
def test_a_table_without_rows_or_of_another_kind_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    for read in (read_rows, published.read):
        with pytest.raises(UserError, match=message):
            read(tmp_path / "rows.csv")


def test_names_from_files_do_not_break_the_table() -> None:
    lines = markdown([replace(ROW, dataset="a|b\nc")], LINES).splitlines()
    assert r"a\|b c" in lines[2] and lines[3] == ""


def test_the_command_prints_the_table_and_writes_both_files(
    run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("a")
    main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "results.md").read_text()
    assert "| CxGrad, 4-CONV | toy | 2-way 1-shot | – |" in printed
    (line,) = (line for line in csv.DictReader((tmp_path / "results.csv").open()) if line["dataset"] == "toy")
    assert line["single"] == str(collect([tmp_path])[0].single)


def test_folders_without_results_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no result below .*TEST=1"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        main([str(tmp_path / "nowhere")])


def test_docs_keeps_results_and_makes_the_documents_anew(
    run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("a")
    copies = {name: tmp_path / getattr(results, name).name for name in ("README", "DOCUMENT", "KEPT")}
    for name, copy in copies.items():
        shutil.copy(getattr(results, name), copy)
        monkeypatch.setattr(results, name, copy)
    before = read_rows(copies["KEPT"])
    for _ in range(2):  # the second time its result takes the place of the first
        main(["--docs", str(tmp_path / "a")])
        new = [row for row in read_rows(copies["KEPT"]) if row not in before]
        assert [row.dataset for row in new] == ["toy"]
    assert "| CxGrad, 4-CONV | toy | 2-way 1-shot |" in copies["DOCUMENT"].read_text()
    (kept,) = collect([tmp_path / "a"])
    results.keep([replace(kept, seeds=3), replace(kept, device="GPU")])
    new = [row for row in read_rows(copies["KEPT"]) if row not in before]
    assert len(new) == 3, "neither of more seeds nor of another device"
    copies["DOCUMENT"].write_text(made_anew(copies["DOCUMENT"].read_text(), ours="stale\n", published="stale\n"))
    main(["--docs"])
    assert "stale" not in copies["DOCUMENT"].read_text()


@pytest.mark.parametrize(("path", "text"), documents().items(), ids=lambda value: getattr(value, "name", ""))
def test_tables_of_the_documents_are_not_stale(path: Path, text: str) -> None:
    assert path.read_text(encoding="utf-8") == text, "run `python -m utils.results --docs`"


def test_kept_results_are_in_the_form_that_the_command_writes(tmp_path: Path) -> None:
    write_rows(tmp_path / "results.csv", read_rows(KEPT), LINES)
    assert (tmp_path / "results.csv").read_text() == KEPT.read_text(), "run `python -m utils.results --docs`"
    assert DOCUMENT.parent == KEPT.parent
