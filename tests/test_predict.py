"""predict.py from the command line: what it writes and says, and what it refuses."""

import csv
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import predict
from predictor import Predictor
from tests.forked import run_forked
from tests.made_models import write_classes
from utils.errors import UserError
from utils.images import list_images
from utils.prediction_sheet import SHOWN, Answered, prediction_sheet

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with support/class_{0,1,2}/* and query/class_{0,1,2}/*."""
    write_classes(tmp_path / "support", 3, 2, 2)
    write_classes(tmp_path / "query", 2, 2, 2, seed=6)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(model: Path, *words: str, query: Sequence[str] = ("query",), support: str = "support") -> None:
    predict.main(["--load", str(model), "--support", support, "--query", *query, "--gpu", "cpu", *words])


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


# --- what it writes ------------------------------------------------------------------------------------------------


def test_the_table_holds_each_file_its_class_and_the_probability_of_each_class(cxgrad: Path, here: Path) -> None:
    run(cxgrad, "--out", "answers")
    rows = rows_of(here / "answers" / "predictions.csv")
    columns = ["file", "class", *(f"probability of class_{k}" for k in range(3))]
    assert all(list(row) == columns for row in rows)
    files = list_images(Path("query"))
    assert [row["file"] for row in rows] == list(map(str, files))
    support = list_images(Path("support"))
    predictor = Predictor.load(cxgrad, "cpu").fit(support, [file.parent.name for file in support])
    assert [row["class"] for row in rows] == list(predictor.predict(files))
    found = [[float(row[column]) for column in columns[2:]] for row in rows]
    np.testing.assert_allclose(found, predictor.predict_proba(files), atol=1e-6)
    assert (here / "answers" / "predictions.png").is_file()


def test_the_sheet_shows_every_class_with_its_support_and_its_queries(tmp_path: Path) -> None:
    red, blue = tmp_path / "red.png", tmp_path / "blue.png"
    Image.new("RGB", (8, 8), "red").save(red)
    Image.new("RGB", (8, 8), "blue").save(blue)
    sheet = prediction_sheet([Answered("warm", [red], [(red, 0.9)] * 3), Answered("cold", [blue] * 2, [])])
    pixels = np.asarray(sheet)
    reds, blues = (int((pixels == colour).all(2).sum()) for colour in ((255, 0, 0), (0, 0, 255)))
    assert reds == 4 * 72 * 72
    assert blues == 2 * 72 * 72


def test_the_sheet_of_many_queries_shows_the_most_and_the_least_certain(tmp_path: Path) -> None:
    shade = [tmp_path / f"{k}.png" for k in range(3)]
    for k, path in enumerate(shade):
        Image.new("RGB", (8, 8), (200, k, 0)).save(path)
    queries = [(shade[0], 0.9)] * SHOWN + [(shade[1], 0.7)] + [(shade[2], 0.4)] * (SHOWN // 2)
    sheet = np.asarray(prediction_sheet([Answered("one", [], queries)]))
    counts = [int((sheet == (200, k, 0)).all(2).sum()) // 72**2 for k in range(3)]
    assert counts == [SHOWN // 2, 0, SHOWN // 2]


def test_each_run_without_out_gets_a_folder_of_its_own(cxgrad: Path, here: Path) -> None:
    (here / "predictions_2").write_text("mine")
    run(cxgrad)
    first = (here / "predictions" / "predictions.csv").read_bytes()
    run(cxgrad, query=["query/class_0"])
    assert (here / "predictions" / "predictions.csv").read_bytes() == first
    assert (here / "predictions_2").read_text() == "mine"
    assert len(rows_of(here / "predictions_3" / "predictions.csv")) == 2


def test_results_that_are_there_are_kept(cxgrad: Path, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "predictions.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"out holds predictions.png already; move it away, or name another"):
        run(cxgrad, "--out", "out")
    assert [path.name for path in (here / "out").iterdir()] == ["predictions.png"]
    (here / "file").write_text("mine")
    with pytest.raises(UserError, match="file is a file; name a folder"):
        run(cxgrad, "--out", "file")


def test_queries_are_files_and_folders_with_their_subfolders(cxgrad: Path, here: Path) -> None:
    (here / "query" / "notes.txt").write_text("no image")
    (here / "query" / ".hidden.png").write_text("no image")
    run(cxgrad, query=["query/class_1/0.png", "query"])
    files = [row["file"] for row in rows_of(here / "predictions" / "predictions.csv")]
    assert files == ["query/class_1/0.png", *(f"query/class_{k}/{i}.png" for k in range(3) for i in range(2))]


def test_two_hundred_images_at_once(cxgrad: Path, here: Path) -> None:
    write_classes(here / "many", 70, 70, 60, seed=7)
    run(cxgrad, query=["many"])
    assert len(rows_of(here / "predictions" / "predictions.csv")) == 200


def test_names_that_are_no_unicode_or_hold_commas(cxgrad: Path, here: Path) -> None:
    odd = os.fsdecode(b'caf\xe9, "x"\n')
    (here / "support" / "class_0").rename(here / "support" / odd)
    (here / "query" / "class_0").rename(here / "query" / odd)
    run(cxgrad)
    rows = rows_of(here / "predictions" / "predictions.csv")
    assert len(rows) == 6
    assert 'probability of caf?, "x"\n' in rows[0]


@pytest.mark.slow
def test_it_runs_from_the_shell(cxgrad: Path, here: Path) -> None:
    command = [sys.executable, "predict.py", "--support", "support", "--query", "query", "--gpu", "cpu"]
    done = run_forked([*command, "--load", str(cxgrad)], cwd=here)
    assert done.returncode == 0 and "Traceback" not in done.stderr, (
        done.stderr
    )  # Matplotlib may speak of its fonts there
    assert done.stdout.endswith("written: predictions/predictions.csv, predictions/predictions.png\n")


# --- what it says --------------------------------------------------------------------------------------------------


def test_it_states_the_batch_norm_and_warns_of_transduction(
    cxgrad: Path, ridge: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(cxgrad)
    assert "warning: batch norm: transductive, 6 query images at once" in (said := capsys.readouterr().out)
    assert "take --one_by_one" in said
    run(cxgrad, "--one_by_one")
    assert "warning" not in (said := capsys.readouterr().out)
    assert "batch norm: each query image together with the support images" in said
    run(ridge)
    assert "warning" not in (said := capsys.readouterr().out)
    assert "batch norm: running statistics; no answer depends on other query images" in said


def test_it_states_the_leave_one_out_accuracy(cxgrad: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(cxgrad)
    assert "leave-one-out accuracy on the support: " in (said := capsys.readouterr().out)
    assert " of 7 images (95 % interval " in said
    assert "alone" not in said
    (here / "support" / "class_1" / "0.png").unlink()
    run(cxgrad)
    said = capsys.readouterr().out
    assert " of 5 images" in said
    assert "alone in their class: the images of class_1\n" in said


def test_one_image_of_each_class_gives_no_estimate(
    cxgrad: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_classes(here / "single", 1, 1, 1)
    run(cxgrad, support="single")
    assert "no estimate of the accuracy: each class has one support image" in capsys.readouterr().out


def test_an_image_beside_the_class_folders_is_said_to_be_left_out(
    cxgrad: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(cxgrad)
    assert "is no support image" not in capsys.readouterr().out
    shutil.copy("query/class_0/0.png", "support/beside.png")
    run(cxgrad)
    assert "warning: support/beside.png is no support image, as it does not lie" in capsys.readouterr().out


def test_without_arguments_it_says_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        predict.main([])
    assert "required: --load, --support, --query" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        predict.main(["--help"])
    assert "--one_by_one" in capsys.readouterr().out


# --- what it refuses -----------------------------------------------------------------------------------------------


def nothing_is_left(here: Path) -> bool:
    return not list(here.glob("predictions*"))


def test_a_support_image_among_the_queries_is_refused(cxgrad: Path, here: Path) -> None:
    with pytest.raises(UserError, match=r"support/class_1/0.png is also a support image \(support/class_1/0.png\)"):
        run(cxgrad, query=["query", "support/class_1/0.png"])
    with Image.open("support/class_2/1.png") as image:
        image.save("query/copied.bmp")
    with pytest.raises(UserError, match=r"query/copied.bmp is also a support image \(support/class_2/1.png\)"):
        run(cxgrad)
    assert nothing_is_left(here)


def test_a_picture_that_is_twice_in_the_support_is_refused(cxgrad: Path, here: Path) -> None:
    shutil.copy("support/class_0/1.png", "support/class_2/again.png")
    with pytest.raises(UserError, match=r"support/class_0/1.png and support/class_2/again.png are the same picture"):
        run(cxgrad)


def test_unreadable_images_are_named(cxgrad: Path, here: Path) -> None:
    Image.effect_noise((64, 64), 50).save("whole.jpg")
    (here / "query" / "torn.jpg").write_bytes((here / "whole.jpg").read_bytes()[:700])
    (here / "query" / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"cannot read query/text.png .*; query/torn.jpg \(OSError: .*truncated"):
        run(cxgrad)
    os.mkfifo("pipe")
    with pytest.raises(UserError, match="pipe is neither a file nor a folder; --query takes image files"):
        run(cxgrad, query=["pipe"])
    shutil.move("query/torn.jpg", "support/class_0/torn.jpg")
    with pytest.raises(UserError, match=r"cannot read support/class_0/torn.jpg"):
        run(cxgrad)
    assert nothing_is_left(here)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((3,), "1 class given"), ((1, 1, 1, 1), "4 classes given, but .*best has a linear classifier of 3")],
    ids=str,
)
def test_numbers_of_classes_that_cannot_work_are_refused(
    sizes: tuple[int, ...], message: str, cxgrad: Path, here: Path
) -> None:
    write_classes(here / "few", *sizes)
    with pytest.raises(UserError, match=message):
        run(cxgrad, support="few")


def test_a_head_takes_more_classes_than_it_was_trained_with(ridge: Path, here: Path) -> None:
    write_classes(here / "more", 1, 1, 1, 1)
    run(ridge, support="more")
    assert len(rows_of(here / "predictions" / "predictions.csv")[0]) == 6


def test_paths_that_are_not_there_or_empty_are_named(cxgrad: Path, here: Path) -> None:
    (here / "empty").mkdir()
    for query, message in (("absent", "there is no absent to classify"), ("empty", "there are no images in empty")):
        with pytest.raises(UserError, match=message):
            run(cxgrad, query=[query])
    for support, message in (("absent", "Cannot list the folder absent"), ("empty", "empty holds no class folders")):
        with pytest.raises(UserError, match=message):
            run(cxgrad, support=support)
    with pytest.raises(UserError, match="query/class_0 holds no class folders"):
        run(cxgrad, support="query/class_0")
    with pytest.raises(UserError, match="there is no checkpoint absent"):
        run(Path("absent"))
    with pytest.raises(UserError, match=r"the folder support holds no exported model"):
        run(Path("support"))
