"""Where the curves of a run go besides its logs: --tracker none, tensorboard, or one of your own (docs/tracking.md)."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from utils.errors import UserError
from utils.options import add_choice, add_plug_in


class Tracker:
    """A tracker takes what a run has to show; this one, "none", leaves it alone.

    Args:
        folder: where its own files belong, logs/NAME of the experiment.
        iteration: the run goes on after it; what an earlier process has tracked of later ones is not valid any more.
    """

    def __init__(self, folder: Path, iteration: int) -> None: ...

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Take the numbers of an epoch, such as accuracy/validation, at the iteration that it ended with."""

    def picture(self, name: str, png: bytes, iteration: int) -> None:
        """Take a picture of the report."""

    def results(self, options: Mapping[str, Any], accuracies: Mapping[str, float]) -> None:
        """Take the accuracies of a test, in [0, 1], with the options that decide what is trained."""

    def close(self) -> None:
        """End the record."""


TRACKERS: dict[str, type[Tracker]] = {"none": Tracker}


def register(name: str) -> Callable[[type[Tracker]], type[Tracker]]:
    """Make a class a choice of --tracker; raises ValueError if there is one of that name."""

    def add(tracker: type[Tracker]) -> type[Tracker]:
        add_plug_in(TRACKERS, name, tracker)
        add_choice("tracker", name)
        return tracker

    return add


@register("tensorboard")
class TensorBoard(Tracker):
    """This tracker writes event files; `tensorboard --logdir experiments` shows them."""

    def __init__(self, folder: Path, iteration: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # slow to import
        except ModuleNotFoundError as error:
            raise UserError("--tracker tensorboard needs TensorBoard: pip install tensorboard") from error
        self.folder = folder
        # Events of a stopped process that this one will write again are not shown.
        self.writer = SummaryWriter(str(folder), purge_step=iteration + 1)

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, iteration)
        self.writer.flush()

    def picture(self, name: str, png: bytes, iteration: int) -> None:
        pixels = decoded(png)
        self.writer.add_image(name, pixels, iteration, dataformats="HWC")

    def results(self, options: Mapping[str, Any], accuracies: Mapping[str, float]) -> None:
        numbers = {name: value for name, value in options.items() if type(value) in (int, float)}
        words = {name: str(value) for name, value in options.items() if name not in numbers}  # true is no 1 there
        self.writer.add_hparams(numbers | words, dict(accuracies), run_name=".")

    def close(self) -> None:
        self.writer.close()


def decoded(png: bytes) -> np.ndarray:
    """Return the pixels (H, W, 3) of a PNG."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))
