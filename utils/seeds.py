"""Several seeds of one command: a run of each in a folder of its own, and their mean and standard deviation."""

import dataclasses
import logging

from experiment_builder import experiment_folder
from utils import results
from utils.options import Options

log = logging.getLogger(__name__)


def each(options: Options) -> list[Options]:
    """Return the options of each run: those given, or with --num_seeds n those of n runs in folders seed_1 to seed_n.

    From one to the next, the seeds of the initial weights and of the training tasks go up by one; validation and test
    tasks stay the same. Raises UserError where a seed becomes too large.
    """
    if options.num_seeds == 1:
        return [options]
    return [_of_seed(options, i) for i in range(options.num_seeds)]


def _of_seed(options: Options, i: int) -> Options:
    of_seed = dataclasses.replace(
        options,
        seed=options.seed + i,
        train_seed=options.train_seed + i,
        experiment_name=f"{options.experiment_name}/seed_{i + 1}",
        save_path=options.save_path and f"{options.save_path}/seed_{i + 1}",
    )
    of_seed.validate()
    return of_seed


def report(options: Options) -> None:
    """Print mean and standard deviation of each test over the seeds, all of which are tested.

    They go to results.md and results.csv in the folder that holds the seeds' folders, too.
    """
    folders = [experiment_folder(of_seed) for of_seed in each(options)]
    rows = results.collect(folders)
    results.write(rows, folders[0].parent)
    alike = [row for row in rows if row.seeds == options.num_seeds]
    for row in alike:
        single, ensemble = results.accuracies(row)
        log.info("%s, in %%: single best %s, ensemble %s; ± is the standard deviation", row.title, single, ensemble)
    if not alike:
        log.warning("the seeds were not trained or tested alike, so there is no mean of them")
    log.info("table of all tests: %s", folders[0].parent / "results.md")
