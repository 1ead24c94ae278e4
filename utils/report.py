"""What came out of an experiment: a short table and one picture.

python utils/report.py experiments/glyphs_5way_1shot/CxGrad_4conv
"""

import argparse
import csv
import json
import re
import sys
import textwrap
import zipfile
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

if __name__ == "__main__":  # a script finds modules beside itself only; ours are found from the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from utils import entry
from utils.errors import UserError
from utils.files import replace_file
from utils.names import canonical_name
from utils.tables import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Parsed = TypeVar("Parsed")
ROOT = Path(__file__).resolve().parents[1]
SHOWN = 6  # support and query images of a class in the picture, at most
CELL = 0.8  # inches from one image of an episode to the next
NAME, GAP = 1.85, 0.3  # widths in cells: of a class name; between support and query images
TRAINING, VALIDATION, CHANCE = "#98a2b3", "#1f5fa8", "#b45309"
SUPPORT, RIGHT, WRONG = "#374151", "#2e9e5b", "#d0342c"


class Epoch(NamedTuple):
    """An epoch is a row of summary_statistics.csv; accuracies and their CI are in [0, 1]."""

    epoch: float
    iterations: float  # since the start of training
    train_accuracy: float
    val_accuracy: float
    val_ci95_per_episode: float
    seconds: float


class Setup(NamedTuple):
    """The setup is what options.json says of the training and its validation."""

    dataset_name: str
    experiment_name: str
    learner: str
    num_classes_per_set: int
    num_samples_per_class: int
    test_way: int | None
    test_shots: str | None


class Result(NamedTuple):
    """A result is an entry of test_summary.json in words, accuracy and CI in %."""

    dataset: str
    trained_on: str
    model: str
    checkpoints: str
    cells: tuple[str, str]  # accuracy with the CI per episode; CI per query
    protocol: str


class Episode(NamedTuple):
    """An episode is a task and the model's answers."""

    support: np.ndarray  # (way, at most SHOWN, H, W, C) uint8
    query: np.ndarray  # (way, at most SHOWN, H, W, C) uint8
    predictions: np.ndarray  # (way, query), indices of classes
    class_names: np.ndarray  # (way,)


# ---------------------------------------------------------------- what the experiment left


def read_setup(folder: Path) -> Setup | None:
    """Return how the experiment is trained; None before it has begun. Raises UserError if the file is damaged."""
    wanted = itemgetter(*Setup._fields)
    return _parsed(folder / "logs" / "options.json", lambda path: Setup(*wanted(json.loads(path.read_text()))))


def read_epochs(folder: Path) -> list[Epoch]:
    """Return the finished epochs; raises UserError where there is none or the file is damaged."""
    path, wanted = folder / "logs" / "summary_statistics.csv", itemgetter(*Epoch._fields)
    rows = _parsed(
        path, lambda path: [Epoch(*map(float, wanted(row))) for row in csv.DictReader(path.read_text().splitlines())]
    )
    if not rows:
        raise UserError(f"there is no {path} with a row: no epoch is finished. To train: {_command(folder)}")
    return rows


def read_results(folder: Path) -> list[Result]:
    """Return the results of the meta-tests, none before the first; raises UserError if the file is damaged."""
    path = folder / "logs" / "test_summary.json"
    return _parsed(path, lambda path: [_in_words(entry) for entry in json.loads(path.read_text())]) or []


def _in_words(entry: Mapping[str, Any]) -> Result:
    method = f"{entry['head']} head" if entry.get("head") else f"{entry['steps']} inner steps"
    protocol = (
        f"Meta-test: {entry['episodes']:,} episodes of the {entry['split']} split, "
        f"{entry['way']}-way {entry['shot']}-shot, {entry['query']} query images per class,\n"
        f"{method}, {entry['batch_norm']} batch norm, seed {entry['seed']}; chance level {100 / entry['way']:.2f} %"
    )
    accuracy, episodes, queries = (100 * entry[name] for name in ("accuracy", "ci95_per_episode", "ci95_per_query"))
    cells = f"{accuracy:.2f} ± {episodes:.2f} %", f"± {queries:.2f} %"
    checkpoints = f"{entry['model']}: {', '.join(entry['checkpoints'])}"
    return Result(entry["dataset"], entry["trained_on"], entry["model"], checkpoints, cells, protocol)


def read_episode(folder: Path) -> tuple[str, Episode] | None:
    """Return name and sample episode of the data set trained on, else of the first; UserError for a damaged file."""
    found = sorted((folder / "visual_outputs").glob("sample_episode_*.npz"))
    if not found:
        return None
    trained_on = {f"sample_episode_{result.trained_on}.npz" for result in read_results(folder)}
    return _parsed(next((path for path in found if path.name in trained_on), found[0]), _read_episode)


def _read_episode(path: Path) -> tuple[str, Episode]:
    with np.load(path, allow_pickle=False) as file:
        support, query, *answers = (file[name] for name in Episode._fields)
    return path.stem.removeprefix("sample_episode_"), Episode(support[:, :SHOWN], query[:, :SHOWN], *answers)


def _parsed(path: Path, parse: Callable[[Path], Parsed]) -> Parsed | None:
    """Return what `parse` makes of a file, None if there is no file; raises a UserError that names a damaged one."""
    if not path.is_file():
        return None
    try:
        return parse(path)
    except (KeyError, TypeError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"cannot read {path} ({type(error).__name__}: {error}). Remove it and run its script again"
        ) from error


def _command(folder: Path) -> str:
    """Return the command that trains this experiment, or the pattern of such commands where its name says no method."""
    script = "any.sh METHOD DATASET SHOT"
    if setup := read_setup(folder):
        dataset, head = canonical_name(setup.dataset_name), setup.learner == "head"
        task = f"{dataset}_{setup.num_classes_per_set}way" + ("" if head else f"_{setup.num_samples_per_class}shot")
        own = f"{task}/{setup.experiment_name}.sh"
        if (ROOT / "experiment_scripts" / own).is_file():
            script = own
        elif re.search("_(4conv|resnet12|conv64|r2d2net)$", setup.experiment_name):
            shot = setup.test_shots if head else setup.num_samples_per_class
            script = f"any.sh {setup.experiment_name} {dataset} {shot}"
    return f"bash experiment_scripts/{script} GPU_ID"


def _title(folder: Path) -> str:
    return "/".join(folder.resolve().parts[-2:])


def _best(epochs: Sequence[Epoch]) -> Epoch:
    return max(epochs, key=lambda epoch: epoch.val_accuracy)


# ---------------------------------------------------------------- text


def write_report(folder: Path) -> str:
    """Return the closing table of an experiment, accuracies in %; raises UserError if no epoch is finished."""
    epochs, results = read_epochs(folder), read_results(folder)
    best, last = _best(epochs), epochs[-1]
    lines = [
        f"{_title(folder)}: trained to epoch {last.epoch:.0f}, iteration {last.iterations:,.0f}, "
        f"in {_duration(sum(epoch.seconds for epoch in epochs))}",
        f"Best validation accuracy {100 * best.val_accuracy:.2f} ± {100 * best.val_ci95_per_episode:.2f} % "
        f"(95 % CI per episode), epoch {best.epoch:.0f}",
    ]
    if not results:
        lines += ["", f"Not meta-tested yet. To do so: TEST=1 {_command(folder)}"]
    for protocol in dict.fromkeys(result.protocol for result in results):
        lines += ["", protocol, "", *_table([result for result in results if result.protocol == protocol])]
    return "\n".join(lines)


def _table(results: Sequence[Result]) -> list[str]:
    """Return a row for each data set, two columns for each model; then the checkpoints behind the models."""
    models = list(dict.fromkeys(result.model for result in results))
    cells = {(result.dataset, result.model): result.cells for result in results}
    rows = [
        ["", *(text for model in models for text in (model, ""))],
        ["", *["accuracy ± 95 % CI", "± 95 % CI"] * len(models)],
        ["data set", *["per episode", "per query"] * len(models)],
    ]
    for name in dict.fromkeys(result.dataset for result in results):
        rows.append([name, *(text for model in models for text in cells.get((name, model), ("–", "–")))])
    return [*aligned(rows), "", *dict.fromkeys(result.checkpoints for result in results)]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------- picture


def draw(folder: Path, path: Path) -> Path:
    """Draw training curve and sample episode into the PNG `path`; raises UserError as `write_report` does."""
    # Slow to import, so only here; without pyplot it draws with Agg and needs no display.
    from matplotlib.figure import Figure

    epochs, sample, setup = read_epochs(folder), read_episode(folder), read_setup(folder)
    chance = 100 / (setup.test_way or setup.num_classes_per_set) if setup else None  # of the validation
    rows, columns = (len(sample[1].support), _columns(sample[1])[1]) if sample else (5, 0.0)
    figure = Figure((5.5 + CELL * columns, 1.75 + CELL * rows), dpi=150)
    inch = 1 / figure.get_size_inches()  # of the figure's width and height
    figure.text(0.3 * inch[0], 1 - 0.3 * inch[1], _title(folder), size=13, weight="bold", va="center", parse_math=False)
    top = 1 - 1.1 * inch[1]  # of both drawings
    curve, images = CELL * min(rows, 6) * inch[1], CELL * rows * inch[1]  # heights
    _draw_curve(figure.add_axes((0.8 * inch[0], top - curve, 4.3 * inch[0], curve)), epochs, chance)
    if sample:
        _draw_episode(figure.add_axes((5.4 * inch[0], top - images, CELL * columns * inch[0], images)), *sample)
    with replace_file(path) as file:
        figure.savefig(file, format="png")
    return path


def _draw_curve(axes: "Axes", epochs: Sequence[Epoch], chance: float | None) -> None:
    """Draw accuracies over iterations, all in %, with the CI of the validation and the chance level."""
    done, train, val, ci = (
        np.array([getattr(epoch, name) for epoch in epochs])
        for name in ("iterations", "train_accuracy", "val_accuracy", "val_ci95_per_episode")
    )
    best, size = _best(epochs), 5 if len(epochs) <= 30 else 2.5
    axes.plot(done, 100 * train, "o-", color=TRAINING, markersize=size, label="training")
    label = "validation, 95 % CI per episode"
    axes.plot(done, 100 * val, "o-", color=VALIDATION, markersize=size, label=label)
    # The band's outline is all there is to see of it after a single epoch.
    axes.fill_between(done, 100 * (val - ci), 100 * (val + ci), color=VALIDATION, alpha=0.2, linewidth=1.5)
    axes.plot(best.iterations, 100 * best.val_accuracy, "*", color=VALIDATION, markersize=13, mec="white")
    if chance:
        axes.axhline(chance, color=CHANCE, linestyle="--", linewidth=1.2, label=f"chance, {chance:.3g} %")
    title = f"Best validation accuracy {100 * best.val_accuracy:.1f} % (★, epoch {best.epoch:.0f})"
    axes.set_title(title, loc="left", fontsize=11, pad=22)
    axes.set(xlabel="iterations", ylabel="accuracy (%)", xlim=(0, 1.05 * done[-1]))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


def _columns(episode: Episode) -> tuple[float, float]:
    """Return where the query images of a drawn episode begin and end, in cells."""
    start = NAME + episode.support.shape[1] + GAP
    return start, start + episode.query.shape[1]


def _draw_episode(axes: "Axes", dataset: str, episode: Episode) -> None:
    """Draw a row for each class: its name, support images, query images framed by whether the answer is right."""
    (start, end), (way, queries) = _columns(episode), episode.predictions.shape
    right = episode.predictions == np.arange(way)[:, None]
    for row, name in enumerate(episode.class_names):
        axes.text(0.25, row + 0.45, str(row + 1), size=11, weight="bold", ha="center", va="center")
        axes.text(0.5, row + 0.45, short_name(str(name)), size=8, va="center", parse_math=False)
        for column, image in enumerate(episode.support[row]):
            _draw_image(axes, image, NAME + column, row, SUPPORT)
        for column, image in enumerate(episode.query[row]):
            _draw_image(axes, image, start + column, row, RIGHT if right[row, column] else WRONG)
            if not right[row, column]:
                corner = start + column + 0.87, row + 0.87, str(episode.predictions[row, column] + 1)
                label = {"facecolor": WRONG, "edgecolor": "none", "pad": 1.5}
                axes.text(*corner, color="white", size=8, ha="right", va="bottom", bbox=label)
    title = f"An episode of {dataset}: {right.sum()} of {right.size} query images right"
    axes.set(xlim=(0, end), ylim=(way, 0), aspect="auto")
    axes.set_title(title, loc="left", x=NAME / end, fontsize=11, pad=22, parse_math=False)
    axes.text(NAME, -0.12, "support", size=9)
    axes.text(start, -0.12, "query" if queries <= SHOWN else f"query, {SHOWN} of {queries} per class", size=9)
    axes.text(start, way + 0.2, "■ right", color=RIGHT, size=9)
    axes.text(start + 1, way + 0.2, "■ wrong: taken for the row in the corner", color=WRONG, size=9)
    axes.axis("off")


def _draw_image(axes: "Axes", image: np.ndarray, x: float, y: float, colour: str) -> None:
    """Draw uint8 (H, W, 1 or 3) into the cell at (x, y) with a frame, its longer side 0.9 cells."""
    from matplotlib.patches import Rectangle

    height, width = 0.9 * np.array(image.shape[:2]) / max(image.shape[:2])
    axes.imshow(np.broadcast_to(image, (*image.shape[:2], 3)), extent=(x, x + width, y + height, y))
    axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=2.5, clip_on=False))


def short_name(name: str) -> str:
    """Return a class name in at most three short lines; U+0531_ARMENIAN_CAPITAL_LETTER_AYB: Armenian capital ayb."""
    words = re.sub(r"^U\+[0-9A-F]+_", "", name).replace("_", " ")
    if name.startswith("U+"):
        words = words.replace(" LETTER", "").capitalize()
    return "\n".join(textwrap.wrap(words, 14, max_lines=3, placeholder="…"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the results of an experiment and draw them.")
    parser.add_argument("folder", type=Path, help="for example experiments/glyphs_5way_1shot/CxGrad_4conv")
    folder = parser.parse_args().folder
    print(write_report(folder))
    print(f"\nPicture: {draw(folder, folder / 'visual_outputs' / 'report.png')}")


if __name__ == "__main__":
    sys.exit(entry.run(main))
