"""Scoring a learner on fixed tasks, for validation and for the meta-test of single and averaged checkpoints."""

import dataclasses
import io
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import Episodes, Normalization, evaluation_episodes, open_dataset
from learner import FewShotLearner
from utils import distributed
from utils.confusion import write_confusion
from utils.cross_domain import write_cross_domain
from utils.errors import UserError
from utils.files import only_process, replace_file, write_csv, write_text
from utils.names import find_dataset
from utils.options import GRADIENT, Options, declaration, differences
from utils.progress import progress_bar
from utils.records import read_tests
from utils.scores import score

log = logging.getLogger(__name__)

Result = dict[str, Any]
SAMPLES = 3  # tasks of a test that are kept for the report


def query_logits(
    models: Sequence[FewShotLearner], episodes: Episodes, options: Options, title: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what models answer to the first evaluation tasks, each of which is made once, on the CPU.

    These are logits (models, tasks, way*query, way), labels (tasks, way*query), and which answers were lost and are
    guesses, (models, tasks): see `checked_logits`.
    """
    total = options.num_evaluation_tasks
    share = -(-total // distributed.world_size())  # the last process may go past the end; the surplus is cut off
    first, size = distributed.rank() * share, options.evaluation_batch_size
    logits: list[Tensor] = []
    labels: list[Tensor] = []
    counts = [dict.fromkeys(model.counts, torch.zeros((), device=model.device)) for model in models]
    with progress_bar(share, 0, title) as bar:
        for start in range(first, first + share, size):
            batch = episodes.batch(start, min(size, first + share - start))
            answers = []
            for model, sums in zip(models, counts, strict=True):
                metrics, predictions = model.run_validation_iter(batch)
                answers.append(torch.stack(predictions))
                for name in sums:
                    sums[name] = sums[name] + metrics[name]
            logits.append(torch.stack(answers, 1))  # (tasks, models, way*query, way)
            labels.append(batch.y_target.flatten(1))
            bar.update(len(batch.y_target))
    scores, answered = (distributed.gather_tasks(torch.cat(parts))[:total].cpu() for parts in (logits, labels))
    scores, lost = checked_logits(scores, options, title)
    for model, sums in zip(models, counts, strict=True):
        model.check_scores({name: distributed.gather_tasks(n.view(1)).sum().item() for name, n in sums.items()})
    return scores.transpose(0, 1), answered, lost.T


def checked_logits(logits: Tensor, options: Options, title: str) -> tuple[Tensor, Tensor]:
    """Return logits (tasks, models, way*query, way) with zeros, which are guesses, where a model's are not finite.

    These places, (tasks, models), come with them. They are a warning, and without ``on_nonfinite`` = skip a UserError:
    such numbers have no accuracy.
    """
    finite = logits.isfinite().all(dim=(2, 3))
    lost = ~finite
    if finite.all():
        return logits, lost
    tasks = lost.any(1).nonzero().flatten().tolist()
    which = f" of model {int(lost[tasks[0]].nonzero()[0]) + 1}" if lost.shape[1] > 1 else ""
    problem = (
        f"{title}: answers to {len(tasks)} of {len(lost)} tasks are not finite numbers, the first{which} to task "
        f"{tasks[0]} (--val_seed {options.val_seed})"
    )
    if options.on_nonfinite == "stop":
        raise UserError(
            f"{problem}, so there is no accuracy. The training may have diverged: take an earlier checkpoint, or lower "
            "--meta_learning_rate; --on_nonfinite skip lets such answers count as guesses"
        )
    log.warning("%s; they count as guesses", problem)
    return logits.masked_fill(lost[:, :, None, None], 0), lost


def meta_test(
    model: FewShotLearner,
    options: Options,
    checkpoints: Sequence[tuple[Path, Mapping[str, Any]]],
    labels: Sequence[str],
    normalization: Normalization,
    folder: Path,
) -> list[Result]:
    """Score the first checkpoint, and the mean logits of all, on each data set and shot that the options name.

    `checkpoints` are files and what was read from them. `labels` name the two in the results; one label asks for the
    first only. Images are resized and normalised as in training, and all checkpoints score a task before the next is
    made. Results are printed; they go to FOLDER/logs/test_summary.{json,csv}, sample tasks with predictions to
    FOLDER/visual_outputs; those of several data sets also to `utils.cross_domain`'s table and heat map.
    """
    models = [model]
    for _ in checkpoints[1:]:
        models.append(type(model)((options.batch_size, *options.image_shape), model.device, model.options))
    for one, (path, state) in zip(models, checkpoints, strict=True):
        one.load_state(state, path, with_optimizer=False)
    results: list[Result] = []
    read_tests(folder / "logs" / "test_summary.json")  # where it is damaged, no test need be run
    changed = changes_of(options, checkpoints[0][1].get("options"))
    for dataset, shot in itertools.product(options.test_dataset_list, options.test_shot_list):
        options = dataclasses.replace(options, val_shot=shot)
        split = open_dataset(options, dataset, "test")
        episodes = evaluation_episodes(split, options, model.device, normalization)
        check_disjoint(episodes, options.num_evaluation_tasks)
        logits, answers, lost = query_logits(models, episodes, options, split.name)
        protocol = protocol_of(options, split.name) | model.protocol() | {"changed": changed}
        names = [path.name for path, _ in checkpoints]
        guessed = int(lost[0].sum()), int(lost.any(0).sum())  # of an ensemble: by one of its models at least
        scored = zip(labels, (names[:1], names), (logits[0], logits.mean(0)), guessed, strict=False)
        tested = [
            protocol | {"model": label, "checkpoints": used, "guessed": tasks} | score(scores, answers)._asdict()
            for label, used, scores, tasks in scored
        ]
        for result in tested:
            log.info(describe(result))  # before anything is written: a full disk takes no accuracy away
        if distributed.is_main():
            write_results(folder / "logs", tested)
            write_confusion(folder / "logs", episodes, logits[0])
            write_samples(folder / "visual_outputs", episodes, logits[0], split.name)
        results += tested
    if len(options.test_dataset_list) > 1 and distributed.is_main():
        log.info(write_cross_domain(folder, results))
    return results


def protocol_of(options: Options, dataset: str) -> Result:
    """Return which tasks a test is on and how their images are normalised."""
    way, shot, query = options.evaluation_task
    return {
        "dataset": dataset,
        "split": "test",
        "trained_on": find_dataset(Path(options.dataset_dir), options.dataset_name).name,
        "episodes": options.num_evaluation_tasks,
        "way": way,
        "shot": shot,
        "query": query,
        "batch_norm": options.batch_norm,
        "normalization": options.normalization,
        "seed": options.val_seed,
    }


def changes_of(options: Options, trained: Mapping[str, Any] | None) -> str:
    """Return the options whose value in a test is not that of the training, without those that other columns show."""
    shown = {"num_classes_per_set", "num_samples_per_class", "number_of_training_steps_per_iter", "batch_norm", "head"}
    found = differences(trained, options, "test") if trained else []
    found = [one for one in found if one.name not in shown and "head" not in declaration(one.name).only]
    if options.head:  # it takes the place of inner steps
        found = [one for one in found if declaration(one.name).only != GRADIENT]
    return ", ".join(f"{one.name}={one.now}" for one in found)


def write_samples(folder: Path, episodes: Episodes, logits: Tensor, name: str) -> None:
    """Write the first tasks and the answers to them, logits (tasks, way*query, way), to sample_episode_NAME[.K].npz."""
    for task, answered in enumerate(logits[:SAMPLES]):
        number = f".{task + 1}" if task else ""
        whole = io.BytesIO()  # a zip file that could not be ended would complain when Python forgets it
        np.savez_compressed(whole, **sample_episode(episodes, answered, task))
        with replace_file(folder / f"sample_episode_{name}{number}.npz") as file:
            file.write(whole.getbuffer())


def check_disjoint(episodes: Episodes, tasks: int) -> None:
    """Raise RuntimeError if an image is support and query of one task, or twice either."""
    for task in range(tasks):
        rows = episodes.indices(task)
        if len(np.unique(rows)) != rows.size:
            raise RuntimeError(f"task {task} of {episodes.split.name} uses an image twice")


def write_results(folder: Path, results: Sequence[Result]) -> None:
    """Add results to FOLDER/test_summary.json and .csv; a repeated test replaces its earlier result.

    Processes that test at once wait for one another here. Raises UserError if the file is damaged.
    """
    file = folder / "test_summary.json"
    with only_process(folder):
        same = [identity(result) for result in results]
        rows = [row for row in read_tests(file) if identity(row) not in same] + list(results)
        lines = [row | {"checkpoints": " ".join(row["checkpoints"])} for row in rows]
        write_text(file, json.dumps(rows, indent=2))
        write_csv(file.with_suffix(".csv"), lines)


def identity(result: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what two test results have in common if they answer the same question."""
    names = ("dataset", "split", "trained_on", "normalization", "episodes", "way", "shot", "query", "steps",
             "batch_norm", "seed")  # fmt: skip
    model = "ensemble" if result["model"].startswith("top-") else result["model"]  # of more epochs, as a run goes on
    return (*(result.get(name) for name in (*names, "head")), result.get("changed", ""), model)


def describe(result: Mapping[str, Any]) -> str:
    """Return one line with everything needed to compare a test result with a paper's."""
    return (
        f"test on {result['dataset']}, {result['way']}-way {result['shot']}-shot, {result['model']}: "
        f"{result['accuracy']:.2%} ± {result['ci95_per_episode']:.2%} (95 % CI per episode; "
        f"± {result['ci95_per_query']:.2%} per query), {result['episodes']} episodes, "
        f"{result['query']} queries per class, {result['batch_norm']} batch norm"
        + (f", {result['head']} head" if result["head"] else "")
        + (f", not as trained: {result['changed']}" if result["changed"] else "")
        + (f", {result['guessed']} tasks guessed" if result["guessed"] else "")
    )


def sample_episode(episodes: Episodes, logits: Tensor, task: int) -> dict[str, np.ndarray]:
    """Return a task for the report's picture: uint8 images (way, shot or query, H, W, C), and predictions."""
    split, rows = episodes.split, episodes.indices(task)  # (way, shot + query)
    classes = np.searchsorted(split.class_starts, rows[:, 0], side="right") - 1
    images = split.images[rows]
    return {
        "support": images[:, : episodes.shot],
        "query": images[:, episodes.shot :],
        "predictions": logits.argmax(1).view(len(rows), -1).numpy(),
        "class_names": np.array([split.class_names[k] for k in classes]),
    }
