"""Results of all runs in one table: what was reached, what was published of that row, and what it cost.

python -m utils.results                     the runs in experiments/: prints the table; experiments/results.{md,csv}
python -m utils.results FOLDER [FOLDER …]   the runs below these folders; the files go into the first
python -m utils.results --docs [FOLDER …]   keeps the results of these runs, if any, in docs/results.csv, and makes the
                                            tables of README.md and docs/results.md and the scripts' headers anew

A run is a folder with logs/test_summary.json. Runs that differ in nothing but their seeds are one line of the table.
"""

import argparse
import dataclasses
import json
import logging
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args

from inner_loop_optimizers import RULES
from meta_test import identity
from utils import entry, published
from utils.environment import read_environments
from utils.errors import UserError
from utils.files import parsed_json, write_csv, write_text
from utils.options import Options, declaration
from utils.progress import set_up_logging
from utils.published import MARKS, SCRIPTS, Published
from utils.records import read_epochs, read_table, read_tests
from utils.scores import is_ensemble

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
README, DOCUMENT, KEPT = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "docs" / "results.csv"
SPELLED = {"SVM-CS": "MetaOptNet-SVM", "Ridge": "MetaOptNet-RR", "MetaSGD": "Meta-SGD"}  # otherwise in the code
SEEDS = ("seed", "train_seed")
# The rows of the README's table: method, network, data set.
HEADLINES = (
    ("CxGrad", "4-CONV", "miniImageNet"),
    ("MetaOptNet-SVM", "ResNet-12", "miniImageNet"),
    ("MetaOptNet-RR", "ResNet-12", "CIFAR-FS"),
)
LEGEND = (
    "A dash: not known or not recorded. ± is the 95 % interval per episode; where a line says seeds, the standard "
    "deviation over them. Iterations: trained, of those of the row's script. Hours of training alone, and the peak of "
    "memory: on the GPU, or of the whole process on a CPU; of one seed. Pixels: how `--normalization` scales them. "
    "Zero context: CxGrad trained with gammas that no task changes (`--context_params_learning_rate 0`)."
)


@dataclass(frozen=True)
class Row:
    """One line of the table: a training, a test of it, and what it cost. Accuracies and what is behind ± are in %."""

    method: str
    network: str
    trained_on: str
    dataset: str
    way: int
    shot: int
    query: int
    episodes: int
    batch_norm: str
    normalization: str  # of the pixels
    adaptation: str  # inner steps or the head, in the test
    changed: str  # what else the test had otherwise than the training
    iterations: int
    seeds: int
    single: float | None
    single_pm: float | None  # of one seed the 95 % CI per episode; of several their standard deviation
    ensemble: float | None
    ensemble_pm: float | None
    hours: float | None  # of training, of one seed
    peak_gib: float | None
    device: str
    commit: str

    @property
    def name(self) -> tuple[object, ...]:
        """Return what seeds of one training and test have in common."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self)[:13])

    @property
    def title(self) -> str:
        """Return the line in words, without its numbers."""
        changed = f" ({self.changed})" if self.changed else ""
        return f"{self.method}, {self.network}, {self.data} {self.way}-way {self.shot}-shot{changed}"

    @property
    def data(self) -> str:
        """Return the data set, or both where it was not tested on the one that it was trained on."""
        return self.dataset if self.trained_on == self.dataset else f"{self.trained_on} → {self.dataset}"


@dataclass(frozen=True)
class Tested:
    """A test of a run of one seed."""

    setting: str  # equal for runs that differ in nothing but their seeds
    seed: tuple[int, ...]
    row: Row


# --- reading runs ----------------------------------------------------------------------------------------------------


def collect(folders: Iterable[Path]) -> list[Row]:
    """Return a line for each training and test below the folders; several seeds of one are one line.

    A seed that was run twice has two lines. A run that cannot be read is left out with a warning. Raises UserError for
    a folder that is not there.
    """
    lines: dict[tuple[object, ...], list[dict[tuple[int, ...], Row]]] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}; name one that holds runs, such as experiments")
        for summary in sorted(folder.rglob("logs/test_summary.json")):
            for tested in _read(summary.parent):
                alike = lines.setdefault((tested.setting, tested.row.name), [])
                if all(tested.seed in line for line in alike):
                    alike.append({})
                next(line for line in alike if tested.seed not in line)[tested.seed] = tested.row
    return sorted((over_seeds(list(line.values())) for alike in lines.values() for line in alike), key=_order)


def _order(row: Row) -> tuple[object, ...]:
    return row.trained_on, row.method, row.network, row.trained_on != row.dataset, row.dataset, row.shot


def _read(logs: Path) -> list[Tested]:
    """Return the tests of one run; none, with a warning, where its files cannot be read."""
    try:
        return list(_tests(logs))
    except FileNotFoundError as error:
        log.warning("%s is left out: there is no %s", logs.parent, error.filename)
    except Exception as error:  # whatever they hold
        log.warning("%s is left out: %s", logs.parent, error if isinstance(error, UserError) else repr(error))
    return []


def _tests(logs: Path) -> Iterator[Tested]:
    saved = parsed_json((logs / "options.json").read_bytes())
    options, training = Options.from_mapping(saved, str(logs / "options.json"), saved=True), _training(logs)
    values = dataclasses.asdict(options)
    of_run = {n: v for n, v in values.items() if n not in SEEDS and declaration(n).resume != "ignore"}
    summary = read_tests(logs / "test_summary.json")
    by_protocol: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for result in sorted(summary, key=lambda result: result["model"] != "single best"):
        by_protocol.setdefault(identity({**result, "model": ""}), []).append(result)
    for protocol, results in by_protocol.items():
        setting = json.dumps([of_run, protocol], sort_keys=True)
        yield Tested(setting, tuple(values[name] for name in SEEDS), _row(options, training, results))


def _training(logs: Path) -> dict[str, Any]:
    """Return what a training cost and where; hours and memory are None where they are not recorded."""
    epochs = read_epochs(logs.parent)
    environments = read_environments(logs / "environment.json")
    devices, commits = (list(dict.fromkeys(_place(e)[k] for e in environments)) for k in (0, 1))
    return {
        "iterations": int(epochs[-1].iterations),
        "hours": round(sum(epoch.seconds for epoch in epochs) / 3600, 2),
        "peak_gib": round(max(e["peak_memory_gib"] for e in environments), 2) if environments else None,
        "device": "; ".join(devices),
        "commit": "; ".join(commits),
    }


def _place(environment: Mapping[str, Any]) -> tuple[str, str]:
    count = environment["processes"]
    return (f"{count} × " if count > 1 else "") + environment["device"], environment["commit"]


def _row(options: Options, training: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> Row:
    """Return the line of one training and one protocol from its results, of single models first."""
    first, found = results[0], {}
    for result in reversed(results):
        kind = "ensemble" if is_ensemble(result["model"]) else "single"
        found[kind] = [round(100 * result[key], 2) for key in ("accuracy", "ci95_per_episode")]
    single, ensemble = (found.get(kind, [None, None]) for kind in ("single", "ensemble"))
    method = method_of(options)
    if options.learner == "gradient" and first.get("head"):
        method += " with another head"
    names = ("trained_on", "dataset", "way", "shot", "query", "episodes", "batch_norm", "normalization")
    values: dict[str, Any] = {name: first[name] for name in names} | dict(training)
    values |= {"method": method, "network": options.backbone, "seeds": 1}
    values |= {"single": single[0], "single_pm": single[1], "ensemble": ensemble[0], "ensemble_pm": ensemble[1]}
    adaptation = first.get("head") or f"{first['steps']} steps"
    return Row(adaptation=adaptation, changed=first.get("changed", ""), **values)


def method_of(options: Any) -> str:
    """Return the name of a run's method, as papers spell it; a plug-in's is its class's or head's."""
    return " + ".join(methods_of(options))


def methods_of(options: Any) -> list[str]:
    """Return the names of the methods that the options combine."""
    if options.learner == "head":
        return [SPELLED.get(str(options.head), str(options.head))]
    rules = [name for name, rule in RULES.items() if rule.chosen(options)]
    if "LSLR" in rules and options.use_multi_step_loss_optimization:
        rules[rules.index("LSLR")] = "MAML++"
    if "CxGrad" in rules and not options.context_params_learning_rate:
        rules[rules.index("CxGrad")] = "CxGrad (zero context)"
    if "ALFA" in rules and options.random_init:
        rules[rules.index("ALFA")] = "ALFA (random init)"
    return sorted(SPELLED.get(name, name) for name in rules) or ["MAML"]


def over_seeds(rows: Sequence[Row]) -> Row:
    """Return the line of several seeds: mean and standard deviation, mean hours, the highest peak of memory."""
    if len(rows) == 1:
        return rows[0]
    changes: dict[str, Any] = {"seeds": len(rows)}
    for kind in ("single", "ensemble"):
        values = [value for value in map(attrgetter(kind), rows) if value is not None]
        whole = len(values) == len(rows)
        changes[kind] = round(statistics.mean(values), 2) if whole else None
        changes[f"{kind}_pm"] = round(statistics.stdev(values), 2) if whole else None
    changes["hours"] = round(statistics.mean(row.hours or 0 for row in rows), 2)
    changes["peak_gib"] = max((row.peak_gib for row in rows if row.peak_gib is not None), default=None)
    for name in ("device", "commit"):
        changes[name] = "; ".join(dict.fromkeys(filter(None, map(attrgetter(name), rows))))
    return dataclasses.replace(rows[0], **changes)


# --- beside what was published ---------------------------------------------------------------------------------------


def published_line(row: Row, lines: Iterable[Published]) -> Published | None:
    """Return the first published line of the row that a run is of; None if there is no such row."""
    return published.line_of(lines, row.method, row.network, row.trained_on, row.way, row.shot)


def recipe_iterations(line: Published) -> int:
    """Return how many iterations the script of a published line trains."""
    script = (SCRIPTS / f"{line.row}.sh").read_text(encoding="utf-8")
    epochs, iterations = (re.search(rf"--{name} (\d+)", script) for name in ("total_epochs", "total_iter_per_epoch"))
    assert epochs and iterations, f"{line.row}.sh does not say how long it trains"
    return int(epochs[1]) * int(iterations[1])


def record(row: Row, lines: Sequence[Published]) -> dict[str, Any]:
    """Return a line of the CSV file: the row, what was published of it, and the iterations of its script."""
    line = published_line(row, lines)
    known = line if line and line.accuracy is not None and row.dataset == row.trained_on and not row.changed else None
    return dataclasses.asdict(row) | {
        "recipe_iterations": recipe_iterations(line) if line else "",
        "published": f"{known.number}{MARKS[known.mark][1]}" if known else "",
        "published_source": f"{MARKS[known.mark][0]}{known.source}" if known else "",
    }


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown(rows: Iterable[Row], lines: Sequence[Published]) -> str:
    """Return the Markdown table, with its legend."""
    header = "method, network;trained → tested on;task;published;single best;ensemble;batch norm;pixels;adaptation"
    table = [[*header.split(";"), "iterations", "episodes", "hours", "GiB", "device", "commit"]]
    table.append(["---"] * len(table[0]))
    for row in rows:
        values = record(row, lines)
        of, source = values["recipe_iterations"], values["published_source"]
        cells = [
            f"{row.method}, {row.network}",
            row.data,
            f"{row.way}-way {row.shot}-shot",
            values["published"] + (f" ({source})" if source else ""),
            *accuracies(row),
            row.batch_norm,
            row.normalization,
            ", ".join(filter(None, (row.adaptation, row.changed))),
            f"{row.iterations:,}" + (f" of {of:,}" if of else ""),
            f"{row.episodes:,}",
            *("" if value is None else f"{value:.2f}" for value in (row.hours, row.peak_gib)),
            row.device,
            row.commit,
        ]
        table.append([" ".join(cell.split()).replace("|", r"\|") or "–" for cell in cells])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table) + f"\n{LEGEND}\n"


def accuracies(row: Row) -> tuple[str, str]:
    """Return the accuracy of the single best model and of the ensemble as text, "" for one that is not there."""
    seeds = f" ({row.seeds} seeds)" if row.seeds > 1 else ""
    return _with_spread(row.single, row.single_pm, seeds), _with_spread(row.ensemble, row.ensemble_pm, seeds)


def _with_spread(value: float | None, spread: float | None, seeds: str) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" + ("" if spread is None else f" ± {spread:.2f}") + seeds


def headlines(rows: Sequence[Row], lines: Sequence[Published]) -> str:
    """Return the README's table: a few published rows, and ours where the whole of the row's script was run."""
    table = [["5-way 1-/5-shot, %", "published", "ours"], ["---"] * 3]
    for names in HEADLINES:
        published_cells, our_cells = [], []
        for shot in (1, 5):
            line = next(one for one in lines if (one.method, one.network, one.dataset, one.shot) == (*names, shot))
            published_cells.append(f"{line.number}{MARKS[line.mark][1]}")
            ours = [row for row in rows if _is_whole(row, line, lines)]
            our_cells.append(accuracies(ours[-1])[0] if ours else "not run yet")
        table.append([", ".join(names), " / ".join(published_cells), " / ".join(dict.fromkeys(our_cells))])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def _is_whole(row: Row, line: Published, lines: Sequence[Published]) -> bool:
    """Return whether a result is one of the published line, trained as long and tested as its script says."""
    batch_norm = "running" if line.has_head else "transductive"
    as_published = (row.dataset, row.batch_norm, row.changed) == (row.trained_on, batch_norm, "")
    return as_published and published_line(row, lines) == line and row.iterations >= recipe_iterations(line)


# --- files -----------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """Return the lines of a CSV file that `write_rows` wrote; raises UserError with the number of a damaged one."""
    fields = dataclasses.fields(Row)
    return read_table(path, lambda line: Row(**{field.name: _parsed(line[field.name], field.type) for field in fields}))


def _parsed(text: str, kind: Any) -> Any:
    (kind, *optional) = get_args(kind) or (kind,)
    return None if optional and not text else kind(text)


def write_rows(path: Path, rows: Iterable[Row], lines: Sequence[Published]) -> None:
    """Replace a CSV file with these rows, beside what was published of them."""
    write_csv(path, [record(row, lines) for row in rows])


def write(rows: Sequence[Row], folder: Path) -> str:
    """Write the table to FOLDER/results.md and .csv, and return it as Markdown."""
    lines = published.read()
    table = markdown(rows, lines)
    write_text(folder / "results.md", table)
    write_rows(folder / "results.csv", rows, lines)
    return table


def keep(rows: Sequence[Row]) -> None:
    """Add results to those that the project keeps; each replaces an earlier one with as many seeds and its device."""
    same = attrgetter("name", "seeds", "device")
    new = set(map(same, rows))
    kept = [row for row in read_rows(KEPT) if same(row) not in new]
    write_rows(KEPT, sorted([*kept, *rows], key=_order), published.read())


def made_anew(document: str, **parts: str) -> str:
    """Return a document with other text between its marks <!-- NAME --> and <!-- /NAME -->."""
    for name, text in parts.items():
        before, rest = document.split(f"<!-- {name} -->\n")
        _, after = rest.split(f"<!-- /{name} -->\n")
        document = f"{before}<!-- {name} -->\n{text}<!-- /{name} -->\n{after}"
    return document


def documents() -> dict[Path, str]:
    """Return README.md and docs/results.md as they have to be."""
    rows, lines = read_rows(KEPT), published.read()
    parts = {
        README: {"headlines": headlines(rows, lines)},
        DOCUMENT: {"published": published.tables(lines), "ours": markdown(rows, lines)},
    }
    return {path: made_anew(path.read_text(encoding="utf-8"), **text) for path, text in parts.items()}


def main(argv: Sequence[str] | None = None) -> None:
    set_up_logging()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="*", help="folders of runs [experiments]")
    parser.add_argument("--docs", action="store_true", help="make the documents anew, with the results of these runs")
    options = parser.parse_args(argv)
    if options.docs:
        keep(collect(options.folders))
        for path, text in documents().items():
            write_text(path, text)
        published.write_headers(published.read())
        return
    folders = options.folders or [Path("experiments")]
    rows = collect(folders)
    if not rows:
        raise UserError(f"there is no result below {', '.join(map(str, folders))}; to make one: TEST=1 bash SCRIPT")
    print(write(rows, folders[0]), end="")


if __name__ == "__main__":
    sys.exit(entry.run(main))
