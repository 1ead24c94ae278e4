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

from utils import checkpoints, distributed
from utils.devices import prepare_device
from utils.errors import UserError
from utils.official_checkpoints import load_official, to_official
from utils.options import Options

# x_support, x_target (tasks, way, images, C, H, W), y_support, y_target (tasks, way, images)
DataBatch = Sequence[Any]
# Settings of the optimisers that no option changes.
OPTIMISER_CONSTANTS = {"betas", "eps", "momentum", "dampening", "nesterov", "amsgrad", "maximize"}


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
    """Why an iteration must not count."""

    problem: str
    cure: str
    task: int | None  # its place in the meta-batch; None: all tasks, or no single one, are to blame


class FewShotLearner(nn.Module):
    """Base of the learners. A subclass sets `optimizer` and says how to train, adapt and predict."""

    optimizer: torch.optim.Optimizer
    form: Form | None = None  # in which training goes on if it has been measured, in this process or before a resume
    counts: ClassVar[Sequence[str]] = ()  # metrics beside loss and accuracy that an epoch adds up: numbers of tasks
    # Metrics that have to be finite in training, each (tasks,) but the last, (parameters,). What is not finite spoils
    # all that comes after it, so the first one is to blame.
    checked: ClassVar[Sequence[str]] = ("pixels", "losses", "gradients")
    cure = "Lower --meta_learning_rate"  # of numbers that grow without bound
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

    def run_train_iter(
        self, data_batch: DataBatch, epoch: float, current_iter: int | None = None
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """One outer update on a meta-batch; returns (losses, per-task query logits), left on the device.

        `losses` has all that is `checked` too. With ``on_nonfinite`` = skip the host waits for the device, and what is
        not finite in any process leaves weights, statistics and the optimiser of all as they were.

        Args:
            data_batch: x_support, x_target, y_support, y_target; arrays or tensors.
            epoch: decides on the learning rate and, with gradient steps, on derivative order and multi-step loss; its
                whole part counts.
            current_iter: iterations done before this one; default: counted by this object.
        """
        if current_iter is not None:
            self.iterations_done = current_iter
        self._set_learning_rate(int(epoch))
        tasks = self._to_device(data_batch)
        may_skip = self.options.on_nonfinite == "skip"
        before = [buffer.clone() for buffer in self.buffers()] if may_skip else []
        report, logits = self._set_gradients(tasks, int(epoch))
        distributed.average_gradients(self.parameters())
        distributed.average([buffer for buffer in self.buffers() if buffer.is_floating_point()])
        self._clamp_gradients()
        report["pixels"] = torch.maximum(largest_of_tasks(tasks.x_support), largest_of_tasks(tasks.x_query))
        # Not the largest entries: Adam adds up squares, which may overflow where a gradient does not.
        report["gradients"] = torch.stack(torch._foreach_norm([*self._outer_gradients().values()]))
        if may_skip and not self._finite(report):
            for buffer, value in zip(self.buffers(), before, strict=True):
                buffer.copy_(value)
        else:
            self.optimizer.step()
        self.iterations_done += 1
        return report, logits

    @abstractmethod
    def _set_gradients(self, tasks: Tasks, epoch: int) -> tuple[dict[str, Any], list[Tensor]]:
        """Set the gradients of a meta-batch's loss; return metrics and query logits as `_report` does."""

    @abstractmethod
    def _set_learning_rate(self, epoch: int) -> None:
        """Set the outer learning rate of the next update."""

    def _clamp_gradients(self) -> None:
        """Limit the gradients of the outer update, where a learner does that."""

    def _outer_gradients(self) -> dict[str, Tensor]:
        """Return the gradient of every parameter that has one; throughout an epoch these are the same parameters."""
        return {name: p.grad for name, p in self.named_parameters() if p.grad is not None}

    def _finite(self, report: Mapping[str, Any]) -> bool:
        """Return whether all that is `checked` is finite in all processes; the host waits for the device."""
        finite = torch.cat([report[name] for name in self.checked]).isfinite().all()
        return not distributed.largest(int(not finite))

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
        return report | {"losses": losses}, list(logits)

    def veto(self, metrics: Mapping[str, Sequence[float]]) -> Veto | None:
        """Say why an iteration with these values of what is `checked`, of all processes in turn, must not count.

        None: it counts. The iteration must be one of the present epoch.
        """
        for name in self.checked:
            values = metrics[name]
            if places := [place for place, value in enumerate(values) if not math.isfinite(value)]:
                of_one = name != "gradients" and (len(places) < len(values) or len(values) == 1)
                return Veto(*self._blame(name, values[places[0]], places), places[0] if of_one else None)
        return None

    def _blame(self, name: str, value: float, places: Sequence[int]) -> tuple[str, str]:
        """Return problem and cure of a `checked` metric, given its first value that is not finite, and all places."""
        if name == "pixels":
            cure = "Image files hold finite pixels only: look at what normalises them, or at the code that makes them"
            return f"a pixel is {value}", cure
        if name == "losses":
            return f"the loss is {value}", self.cure
        names = [*self._outer_gradients()]
        first, *others = dict.fromkeys(names[place % len(names)] for place in places)  # each process has them all
        more = f" (and of {len(others)} more parameters)" if others else ""
        return f"the gradient of {first}{more} is {value}", self.cure

    def not_finite(self) -> list[str]:
        """Return the names of weights, statistics and parts of the optimiser's state that are not finite."""
        held = self.state_dict()
        for name, parameter in self.named_parameters():
            held |= {f"{part} of {name}": value for part, value in self.optimizer.state.get(parameter, {}).items()}
        return [name for name, value in held.items() if isinstance(value, Tensor) and not value.isfinite().all()]

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

    def _check_optimizer(self, before: Mapping[str, Any]) -> None:
        """Raise UserError or another error if what the optimiser loaded would make its next step fail."""
        for group, own in zip(self.optimizer.param_groups, before["param_groups"], strict=True):
            for name in OPTIMISER_CONSTANTS & own.keys():
                if group[name] != own[name]:
                    raise UserError(f"the optimiser's {name} is {group[name]!r}, this model's {own[name]!r}")
            for name in ("lr", "weight_decay"):
                if not isinstance(group[name], int | float):
                    raise UserError(f"the optimiser's {name} is {group[name]!r}")
        averages = ("exp_avg", "exp_avg_sq") if "betas" in before["param_groups"][0] else ("momentum_buffer",)
        for parameter, state in self.optimizer.state.items():
            for name in averages:
                if state[name].shape != parameter.shape:
                    raise UserError(f"the optimiser's {name} has the shape {tuple(state[name].shape)}")

    def load_state(self, state: Mapping[str, Any], path: Path, with_optimizer: bool = True) -> None:
        """Restore the weights and, if wanted, the optimiser from the state that was read from `path`.

        Raises UserError if another architecture made it; the model is then unchanged.
        """
        before = self.optimizer.state_dict()
        try:
            weights = self.weights_in(state)
            if "optimizer" in state and with_optimizer:
                self.optimizer.load_state_dict(state["optimizer"])
                self._check_optimizer(before)
            load_official(self, weights)
        except (ValueError, TypeError, AttributeError, LookupError, NotImplementedError) as error:  # an optimiser's too
            self.optimizer.load_state_dict(before)
            raise UserError(f"{path} does not fit this model: {error}") from error
        self.iterations_done = state.get("iterations_done", 0)
        measured_here = state.get("device", self.device.type) == self.device.type
        self.form = Form(**state["form"]) if state.get("form") and measured_here else None


def largest_of_tasks(values: Tensor) -> Tensor:
    """Return the largest absolute value of each task (tasks,), not finite where one of the task's values is not."""
    return values.flatten(1).abs().amax(1)  # on a CPU a tenth of the time of a norm


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
