"""One model on several data sets: a table, a CSV file and a heat map."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from utils.files import replace_file, write_csv
from utils.tables import aligned

CELL = (1.5, 0.7)  # inches
LABELS = 2.6, 1.1  # inches left of the cells and above them


def write_cross_domain(folder: Path, results: Sequence[Mapping[str, Any]]) -> str:
    """Write FOLDER/logs/cross_domain.csv and FOLDER/visual_outputs/cross_domain.png, and return the table as text.

    `results` are those of `meta_test`; accuracies come in %, with the 95 % CI per episode.
    """
    found = {(_row(result), result["dataset"]): result for result in results}
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    table = [[row, *(_cell(found[row, column]) for column in columns)] for row in rows]
    header = ["model", *columns]
    write_csv(folder / "logs" / "cross_domain.csv", [dict(zip(header, line, strict=True)) for line in table])
    file = folder / "visual_outputs" / "cross_domain.png"
    title = f"Trained on {results[0]['trained_on']}, {results[0]['way']}-way; accuracy in % ± 95 % CI per episode"
    with replace_file(file) as handle:
        _draw(handle, title, columns, table, [[found[row, column]["accuracy"] for column in columns] for row in rows])
    return "\n".join([title, *aligned([["", *columns], *table]), f"Picture: {file}"])


def _row(result: Mapping[str, Any]) -> str:
    model = "ensemble" if "ensemble" in result["model"] else result["model"]
    return f"{result['shot']}-shot, {model}"


def _cell(result: Mapping[str, Any]) -> str:
    return f"{100 * result['accuracy']:.2f} ± {100 * result['ci95_per_episode']:.2f}"


def _draw(
    handle: IO[bytes],
    title: str,
    columns: Sequence[str],
    table: Sequence[Sequence[str]],
    accuracies: Sequence[Sequence[float]],
) -> None:
    """Draw the table, a row's name first in each of its lines, with cells coloured by the accuracies in [0, 1]."""
    from matplotlib.figure import Figure  # slow to import, and not needed by those who test on one data set

    wide, high = CELL[0] * len(columns), CELL[1] * len(table)
    width, height = max(LABELS[0] + wide + 0.2, 8), LABELS[1] + high + 0.2
    figure = Figure(figsize=(width, height), dpi=150)
    axes = figure.add_axes((LABELS[0] / width, 0.2 / height, wide / width, high / height))
    axes.imshow(accuracies, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, parse_math=False)
    axes.set_yticks(range(len(table)), [row for row, *_ in table])
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for row, (_, *cells) in enumerate(table):
        for column, text in enumerate(cells):
            colour = "white" if accuracies[row][column] > 0.6 else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, size=9)
    figure.text(0.1 / width, 1 - 0.3 / height, title, size=10, weight="bold", va="center", parse_math=False)
    figure.savefig(handle, format="png")
