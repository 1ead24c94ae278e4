"""What a torture works on: tiny data, the commands of a run, and how each of them ends where nothing disturbs it."""

import csv
import hashlib
import importlib
import json
import random
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import experiment_builder
import train_maml_system  # noqa: F401  what the commands need is imported before they are forked
import utils.observer
from tests.forked import Command, Operations, nothing
from tests.made_archives import pack, png
from tests.test_experiment_builder import command, folder_of
from utils import checkpoints, entry
from utils.image_cache import SPLITS, open_split

SHAPE = (3, 8, 8)
LARGE = (3, 84, 84)  # at this size more than one process decodes a split
CLASSES, IMAGES = 4, 16  # of each split; together more images than one thread of the preprocessing takes at once
PASSING = {"seconds", "peak_memory_gib"}  # what two runs of one command do not share
# A lock's file stays, but nobody holds it; the picture shows time and memory; this checkout may change meanwhile.
NOT_COMPARED = {".lock", "resources.png", "environment.json"}
for module in ("matplotlib.backends.backend_agg", "matplotlib.figure", "jinja2"):
    importlib.import_module(module)  # here, and not in each forked process anew
SHORT = ["--total_epochs", "2", "--total_iter_per_epoch", "2", "--num_evaluation_tasks", "2"]  # of the short form
Words = list[str] | Callable[[], int]


def preprocess(work: Path) -> Words:
    return ["preprocess/preprocess.py", "--datasets", "toy", "--dataset_dir", str(work / "datasets")]


def build_caches(work: Path) -> Words:
    def build() -> None:
        for split in SPLITS:
            open_split(work / "datasets", "toy", split, SHAPE)
        open_split(work / "datasets", "toy", "train", LARGE, workers=2)

    return partial(entry.run, build)


def train(work: Path, *more: str) -> Words:
    options = command(work / "datasets", work / "experiments", "--max_models_to_save", "9", *more)
    return ["train_maml_system.py", *options]


def test(work: Path) -> Words:
    return train(work, "--evaluate_on_test_set_only")


def report(work: Path) -> Words:
    return ["utils/report.py", str(experiment(work))]


def export(work: Path) -> Words:
    return ["utils/export.py", str(experiment(work)), str(work / "exported")]


def tabulate(work: Path) -> Words:
    return ["utils/results.py", str(work / "experiments")]


def experiment(work: Path) -> Path:
    return folder_of(work / "experiments")


def draw_nothing() -> None:
    """Leave out the report at the end of a run: drawing it takes most of the time, and is a stage of its own."""
    utils.observer.update_report = lambda run: []


def save_often() -> None:
    """Save a checkpoint after every iteration, so that most of a training's file operations are such."""
    draw_nothing()
    experiment_builder.SAVE_EVERY_SECONDS = experiment_builder.READ_EVERY_SECONDS = 0.0


class Stage(NamedTuple):
    """A stage is a command that works in a folder, where the stage `after` has been before."""

    name: str
    words: Callable[[Path], Words]
    after: str | None
    prepare: Callable[[], None] = nothing


STAGES = (
    Stage("preprocessing", preprocess, None),
    Stage("cache building", build_caches, "preprocessing"),
    Stage("training", train, "cache building", draw_nothing),
    Stage("checkpoint writing", train, "cache building", save_often),
    Stage("testing", test, "training", draw_nothing),
    Stage("report", report, "training"),
    Stage("export", export, "training"),
    Stage("second export", export, "export"),
    Stage("results table", tabulate, "training"),
)


class Whole(NamedTuple):
    """How a stage goes that nothing disturbs."""

    seconds: float
    operations: int  # on files in the folder
    contents: dict[str, str]


class Lab:
    """A lab is a folder to work in, put back to the beginning of any stage, and the seed of all that is random."""

    def __init__(self, folder: Path, seed: int, short: bool) -> None:
        self.folder, self.short, self.seed, self.rng = folder, short, seed, random.Random()
        self.work = folder / "work"
        self.work.mkdir()
        # Drawing takes longer than all other stages together.
        self.stages = [stage for stage in STAGES if not (short and stage.name == "report")]
        self._by_name = {stage.name: stage for stage in STAGES}
        self._whole: dict[str, Whole] = {}
        self._started: list[Command] = []
        classes = [f"toy/{split}/{split}_{k}" for split in SPLITS for k in range(CLASSES)]
        names = [f"{name}/{i}.png" for name in classes for i in range(IMAGES)]
        (self._state(None) / "datasets").mkdir(parents=True)
        pack(self._state(None) / "datasets" / "toy.zip", {name: png(number) for number, name in enumerate(names)})

    def stage(self, name: str) -> Stage:
        return self._by_name[name]

    def start(self, stage: Stage, prepare: Callable[[], None] = nothing, name: str = "printed") -> Command:
        """Start a stage's command where it stands; what it prints goes to a file of this name."""

        def both() -> None:
            stage.prepare()
            prepare()

        words = stage.words(self.work)
        if self.short and not callable(words) and words[0] == "train_maml_system.py":
            words = [*words, *SHORT]
        self._started.append(Command(self.folder / name, words, both))
        return self._started[-1]

    def close(self) -> None:
        """Kill what still runs."""
        for run in self._started:
            run.kill()

    def whole(self, stage: Stage) -> Whole:
        """Return how a stage goes that nothing disturbs; it is run once."""
        if stage.name not in self._whole:
            self.reset(stage)
            operations, begun = Operations(self.work), monotonic()
            run = self.start(stage, operations.watch)
            if run.wait():
                raise RuntimeError(f"{stage.name} failed though nothing disturbed it:\n{run.printed()}")
            seconds = monotonic() - begun
            self._whole[stage.name] = Whole(seconds, operations.count, contents(self.work))
            self._keep(stage)
        return self._whole[stage.name]

    def reset(self, stage: Stage) -> None:
        """Put the folder back to the beginning of a stage."""
        if stage.after:
            self.whole(self._by_name[stage.after])
        for path in self.work.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(self._state(stage.after), self.work, symlinks=True, dirs_exist_ok=True)

    def _state(self, name: str | None) -> Path:
        return self.folder / "states" / (name or "beginning")

    def _keep(self, stage: Stage) -> None:
        """Keep the state after a stage; images are linked to, as the cache of copied ones would be out of date."""
        images = self.work / "datasets" / "toy"
        if not images.is_symlink():
            images.rename(self.folder / "toy")
            images.symlink_to(self.folder / "toy")
        shutil.copytree(self.work, self._state(stage.name), symlinks=True)


def contents(folder: Path) -> dict[str, str]:
    """Return what a folder holds, by the paths in it, less what two runs of one command do not share."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.name not in NOT_COMPARED:
            found[str(path.relative_to(folder))] = "folder" if path.is_dir() else _content(path)
    return found


def differences(what: str, expected: dict[str, str], found: dict[str, str]) -> str:
    """Return a text on what two folders do not have in common; empty if they are the same."""
    lines = [f"{name} is missing" for name in expected.keys() - found.keys()]
    lines += [f"{name} was left behind" for name in found.keys() - expected.keys()]
    lines += [f"{name} differs" for name in expected.keys() & found.keys() if expected[name] != found[name]]
    return f"{what}: {', '.join(sorted(lines))}" if lines else ""


def _content(path: Path) -> str:
    """Return the numbers, text or bytes of a file as text; raises UserError for a damaged checkpoint."""
    if path.parent.name == "saved_models":
        return repr(lasting(checkpoints.load(path)))
    if path.suffix == ".csv":
        return repr(lasting(list(csv.DictReader(path.read_text().splitlines()))))
    if path.suffix in (".json", ".jsonl"):
        texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        return repr([lasting(json.loads(text)) for text in texts])
    if path.suffix == ".html":
        return re.sub(r"in [\d.]+ (s|min)\b|base64,[^\"]*", "", path.read_text())  # the pictures are files, too
    return _digest(path.read_bytes())


def lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: lasting(held) for key, held in value.items() if key not in PASSING}
    if isinstance(value, list | tuple):
        return [lasting(held) for held in value]
    return (str(value.dtype), value.shape, _digest(value.numpy().tobytes())) if hasattr(value, "numpy") else value


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
