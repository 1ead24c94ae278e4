"""What every learner shares: moving tasks to the device, scoring, and checkpoints.

A learner has two verbs: `adapt` to labelled support images, and `predict` the logits of query images.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import checkpoints
from utils.devices import prepare_device
from utils.errors import UserError
from utils.official_checkpoints import load_official, to_official
from utils.options import Options

# x_support, x_target (tasks, way, images, C, H, W), y_support, y_target (tasks, way, images)
DataBatch = Sequence[Any]


class Tasks(NamedTuple):
    """A batch of tasks on the device; rows are way-major: all images of class 0, then of class 1, ..."""

    x_support: Tensor  # (tasks, way*shot, C, H, W)
    y_support: Tensor  # (tasks, way*shot)
    x_query: Tensor  # (tasks, way*query, C, H, W)
    y_query: Tensor  # (tasks, way*query)


class Form(NamedTuple):
    """How the gradients of a meta-batch are computed; they are the same in all forms, up to rounding."""

    tasks_per_pass: int
    captured: bool  # in a CUDA graph

    def __str__(self) -> str:
        return f"{self.tasks_per_pass} task{'s' * (self.tasks_per_pass > 1)} per pass{', captured' * self.captured}"


class Veto(NamedTuple):
    """Why training must not go on."""

    problem: str
    cure: str


class FewShotLearner(nn.Module):
    """Base of the learners. A subclass sets `optimizer` and says how to train, adapt and predict."""

    optimizer: torch.optim.Optimizer
    form: Form | None = None  # in which training goes on if it has been measured, in this process or before a resume
    counts: ClassVar[Sequence[str]] = ()  # metrics beside loss and accuracy that an epoch adds up: numbers of tasks
    # A checkpoint's file name, by what the experiment calls it; other names (epoch_N) get `suffix` only.
    file_names: Mapping[str, str] = {}
    suffix = ""

    def __init__(self, im_shape: Sequence[int], device: torch.device | str, args: object) -> None:
        super().__init__()
        self.options = Options.from_object(args)
        self.device = torch.device(device)
        self.image_shape = (im_shape[1], im_shape[2], im_shape[3])
        self.iterations_done = 0
        prepare_device(self.device, self.options.precision == "tf32", self.options.deterministic)

    def choose_form(self, data_batch: Callable[[], DataBatch]) -> bool:
        """Choose `form` by measurement on a training meta-batch, where there is a choice; return whether it was made.

        Nothing else changes. All processes have to call it.
        """
        return False

    @abstractmethod
    def run_train_iter(
        self, data_batch: DataBatch, epoch: float, current_iter: int | None = None
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """One outer update on a meta-batch; returns (losses, per-task query logits), left on the device."""

    @abstractmethod
    def adapt(self, x_support: Tensor, y_support: Tensor) -> Any:
        """Adapt for evaluation: support (tasks, n, C, H, W) and labels (tasks, n) -> the state that `predict` takes."""

    @abstractmethod
    def predict(self, state: Any, x_query: Tensor) -> Tensor:
        """Return logits (tasks, n, way) of query images (tasks, n, C, H, W)."""

    def run_validation_iter(
        self, data_batch: DataBatch, current_iter: int | None = None
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """Score a meta-batch without changing anything; same result as `run_train_iter`."""
        tasks = self._to_device(data_batch, self.options.evaluation_task[0])
        parts = [self.predict(self.adapt(part.x_support, part.y_support), part.x_query) for part in self._passes(tasks)]
        logits = torch.cat(parts)
        return self._report(cross_entropy(logits, tasks.y_query), logits, tasks.y_query)

    def _to_device(self, data_batch: DataBatch, way: int | None = None) -> Tasks:
        """A batch of tasks of `way` classes, by default those of training; UserError if it does not fit the model."""
        dtype = next(self.parameters()).dtype
        x_support, x_query, y_support, y_query = (as_tensor(array) for array in data_batch)
        way = way or self.options.num_classes_per_set
        for x in (x_support, x_query):
            if x.dim() != 6 or (x.shape[1], tuple(x.shape[3:])) != (way, self.image_shape):
                raise UserError(
                    f"a batch of shape {tuple(x.shape)} does not fit a model of {way} ways and images of "
                    f"{self.image_shape}; batches are (tasks, way, images, C, H, W)"
                )
        images = [x.to(self.device, dtype).flatten(1, 2) for x in (x_support, x_query)]
        labels = [y.to(self.device, torch.long).flatten(1) for y in (y_support, y_query)]
        return Tasks(images[0], labels[0], images[1], labels[1])

    def _passes(self, tasks: Tasks) -> Iterator[Tasks]:
        """Yield the meta-batch in micro-batches of tasks; gradients do not depend on the cut."""
        yield from parts_of(tasks, self.options.tasks_per_pass or self._usual_tasks_per_pass(len(tasks.x_support)))

    def _usual_tasks_per_pass(self, tasks: int) -> int:
        return 1 if self.device.type == "cpu" else tasks

    def _report(self, losses: Tensor, logits: Tensor, labels: Tensor) -> tuple[dict[str, Any], list[Tensor]]:
        correct = (logits.argmax(2) == labels).to(losses.dtype)
        report = {"loss": losses.mean(), "accuracy": correct.mean(), "learning_rate": self.learning_rate}
        return report, list(logits)

    def veto(self, metrics: Mapping[str, float]) -> Veto | None:
        """Say why training must stop after an iteration with these metrics; None: it goes on."""
        if math.isfinite(metrics["loss"]):
            return None
        return Veto(f"the loss is {metrics['loss']}", "Lower --meta_learning_rate")

    def check_scores(self, counts: Mapping[str, float]) -> None:
        """Raise UserError where scored tasks must not count, from the sums of their `counts`."""

    def protocol(self) -> dict[str, Any]:
        """Return how the learner adapts in a test, for the results to say."""
        return {"steps": None, "head": None}

    @property
    def learning_rate(self) -> float:
        """Return the outer learning rate in use."""
        return self.optimizer.param_groups[0]["lr"]

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    # --- checkpoints -------------------------------------------------------------------------------------------

    def file_name(self, name: str) -> str:
        """Return the file of the checkpoint `name`: latest, best or epoch_N."""
        return self.file_names.get(name, f"{name}{self.suffix}")

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Return the parts of a checkpoint that hold weights, as the official programs name them."""
        return {"network": to_official(self.state_dict())}

    def weights_in(self, state: Mapping[str, Any]) -> Mapping[str, Tensor]:
        """Return the weights in a checkpoint by this model's names; UserError if another kind of learner made it."""
        if "network" not in state:
            raise UserError("it was trained with --learner head, this model with gradient steps")
        weights: Mapping[str, Tensor] = state["network"]
        return weights

    def save_model(self, model_save_dir: str | Path, state: Mapping[str, Any]) -> None:
        """Write weights, optimiser and `state` (plain values and tensors) to the file `model_save_dir`, atomically."""
        own = {**self.weights(), "optimizer": self.optimizer.state_dict(), "iterations_done": self.iterations_done}
        form = {"form": self.form and self.form._asdict(), "device": self.device.type}
        checkpoints.save({**state, **own, **form}, Path(model_save_dir))

    def load_model(self, model_save_dir: str | Path, model_name: str, model_idx: str | int) -> dict[str, Any]:
        """Restore what `save_model` wrote to MODEL_SAVE_DIR/MODEL_NAME_MODEL_IDX; returns the whole state."""
        return self.load_checkpoint(Path(model_save_dir) / f"{model_name}_{model_idx}")

    def load_checkpoint(self, path: Path, with_optimizer: bool = True) -> dict[str, Any]:
        """Restore what `save_model` wrote to `path` and return the whole state; see `load_state`."""
        state = checkpoints.load(path)
        self.load_state(state, path, with_optimizer)
        return state

    def load_state(self, state: Mapping[str, Any], path: Path, with_optimizer: bool = True) -> None:
        """Restore the weights and, if wanted, the optimiser from the state that was read from `path`.

        Raises UserError if another architecture made it; the model is then unchanged.
        """
        before = self.optimizer.state_dict()
        try:
            weights = self.weights_in(state)
            if "optimizer" in state and with_optimizer:
                self.optimizer.load_state_dict(state["optimizer"])
            load_official(self, weights)
        except (ValueError, TypeError, AttributeError, LookupError) as error:  # torch checks little of an optimiser's
            self.optimizer.load_state_dict(before)
            raise UserError(f"{path} does not fit this model: {error}") from error
        self.iterations_done = state.get("iterations_done", 0)
        measured_here = state.get("device", self.device.type) == self.device.type
        self.form = Form(**state["form"]) if state.get("form") and measured_here else None


def parts_of(tasks: Tasks, size: int) -> Iterator[Tasks]:
    """Return the tasks in parts of `size`; the last one may be smaller."""
    return map(Tasks._make, zip(*(tensor.split(size) for tensor in tasks), strict=True))


def as_tensor(array: Any) -> Tensor:
    """An array or tensor as a tensor; a read-only array, such as a memory map, is copied."""
    if isinstance(array, np.ndarray) and not array.flags.writeable:
        array = array.copy()
    return torch.as_tensor(array)


def cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of each task (tasks,), from logits (tasks, n, way) and labels (tasks, n).

    With `smoothing`, the target is 1 - smoothing on the true class and shares smoothing among the *other* classes
    (MetaOptNet's way; torch's own label smoothing gives the true class a share too).
    """
    way = logits.shape[2]
    share = smoothing * way / (way - 1) if way > 1 else 0.0  # what torch's definition calls the same smoothing
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", label_smoothing=share).mean(1)
