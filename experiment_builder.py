"""The experiment around a learner: epochs, validation, checkpoints, exact resume and the meta-test.

Everything that decides the numbers of a run is in its checkpoint or is a function of (seed, task index), so a run that
is stopped anywhere and started again ends with the same weights as one that never was.
"""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from data import Episodes, Normalization, evaluation_episodes, open_dataset, training_episodes
from learner import FewShotLearner, Veto
from meta_test import Result, meta_test, query_logits
from utils import checkpoints, distributed
from utils.devices import peak_memory_gib
from utils.environment import record_environment
from utils.errors import UserError
from utils.files import copy_file, move_aside, only_process, write_csv, write_text
from utils.image_cache import Split
from utils.metaoptnet import published_statistics
from utils.names import find_dataset
from utils.observer import Observer
from utils.options import Options, differences
from utils.progress import progress_bar, stop_requests
from utils.scores import Score, score

log = logging.getLogger(__name__)

AVERAGED = ("loss", "accuracy")  # metrics of an iteration; a learner's `counts` are added up
SAVE_EVERY_SECONDS = 60.0
READ_EVERY_SECONDS = 1.0  # reading metrics waits for the device
READ_EVERY_ITERATIONS = 50  # at most so many between two readings


class Stopped(SystemExit):
    """A run that was asked to stop (Ctrl-C, SIGTERM) has saved its state; `code` is the process's exit status."""


def experiment_folder(options: Options) -> Path:
    """Return EXPERIMENTS_DIR/DATASET_Nway_Kshot/NAME, of a head learner DATASET_Nway, or what --save_path says."""
    if options.save_path is not None:
        return Path(options.save_path)
    shot = "" if options.learner == "head" else f"_{options.num_samples_per_class}shot"
    dataset = find_dataset(Path(options.dataset_dir), options.dataset_name).name
    return Path(options.experiments_dir) / f"{dataset}_{options.num_classes_per_set}way{shot}" / options.experiment_name


def earlier_folder(folder: Path, options: Options) -> Path:
    """Return where earlier versions kept the results that now go to `folder`: in DATASET_NwayKshot, of heads too."""
    dataset = folder.parent.name.rpartition(f"_{options.num_classes_per_set}way")[0]
    setting = f"{dataset}_{options.num_classes_per_set}way{options.num_samples_per_class}shot"
    return folder.parent.with_name(setting) / folder.name


class Experiment:
    """An experiment is one run in its folder: saved_models/{latest,best,epoch_N}, logs/, visual_outputs/.

    Head learners' checkpoints have MetaOptNet's names: last_epoch.pth, best_model.pth, epoch_N.pth.
    """

    def __init__(self, options: Options, model: FewShotLearner) -> None:
        self.options, self.model = options, model
        self.folder = experiment_folder(options)
        self.models = self.folder if options.save_path is not None else self.folder / "saved_models"
        self.history: list[dict[str, float]] = []  # one row per finished epoch
        self.metrics = (*AVERAGED, *model.counts)
        # over the iterations of the current epoch
        self.sums = dict.fromkeys((*self.metrics, "skipped", "seconds"), 0.0)
        self.normalization: Normalization = None
        self.images: dict[str, int] = {}  # of each split that was trained or validated on, the checksum
        self.observer = Observer(options, self.folder)

    # --- training ----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train and validate until `total_epochs` epochs are done, going on from the newest good checkpoint."""
        with only_process(self.folder, "training") if distributed.is_main() else nullcontext():
            train_split = open_dataset(self.options, self.options.dataset_name, "train")
            if self.options.normalization == "channel":
                self.normalization = (train_split.mean, train_split.std)
            elif self.options.normalization == "published":
                self.normalization = published_statistics(self.options.dataset_name)
            self.resume()
            validation_split = open_dataset(self.options, self.options.dataset_name, "val")
            self._note_images(train_split, validation_split)
            device, options, tasks = self.model.device, self.options, local_tasks(self.options.batch_size)
            training = training_episodes(train_split, options, device, self.normalization)
            validation = evaluation_episodes(validation_split, options, device, self.normalization)
            first_batch = partial(training.batch, tasks.start, len(tasks))
            if not self.model.iterations_done and self.model.choose_form(first_batch):
                self._save("latest")  # so that a run that is killed before its first save goes on in the same form
            self._write_logs()
            self.observer.start(self.model.iterations_done)
            while len(self.history) < options.total_epochs:
                self._train_epoch(training, tasks)
                (logits,), labels, _ = query_logits([self.model], validation, options, "validation")
                self.observer.look(self.model, validation, len(self.history) + 1)
                self._finish_epoch(score(logits, labels))
                self.observer.epoch_done(self.history[-1])

    def _note_images(self, *splits: Split) -> None:
        """Warn of splits whose images are no longer those that the run was trained on; remember those of now."""
        for split in splits:
            if self.images.get(split.split, split.checksum) != split.checksum:
                log.warning(
                    "the images of %s/%s have changed since the run was started; going on with those that are there "
                    "now, so its numbers are not those of one data set",
                    split.name,
                    split.split,
                )
        self.images = {split.split: split.checksum for split in splits}

    def _train_epoch(self, episodes: Episodes, tasks: range) -> None:
        """The iterations that are left of the current epoch; saves `latest` every minute and at the end.

        `tasks` is this process's share of each meta-batch. About once a second metrics are read and processes agree on
        whether to save or stop; the iteration at which they do so next is part of the agreement.
        """
        options, epoch = self.options, len(self.history)
        end = (epoch + 1) * options.total_iter_per_epoch
        unread: list[dict[str, Any]] = []  # metrics of each iteration, on the device
        clock = saved = time.monotonic()
        next_reading = self.model.iterations_done + 1
        with stop_requests() as stop, progress_bar(end, self.model.iterations_done, f"epoch {epoch + 1}") as bar:
            while (done := self.model.iterations_done) < end:
                batch = episodes.batch(done * options.batch_size + tasks.start, len(tasks))
                # What the network draws (dropout) is the same whenever and however often an iteration is run.
                seed = np.random.SeedSequence([options.seed, done, distributed.rank()])
                torch.manual_seed(int(seed.generate_state(1)[0]))
                metrics, _ = self.model.run_train_iter(batch, epoch)
                unread.append(metrics)
                bar.update()
                stops_alone = stop and distributed.world_size() == 1
                if done + 1 < min(next_reading, end) and not stops_alone:
                    continue
                self._read_metrics(unread, bar)
                now = time.monotonic()
                pace = (now - clock) / len(unread)
                next_reading = done + 1 + distributed.largest(iterations_between_readings(pace))
                self.sums["seconds"] += now - clock
                clock = now
                unread.clear()
                save_is_due = now - saved > SAVE_EVERY_SECONDS or done + 1 == end
                agreed = distributed.largest(stop[0] if stop else int(save_is_due))  # all processes save, or none
                if agreed:
                    self._save("latest")
                    saved = time.monotonic()
                if agreed > 1:
                    break
            # Also where it was asked for while the last iteration's state was being saved.
            if code := distributed.largest(stop[0] if stop else 0):
                without = "" if options.continue_from_epoch == "latest" else "without --continue_from_epoch "
                done = self.model.iterations_done
                log.info("stopped and saved at iteration %d; the same command %sgoes on from here", done, without)
                raise Stopped(code)

    def _read_metrics(self, unread: Sequence[Mapping[str, Any]], bar: "tqdm[Any]") -> None:
        """Add up the metrics of some iterations, but for those that the learner vetoes; see `_skip`."""
        read = {}  # (processes, iterations, values)
        for name in (*self.metrics, *self.model.checked):
            values = torch.stack([metrics[name] for metrics in unread]).view(1, len(unread), -1)
            read[name] = distributed.gather_tasks(values).double().cpu()
        for place, iteration in enumerate(range(self.model.iterations_done - len(unread), self.model.iterations_done)):
            metrics = {name: values[:, place].flatten().tolist() for name, values in read.items()}
            if veto := self.model.veto(metrics):
                self._skip(iteration, veto)
                continue
            for name in self.metrics:
                self.sums[name] += sum(metrics[name]) / (1 if name in self.model.counts else len(metrics[name]))
        loss, accuracy = self._means()
        bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.1%}")

    def _skip(self, iteration: int, veto: Veto) -> None:
        """Count an iteration that was left out; raises UserError where it was not, or where they are too many."""
        options = self.options
        first, last = iteration * options.batch_size, (iteration + 1) * options.batch_size - 1
        tasks = f"tasks {first} to {last}" if veto.task is None else f"task {first + veto.task}"
        problem = f"{veto.problem} at iteration {iteration} (training {tasks}, --train_seed {options.train_seed})"
        if options.on_nonfinite == "stop":
            raise UserError(
                f"{problem}; training has stopped, checkpoints hold earlier, finite weights. {veto.cure}; "
                "--on_nonfinite skip leaves such iterations out"
            )
        self._check_state()  # if that is lost, no later iteration can do better
        self.sums["skipped"] += 1
        skipped = int(self.sums["skipped"] + sum(row.get("skipped", 0) for row in self.history))
        if skipped > options.max_skipped:
            raise UserError(
                f"{problem}; training has stopped, as {skipped} iterations would be left out, more than --max_skipped "
                f"{options.max_skipped}. {veto.cure}"
            )
        log.warning("%s; left out, %d of at most %d iterations", problem, skipped, options.max_skipped)

    def _means(self) -> tuple[float, float]:
        """Return loss and accuracy over the iterations of the current epoch that counted; nan if there is none."""
        per_epoch = self.options.total_iter_per_epoch
        counted = (self.model.iterations_done % per_epoch or per_epoch) - self.sums["skipped"]
        return (self.sums["loss"] / counted, self.sums["accuracy"] / counted) if counted else (math.nan, math.nan)

    def _finish_epoch(self, validation: Score) -> None:
        """Record the epoch, save it, and forget the epoch checkpoints that are no longer among the best."""
        train_loss, train_accuracy = self._means()
        row = {
            "epoch": len(self.history) + 1,
            "iterations": self.model.iterations_done,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy,
            "val_loss": validation.loss,
            "val_accuracy": validation.accuracy,
            "val_ci95_per_episode": validation.ci95_per_episode,
            "learning_rate": self.model.learning_rate,
            **{name: int(self.sums[name]) for name in (*self.model.counts, "skipped")},
            "seconds": round(self.sums["seconds"], 3),
        }
        self.history.append(row)
        self.sums = dict.fromkeys(self.sums, 0.0)
        copies = ["best", "latest"] if self.ranking()[0] == row["epoch"] else ["latest"]
        self._save(f"epoch_{row['epoch']}", *copies)
        self._write_logs()
        if distributed.is_main():
            for epoch in self.ranking()[self.options.max_models_to_save :]:
                if not self.options.save_epoch or epoch % self.options.save_epoch:
                    self.file(f"epoch_{epoch}").unlink(missing_ok=True)
        distributed.barrier()  # or a process that is ahead would find them and test more than the others
        best = self.history[self.ranking()[0] - 1]
        log.info(
            f"epoch {row['epoch']}/{self.options.total_epochs}  train loss {row['train_loss']:.3f} accuracy "
            f"{row['train_accuracy']:.1%}  validation loss {row['val_loss']:.3f} accuracy {row['val_accuracy']:.1%} "
            f"± {row['val_ci95_per_episode']:.1%}  best {best['val_accuracy']:.1%} (epoch {best['epoch']})  "
            f"{row['seconds'] / self.options.total_iter_per_epoch:.3f} s/iteration  "
            f"peak memory {peak_memory_gib(self.model.device):.1f} GiB"
        )

    def ranking(self) -> list[int]:
        """Return the finished epochs, best validation accuracy first; of equal ones the earlier first."""
        rows = sorted(self.history, key=lambda row: (-row["val_accuracy"], row["epoch"]))
        return [int(row["epoch"]) for row in rows]

    def _write_logs(self) -> None:
        if not distributed.is_main():
            return
        write_text(self.folder / "logs" / "options.json", json.dumps(dataclasses.asdict(self.options), indent=2))
        record_environment(self.folder / "logs" / "environment.json", self.model.device)
        if self.history:
            write_csv(self.folder / "logs" / "summary_statistics.csv", self.history)

    # --- checkpoints -------------------------------------------------------------------------------------------

    def file(self, name: str) -> Path:
        """Return where the checkpoint `name` (latest, best, epoch_N) lies."""
        return self.models / self.model.file_name(name)

    def _files(self) -> list[Path]:
        """All checkpoints that are there: the latest one, those of epochs from the last to the first, the best one."""
        stems = (path.name.removesuffix(self.model.suffix) for path in self.models.glob("epoch_*"))
        epochs = {int(digits) for stem in stems if (digits := stem.removeprefix("epoch_")).isdecimal()}
        names = ["latest", *(f"epoch_{epoch}" for epoch in sorted(epochs, reverse=True)), "best"]
        return [path for path in map(self.file, names) if path.exists()]

    def _check_state(self) -> None:
        """Raise UserError, in all processes, where weights or the optimiser's state are not finite."""
        if lost := self.model.not_finite():
            more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
            raise UserError(
                f"{lost[0]}{more} is not finite after {self.model.iterations_done} iterations; training has stopped, "
                f"checkpoints hold earlier, finite weights. {self.model.cure}"
            )

    def _save(self, name: str, *copies: str) -> None:
        """Write the checkpoint `name`, then its copies; raises UserError where the state is not finite."""
        self._check_state()
        if distributed.is_main():
            state = {"options": dataclasses.asdict(self.options), "normalization": self.normalization}
            so_far = {"history": self.history, "sums": self.sums, "images": self.images}
            self.model.save_model(self.file(name), state | so_far)
            for copy in copies:
                copy_file(self.file(name), self.file(copy))
        distributed.barrier()

    def resume(self) -> None:
        """Restore what `continue_from_epoch` names; by default the newest checkpoint that is whole, if there is any.

        Raises UserError where another process found a later one: machines that train together share this folder.
        """
        wanted = self.options.continue_from_epoch
        if wanted == "latest":
            if newest := self.newest_whole():
                self._restore(*newest)
                self._save("latest")
        elif wanted == "from_scratch":
            self._move_aside(self._files())
        else:
            path = self.file(f"epoch_{wanted}")
            self._restore(path, checkpoints.load(path))
            of_branch = [self.file(f"epoch_{epoch}") for epoch in self.ranking()]
            self._move_aside([path for path in self._files() if path not in of_branch])
            self._save("latest")
            if distributed.is_main():
                copy_file(next(path for path in of_branch if path.exists()), self.file("best"))
            distributed.barrier()
        if distributed.largest(self.model.iterations_done) > self.model.iterations_done:
            raise UserError(
                f"another process of this run found a later checkpoint than this one in {self.models}; put "
                "--experiments_dir on a disk that all machines of the run share"
            )

    def newest_whole(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the newest checkpoint that can be read and what it holds; None if there is none at all.

        Raises UserError if there are some and all are damaged.
        """
        files = self._files()
        for path in files:
            if state := self._read(path):
                return path, state
        if files:
            raise UserError(
                f"no checkpoint in {self.models} can be read. To train anew: --continue_from_epoch from_scratch, "
                "which keeps them in another folder"
            )
        if self.options.save_path is None and (earlier := earlier_folder(self.folder, self.options)).is_dir():
            raise UserError(
                f"an earlier version kept this run in {earlier}. To go on with it, move it to {self.folder}; to train "
                "anew, choose another --experiment_name"
            )
        return None

    def _read(self, path: Path) -> dict[str, Any] | None:
        """Return what a checkpoint holds; None if it is not there or, with a warning, if it is damaged."""
        try:
            return checkpoints.load(path) if path.exists() else None
        except checkpoints.DamagedCheckpoint as error:
            log.warning("%s; going on without it", error)
            return None

    def _move_aside(self, paths: list[Path]) -> None:
        """Keep checkpoints that this run will not go on from in a folder of their own."""
        if distributed.is_main() and paths:
            kept = move_aside(paths, self.folder / f"saved_models_until_{time.strftime('%Y%m%d-%H%M%S')}")
            log.info("%d checkpoints of the earlier run are kept in %s", len(paths), kept)
        distributed.barrier()

    def _restore(self, path: Path, state: dict[str, Any]) -> None:
        """Take over the training state that was read from `path`; raises UserError if it is not one of this run."""
        check_training_state(path, state)
        self._compare_options(state["options"], "resume")
        epochs, done, per_epoch = len(state["history"]), state["iterations_done"], self.options.total_iter_per_epoch
        if not epochs * per_epoch <= done <= (epochs + 1) * per_epoch:
            raise UserError(
                f"{path} is damaged: {done} iterations do not belong to {epochs} finished epochs of {per_epoch}"
            )
        self.model.load_state(state, path)
        if lost := self.model.not_finite():
            raise UserError(
                f"{path}: {lost[0]} is not finite, so training cannot go on from it; --continue_from_epoch N takes the "
                "checkpoint of an earlier epoch"
            )
        self.history, self.normalization = state["history"], state["normalization"]
        self.images = state.get("images", {})  # which earlier versions did not keep
        self.sums |= state["sums"]
        log.info("going on from %s: %d epochs, %d iterations done", path, epochs, done)

    def _compare_options(self, before: Mapping[str, Any], purpose: Literal["resume", "test"]) -> None:
        """Do with each option that differs from the run's what its declaration says; may raise UserError."""
        for found in differences(before, self.options, purpose):
            if found.policy == "refuse":
                cure = "; to train anew, another --experiment_name or --continue_from_epoch from_scratch"
                raise UserError(f"{found}; it has to stay. Give the earlier value{cure if purpose == 'resume' else ''}")
            used = found.before if found.policy == "keep" else found.now
            log.warning("%s; going on with %s", found, used)
            self.options = dataclasses.replace(self.options, **{found.name: used})

    # --- meta-test ---------------------------------------------------------------------------------------------

    def meta_test(self) -> list[Result]:
        """Test the best checkpoint and the ensemble of the top N as the options say; see `meta_test.meta_test`."""
        done = self.model.iterations_done
        if not self.history:  # it was not trained just now
            newest = self.newest_whole()
            if newest is None:
                raise UserError(
                    f"there is no checkpoint in {self.models}; train first: the same command without TEST=1"
                )
            path, state = newest
            check_training_state(path, state)
            self._compare_options(state["options"], "test")
            self.history, self.normalization, done = state["history"], state["normalization"], state["iterations_done"]
        whole = ((path, read) for epoch in self.ranking() if (read := self._read(path := self.file(f"epoch_{epoch}"))))
        kept = list(islice(whole, self.options.top_n_models))
        if not kept:
            raise UserError(f"no epoch of {self.folder} is finished yet, so there is nothing to test")
        labels = ("single best", f"top-{len(kept)} ensemble")
        self.observer.start(done)
        results = meta_test(self.model, self.options, kept, labels, self.normalization, self.folder)
        self.observer.tested(results, done)
        return results


def check_training_state(path: Path, state: Mapping[str, Any]) -> None:
    """Raise UserError if a checkpoint does not hold where a training stands."""
    if not {"options", "normalization", "history", "sums", "iterations_done"} <= state.keys():
        raise UserError(
            f"{path} holds weights only, no training state; test.py can test it, but it cannot be continued"
        )
    if [row["epoch"] for row in state["history"]] != [*range(1, len(state["history"]) + 1)]:
        raise UserError(f"{path} is damaged: its epochs are not numbered 1, 2, ...")


def iterations_between_readings(seconds_per_iteration: float) -> int:
    """Return how many iterations make about a second, at least one."""
    return max(1, min(READ_EVERY_ITERATIONS, int(READ_EVERY_SECONDS / max(seconds_per_iteration, 1e-6))))


def local_tasks(batch_size: int) -> range:
    """Return this process's share of a meta-batch; raises UserError if it cannot be shared out equally."""
    ranks = distributed.world_size()
    share, rest = divmod(batch_size, ranks)
    if rest:
        raise UserError(
            f"--batch_size {batch_size} tasks cannot be shared equally over {ranks} GPUs; use a multiple of {ranks}"
        )
    return range(distributed.rank() * share, (distributed.rank() + 1) * share)
