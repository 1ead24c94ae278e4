"""One model on several data sets: a table, a CSV file and a heat map."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import replace_file, write_csv

CELL = (1.5, 0.7)  # inches
LABELS = 2.6, 1.1  # inches left of the cells and above them


def write_cross_domain(folder: Path, results: Sequence[Mapping[str, Any]]) -> str:
    """FOLDER/logs/cross_domain.csv and FOLDER/visual_outputs/cross_domain.png; returns the table as text.

    `results` are those of `meta_test`; accuracies come in %, with the 95 % CI per episode.
    """
    rows = list(dict.fromkeys(map(_row, results)))
    columns = list(dict.fromkeys(result["dataset"] for result in results))
    found = {(_row(result), result["dataset"]): result for result in results}
    cells = [[_cell(found[row, column]) for column in columns] for row in rows]
    table = [{"model": row} | dict(zip(columns, line, strict=True)) for row, line in zip(rows, cells, strict=True)]
    write_csv(folder / "logs" / "cross_domain.csv", table)
    accuracies = np.array([[100 * found[row, column]["accuracy"] for column in columns] for row in rows])
    file = folder / "visual_outputs" / "cross_domain.png"
    title = f"Trained on {results[0]['trained_on']}, {results[0]['way']}-way; accuracy in % ± 95 % CI per episode"
    with replace_file(file) as handle:
        _draw(handle, title, rows, columns, accuracies, cells)
    lines = [["", *columns], *([row, *line] for row, line in zip(rows, cells, strict=True))]
    return "\n".join([title, *_aligned(lines), f"Picture: {file}"])


def _row(result: Mapping[str, Any]) -> str:
    model = "ensemble" if "ensemble" in result["model"] else result["model"]
    return f"{result['shot']}-shot, {model}"


def _cell(result: Mapping[str, Any]) -> str:
    return f"{100 * result['accuracy']:.2f} ± {100 * result['ci95_per_episode']:.2f}"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return ["   ".join([line[0].ljust(first), *map(str.rjust, line[1:], others)]).rstrip() for line in lines]


def _draw(
    handle: Any,
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    accuracies: np.ndarray,
    cells: Sequence[Sequence[str]],
) -> None:
    from matplotlib.figure import Figure  # slow to import, and not needed by those who test on one data set

    width, height = LABELS[0] + CELL[0] * len(columns) + 0.2, LABELS[1] + CELL[1] * len(rows) + 0.2
    figure = Figure(figsize=(max(width, 8), height), dpi=150)
    axes = figure.add_axes(
        (LABELS[0] / max(width, 8), 0.2 / height, CELL[0] * len(columns) / max(width, 8), CELL[1] * len(rows) / height)
    )
    axes.imshow(accuracies, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, parse_math=False)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for row, line in enumerate(cells):
        for column, text in enumerate(line):
            colour = "white" if accuracies[row, column] > 60 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, size=9)
    figure.text(0.1 / max(width, 8), 1 - 0.3 / height, title, size=10, weight="bold", va="center", parse_math=False)
    figure.savefig(handle, format="png")
