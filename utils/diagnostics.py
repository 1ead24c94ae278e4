"""What goes on inside a task, looked at after every epoch on a few fixed validation tasks: logs/diagnostics.jsonl.

A record is {"epoch", "iterations", "tasks", "peak_memory_gib", "series"} and, where a network has DropBlock,
"dropblock_keep". A series holds the mean over tasks and their standard deviation, one number per inner step:

accuracy                          of the query images, after each inner step
gradient_norm/LAYER               of the support loss by a layer's weights, with everything that the method does
gradient_norm_unscaled/LAYER      CxGrad: the same tasks from the same weights, without contextual scaling
gamma/LAYER                       CxGrad: the norm that contextual scaling gives the weights
residual                          of heads: the relative KKT residual of the solution, one number

Looking changes nothing of the run: neither weights nor statistics, nor what is drawn at random later.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from classification_heads import head_options
from data import Episodes
from few_shot_learning_system import EVALUATION, InnerStep, MAMLFewShotClassifier
from head_learning_system import HeadFewShotClassifier
from inner_loop_optimizers import CxGrad
from learner import FewShotLearner, Tasks
from meta_neural_network_architectures import DropBlock
from utils.devices import peak_memory_gib
from utils.files import write_text
from utils.records import read_diagnostics

TASKS = 8  # the first of the validation
Series = dict[str, Tensor]  # name -> (steps, tasks)


def diagnose(model: FewShotLearner, episodes: Episodes, epoch: int) -> dict[str, Any]:
    """Return the record of an epoch: the model on the first `TASKS` of these tasks, or on all that are validated on."""
    number = min(TASKS, model.options.num_evaluation_tasks)
    record: dict[str, Any] = {"epoch": epoch, "iterations": model.iterations_done, "tasks": number}
    record["peak_memory_gib"] = rounded(peak_memory_gib(model.device))
    for module in model.modules():
        if isinstance(module, DropBlock):
            record["dropblock_keep"] = rounded(1 - module.fraction().item())
    with untouched(model):
        tasks = model._to_device(episodes.batch(0, number), model.options.evaluation_task[0])
        parts = [_look(model, part) for part in model._passes(tasks)]
    joined = {name: torch.cat([part[name] for part in parts], 1).double().cpu() for name in parts[0]}
    return record | {"series": {name: summary(series) for name, series in joined.items()}}


def summary(series: Tensor) -> dict[str, list[float]]:
    """Return mean and deviation over tasks, one number per step, of (steps, tasks)."""
    deviation, mean = torch.std_mean(series, 1)
    return {"mean": [*map(rounded, mean.tolist())], "std": [*map(rounded, deviation.tolist())]}


def rounded(number: float) -> float:
    return float(f"{number:.5g}")


def write_diagnostics(folder: Path, record: dict[str, Any]) -> None:
    """Add a record to FOLDER/logs/diagnostics.jsonl; those of this epoch and later ones, of before a resume, go."""
    kept = [earlier for earlier in read_diagnostics(folder) if earlier["epoch"] < record["epoch"]]
    text = "".join(f"{json.dumps(line)}\n" for line in (*kept, record))
    write_text(folder / "logs" / "diagnostics.jsonl", text)


@contextmanager
def untouched(model: FewShotLearner) -> Iterator[None]:
    """Put the model's buffers, such as counters of forward passes, and the random numbers back in the end."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)


def _look(model: FewShotLearner, tasks: Tasks) -> Series:
    if isinstance(model, HeadFewShotClassifier):
        return {"residual": _residuals(model, tasks).unsqueeze(0)}
    if isinstance(model, MAMLFewShotClassifier):
        return _inner_steps(model, tasks)
    return {}


@torch.no_grad()
def _residuals(model: HeadFewShotClassifier, tasks: Tasks) -> Tensor:
    """Return the residual of each task (tasks,)."""
    support, (way, shot, _) = model.adapt(tasks.x_support, tasks.y_support), model.options.evaluation_task
    arguments = model.features(tasks.x_query), support.features, support.labels, way, shot
    return model.head.solve_and_score(*arguments, **head_options(model.options)).residual


def _inner_steps(model: MAMLFewShotClassifier, tasks: Tasks) -> Series:
    def accuracy(step: InnerStep) -> dict[str, Tensor]:
        right = model.predict(step, tasks.x_query).argmax(2) == tasks.y_query
        return {"accuracy": right.double().mean(1)}

    def scaling(step: InnerStep) -> dict[str, Tensor]:
        rule = model.rules[CxGrad.__name__]
        assert isinstance(rule, CxGrad)
        return {f"gamma/{layer(name)}": norms(step.used[name]) for name in rule.names if is_layer(step.used[name])}

    if CxGrad.__name__ not in model.rules:
        return _along(model, tasks, accuracy, gradient_norms)
    found = _along(model, tasks, accuracy, gradient_norms, scaling)
    with without_rule(model, CxGrad.__name__):
        unscaled = _along(model, tasks, gradient_norms)
    return found | {name.replace("/", "_unscaled/", 1): series for name, series in unscaled.items()}


def _along(model: MAMLFewShotClassifier, tasks: Tasks, *looks: Callable[[InnerStep], dict[str, Tensor]]) -> Series:
    """Return what `looks`, each name -> (tasks,), see of every inner step in evaluation."""
    steps, seen = model.options.number_of_evaluation_steps_per_iter, []
    with torch.enable_grad():
        for step in model.inner_loop(tasks.x_support, tasks.y_support, steps, EVALUATION):
            seen.append({name: value for look in looks for name, value in look(step).items()})
    return {name: torch.stack([values[name] for values in seen]) for name in seen[0]}


def gradient_norms(step: InnerStep) -> dict[str, Tensor]:
    """Return the norm of the support loss's gradient by each layer's weights, of each task (tasks,)."""
    return {f"gradient_norm/{layer(n)}": norms(g) for n, g in step.gradients.items() if is_layer(g)}


def norms(tensor: Tensor) -> Tensor:
    """Return the root of the sum of squares of each task's tensor: (tasks, ...) -> (tasks,)."""
    return torch.linalg.vector_norm(tensor.detach().flatten(1), dim=1)


def is_layer(tensor: Tensor) -> bool:
    """Return whether a tensor (tasks, ...) is a layer's matrix or kernels, not a bias or scale."""
    return tensor.dim() > 2


def layer(name: str) -> str:
    """Return a parameter's name without the words that all have: layer_dict.conv0.conv.weight is conv0."""
    return name.removeprefix("layer_dict.").removesuffix("s").removesuffix(".weight").removesuffix(".conv")


@contextmanager
def without_rule(model: MAMLFewShotClassifier, name: str) -> Iterator[None]:
    """Leave one rule of the inner loop out while inside; what it has learned stays as it is."""
    rules = model.rules
    model.rules = nn.ModuleDict({other: rule for other, rule in rules.items() if other != name})
    try:
        yield
    finally:
        model.rules = rules
