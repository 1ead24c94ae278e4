from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.made_runs import (
    CSV_HEADER,
    LAYERS,
    ROWS,
    result,
    write_confusion,
    write_episode,
    write_inside,
    write_options,
    write_results,
    write_run,
)
from utils import figures
from utils.errors import UserError
from utils.figures import (
    draw_confusion,
    draw_gammas,
    draw_gradient_norms,
    draw_head,
    draw_overview,
    draw_resources,
    draw_steps,
    one_line,
    pictures,
    shades,
    short_name,
)
from utils.records import read_run

GREEN, RED = (46, 158, 91), (208, 52, 44)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An experiment of three epochs, the second the best, that is not tested yet."""
    return write_run(tmp_path / "glyphs_5way1shot" / "CxGrad_4conv")


def drawn(folder: Path) -> np.ndarray:
    """Pixels of the report's picture (H, W, 3)."""
    path = draw_overview(read_run(folder), folder / "visual_outputs" / "report.png")
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def frames(pixels: np.ndarray, colour: tuple[int, int, int]) -> float:
    """How many images are framed in this colour: a frame has two upright bars of at least 100 pixels."""
    below = (pixels == colour).all(2).cumsum(0)
    bars = np.pad(below[100:] - below[:-100] == 100, 1)
    corners = bars[1:, 1:] & ~bars[:-1, 1:] & ~bars[1:, :-1]  # the upper left one of each bar
    return corners.sum() / 2


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
    monkeypatch.setattr(figures, "draw_accuracy", lambda axes, epochs, chance: drawn_with.append(chance))
    write_options(folder, num_classes_per_set=5, test_way=test_way)
    for name in ("glyphs_5way1shot", "my_folder", "glyphs_99way"):
        folder = folder.parent.rename(folder.parent.parent / name) / folder.name
        draw_overview(read_run(folder), folder / "report.png")
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


def test_picture_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder / "visual_outputs").write_text("a file where the folder belongs")
    with pytest.raises(UserError, match=r"cannot write .*report.png"):
        draw_overview(read_run(folder), folder / "visual_outputs" / "report.png")


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


def test_a_name_in_one_line_is_short() -> None:
    assert one_line("U+0531_ARMENIAN_CAPITAL_LETTER_AYB") == "Armenian capital ayb"
    assert len(one_line("VERY_LONG_" * 20)) <= 24 and len(one_line("x" * 100)) == 24


# ---------------------------------------------------------------- what figures show


def axes_of(figure: Any) -> list[Any]:
    assert figure
    return list(figure.axes)


def lines_of(axes: Any) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_ydata() for line in axes.lines}


def test_gradient_norms_are_drawn_before_and_after_scaling(folder: Path) -> None:
    write_inside(folder)
    axes = axes_of(draw_gradient_norms(read_run(folder)))
    without, scaled = axes
    assert without.get_title(loc="left") == "Without contextual scaling"
    assert scaled.get_title(loc="left") == "With contextual scaling"
    assert [*lines_of(without)] == [*lines_of(scaled)] == [*LAYERS]
    assert np.allclose(lines_of(without)["conv1"], [100] * 3) and np.allclose(lines_of(scaled)["conv1"], [2, 1, 2 / 3])
    assert [text.get_text() for text in scaled.get_legend().get_texts()] == [*LAYERS]


def test_gammas_are_drawn_over_training_with_their_spread(folder: Path) -> None:
    write_inside(folder)
    axes = axes_of(draw_gammas(read_run(folder)))
    level, spread = axes
    assert [line.get_xdata().tolist() for line in level.lines] == [[500, 1000, 1500]] * 3
    assert [line.get_ydata()[0] for line in level.lines] == [2, 3, 4] and len(level.collections) == 3
    assert lines_of(spread)["conv0"] == pytest.approx([0.1] * 3)


def test_steps_are_drawn_of_the_first_a_middle_and_the_last_epoch(folder: Path) -> None:
    write_inside(folder, epochs=9)
    write_options(folder)
    axes = axes_of(draw_steps(read_run(folder)))
    labels = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert labels == ["chance, 20 %", "epoch 1", "epoch 5", "epoch 9"]


def test_memory_is_drawn_where_it_is_recorded(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    write_inside(folder)
    assert len(draw_resources(read_run(folder)).axes) == 3
    lines = (folder / "logs" / "diagnostics.jsonl").read_text().replace('"peak_memory_gib": 0.5, ', "", 1)
    (folder / "logs" / "diagnostics.jsonl").write_text(lines)
    (line,) = draw_resources(read_run(folder)).axes[2].lines
    assert np.array_equal(line.get_xdata(), [1000, 1500])
    (folder / "logs" / "diagnostics.jsonl").write_text("")
    assert len(draw_resources(read_run(folder)).axes) == 2


def test_a_head_shows_what_it_has(tmp_path: Path) -> None:
    rows = [f"{row},{unsolved}" for row, unsolved in zip(ROWS, (0, 2, 0), strict=True)]
    folder = write_run(tmp_path / "head", rows, f"{CSV_HEADER},unsolved")
    assert draw_head(read_run(folder)) is None
    write_inside(folder, head=True)
    axes = axes_of(draw_head(read_run(folder)))
    titles = [panel.get_title(loc="left") for panel in axes]
    assert titles == ["DropBlock", "Residual of the solution", "Training tasks not solved"]
    assert lines_of(axes[0]).popitem()[1] == pytest.approx([98, 96, 94])
    assert [bar.get_height() for bar in axes[2].patches] == [0, 2, 0]


def test_few_classes_make_a_map_and_many_a_list_of_extremes(folder: Path) -> None:
    write_confusion(folder, classes=6)
    (pairs,) = read_run(folder).confusions.values()
    axes, right, _ = axes_of(draw_confusion(pairs))
    rates = axes.images[0].get_array()
    assert rates[0, 1] == 50 and np.ma.masked_invalid(rates).sum() == 50
    assert [bar.get_width() for bar in right.patches] == [50, *[100] * 5]
    write_confusion(folder, classes=45)
    (pairs,) = read_run(folder).confusions.values()
    least, worst = axes_of(draw_confusion(pairs))
    assert least.get_yticklabels()[0].get_text() == "class 0" and least.patches[0].get_width() == 50
    assert worst.get_yticklabels()[0].get_text() == "class 0 → class 1" and worst.patches[0].get_width() == 50


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("head", [False, True])
def test_every_picture_of_a_single_epoch_is_drawn_without_a_warning(tmp_path: Path, head: bool) -> None:
    folder = write_run(tmp_path / "a$b$_{" / "run", ROWS[:1])
    write_inside(folder, head, epochs=1)
    write_options(folder)
    write_episode(folder, "a$b$_{", way=2, query=1)
    write_confusion(folder, classes=2, test="a$b$_{_1shot")
    drawn = {picture.name: picture for picture in pictures(read_run(folder))}
    assert len(drawn) == (5 if head else 7)
    assert all(picture.png.startswith(b"\x89PNG") for picture in drawn.values())


def test_layers_of_a_deep_network_have_different_colours() -> None:
    assert len(set(shades(14))) == 14 and shades(0) == []
