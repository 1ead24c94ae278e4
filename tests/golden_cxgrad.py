"""Our numbers for every recorded array of a CxGrad golden case, and their errors. Run as a script, it prints the table.

    python tests/golden_cxgrad.py

An error is max|ours - recorded| / max|recorded| of an array.
"""

import sys
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from few_shot_learning_system import (
    FIRST_ORDER,
    SECOND_ORDER,
    MAMLFewShotClassifier,
    Tasks,
    cross_entropy,
    multi_step_importances,
)
from inner_loop_optimizers import means
from tests.golden import facts, load, recipes
from utils.official_checkpoints import load_official, to_official

RUNNING = ("running_mean", "running_var")
DTYPES = {"f64": torch.float64, "f32": torch.float32}


def load_cases() -> dict[str, dict[str, Any]]:
    """Return the settings of each case that was recorded from the official programs of CxGrad, MAML++ and ALFA."""
    manifest: dict[str, dict[str, Any]] = facts("manifest")
    for case in manifest.values():
        if case["reference_repo"] != "CxGrad":
            case["args"]["use_bias"] = True  # the other two programs always have convolution biases
    return manifest


class Golden:
    """One recorded case: its arrays, and models and batches made from them."""

    def __init__(self, name: str, case: Mapping[str, Any], kind: str) -> None:
        self.arrays = load("cxgrad", name) | recipes.tasks()
        self.options, self.epoch, self.kind = case["args"], case["epoch"], kind
        self.evaluation_only = "_eval" in name

    def model(self, **changes: Any) -> MAMLFewShotClassifier:
        model = MAMLFewShotClassifier((2, 3, 20, 20), "cpu", SimpleNamespace(**{**self.options, **changes}))
        start = {name[5:]: torch.from_numpy(a) for name, a in self.arrays.items() if name.startswith("init/")}
        load_official(model, start)
        return model.to(DTYPES[self.kind])

    def batch(self, iteration: int) -> tuple[np.ndarray, ...]:
        names = ("x_support", "x_target", "y_support", "y_target")
        x_support, x_target, y_support, y_target = (self.arrays[name][iteration] for name in names)
        precision = np.float64 if self.kind == "f64" else np.float32
        return x_support.astype(precision), x_target.astype(precision), y_support, y_target

    def recorded(self) -> dict[str, np.ndarray]:
        """What the official program gave in this precision, by array name."""
        prefix = f"{self.kind}/"
        return {name.removeprefix(prefix): a for name, a in self.arrays.items() if name.startswith(prefix)}

    def is_rounding_noise(self, name: str) -> bool:
        """Whether an array is, or follows from, a gradient that is mathematically zero.

        So is the gradient of a bias in front of batch norm, and of its learned rate. Adam makes steps of such noise.
        """
        parameter = name.partition("/")[2]
        gradient = self.arrays.get(f"f64/outer_grad/{parameter}", np.ones(1))
        return name.startswith(("outer_grad/", "params_after")) and float(np.abs(gradient).max()) < 1e-12

    @cached_property
    def ours(self) -> dict[str, np.ndarray]:
        """The same quantities, computed by this project."""
        found = dict(self.evaluation()) if self.evaluation_only else dict(self.training())
        return {n: v.detach().numpy() if isinstance(v, torch.Tensor) else np.asarray(v) for n, v in found.items()}

    def training(self) -> Iterator[tuple[str, Any]]:
        yield from self.adaptation("", *self.orders())
        model = self.model()
        losses, accuracies, rates = [], [], []
        for iteration in range(5):
            result, logits = model.run_train_iter(self.batch(iteration), self.epoch)
            losses.append(result["loss"])
            accuracies.append(result["accuracy"])
            rates.append(result["learning_rate"])
            if iteration == 0:
                yield from (("loss", losses[0]), ("accuracy", accuracies[0]), ("target_logits", torch.stack(logits)))
                gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
                yield from ((f"outer_grad/{n}", g) for n, g in to_official(gradients).items())
            if iteration in (0, 4):
                state = to_official(model.state_dict()) if self.kind == "f64" else {}
                yield from ((f"params_after_{iteration + 1}/{n}", t.clone()) for n, t in state.items())
        yield from {"train_loss": torch.stack(losses), "train_accuracy": torch.stack(accuracies)}.items()
        yield "learning_rate", rates
        yield from self.importances()
        yield from ((f"eval/{name}", value) for name, value in self.evaluation())

    def importances(self) -> Iterator[tuple[str, Any]]:
        yield "loss_importance_vector", multi_step_importances(3, self.epoch, 15)  # recorded even where it is not used
        for steps in (3, 5):
            rows = [multi_step_importances(steps, epoch, 15) for epoch in (0, 3, 14, 15, 20)]
            yield f"msl_importance_{steps}steps", rows

    def evaluation(self) -> Iterator[tuple[str, Any]]:
        model = self.model()
        losses, accuracies = [], []
        for iteration in range(5):
            result, logits = model.run_validation_iter(self.batch(iteration))
            losses.append(result["loss"])
            accuracies.append(result["accuracy"])
            if iteration == 0:
                yield from (("loss", losses[0]), ("accuracy", accuracies[0]), ("target_logits", torch.stack(logits)))
        yield from {"five_batches_loss": torch.stack(losses), "five_batches_accuracy": torch.stack(accuracies)}.items()
        yield from self.adaptation("", FIRST_ORDER, False)

    def orders(self) -> tuple[int, bool]:
        second = self.options["second_order"] and self.epoch > self.options["first_order_to_second_order_epoch"]
        return SECOND_ORDER if second else FIRST_ORDER, self.options["use_multi_step_loss_optimization"]

    def adaptation(self, prefix: str, order: int, multi_step: bool) -> Iterator[tuple[str, Any]]:
        """What happens inside the inner loop of iteration 0, step by step."""
        model = self.model()
        tasks: Tasks = model._to_device(self.batch(0))
        seen: list[Any] = []
        trace = [
            (state, model._query_logits(state, tasks.x_query, None))
            for state in model.inner_loop(tasks.x_support, tasks.y_support, 3, order, seen)
        ]
        steps = [state for state, _ in trace]
        queried = [2] if not multi_step else [0, 1, 2]
        query_logits = torch.stack([trace[k][1] for k in queried], 1)
        yield "support_loss", torch.stack([s.support_losses for s in steps], 1)
        yield "support_logits", torch.stack([s.support_logits for s in steps], 1)
        yield "target_logits_per_forward", query_logits
        yield "target_loss_per_forward", torch.stack([cross_entropy(trace[k][1], tasks.y_query) for k in queried], 1)
        yield "target_loss_step_index", queried
        last_task = torch.stack([s.support_losses[-1] for s in steps]).detach()
        yield "adaptation_loss", last_task.mean()
        yield "adaptation_std", last_task.std()
        yield from ((f"task0/used_weights/step{s.step}/{n}", w[0]) for s in steps for n, w in s.used.items())
        yield from ((f"task0/adapted_weights/step{s.step}/{n}", w[0]) for s in steps for n, w in s.weights.items())
        if self.options["contextual_grad"]:
            yield from self.contexts(model, tasks, steps)
        if self.options["alfa"]:
            rule: Any = model.rules["ALFA"]
            alpha, beta = torch.stack([torch.stack(rule.generate(s.used, s.gradients)) for s in steps], 2)
            embedding = torch.stack([torch.cat([means(s.used), means(s.gradients)], 1) for s in steps], 1)
            yield from {"task_embedding": embedding, "generated_alpha": alpha, "generated_beta": beta}.items()
        if self.options["attenuate"]:
            yield from self.attenuation(model, tasks)
        if self.options["per_step_bn_statistics"]:
            model.options.use_multi_step_loss_optimization = multi_step
            model.query_losses(tasks, self.epoch)  # training collects statistics, evaluation leaves them alone
            yield from ((f"buffers_after_1/{n}", b) for n, b in model.state_dict().items() if n.endswith(RUNNING))

    def attenuation(self, model: MAMLFewShotClassifier, tasks: Tasks) -> Iterator[tuple[str, Any]]:
        rule: Any = model.rules["L2F"]
        parameters = model.task_parameters(2)
        weights = {name: parameters[name] for name in model.inner_names}
        logits = model._forward(parameters, False)(weights, tasks.x_support, 0, None)
        losses = cross_entropy(logits, tasks.y_support)
        gradients = torch.autograd.grad(losses.sum(), list(weights.values()))
        embedding = means(dict(zip(weights, gradients, strict=True)))
        yield from {"embed_support_logits": logits, "embed_support_loss": losses}.items()
        yield from {"attenuator_input": embedding, "attenuator_gamma": rule.attenuator(embedding)}.items()

    def contexts(self, model: MAMLFewShotClassifier, tasks: Tasks, steps: list[Any]) -> Iterator[tuple[str, Any]]:
        rule: Any = model.rules["CxGrad"]
        parameters = model.task_parameters(2)
        warm_up: list[torch.Tensor] = []

        def support_loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
            warm_up.append(model._forward(parameters, False)(weights, tasks.x_support, 0, None))
            return cross_entropy(warm_up[0], tasks.y_support)

        weights = {name: parameters[name] for name in model.inner_names}
        _, start = rule.start(weights, support_loss)
        contexts = [start["context"], *(s.states["CxGrad"]["context"] for s in steps)]
        yield "gamma_warmup", rule.generator(torch.zeros(2, 10, dtype=DTYPES[self.kind]))
        yield "warmup_support_logits", warm_up[0]
        yield "warmup_support_loss", cross_entropy(warm_up[0], tasks.y_support)
        yield "context_after_warmup", contexts[0]
        yield "gamma_step", torch.stack([rule.generator(context) for context in contexts[:-1]], 1)
        yield "context_after_step", torch.stack(contexts[1:], 1)


def relative_errors(golden: Golden) -> dict[str, float]:
    """max|ours - recorded| / max|recorded| of every array that is more than rounding noise.

    For a gradient the denominator is at least 1 % of the largest one of its module.
    """
    ours, recorded = golden.ours, golden.recorded()
    largest = {name: np.abs(array).max(initial=0.0) or 1.0 for name, array in recorded.items()}
    errors = {}
    for name, array in recorded.items():
        module = ".".join(name.split(".")[:1]) if name.startswith("outer_grad/") else name
        scale = max(largest[name], *(0.01 * largest[n] for n in recorded if n.startswith(module)))
        if not golden.is_rounding_noise(name):
            errors[name] = float(np.abs(ours[name] - array).max(initial=0.0) / scale)
    return errors


def is_accuracy(name: str) -> bool:
    """Recorded as float32 in all runs; in float32 runs a single query may fall on the other side later on."""
    return "accuracy" in name


if __name__ == "__main__":
    for name, case in load_cases().items():
        for kind in DTYPES:
            errors = {n: e for n, e in relative_errors(Golden(name, case, kind)).items() if not is_accuracy(n)}
            worst = max(errors, key=lambda n: errors[n])
            print(f"{name:28} {kind}  {errors[worst]:.1e}  {worst}  ({len(errors)} arrays)")
