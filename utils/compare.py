"""Runs side by side, with the published accuracies of their rows: a table, a picture and a page.

python -m utils.compare experiments/CIFAR_FS_5way_5shot/*                writes comparison.html and comparison.png
python -m utils.compare EXPERIMENT EXPERIMENT --to ablation.html
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from utils import entry, published
from utils.errors import UserError
from utils.figures import column, dress, marks, plain, png
from utils.files import replace_file
from utils.options import Options
from utils.published import Published
from utils.records import Result, Run, read_run
from utils.report import write_page
from utils.results import method_of
from utils.scores import is_ensemble
from utils.tables import aligned

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#1f5fa8", "#d9730d", "#2e9e5b", "#9a3fb5", "#c2185b", "#0e8a9c", "#7a5c2e", "#5b6472")
PUBLISHED = "#111827"
MOST = len(COLOURS)  # more lines cannot be told apart
HEADINGS = ["run", "best validation", "test", "single", "ensemble", "published"]


class Outcome(NamedTuple):
    """An outcome is what one run reached on one data set with one shot."""

    run: Run
    results: list[Result]  # of the single best checkpoint and of ensembles
    published: Published | None  # the number to compare with, if the row has one

    @property
    def name(self) -> str:
        first = self.results[0]
        changed = f" ({first.changed})" if first.changed else ""
        return f"{first.dataset}, {first.way}-way {first.shot}-shot{changed}"


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Return the runs in these folders; raises UserError for a folder that is none, or too many of them."""
    different = list(dict.fromkeys(folder.resolve() for folder in folders))
    if len(different) > MOST:
        raise UserError(f"{len(different)} runs cannot be told apart in one picture; name at most {MOST}")
    for folder in different:
        if not (folder / "logs" / "summary_statistics.csv").is_file():
            raise UserError(f"{folder} is no experiment with a finished epoch: it has no logs/summary_statistics.csv")
    return [read_run(folder) for folder in different]


def names(runs: Sequence[Run]) -> dict[Path, str]:
    """Return what to call the run of each folder: its title, or the whole path where others have the same title."""
    titles = Counter(run.title for run in runs)
    return {run.folder: run.title if titles[run.title] == 1 else str(run.folder) for run in runs}


def outcomes(runs: Sequence[Run]) -> list[Outcome]:
    """Return each run's tests on each data set and shot."""
    lines, found = published.read(), []
    for run in runs:
        options = Options.from_mapping(run.options, str(run.folder / "logs" / "options.json"), saved=True)
        method, network = method_of(options), options.backbone
        rows = lines if run.options else []  # without its options a run is of no known row
        for protocol, dataset in dict.fromkeys((result.protocol, result.dataset) for result in run.results):
            results = [one for one in run.results if (one.protocol, one.dataset) == (protocol, dataset)]
            first = results[0]
            line = published.line_of(rows, method, network, dataset, first.way, first.shot)
            known = line if line and line.accuracy is not None and dataset == first.trained_on else None
            found.append(Outcome(run, results, known))
    return found


def check_comparable(runs: Sequence[Run], tests: Sequence[Outcome]) -> None:
    """Raise UserError where there is nothing to compare."""
    if len(runs) == 1 and not any(test.published for test in tests):
        problem = "it is not tested yet" if not tests else "no accuracy is published for its row"
        raise UserError(f"there is nothing to compare {runs[0].folder} with: {problem}. Name a second experiment")


def table(runs: Sequence[Run], tests: Sequence[Outcome]) -> list[list[str]]:
    """Return headings and a row for each run and test; accuracies in % with the 95 % CI per episode."""
    rows, named = [HEADINGS], names(runs)
    for run in runs:
        best = run.best
        validation = f"{100 * best.val_accuracy:.2f} ± {100 * best.val_ci95_per_episode:.2f}"
        start = [named[run.folder], f"{validation} (epoch {best.epoch:.0f})"]
        own = [test for test in tests if test.run is run]
        rows += [[*start, *_cells(test)] for test in own] or [[*start, "not tested", "–", "–", "–"]]
    return rows


def _cells(test: Outcome) -> list[str]:
    single, ensemble = (
        [f"{r.accuracy:.2f} ± {r.ci95_per_episode:.2f}" for r in test.results if is_ensemble(r.model) == wanted]
        for wanted in (False, True)
    )
    number = test.published and f"{test.published.number}{published.MARKS[test.published.mark][1]}"
    return [test.name, " ".join(single) or "–", " ".join(ensemble) or "–", number or "–"]


def sources(tests: Sequence[Outcome]) -> list[str]:
    """Return where the published numbers come from, a sentence for each."""
    numbers = dict.fromkeys(test.published for test in tests if test.published)
    return [
        f"{one.method}, {one.network}, {one.dataset} {one.way}-way {one.shot}-shot: {one.number} %, "
        f"{published.MARKS[one.mark][0]}{one.source} ({one.citation})"
        for one in numbers
    ]


def draw(runs: Sequence[Run], tests: Sequence[Outcome]) -> "Figure":
    """Draw the validation accuracy of all runs by iteration and, where there are tests, what they reached."""
    colours, named = {run.folder: colour for run, colour in zip(runs, COLOURS, strict=False)}, names(runs)
    height = max(4.2, 1.4 + 0.55 * len(tests))
    if not tests:
        figure, (curves,) = plain((8, height))
    else:
        figure, (curves, points) = plain((13, height), 2)
        _draw_tests(points, tests, colours, named)
    for run in runs:
        columns = ("iterations", "val_accuracy", "val_ci95_per_episode")
        done, accuracy, ci = (column(run.epochs, name) for name in columns)
        colour = colours[run.folder]
        curves.plot(done, 100 * accuracy, color=colour, label=_plain(named[run.folder]), **marks(len(done)))
        curves.fill_between(done, 100 * (accuracy - ci), 100 * (accuracy + ci), color=colour, alpha=0.15)
    dress(curves, "Validation accuracy, 95 % CI per episode", xlabel="iterations", ylabel="accuracy (%)")
    curves.set_xlim(left=0)
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower left", frameon=False, fontsize=9, ncols=2)
    return figure


def _draw_tests(axes: "Axes", tests: Sequence[Outcome], colours: Mapping[Path, str], named: Mapping[Path, str]) -> None:
    """Draw a line for each test: single best, ensemble with CI and, as a diamond, the published accuracy."""
    for place, test in enumerate(tests):
        for result in test.results:
            ensemble = is_ensemble(result.model)
            colour = colours[test.run.folder]
            at, face = (place + 0.13, "white") if ensemble else (place - 0.13, colour)
            style: dict[str, Any] = {"fmt": "s" if ensemble else "o", "color": colour, "markerfacecolor": face}
            axes.errorbar(result.accuracy, at, xerr=result.ci95_per_episode, capsize=3, **style)
        if test.published:
            axes.plot(float(test.published.accuracy or 0), place, "D", color=PUBLISHED, markersize=6)
    keys = [("o", "single best", "grey"), ("s", "ensemble", "white"), ("D", "published", PUBLISHED)]
    for marker, label, face in keys if any(test.published for test in tests) else keys[:2]:
        axes.plot([], [], marker, color=PUBLISHED, markerfacecolor=face, label=label)
    dress(axes, "Test accuracy, 95 % CI per episode", xlabel="accuracy (%)")
    axes.set_yticks(range(len(tests)), [f"{named[test.run.folder]}\n{test.name}" for test in tests], parse_math=False)
    axes.tick_params(axis="y", labelsize=8)
    axes.set_ylim(len(tests) - 0.5, -0.5)
    axes.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.06), ncols=3)


def _plain(text: str) -> str:
    return text.replace("$", r"\$")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="EXPERIMENT", help="folders of runs")
    parser.add_argument("--to", type=Path, default=Path("comparison.html"), help="the page; the picture lies beside it")
    arguments = parser.parse_args(argv)
    if arguments.to.suffix != ".html":
        raise UserError(f"--to is {arguments.to}; it takes the name of a page, such as comparison.html")
    runs = read_runs(arguments.folders)
    tests = outcomes(runs)
    check_comparable(runs, tests)
    rows, read_in = table(runs, tests), sources(tests)
    print(
        "\n".join(["Accuracies in %, ± 95 % CI per episode", "", *aligned(rows), *([""] if read_in else []), *read_in])
    )
    picture = png(draw(runs, tests))
    with replace_file(arguments.to.with_suffix(".png")) as file:
        file.write(picture)
    write_page(arguments.to, "compare", "Comparison of runs", rows=rows, sources=read_in, png=picture)
    print(f"\nPicture: {arguments.to.with_suffix('.png')}\nPage: {arguments.to}")


if __name__ == "__main__":
    sys.exit(entry.run(main))
