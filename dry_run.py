"""A rehearsal: everything that a command would do, in seconds, on made-up images."""

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from utils import distributed
from utils.image_cache import SPLITS
from utils.options import Options, all_defaults, declaration, unmet
from utils.synthetic import write_dataset

log = logging.getLogger(__name__)

ELSEWHERE = "dry_run_elsewhere"  # the data set of its cross-domain test


def dry_run(run: Callable[..., None], options: Options, device: torch.device) -> None:
    """Call `run` for two tiny epochs on made-up images: train, validate, save, resume, test, cross-test.

    It is called with options, the device and, for the training that is then resumed, `test` false.
    """
    with tempfile.TemporaryDirectory(prefix="dry_run_") as name:
        folder = distributed.broadcast_text(name)
        tiny = shrink(options, Path(folder))
        if distributed.is_main():
            write_images(tiny, (tiny.dataset_name,))
            write_images(tiny, (ELSEWHERE,), ("test",))
        distributed.barrier()
        run(dataclasses.replace(tiny, total_epochs=1), device, test=False)
        run(tiny, device)
        run(dataclasses.replace(tiny, evaluate_on_test_set_only=True, test_datasets=ELSEWHERE), device)
        distributed.barrier()
    log.info("dry run: trained, resumed, tested and cross-tested")


def write_images(options: Options, names: Iterable[str], splits: Sequence[str] = SPLITS) -> None:
    """Write just enough made-up images for the options' tasks, in splits of data sets of these names."""
    (way, shot, query), (test_way, _, test_query) = options.training_task, options.evaluation_task
    images = max(shot + query, max(options.evaluation_task[1], *options.test_shot_list) + test_query)
    for name in names:
        write_dataset(Path(options.dataset_dir) / name, max(way, test_way), images, (28, 28), splits)


def shrink(options: Options, folder: Path) -> Options:
    """Return the options of the same method on fewer, smaller images with a narrower network, all in `folder`."""
    declared = {name: declaration(name) for name in all_defaults()}
    tiny = {n: d.dry_run for n, d in declared.items() if d.dry_run is not None and not unmet(d.only, options)}
    ranks, side = distributed.world_size(), 16 if options.conv_padding else 64
    return dataclasses.replace(
        options,
        dataset_dir=str(folder),
        experiments_dir=str(folder / "experiments"),
        save_path=options.save_path and str(folder / "run"),
        test_datasets=None,
        image_height=side,
        image_width=side,
        batch_size=ranks * min(2, -(-options.batch_size // ranks)),
        **tiny,
    )
