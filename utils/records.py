"""What a run has left in its folder, read for the report, the comparison of runs and the trackers."""

import csv
import math
import re
from collections.abc import Callable, Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from utils.errors import UserError
from utils.files import parsed_json
from utils.names import canonical_name

Parsed = TypeVar("Parsed")
ROOT = Path(__file__).resolve().parents[1]
SHOWN = 6  # support and query images of a class in a picture, at most
HUGE = 1e39  # float32 has no number as large


class Epoch(NamedTuple):
    """An epoch is a row of summary_statistics.csv; accuracies and their CI are in [0, 1]."""

    epoch: float
    iterations: float  # since the start of training
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    val_ci95_per_episode: float
    learning_rate: float
    seconds: float  # of training, without the validation
    unsolved: float | None = None  # tasks whose head was not solved; of heads only
    skipped: float | None = None  # iterations that were left out, as not all was finite; None in earlier runs


class Setup(NamedTuple):
    """The setup is what options.json says of the training and its validation."""

    dataset_name: str
    experiment_name: str
    learner: str
    num_classes_per_set: int
    num_samples_per_class: int
    test_way: int | None
    test_shots: str | None
    num_seeds: int

    @property
    def chance(self) -> float:
        """Return the accuracy of guessing in the validation, in %."""
        return 100 / (self.test_way or self.num_classes_per_set)

    @property
    def row(self) -> str:
        """Return where the script of such a run lies below experiment_scripts/, without .sh."""
        shot = "" if self.learner == "head" else f"_{self.num_samples_per_class}shot"
        return f"{canonical_name(self.dataset_name)}_{self.num_classes_per_set}way{shot}/{self.method}"

    @property
    def method(self) -> str:
        """Return the name of the experiment; of a seed among several, of all of them."""
        return re.sub(r"/seed_\d+$", "", self.experiment_name) if self.num_seeds > 1 else self.experiment_name


RESULT_KINDS: dict[str, Any] = {
    **dict.fromkeys(("dataset", "trained_on", "model", "split", "batch_norm", "normalization"), str),
    **dict.fromkeys(("way", "shot", "query", "episodes", "seed"), int),
    **dict.fromkeys(("accuracy", "ci95_per_episode", "ci95_per_query"), int | float),
    "checkpoints": list,
}
LATER_COLUMNS = {"changed": "", "guessed": 0}  # and what they are in results of before them
MAY_BE_NAN = {"train_loss", "train_accuracy", "val_loss", "val_ci95_per_episode"}  # of an epoch


class Result(NamedTuple):
    """A result is an entry of test_summary.json; accuracy and CI in %."""

    dataset: str
    trained_on: str
    model: str
    checkpoints: str
    way: int
    shot: int
    accuracy: float
    ci95_per_episode: float
    ci95_per_query: float
    changed: str  # what the test had otherwise than the training
    protocol: str  # in words

    @property
    def cells(self) -> tuple[str, str]:
        """Return the accuracy with the CI per episode, and the CI per query."""
        return f"{self.accuracy:.2f} ± {self.ci95_per_episode:.2f} %", f"± {self.ci95_per_query:.2f} %"


class Episode(NamedTuple):
    """An episode is a task and the model's answers."""

    support: np.ndarray  # (way, at most SHOWN, H, W, C) uint8
    query: np.ndarray  # (way, at most SHOWN, H, W, C) uint8
    predictions: np.ndarray  # (way, query), indices of classes
    class_names: np.ndarray  # (way,)


class Pair(NamedTuple):
    """How often query images of one class were taken for a second one, in the test's tasks that have both."""

    true: str
    predicted: str
    answers: int
    of: int

    @property
    def rate(self) -> float:
        return self.answers / self.of


class Run(NamedTuple):
    """A run is all that its folder holds; what is not there yet is empty."""

    folder: Path
    options: dict[str, Any]
    setup: Setup | None
    epochs: list[Epoch]
    diagnostics: list[dict[str, Any]]  # one record per epoch, see utils/diagnostics.py
    results: list[Result]
    episodes: dict[str, Episode]  # by the data set, with .2 and so on; that of training comes first
    confusions: dict[str, list[Pair]]  # by the data set and shot

    @property
    def title(self) -> str:
        parts = self.folder.resolve().parts
        return "/".join(parts[-3:] if re.fullmatch(r"seed_\d+", parts[-1]) else parts[-2:])

    @property
    def best(self) -> Epoch:
        """Return the epoch of the best validation, the earliest of equal ones."""
        return max(self.epochs, key=lambda epoch: epoch.val_accuracy)


def read_run(folder: Path) -> Run:
    """Return what an experiment's folder holds; raises UserError if no epoch is finished or a file is damaged."""
    options = _parsed(folder / "logs" / "options.json", _read_options) or {}
    lists = read_epochs(folder), read_diagnostics(folder), read_results(folder)
    return Run(folder, options, read_setup(folder), *lists, read_episodes(folder), read_confusions(folder))


def _read_options(path: Path) -> dict[str, Any]:
    return dict(parsed_json(path.read_bytes()).items())


def read_setup(folder: Path) -> Setup | None:
    """Return how the experiment is trained; None before it has begun. Raises UserError if the file is damaged."""
    return _parsed(folder / "logs" / "options.json", _read_setup)


def _read_setup(path: Path) -> Setup:
    earlier = {"num_seeds": 1}  # what earlier versions did not write
    setup = Setup(*itemgetter(*Setup._fields)(earlier | _read_options(path)))
    if not (setup.num_classes_per_set and setup.num_samples_per_class):
        raise ValueError("no task has 0 ways or 0 shots")
    return setup


def read_epochs(folder: Path) -> list[Epoch]:
    """Return the finished epochs; raises UserError where there is none or the file is damaged."""
    path = folder / "logs" / "summary_statistics.csv"
    rows = _parsed(path, lambda path: [_epoch(row) for row in csv.DictReader(whole_lines(path))])
    if not rows:
        raise UserError(f"there is no {path} with a row: no epoch is finished. To train: {command(folder)}")
    return rows


def _epoch(row: Mapping[str, str]) -> Epoch:
    values = {name: float(row[name]) for name in Epoch._fields if row.get(name)}
    for name, value in values.items():
        if not (abs(value) < HUGE or (math.isnan(value) and name in MAY_BE_NAN)):
            raise ValueError(f"{name} is {value}")
    return Epoch(**values)


def read_diagnostics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of logs/diagnostics.jsonl, none of an older run; raises UserError if the file is damaged."""
    path = folder / "logs" / "diagnostics.jsonl"
    return _parsed(path, lambda path: [_record(line) for line in whole_lines(path)]) or []


def _record(line: str) -> dict[str, Any]:
    record = dict(parsed_json(line))
    numbers = [record[name] for name in ("epoch", "iterations", "tasks")]
    numbers += [record[name] for name in ("peak_memory_gib", "dropblock_keep") if name in record]
    if not all(abs(number) < HUGE for number in numbers):
        raise ValueError("not all of its numbers are finite")
    for name, series in record["series"].items():
        mean, std = series["mean"], series["std"]
        if len(mean) != len(std) or not mean or not all(isinstance(number, int | float) for number in (*mean, *std)):
            raise ValueError(f"the series {name} is not one of means and deviations")
    return record


def read_results(folder: Path) -> list[Result]:
    """Return the results of the meta-tests, none before the first; raises UserError if the file is damaged."""
    return [_result(entry) for entry in read_tests(folder / "logs" / "test_summary.json")]


def read_tests(path: Path) -> list[dict[str, Any]]:
    """Return the entries of a test_summary.json, none where it is not there; raises UserError if it is damaged."""
    try:
        entries: list[dict[str, Any]] = parsed_json(path.read_bytes()) if path.is_file() else []
        if not isinstance(entries, list):
            raise TypeError("it is no list")
        for entry in entries:
            _check_test(entry)
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); move it away and test again") from error
    return entries


def _check_test(entry: Any) -> None:
    if not isinstance(entry, dict):
        raise TypeError(f"{entry!r} is no result")
    adaptation = {"head": str} if entry.get("head") else {"steps": int}
    for name, kind in (RESULT_KINDS | adaptation | {"changed": str, "guessed": int}).items():
        if not isinstance(entry.get(name, LATER_COLUMNS.get(name)), kind):
            raise TypeError(f"{name} is {entry.get(name)!r}")
    if not 0 <= entry["accuracy"] <= 1 or min(entry[name] for name in ("way", "shot", "query", "episodes")) < 1:
        raise ValueError("there is no such accuracy, way, shot, query or number of episodes")
    if not all(isinstance(name, str) for name in entry["checkpoints"]):
        raise TypeError("a checkpoint has no name")


def _result(entry: Mapping[str, Any]) -> Result:
    method = f"{entry['head']} head" if entry.get("head") else f"{entry['steps']} inner steps"
    protocol = (
        f"Meta-test: {entry['episodes']:,} episodes of the {entry['split']} split, "
        f"{entry['way']}-way {entry['shot']}-shot, {entry['query']} query images per class,\n"
        f"{method}, {entry['batch_norm']} batch norm, seed {entry['seed']}; chance level {100 / entry['way']:.2f} %"
        + (f"; not as trained: {entry['changed']}" if entry.get("changed") else "")
        + (f"; {entry['guessed']} tasks guessed" if entry.get("guessed") else "")
    )
    plain = {name: entry[name] for name in ("dataset", "trained_on", "model", "way", "shot")}
    scores = {name: 100 * entry[name] for name in ("accuracy", "ci95_per_episode", "ci95_per_query")}
    checkpoints = f"{entry['model']}: {', '.join(entry['checkpoints'])}"
    return Result(**plain, **scores, checkpoints=checkpoints, changed=entry.get("changed", ""), protocol=protocol)


def read_episodes(folder: Path) -> dict[str, Episode]:
    """Return the sample episodes (glyphs, glyphs.2, ...), of the data set trained on first.

    Raises UserError for a damaged file.
    """
    files = (folder / "visual_outputs").glob("sample_episode_*.npz")
    named = {path.stem.removeprefix("sample_episode_"): path for path in sorted(files, key=lambda path: path.stem)}
    trained_on = {result.trained_on for result in read_results(folder)}
    first = sorted(named, key=lambda name: re.sub(r"\.\d$", "", name) not in trained_on)  # of glyphs.2: glyphs
    found = {name: _parsed(named[name], _read_episode) for name in first}
    return {name: episode for name, episode in found.items() if episode}


def _read_episode(path: Path) -> Episode:
    with np.load(path, allow_pickle=False) as file:
        support, query, *answers = (file[name] for name in Episode._fields)
    return Episode(support[:, :SHOWN], query[:, :SHOWN], *answers)


def read_confusions(folder: Path) -> dict[str, list[Pair]]:
    """Return the confusions of each test, none of an older run; raises UserError for a damaged file."""
    files = sorted((folder / "logs").glob("confusion_*.csv"))
    found = {path.stem.removeprefix("confusion_").replace("_", " "): _parsed(path, _read_pairs) for path in files}
    return {name: pairs for name, pairs in found.items() if pairs}


def _read_pairs(path: Path) -> list[Pair]:
    rows = csv.DictReader(whole_lines(path))
    pairs = [Pair(row["true"], row["predicted"], int(row["answers"]), int(row["of"])) for row in rows]
    if not all(0 <= pair.answers <= pair.of and pair.of for pair in pairs):
        raise ValueError("it has more answers than there were")
    if {name for pair in pairs for name in pair[:2]} != {pair.true for pair in pairs if pair.true == pair.predicted}:
        raise ValueError("a class has no row of its own")
    return pairs


def read_table(path: Path, parse: Callable[[dict[str, str]], Parsed]) -> list[Parsed]:
    """Return what `parse` makes of each row of a CSV file.

    Raises UserError with the number of a line that is damaged, and where there is no row.
    """
    rows: list[Parsed] = []
    reader = None
    try:
        reader = csv.DictReader(whole_lines(path))
        rows += map(parse, reader)
        if not rows:
            raise ValueError("there is no row")
    except (ArithmeticError, LookupError, TypeError, ValueError, csv.Error) as error:
        place = f", line {reader.line_num}" if reader else ""
        raise UserError(f"{path}{place} cannot be read ({error}); correct it") from error
    return rows


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a text; raises ValueError if the last one is cut off, and so may hold another number."""
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        raise ValueError("its last line is cut off")
    return text.splitlines()


def _parsed(path: Path, parse: Callable[[Path], Parsed]) -> Parsed | None:
    """Return what `parse` makes of a file, None if there is no file; raises a UserError that names a damaged one."""
    if not path.is_file():
        return None
    try:
        return parse(path)
    except Exception as error:  # readers raise nearly any type on bytes that are none of theirs
        raise UserError(
            f"cannot read {path} ({type(error).__name__}: {error}). Remove it and run its script again"
        ) from error


def command(folder: Path) -> str:
    """Return the command that trains this experiment, or the pattern of such commands where its name says no method."""
    script, seeds = "any.sh METHOD DATASET SHOT", ""
    if setup := read_setup(folder):
        seeds = f" --num_seeds {setup.num_seeds}" if setup.num_seeds > 1 else ""
        if (ROOT / "experiment_scripts" / f"{setup.row}.sh").is_file():
            script = f"{setup.row}.sh"
        elif re.search("_(4conv|resnet12|conv64|r2d2net)$", setup.method):
            shot = setup.test_shots if setup.learner == "head" else setup.num_samples_per_class
            script = f"any.sh {setup.method} {canonical_name(setup.dataset_name)} {shot}"
    return f"bash experiment_scripts/{script} GPU_ID{seeds}"
