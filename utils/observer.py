"""What a run shows of itself beside its console: diagnostics, report and tracker, kept up to date as it goes on.

None of it is worth a training run, so a failure is one warning; in a dry run, which is there to find such, an error.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data import Episodes
from learner import FewShotLearner
from utils import distributed
from utils.diagnostics import diagnose, write_diagnostics
from utils.options import Options, all_defaults, declaration, unmet
from utils.records import read_run
from utils.report import update_report
from utils.scores import is_ensemble
from utils.trackers import TRACKERS, Tracker

log = logging.getLogger(__name__)

DRAW_EVERY_SECONDS = 60.0  # drawing takes one to two


class Observer:
    """An observer follows one run in its folder; in other processes than the main one it does nothing."""

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.tracker: Tracker | None = None
        self.drawn = time.monotonic()
        self.failed: set[str] = set()

    def start(self, iteration: int) -> None:
        """Open the tracker of a run that goes on after `iteration`; raises UserError where it is not installed."""
        if distributed.is_main() and self.tracker is None:
            self.tracker = TRACKERS[self.options.tracker](self.folder / "logs" / self.options.tracker, iteration)

    def look(self, model: FewShotLearner, episodes: Episodes, epoch: int) -> None:
        """Record the diagnostics of an epoch."""
        if distributed.is_main():
            with self._harmless("diagnostics"):
                record = diagnose(model, episodes, epoch)
                write_diagnostics(self.folder, record)
                if self.tracker:
                    self.tracker.scalars(curves_inside(record), model.iterations_done)

    def epoch_done(self, row: Mapping[str, float]) -> None:
        """Pass on the numbers of an epoch, and draw the report anew unless that was done just now."""
        if distributed.is_main():
            with self._harmless("tracker"):
                if self.tracker:
                    self.tracker.scalars(curves(row, self.options.total_iter_per_epoch), int(row["iterations"]))
            if time.monotonic() - self.drawn > DRAW_EVERY_SECONDS:
                self._draw(int(row["iterations"]), with_test=False)

    def tested(self, results: Sequence[Mapping[str, Any]], iteration: int) -> None:
        """Pass on the results of a test, and draw them."""
        if distributed.is_main():
            self._draw(iteration, with_test=True)
            with self._harmless("tracker"):
                if self.tracker:
                    self.tracker.results(hyperparameters(self.options), accuracies(results))
                    self.tracker.close()
                    self.tracker = None

    def _draw(self, iteration: int, with_test: bool) -> None:
        """Draw the report; without the pictures of an earlier test, which take longest and are out of date."""
        if self.options.dry_run:  # nobody sees it, and the rehearsal of a hundred scripts would take minutes longer
            return
        with self._harmless("report"):
            run = read_run(self.folder)
            for picture in update_report(run if with_test else run._replace(episodes={}, confusions={})):
                if self.tracker:
                    self.tracker.picture(picture.name, picture.png, iteration)
        self.drawn = time.monotonic()

    @contextmanager
    def _harmless(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever it is: the run goes on
            if self.options.dry_run:
                raise
            if what not in self.failed:
                log.warning("the %s cannot be kept up to date (%s: %s)", what, type(error).__name__, error)
            self.failed.add(what)


def curves(row: Mapping[str, float], iterations: int) -> dict[str, float]:
    """Return the numbers of an epoch, a row of summary_statistics.csv, by the names under which trackers show them."""
    names = {"train_": "train", "val_": "validation"}
    found = {"learning_rate": row["learning_rate"], "seconds_per_iteration": row["seconds"] / iterations}
    for name, value in row.items():
        for prefix, split in names.items():
            if name.startswith(prefix):
                found[f"{name.removeprefix(prefix)}/{split}"] = value
    return found | {f"{name}/train": row[name] for name in ("unsolved", "skipped") if name in row}


def curves_inside(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record of diagnostics: of each series its mean over inner steps, accuracies by step."""
    found = {name: record[name] for name in ("peak_memory_gib", "dropblock_keep") if name in record}
    for name, values in record["series"].items():
        if name == "accuracy":
            found |= {f"accuracy_after_step/{step}": mean for step, mean in enumerate(values["mean"], 1)}
        else:
            found[name] = sum(values["mean"]) / len(values["mean"])
    return found


def hyperparameters(options: Options) -> dict[str, Any]:
    """Return the options that have an effect, less those that say where or how long a run computes; and its name."""
    declared = {name: declaration(name) for name in all_defaults()}
    kept = [name for name, one in declared.items() if one.resume != "ignore" and not unmet(one.only, options)]
    return {name: getattr(options, name) for name in ("experiment_name", *kept)}


def accuracies(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the accuracies of a test by data set, shot and model."""
    models = {result["model"]: "ensemble" if is_ensemble(result["model"]) else "single" for result in results}
    return {f"test/{r['dataset']}_{r['shot']}shot_{models[r['model']]}": r["accuracy"] for r in results}
