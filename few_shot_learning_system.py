"""The gradient-based learner: what one meta-batch of tasks costs, and the outer update.

`inner_loop` adapts the weights to a batch of tasks by the rules of `inner_loop_optimizers`; `_meta_gradients` sends the
query loss of the adapted weights back to the meta-parameters, which Adam then moves. All tensors carry a leading task
dimension.
"""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from captured_gradients import WARM_UP, CapturedGradients, CudaGraphs, Refused
from head_learning_system import HeadFewShotClassifier
from inner_loop_optimizers import InnerLoop, Rule, State, Weights, chosen_rules, official_bias
from learner import DataBatch, FewShotLearner, Form, Tasks, cross_entropy, parts_of
from meta_neural_network_architectures import (
    BatchStatistics,
    Pass,
    build_backbone,
    seen_by_tasks,
    update_running_statistics,
)
from utils import distributed
from utils.devices import forget_peak, host_memory_gib, peak_memory_gib, send
from utils.errors import UserError
from utils.measurement import fastest
from utils.options import Options

log = logging.getLogger(__name__)

# What of the inner loop stays in the graph of the query loss: nothing, the weights' path, the inner gradients too.
EVALUATION, FIRST_ORDER, SECOND_ORDER = 0, 1, 2


class Plan(NamedTuple):
    """What decides which operations compute the gradients of a meta-batch; between equal plans only values differ."""

    order: int
    counted: tuple[bool, ...]  # whether the query loss after each inner step is computed
    tasks_per_pass: int


class InnerStep(NamedTuple):
    """This is what one inner step of a batch of tasks used and made."""

    step: int
    used: Weights  # what the support images went through; CxGrad: after scaling
    gradients: Weights  # of the support loss by them
    weights: Weights  # after the update
    states: dict[str, State]  # of each rule by its name, after the update
    support_logits: Tensor  # (tasks, way*shot, way)
    support_losses: Tensor  # (tasks,)
    seen: Sequence[BatchStatistics] = ()  # what batch norm saw


class MAMLFewShotClassifier(FewShotLearner):
    """This learner is MAML, CxGrad and the rest of the family, with the official programs' interface.

    Args:
        im_shape: (batch, C, H, W) of the images.
        device: where everything runs.
        args: any object with attributes named as in `utils.options.Options`; missing ones take the defaults.

    Raises:
        UserError: the options are those of a head learner.
    """

    cure = "Lower --meta_learning_rate, or in a new experiment --init_inner_loop_learning_rate"

    def __init__(self, im_shape: Sequence[int], device: torch.device | str, args: object) -> None:
        super().__init__(im_shape, device, args)
        options, rules = self.options, chosen_rules(self.options)
        if options.learner != "gradient":
            raise UserError("gradient steps were asked of --learner head: use `build_learner`, which chooses the class")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)  # the initial weights are a function of the seed alone
            self.classifier = build_backbone(self.image_shape, options, official_bias(rules))
            self.inner_names = self._inner_names(rules)
            moved = {name: self.classifier.get_parameter(name) for name in self.inner_names}
            loop = InnerLoop(moved, self.classifier.head_names, options.number_of_training_steps_per_iter)
            self.rules = nn.ModuleDict({rule.__name__: rule(loop, options) for rule in rules})
        self.to(self.device)
        self.optimizer = torch.optim.Adam(list(self.trained_parameters().values()), lr=options.meta_learning_rate)
        self.captured: CapturedGradients | None = None
        if options.cuda_graph == "auto" and self.device.type == "cuda" and torch.cuda.is_available():
            self.captured = CapturedGradients(self._meta_gradients, self, CudaGraphs(self.device))

    def _inner_names(self, rules: Sequence[type[Rule]]) -> list[str]:
        """Return what inner steps move: those trained, batch norm's only if the options say so."""
        names = [name for name, parameter in self.classifier.named_parameters() if parameter.requires_grad]
        if not self.options.enable_inner_loop_optimizable_bn_params:
            names = [name for name in names if name not in self.classifier.norm_names]
        for rule in rules:
            names = list(rule.moved(names, self.classifier.head_names))
        return names

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What the outer update moves: everything, but not a network that stays at its random initialisation."""
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if not all(rule.trains_network for rule in self._rules().values()):
            trained = {name: p for name, p in trained.items() if not name.startswith("classifier.")}
        return trained

    def _rules(self) -> dict[str, Rule]:
        return dict(self.rules.items())  # type: ignore[arg-type]

    # --- adapting to tasks -------------------------------------------------------------------------------------

    def inner_loop(
        self, x: Tensor, y: Tensor, steps: int, order: int, seen: list[BatchStatistics] | None = None
    ) -> Iterator[InnerStep]:
        """Adapt to support images x (tasks, n, C, H, W) with labels y (tasks, n); yields after every step.

        What batch norm sees on the way is appended to `seen`.
        """
        parameters = self.task_parameters(len(x), evaluation=order == EVALUATION)
        if order == EVALUATION:
            moved = {name: parameters[name].detach().requires_grad_() for name in self.inner_names}
            parameters = {name: tensor.detach() for name, tensor in parameters.items()} | moved
        forward = self._forward(parameters, order == EVALUATION)
        weights, states = {name: parameters[name] for name in self.inner_names}, {}
        for name, rule in self._rules().items():
            weights, states[name] = rule.start(weights, lambda used: cross_entropy(forward(used, x, 0, seen), y))
        if order == EVALUATION:
            weights, states = leaves(weights, weights), {name: leaves(state, state) for name, state in states.items()}
        for step in range(steps):
            arguments = (forward, step, weights, states, x, y, order)
            if self.options.checkpoint_inner_steps and order != EVALUATION:
                done = checkpoint(self._inner_step, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                done = self._inner_step(*arguments)
            weights, states = done.weights, done.states
            if seen is not None:
                seen.extend(done.seen)
            yield done

    def _inner_step(
        self,
        forward: "Forward",
        step: int,
        weights: Weights,
        states: dict[str, State],
        x: Tensor,
        y: Tensor,
        order: int,
    ) -> InnerStep:
        """One step; may run twice for the same step (checkpointing), so it changes nothing outside."""
        rules, used = self._rules(), weights
        for name, rule in rules.items():
            used = rule.before_step(used, states[name], step)
        seen: list[BatchStatistics] | None = [] if order != EVALUATION and self.options.tracks_statistics else None
        logits = forward(used, x, step, seen)
        losses = cross_entropy(logits, y)
        gradients, by_state = self._gradients(losses.sum(), used, states, order)
        weights, before = used, states
        with torch.set_grad_enabled(order != EVALUATION):
            for name, rule in rules.items():
                weights = rule.update(weights, gradients, before[name], step)
            states = {n: rule.update_state(before[n], by_state[n], gradients) for n, rule in rules.items()}
        if order == EVALUATION:
            weights, states = leaves(weights, used), {name: leaves(states[name], before[name]) for name in states}
            used, logits, losses = leaves(used, {}), logits.detach(), losses.detach()
        return InnerStep(step, used, gradients, weights, states, logits, losses, seen or ())

    @staticmethod
    def _gradients(
        loss: Tensor, weights: Weights, states: dict[str, State], order: int
    ) -> tuple[Weights, dict[str, State]]:
        """Return the loss's gradients by the weights and, from the same pass, by rules' states that require one."""
        keys = [
            (rule, name) for rule, state in states.items() for name, tensor in state.items() if tensor.requires_grad
        ]
        wanted = [*weights.values(), *(states[rule][name] for rule, name in keys)]
        second_order = order == SECOND_ORDER
        # Where a state made the weights, the outer gradient needs the graph between them in first order too.
        keep = second_order or (bool(keys) and order == FIRST_ORDER)
        gradients = torch.autograd.grad(
            loss, wanted, create_graph=second_order, retain_graph=keep, materialize_grads=bool(keys)
        )
        by_state: dict[str, State] = {rule: {} for rule in states}
        for (rule, name), gradient in zip(keys, gradients[len(weights) :], strict=True):
            by_state[rule][name] = gradient
        return dict(zip(weights, gradients, strict=False)), by_state

    def task_parameters(self, tasks: int, evaluation: bool = False) -> Weights:
        """Return the meta-parameters, (tasks, ...); in evaluation with the running statistics that it then uses."""
        return seen_by_tasks(self.classifier, tasks, buffers=evaluation and self.options.batch_norm != "transductive")

    def _forward(self, parameters: Weights, evaluation: bool) -> "Forward":
        """Return the network as a function of the weights that the inner loop moves."""
        use_running = evaluation and self.options.batch_norm != "transductive"

        def forward(weights: Weights, x: Tensor, step: int, seen: list[BatchStatistics] | None) -> Tensor:
            at = Pass(step, use_running, seen)
            logits: Tensor = functional_call(self.classifier, {**parameters, **weights}, (x, at))
            return logits

        return forward

    def adapt(self, x_support: Tensor, y_support: Tensor) -> InnerStep:
        """Adapt for evaluation: support (tasks, n, C, H, W) and labels (tasks, n) -> the state that `predict` takes."""
        steps = self.options.number_of_evaluation_steps_per_iter
        with torch.enable_grad():
            inner_steps = self.inner_loop(x_support, y_support, steps, EVALUATION)
            return deque(inner_steps, maxlen=1)[0]  # only the last step is kept, so the others' graphs are freed

    @torch.no_grad()
    def predict(self, state: InnerStep, x_query: Tensor) -> Tensor:
        """Return logits (tasks, n, way) of query images (tasks, n, C, H, W); they are batch-normalised together."""
        return self._query_logits(state, x_query, None, evaluation=True)

    def _query_logits(
        self, state: InnerStep, x: Tensor, seen: list[BatchStatistics] | None, evaluation: bool = False
    ) -> Tensor:
        forward = self._forward(self.task_parameters(len(x), evaluation), evaluation)
        return forward(state.weights, x, state.step, seen)

    # --- outer loop --------------------------------------------------------------------------------------------

    def _set_gradients(self, tasks: Tasks, epoch: int) -> tuple[dict[str, Any], list[Tensor]]:
        form = self._form(len(tasks.x_support))
        losses, logits = self._gradients_in(form, self._plan(epoch, form), self._importances(epoch), *tasks)
        return self._report(losses, logits, tasks.y_query)

    def query_losses(self, tasks: Tasks, epoch: int) -> tuple[Tensor, Tensor]:
        """Return each training loss (tasks,), in the graph, and the logits of the last query pass (tasks, n, way)."""
        plan = self._plan(epoch, self._form(len(tasks.x_support)))
        return self._planned_losses(plan, self._importances(epoch), tasks)

    def _plan(self, epoch: int, form: Form) -> Plan:
        options = self.options
        second_order = options.second_order and epoch > options.first_order_to_second_order_epoch
        importances = step_importances(options.number_of_training_steps_per_iter, epoch, options)
        order = SECOND_ORDER if second_order else FIRST_ORDER
        return Plan(order, tuple(importance > 0 for importance in importances), form.tasks_per_pass)

    def _importances(self, epoch: int) -> Tensor:
        """Return `step_importances` on the device, (steps,)."""
        importances = step_importances(self.options.number_of_training_steps_per_iter, epoch, self.options)
        return send(torch.tensor(importances, dtype=next(self.parameters()).dtype), self.device)

    def _planned_losses(self, plan: Plan, importances: Tensor, tasks: Tasks) -> tuple[Tensor, Tensor]:
        seen: list[BatchStatistics] | None = [] if self.options.tracks_statistics else None
        losses = torch.zeros((), device=tasks.x_query.device, dtype=tasks.x_query.dtype)
        steps = self.inner_loop(tasks.x_support, tasks.y_support, len(plan.counted), plan.order, seen)
        for state, counted, importance in zip(steps, plan.counted, importances, strict=True):
            if counted:
                logits = self._query_logits(state, tasks.x_query, seen)
                losses = losses + importance * cross_entropy(logits, tasks.y_query)
        update_running_statistics(seen or [])
        return losses, logits

    def _meta_gradients(self, plan: Plan, importances: Tensor, *tasks: Tensor) -> tuple[Tensor, Tensor]:
        """Set the gradients of the mean training loss; return losses (tasks,) and query logits (tasks, n, way).

        A CUDA graph may hold this: between equal plans nothing may differ but the values of tensors.
        """
        self.zero_grad()
        total, losses, logits = len(tasks[0]), [], []
        for part in parts_of(Tasks(*tasks), plan.tasks_per_pass):
            part_losses, part_logits = self._planned_losses(plan, importances, part)
            (part_losses.sum() / total).backward()
            losses.append(part_losses.detach())
            logits.append(part_logits.detach())
        return torch.cat(losses), torch.cat(logits)

    def _gradients_in(self, form: Form, plan: Plan, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Do what `_meta_gradients` does, from a capture where the form says so and captures have not been refused."""
        if form.captured and self.captured:
            try:
                return self.captured(plan, *inputs)
            except Refused as error:
                log.warning("going on without CUDA graphs: %s", error)
                self.captured = None
        return self._meta_gradients(plan, *inputs)

    def _form(self, tasks: int) -> Form:
        """Return the form for meta-batches of so many tasks: by the options, else as measured, else the usual one."""
        form = self.form or Form(self._usual_tasks_per_pass(tasks), captured=True)
        return form._replace(tasks_per_pass=self.options.tasks_per_pass or form.tasks_per_pass)

    def choose_form(self, data_batch: Callable[[], DataBatch]) -> bool:
        options = self.options
        if self.form or options.tasks_per_pass or options.deterministic or options.dry_run:
            return False
        tasks = self._to_device(data_batch())
        count = len(tasks.x_support)
        sizes = dict.fromkeys((self._usual_tasks_per_pass(count), 1, -(-count // 2), count))
        if len(sizes) == 1:
            return False
        log.info("measuring how many tasks to compute at a time; --tasks_per_pass sets it without")
        buffers = [buffer.clone() for buffer in self.buffers()]
        with torch.random.fork_rng([] if self.device.type == "cpu" else [self.device]):
            self.form = fastest(self._forms(tasks, sizes), self.device, warm_up=WARM_UP + 1 if self.captured else 1)
        for buffer, before in zip(self.buffers(), buffers, strict=True):
            buffer.copy_(before)
        self.zero_grad()
        if self.captured:
            self.captured.release()
        forget_peak(self.device)
        return self.form is not None

    def _forms(self, tasks: Tasks, sizes: Iterable[int]) -> Iterator[tuple[Form, Callable[[], object]]]:
        """Yield forms, and what computes gradients in each as in the epoch that takes most memory.

        Where memory is short that raises RuntimeError; on a CPU in advance, as the system would kill processes.
        """
        tried = 1
        for size in sizes:
            needed = peak_memory_gib(self.device) * size / tried * distributed.world_size()
            fits = self.device.type != "cpu" or size <= tried or needed < host_memory_gib() / 2
            for captured in (True, False) if self.captured else (False,):
                form = Form(size, captured)
                yield form, partial(self._try, form, tasks, fits)
            tried = max(size, tried) if fits else tried

    def _try(self, form: Form, tasks: Tasks, fits: bool) -> None:
        if not fits:
            raise torch.OutOfMemoryError(f"{form} may take more than half of the memory")
        epoch = max(range(self.options.total_epochs), key=lambda epoch: self._plan(epoch, form))
        gradients = self.captured if form.captured and self.captured else self._meta_gradients
        if self.captured and not form.captured:
            self.captured.release()  # an eager iteration has to fit in the memory without a graph's beside it
        gradients(self._plan(epoch, form), self._importances(epoch), *tasks)

    def protocol(self) -> dict[str, Any]:
        return super().protocol() | {"steps": self.options.number_of_evaluation_steps_per_iter}

    def _clamp_gradients(self) -> None:
        """MAML++ limits each entry of the network's gradient on ImageNet data."""
        if self.options.clamp_outer_gradients > 0:
            for parameter in self.classifier.parameters():
                if parameter.grad is not None:
                    parameter.grad.clamp_(-self.options.clamp_outer_gradients, self.options.clamp_outer_gradients)

    def _set_learning_rate(self, epoch: int) -> None:
        options = self.options
        official = [rule.lr_schedule for rule in self._rules().values() if rule.lr_schedule]
        schedule = options.lr_schedule or (*official, "per_epoch")[0]
        position = self.iterations_done if schedule == "per_iteration" else epoch
        self.set_learning_rate(
            cosine(options.meta_learning_rate, options.min_learning_rate, position, options.total_epochs)
        )


Forward = Callable[[Weights, Tensor, int, list[BatchStatistics] | None], Tensor]  # the last: step, seen


def build_learner(device: torch.device | str, options: Options) -> FewShotLearner:
    """Return the learner that the options ask for; with a --head, a network of gradient steps is an embedding."""
    kind = HeadFewShotClassifier if options.head else MAMLFewShotClassifier
    return kind((options.batch_size, *options.image_shape), device, options)


def leaves(tensors: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same values without a history; they require a gradient where the tensors `before` them do."""
    wanted = {name for name, tensor in before.items() if tensor.requires_grad}
    return {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in tensors.items()}


def step_importances(steps: int, epoch: int, options: Options) -> list[float]:
    """Return the weight of the query loss after each inner step; 0 means that it is not computed."""
    epochs = options.multi_step_loss_num_epochs
    if options.use_multi_step_loss_optimization and epoch < epochs:
        return multi_step_importances(steps, epoch, epochs)
    return [0.0] * (steps - 1) + [1.0]


def multi_step_importances(steps: int, epoch: int, epochs: int) -> list[float]:
    """Return MAML++'s weights of query losses; they move to the last step (docs/arithmetic.md, section 7)."""
    floor = 0.03 / steps
    early = max(1 / steps - epoch / (steps * epochs), floor)
    last = min(1 / steps + epoch * (steps - 1) / (steps * epochs), 1 - (steps - 1) * floor)
    return [early] * (steps - 1) + [last]


def cosine(start: float, end: float, position: int, half_period: int) -> float:
    """Return the cosine from `start` at position 0 to `end` at `half_period`, and back again."""
    return end + (start - end) * (1 + math.cos(math.pi * position / half_period)) / 2
