"""The pictures of a run, each drawn from what `utils.records` read; a function returns None where it has no numbers."""

import io
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from utils.files import replace_file
from utils.records import SHOWN, Episode, Epoch, Pair, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = 0.8  # inches from one image of an episode to the next
NAME, GAP = 1.85, 0.3  # widths in cells: of a class name; between support and query images
TRAINING, VALIDATION, CHANCE = "#98a2b3", "#1f5fa8", "#b45309"
SUPPORT, RIGHT, WRONG = "#374151", "#2e9e5b", "#d0342c"
MAP_OF_CLASSES = 40  # so many can be told apart in one map; of more classes the extremes are shown
EXTREMES = 15
FEW = 20  # a rate out of fewer query images is chance


class Picture(NamedTuple):
    """A picture is a PNG with what a reader has to know of it; `name` is its file's."""

    name: str
    title: str
    caption: str
    png: bytes


def pictures(run: Run) -> Iterator[Picture]:
    """Yield all pictures for which the run has numbers."""
    for name, (title, caption, make) in OF_TRAINING.items():
        if figure := make(run):
            yield Picture(name, title, caption, png(figure))
    for name, episode in run.episodes.items():
        title, caption = re.sub(r"\.(\d)$", r", task \1", name), "A task of the test and the best checkpoint's answers."
        yield Picture(f"episode_{name}", f"Test episode: {title}", caption, png(draw_episode(title, episode)))
    for test, pairs in run.confusions.items():
        name, title = f"confusion_{test.replace(' ', '_')}", f"Confusion between classes: {test}"
        yield Picture(name, title, CONFUSION, png(draw_confusion(pairs)))


def png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def plain(inches: tuple[float, float], columns: int = 1, **more: Any) -> "tuple[Figure, list[Axes]]":
    """Return a figure and its axes, side by side."""
    from matplotlib.figure import Figure  # slow to import; without pyplot it draws with Agg and needs no display

    figure = Figure(inches, dpi=100, layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, **more)[0])


def dress(axes: "Axes", title: str, **labels: Any) -> None:
    """Give axes a title, labels and limits, a faint grid, and no frame on top and at the right."""
    axes.set_title(title, loc="left", fontsize=10.5)
    axes.set(**labels)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def shades(count: int) -> list[str]:
    """Return so many colours from dark to light: of layers from the image on, of epochs from the first on."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](place)) for place in np.linspace(0, 0.85, count)]


def marks(points: int) -> dict[str, Any]:
    """Return how a line with so many points is drawn."""
    return {"marker": "o", "markersize": 4 if points <= 30 else 2}


# ---------------------------------------------------------------- training


def draw_learning(run: Run) -> "Figure":
    """Draw loss and accuracy over iterations."""
    figure, (loss, accuracy) = plain((10, 3.8), 2)
    done = column(run.epochs, "iterations")
    for name, colour, label in (("train_loss", TRAINING, "training"), ("val_loss", VALIDATION, "validation")):
        loss.plot(done, column(run.epochs, name), color=colour, label=label, **marks(len(done)))
    dress(loss, "Loss", xlabel="iterations", ylabel="cross-entropy", xlim=(0, 1.05 * done[-1]))
    loss.legend(frameon=False, fontsize=9)
    draw_accuracy(accuracy, run.epochs, run.setup and run.setup.chance)
    return figure


def draw_accuracy(axes: "Axes", epochs: Sequence[Epoch], chance: float | None) -> None:
    """Draw accuracies over iterations, all in %, with the CI of the validation and the chance level."""
    names = ("iterations", "train_accuracy", "val_accuracy", "val_ci95_per_episode")
    done, train, val, ci = (column(epochs, name) for name in names)
    best = max(epochs, key=lambda epoch: epoch.val_accuracy)
    axes.plot(done, 100 * train, color=TRAINING, label="training", **marks(len(epochs)))
    axes.plot(done, 100 * val, color=VALIDATION, label="validation, 95 % CI per episode", **marks(len(epochs)))
    # The band's outline is all there is to see of it after a single epoch.
    axes.fill_between(done, 100 * (val - ci), 100 * (val + ci), color=VALIDATION, alpha=0.2, linewidth=1.5)
    axes.plot(best.iterations, 100 * best.val_accuracy, "*", color=VALIDATION, markersize=13, mec="white")
    if chance:
        axes.axhline(chance, color=CHANCE, linestyle="--", linewidth=1.2, label=f"chance, {chance:.3g} %")
    title = f"Best validation accuracy {100 * best.val_accuracy:.1f} % (★, epoch {best.epoch:.0f})"
    dress(axes, title, xlabel="iterations", ylabel="accuracy (%)", xlim=(0, 1.05 * done[-1]))
    axes.legend(frameon=False, fontsize=9)


def column(epochs: Sequence[Epoch], name: str) -> np.ndarray:
    return np.array([getattr(epoch, name) for epoch in epochs])


def draw_resources(run: Run) -> "Figure":
    """Draw the outer learning rate, the time of an iteration and, where it is recorded, the memory."""
    done = column(run.epochs, "iterations")
    per_epoch = np.array([after - before for before, after in pairwise([0, *done])])
    panels = [
        ("Learning rate", "outer learning rate", done, column(run.epochs, "learning_rate")),
        ("Time", "s per iteration", done, column(run.epochs, "seconds") / per_epoch),
    ]
    if memory := [(one["iterations"], one["peak_memory_gib"]) for one in run.diagnostics if "peak_memory_gib" in one]:
        panels.append(("Memory", "peak so far (GiB)", *np.array(memory).T))
    figure, axes = plain((10, 2.9), len(panels))
    for panel, (title, label, x, y) in zip(axes, panels, strict=True):
        panel.plot(x, y, color=VALIDATION, **marks(len(x)))
        dress(panel, title, xlabel="iterations", ylabel=label, xlim=(0, 1.05 * done[-1]), ylim=(0, 1.1 * max(y) or 1))
    return figure


def recorded(run: Run, name: str) -> np.ndarray:
    return np.array([record[name] for record in run.diagnostics if name in record])


# ---------------------------------------------------------------- inside a task


def series(record: Mapping[str, Any], kind: str) -> dict[str, dict[str, np.ndarray]]:
    """Return the series of a record by layer, mean and deviation as arrays; `kind` is what comes before the slash."""
    named = {name.partition("/"): values for name, values in record["series"].items()}
    return {
        layer: {statistic: np.array(numbers) for statistic, numbers in values.items()}
        for (found, _, layer), values in named.items()
        if found == kind
    }


def draw_steps(run: Run) -> "Figure | None":
    """Draw the accuracy after each inner step: of the first, the middle and the last epoch."""
    records = [record for record in run.diagnostics if "accuracy" in record["series"]]
    if not records:
        return None
    places = sorted({0, len(records) // 2, len(records) - 1})
    figure, (axes,) = plain((6, 3.6))
    for offset, (place, colour) in enumerate(zip(places, shades(len(places)), strict=True)):
        record = records[place]
        mean, std = (100 * values for values in series(record, "accuracy")[""].values())
        steps, ci = np.arange(1, len(mean) + 1), 1.96 * std / record["tasks"] ** 0.5
        beside = steps + 0.04 * (offset - len(places) // 2)  # so that intervals do not hide one another
        axes.errorbar(beside, mean, ci, color=colour, capsize=3, label=f"epoch {record['epoch']}", **marks(1))
    if run.setup:
        chance = run.setup.chance
        axes.axhline(chance, color=CHANCE, linestyle="--", linewidth=1.2, label=f"chance, {chance:.3g} %")
    dress(axes, "Accuracy after each inner step", xlabel="inner step", ylabel="accuracy (%)", xticks=steps)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def layer_colours(run: Run) -> dict[str, str]:
    """Return a colour for each layer, the same in all pictures."""
    layers = series(run.diagnostics[-1], "gradient_norm")
    return dict(zip(layers, shades(len(layers)), strict=True))


def draw_gradient_norms(run: Run) -> "Figure | None":
    """Draw the gradients' norms by layer and inner step of the last epoch, without and with contextual scaling."""
    last = run.diagnostics[-1] if run.diagnostics else {"series": {}}
    unscaled, used = (series(last, kind) for kind in ("gradient_norm_unscaled", "gradient_norm"))
    if not used:
        return None
    titles = ("Without contextual scaling", "With contextual scaling") if unscaled else ("Gradient norms",)
    figure, panels = plain((10, 3.8) if unscaled else (6.5, 3.8), len(titles), sharey=True)
    colours = layer_colours(run)
    for axes, norms, title in zip(panels, (unscaled, used)[-len(titles) :], titles, strict=True):
        for name, values in norms.items():
            steps = np.arange(1, len(values["mean"]) + 1)
            axes.plot(steps, values["mean"], color=colours[name], label=name, **marks(len(steps)))
        dress(axes, title, xlabel="inner step", yscale="log", xticks=steps)
    panels[0].set_ylabel("norm of the gradient")
    legend_beside(panels[-1], "layer")
    return figure


def legend_beside(axes: "Axes", title: str) -> None:
    axes.legend(frameon=False, fontsize=8, title=title, loc="center left", bbox_to_anchor=(1, 0.5))


def draw_gammas(run: Run) -> "Figure | None":
    """Draw CxGrad's gamma of each layer over training, with its deviation between tasks; means over inner steps."""
    found = [(record["iterations"], series(record, "gamma")) for record in run.diagnostics]
    found = [(done, gammas) for done, gammas in found if gammas]
    if not found:
        return None
    figure, (level, spread) = plain((10, 3.8), 2)
    done, colours = [iterations for iterations, _ in found], layer_colours(run)
    for name in found[-1][1]:
        colour = colours[name]
        mean, std = (np.array([gammas[name][what].mean() for _, gammas in found]) for what in ("mean", "std"))
        level.plot(done, mean, color=colour, **marks(len(done)))
        level.fill_between(done, mean - std, mean + std, color=colour, alpha=0.2, linewidth=1)
        spread.plot(done, std / mean, color=colour, label=name, **marks(len(done)))
    limits = (0, 1.05 * done[-1])
    dress(level, "Gamma, ± one deviation over tasks", xlabel="iterations", ylabel="gamma", xlim=limits)
    dress(spread, "Its spread over tasks", xlabel="iterations", ylabel="deviation / mean", xlim=limits)
    legend_beside(spread, "layer")
    return figure


# ---------------------------------------------------------------- heads


def draw_head(run: Run) -> "Figure | None":
    """Draw DropBlock's schedule, the residuals of a head and its tasks without a solution, as far as there are any."""
    panels = [draw for has, draw in HEAD_PANELS.values() if has(run)]
    if not panels:
        return None
    figure, axes = plain((max(3.4 * len(panels), 5), 3.1), len(panels))
    for panel, draw in zip(axes, panels, strict=True):
        draw(panel, run)
    return figure


def _draw_dropblock(axes: "Axes", run: Run) -> None:
    keep = recorded(run, "dropblock_keep")
    axes.plot(recorded(run, "iterations")[-len(keep) :], 100 * keep, color=VALIDATION, **marks(len(keep)))
    dress(axes, "DropBlock", xlabel="iterations", ylabel="kept of the map (%)", ylim=(89.5, 100.5))


def _draw_residuals(axes: "Axes", run: Run) -> None:
    done, residuals = zip(*_residuals(run), strict=True)
    axes.plot(done, residuals, color=VALIDATION, label="mean over tasks", **marks(len(done)))
    axes.axhline(1e-6, color=WRONG, linestyle="--", linewidth=1.2, label="counts as not solved")
    dress(axes, "Residual of the solution", xlabel="iterations", ylabel="relative KKT residual", yscale="log")
    axes.legend(frameon=False, fontsize=8)


def _residuals(run: Run) -> list[tuple[float, float]]:
    found = ((record["iterations"], series(record, "residual")) for record in run.diagnostics)
    return [(done, values[""]["mean"][0]) for done, values in found if values and values[""]["mean"][0] > 0]


def _draw_unsolved(axes: "Axes", run: Run) -> None:
    unsolved = column(run.epochs, "unsolved").astype(int)
    axes.bar(column(run.epochs, "epoch"), unsolved, color=WRONG)
    dress(axes, "Training tasks not solved", xlabel="epoch", ylabel="tasks", ylim=(0, max(1, 1.1 * unsolved.max())))
    axes.locator_params(axis="both", integer=True)
    if not unsolved.any():
        axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center", color=SUPPORT)


HEAD_PANELS: dict[str, tuple[Callable[[Run], Any], "Callable[[Axes, Run], None]"]] = {
    "dropblock": (lambda run: len(recorded(run, "dropblock_keep")), _draw_dropblock),
    "residual": (_residuals, _draw_residuals),
    "unsolved": (lambda run: run.epochs[-1].unsolved is not None and _residuals(run), _draw_unsolved),
}

OF_TRAINING: "dict[str, tuple[str, str, Callable[[Run], Figure | None]]]" = {
    "learning": (
        "Loss and accuracy",
        "Training is the mean over an epoch's tasks, while the model still changes; validation is on fixed tasks.",
        draw_learning,
    ),
    "resources": ("Learning rate, time and memory", "Time is that of training alone.", draw_resources),
    "steps": (
        "Accuracy after each inner step",
        "On the same few validation tasks in every epoch; bars are 95 % intervals over them.",
        draw_steps,
    ),
    "gradient_norms": (
        "Gradient norms in the inner loop",
        "Norm of the support loss's gradient by each layer's weights, on a few validation tasks in the last epoch. "
        "CxGrad is drawn twice: the same tasks from the same weights, without and with its scaling.",
        draw_gradient_norms,
    ),
    "gammas": (
        "Gamma: what contextual scaling chooses",
        "The norm that CxGrad gives each layer's weights; a task's step size is the inner rate divided by its square.",
        draw_gammas,
    ),
    "head": (
        "The head",
        "The residual says how exactly the head's problem was solved, on a few validation tasks.",
        draw_head,
    ),
}


# ---------------------------------------------------------------- the test


CONFUSION = (
    "Of the query images of a class, how many were taken for another one, out of those in tasks that had both classes; "
    "beside them, how many were right. Answers of the best checkpoint."
)


def draw_confusion(pairs: Sequence[Pair]) -> "Figure":
    """Draw a map of all pairs and each class's accuracy; of many classes the least accurate, and the worst pairs."""
    own = {pair.true: 100 * pair.rate for pair in pairs if pair.true == pair.predicted}
    if len(own) > MAP_OF_CLASSES:
        return _draw_extremes(pairs, own)
    names, height = list(own), 1.9 + 0.2 * len(own)
    figure, (axes, bars) = plain((height + 5, height), 2, width_ratios=(3, 1), sharey=True)
    rates = np.full((len(names), len(names)), np.nan)
    for pair in pairs:
        if pair.true != pair.predicted:
            rates[names.index(pair.true), names.index(pair.predicted)] = 100 * pair.rate
    image = axes.imshow(rates, cmap="Reds", vmin=0, aspect="auto")
    figure.colorbar(image, ax=axes, label="taken for (%)", location="left", shrink=0.6)
    labels = [one_line(name) for name in names]
    axes.set_facecolor("#eef0f3")
    axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=7, parse_math=False)
    axes.set_yticks(range(len(names)), labels, fontsize=7, parse_math=False)
    axes.set(xlabel="answer", ylabel="class")
    _draw_bars(bars, [*own.values()], [f"{rate:.0f}" for rate in own.values()], RIGHT, "right (%)")
    axes.set_ylim(len(names) - 0.5, -0.5)
    return figure


def _draw_bars(axes: "Axes", values: Sequence[float], texts: Sequence[str], colour: str, label: str) -> None:
    axes.barh(range(len(values)), values, color=colour, height=0.7)
    for place, (value, text) in enumerate(zip(values, texts, strict=True)):
        axes.text(value, place, f" {text}", va="center", size=7)
    axes.set(xlabel=label, xlim=(0, 1.15 * max([*values, 1])))
    axes.spines[["top", "right"]].set_visible(False)


def _draw_extremes(pairs: Sequence[Pair], own: Mapping[str, float]) -> "Figure":
    figure, panels = plain((10, 1.2 + 0.24 * EXTREMES), 2)
    others = [pair for pair in pairs if pair.true != pair.predicted and pair.answers]
    sure = [pair for pair in others if pair.of >= FEW] or others
    worst = sorted(sure, key=lambda pair: -pair.rate)[:EXTREMES]
    least = sorted(own, key=own.__getitem__)[:EXTREMES]
    answers = [f"{one_line(pair.true)} → {one_line(pair.predicted)}" for pair in worst]
    accuracies, rates = [own[name] for name in least], [100 * pair.rate for pair in worst]
    counts = [f"{pair.answers} of {pair.of}" for pair in worst]
    _draw_bars(panels[0], accuracies, [f"{rate:.0f}" for rate in accuracies], RIGHT, "right (%)")
    _draw_bars(panels[1], rates, counts, WRONG, "taken for the other (%)")
    titles = "Least accurate classes", "Most frequent mistakes"
    for axes, labels, title in zip(panels, ([one_line(name) for name in least], answers), titles, strict=True):
        axes.set_yticks(range(len(labels)), labels, fontsize=7, parse_math=False)
        axes.set_title(title, loc="left", fontsize=10.5)
        axes.set_ylim(EXTREMES - 0.5, -0.5)
    return figure


def draw_episode(dataset: str, episode: Episode) -> "Figure":
    """Draw a sample episode alone."""
    from matplotlib.figure import Figure

    width, height = CELL * _columns(episode)[1], CELL * (len(episode.support) + 0.35)
    figure = Figure((width + 0.2, height + 0.75), dpi=100)
    inch = 1 / figure.get_size_inches()
    box = 0.1 * inch[0], 0.05 * inch[1], width * inch[0], height * inch[1]
    _fill_episode(figure.add_axes(box), dataset, episode, bottom=0.35)
    return figure


def draw_overview(run: Run, path: Path) -> Path:
    """Draw training curve and sample episode into the PNG `path`."""
    from matplotlib.figure import Figure

    sample = next(iter(run.episodes.items()), None)
    rows, columns = (len(sample[1].support), _columns(sample[1])[1]) if sample else (5, 0.0)
    figure = Figure((5.5 + CELL * columns, 1.75 + CELL * rows), dpi=150)
    inch = 1 / figure.get_size_inches()  # of the figure's width and height
    figure.text(0.3 * inch[0], 1 - 0.3 * inch[1], run.title, size=13, weight="bold", va="center", parse_math=False)
    top = 1 - 1.1 * inch[1]  # of both drawings
    curve, images = CELL * min(rows, 6) * inch[1], CELL * rows * inch[1]  # heights
    axes = figure.add_axes((0.8 * inch[0], top - curve, 4.3 * inch[0], curve))
    draw_accuracy(axes, run.epochs, run.setup and run.setup.chance)
    axes.set_title(axes.get_title(loc="left"), loc="left", fontsize=11, pad=22)  # as high as the episode's
    if sample:
        _fill_episode(figure.add_axes((5.4 * inch[0], top - images, CELL * columns * inch[0], images)), *sample)
    with replace_file(path) as file:
        figure.savefig(file, format="png")
    return path


def _columns(episode: Episode) -> tuple[float, float]:
    """Return where the query images of a drawn episode begin and end, in cells."""
    start = NAME + episode.support.shape[1] + GAP
    return start, start + episode.query.shape[1]


def _fill_episode(axes: "Axes", dataset: str, episode: Episode, bottom: float = 0) -> None:
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
    axes.set(xlim=(0, end), ylim=(way + bottom, 0), aspect="auto")
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
    return "\n".join(textwrap.wrap(_words(name), 14, max_lines=3, placeholder="…"))


def one_line(name: str) -> str:
    """Return a class name in one line of at most 24 characters."""
    return textwrap.shorten(_words(name), 24, placeholder="…") if " " in _words(name) else _words(name)[:24]


def _words(name: str) -> str:
    words = re.sub(r"^U\+[0-9A-F]+_", "", name).replace("_", " ")
    return words.replace(" LETTER", "").capitalize() if name.startswith("U+") else words
