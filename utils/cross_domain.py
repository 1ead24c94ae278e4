"""One model on several data sets: a table, a CSV file and a heat map."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.files import replace_file, write_csv
from utils.scores import is_ensemble
from utils.tables import aligned


def write_cross_domain(folder: Path, results: Sequence[Mapping[str, Any]]) -> str:
    """Write FOLDER/logs/cross_domain.csv and FOLDER/visual_outputs/cross_domain.png, and return the table as text.

    `results` are those of `meta_test`; accuracies come in %, with the 95 % CI per episode.
    """
    from matplotlib.figure import Figure  # slow to import, and not needed by those who test on one data set

    models = ["ensemble" if is_ensemble(result["model"]) else result["model"] for result in results]
    names = [f"{result['shot']}-shot, {model}" for result, model in zip(results, models, strict=True)]
    found = {(name, result["dataset"]): result for name, result in zip(names, results, strict=True)}
    rows, columns = (list(dict.fromkeys(keys)) for keys in zip(*found, strict=True))
    accuracies = [[found[row, column]["accuracy"] for column in columns] for row in rows]
    cells = {key: f"{100 * one['accuracy']:.2f} ± {100 * one['ci95_per_episode']:.2f}" for key, one in found.items()}
    table = [{"model": row} | {column: cells[row, column] for column in columns} for row in rows]
    title = f"Trained on {results[0]['trained_on']}, {results[0]['way']}-way; accuracy in % ± 95 % CI per episode"
    write_csv(folder / "logs" / "cross_domain.csv", table)

    figure = Figure((max(2.8 + 1.5 * len(columns), 8), 1.3 + 0.7 * len(rows)), dpi=150, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", size=10, weight="bold", parse_math=False)
    axes = figure.subplots()
    axes.imshow(accuracies, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, parse_math=False)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            colour = "white" if accuracies[y][x] > 0.6 else "black"
            axes.text(x, y, cells[row, column], ha="center", va="center", color=colour, size=9)
    path = folder / "visual_outputs" / "cross_domain.png"
    with replace_file(path) as file:
        figure.savefig(file, format="png")
    return "\n".join([title, *aligned([["", *columns], *(list(line.values()) for line in table)]), f"Picture: {path}"])
