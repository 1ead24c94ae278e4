"""The gradient-based learner: what one meta-batch of tasks costs, and the outer update.

`inner_loop` adapts the weights to a batch of tasks (MAML, CxGrad); `run_train_iter` sends the query loss of the adapted
weights back to the meta-parameters and makes one Adam step. All tensors carry a leading task dimension.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from classification_heads import ClassificationHead
from head_learning_system import HeadFewShotClassifier, Support, solve
from inner_loop_optimizers import (
    ALFA,
    LSLR,
    GradientDescent,
    MetaSGD,
    Rule,
    Weights,
    alfa_generator,
    attenuation_generator,
    context_generator,
    means,
    multiply_each,
    scale_by_context,
)
from learner import DataBatch, FewShotLearner, Tasks, cross_entropy
from meta_neural_network_architectures import (
    Backbone,
    BatchStatistics,
    Conv4,
    NormSettings,
    ResNet12,
    update_running_statistics,
)
from utils import distributed
from utils.errors import UserError
from utils.options import Options

# What of the inner loop stays in the graph of the query loss: nothing, the weights' path, the inner gradients too.
EVALUATION, FIRST_ORDER, SECOND_ORDER = 0, 1, 2


class InnerStep(NamedTuple):
    """What one inner step of a batch of tasks used and made."""

    step: int
    used: Weights  # what the support images went through; CxGrad: after scaling
    weights: Weights  # after the update
    support_logits: Tensor  # (tasks, way*shot, way)
    support_losses: Tensor  # (tasks,)
    context: Tensor | None = None  # CxGrad: (tasks, P), after its update
    gammas: Tensor | None = None  # CxGrad: (tasks, L)
    embedding: Tensor | None = None  # ALFA: (tasks, 2N), means of weights and gradients
    generated: Tensor | None = None  # ALFA: (tasks, 2N), alphas and betas
    statistics: Sequence[BatchStatistics] = ()  # what batch norm saw


class MAMLFewShotClassifier(FewShotLearner):
    """MAML, CxGrad and the rest of the family, with the official programs' interface.

    Args:
        im_shape: (batch, C, H, W) of the images.
        device: where everything runs.
        args: any object with attributes named as in `utils.options.Options`; missing ones take the defaults.
    """

    def __init__(self, im_shape: Sequence[int], device: torch.device | str, args: object) -> None:
        super().__init__(im_shape, device, args)
        options = self.options
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)  # the initial weights are a function of the seed alone
            self.classifier = build_network(self.image_shape, options)
            self.inner_names = inner_loop_names(self.classifier, options)
            self.scaled_names = [name for name in self.inner_names if "linear" not in name]
            if options.contextual_grad:
                self.gamma_generator = context_generator(options.num_context_params, len(self.scaled_names))
            if options.attenuate:
                self.attenuator = attenuation_generator(len(self.inner_names))
            if options.alfa:
                self.regularizer = alfa_generator(len(self.inner_names))
            moved = {name: self.classifier.get_parameter(name) for name in self.inner_names}
            self.inner_loop_optimizer = build_rule(moved, options)
        self.to(self.device)
        self.optimizer = torch.optim.Adam(list(self.trained_parameters().values()), lr=options.meta_learning_rate)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """What the outer update moves: everything, but not a network that stays at its random initialisation."""
        trained = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if self.options.random_init:
            trained = {name: p for name, p in trained.items() if not name.startswith("classifier.")}
        return trained

    # --- adapting to tasks -------------------------------------------------------------------------------------

    def inner_loop(
        self, x: Tensor, y: Tensor, steps: int, order: int, statistics: list[BatchStatistics] | None = None
    ) -> Iterator[InnerStep]:
        """Adapt to support images x (tasks, n, C, H, W) with labels y (tasks, n); yields after every step.

        Contextual scaling replaces the weights before each step, and the update starts from the scaled weights with
        the gradient with respect to them (golden README 3.5).
        """
        parameters = self.task_parameters(len(x), evaluation=order == EVALUATION)
        weights = {name: parameters[name] for name in self.inner_names}
        context = None
        if self.options.attenuate:
            weights = self._attenuate(parameters, x, y, statistics)
        if self.options.contextual_grad:
            context = self._warm_up_context(parameters, x, y, statistics)
        for step in range(steps):
            if order == EVALUATION:
                weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
                context = None if context is None else context.detach().requires_grad_()
            arguments = (step, parameters, weights, context, x, y, order)
            if self.options.checkpoint_inner_steps and order != EVALUATION:
                state = checkpoint(self._inner_step, *arguments, use_reentrant=False)
            else:
                state = self._inner_step(*arguments)
            weights, context = state.weights, state.context
            if statistics is not None:
                statistics.extend(state.statistics)
            yield state

    def _inner_step(
        self, step: int, parameters: Weights, weights: Weights, context: Tensor | None, x: Tensor, y: Tensor, order: int
    ) -> InnerStep:
        """One step; may run twice for the same step (checkpointing), so it changes nothing outside."""
        used, gammas, embedding, generated = weights, None, None, None
        seen: list[BatchStatistics] | None = [] if self._tracks(order) else None
        if context is not None:
            gammas = self.gamma_generator(context)
            used = scale_by_context(weights, self.scaled_names, gammas)
        logits = self.classifier({**parameters, **used}, x, step, seen)
        losses = cross_entropy(logits, y)
        gradients, context_gradient = self._gradients(losses.sum(), used, context, order)
        if context is not None and context_gradient is not None:
            context = context - self.options.context_params_learning_rate * context_gradient
        if self.options.alfa:
            embedding = torch.cat([means(used), means(gradients).detach()], 1)
            generated = self.regularizer(embedding)
        weights = self.inner_loop_optimizer.update(used, gradients, step, generated)
        return InnerStep(step, used, weights, logits, losses, context, gammas, embedding, generated, seen or ())

    def _tracks(self, order: int) -> bool:
        """Whether batch norm's statistics of this pass are wanted: in training, if they are kept."""
        return order != EVALUATION and self.options.tracks_statistics

    def _attenuate(
        self, parameters: Weights, x: Tensor, y: Tensor, statistics: list[BatchStatistics] | None
    ) -> Weights:
        """L2F: the initial weights times factors generated from the mean gradients of the support loss.

        The gradients stay in the graph in first order and evaluation too, as in the official program.
        """
        weights = {name: parameters[name] for name in self.inner_names}
        loss = cross_entropy(self.classifier(parameters, x, 0, statistics), y).sum()
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        return multiply_each(weights, self.attenuator(means(dict(zip(weights, gradients, strict=True)))))

    def task_parameters(self, tasks: int, evaluation: bool = False) -> Weights:
        """The meta-parameters of the network, seen once per task: name -> (tasks, ...), without a copy.

        In evaluation they include the running statistics, if batch norm is to use them.
        """
        parameters: dict[str, Tensor] = dict(self.classifier.named_parameters())
        if evaluation and self.options.batch_norm != "transductive":
            parameters |= dict(self.classifier.named_buffers())
        return {name: p.expand(tasks, *p.shape) for name, p in parameters.items()}

    def _warm_up_context(
        self, parameters: Weights, x: Tensor, y: Tensor, statistics: list[BatchStatistics] | None
    ) -> Tensor:
        """The context (tasks, P) after one step from zero; the step is a constant of the outer gradient."""
        context = x.new_zeros(len(x), self.options.num_context_params, requires_grad=True)
        scaled = scale_by_context(parameters, self.scaled_names, self.gamma_generator(context))
        loss = cross_entropy(self.classifier(scaled, x, 0, statistics), y).sum()
        (gradient,) = torch.autograd.grad(loss, [context])
        return (context - self.options.context_params_learning_rate * gradient).detach().requires_grad_()

    def _gradients(
        self, loss: Tensor, weights: Weights, context: Tensor | None, order: int
    ) -> tuple[Weights, Tensor | None]:
        wanted = [*weights.values()] if context is None else [*weights.values(), context]
        second_order = order == SECOND_ORDER
        # The outer gradient needs the gammas' graph in first order too.
        keep = second_order or (context is not None and order == FIRST_ORDER)
        gradients = torch.autograd.grad(loss, wanted, create_graph=second_order, retain_graph=keep)
        return dict(zip(weights, gradients, strict=False)), None if context is None else gradients[-1]

    def adapt(self, x_support: Tensor, y_support: Tensor) -> InnerStep:
        """Adapt for evaluation: support (tasks, n, C, H, W) and labels (tasks, n) -> the state that `predict` takes."""
        steps = self.options.number_of_evaluation_steps_per_iter
        with torch.enable_grad():
            inner_steps = self.inner_loop(x_support, y_support, steps, EVALUATION)
            return deque(inner_steps, maxlen=1)[0]  # only the last step is kept, so the others' graphs are freed

    @torch.no_grad()
    def predict(self, state: InnerStep, x_query: Tensor) -> Tensor:
        """Logits (tasks, n, way) of query images (tasks, n, C, H, W); they are batch-normalised together."""
        return self._query_logits(state, x_query, None, evaluation=True)

    def _query_logits(
        self, state: InnerStep, x: Tensor, statistics: list[BatchStatistics] | None, evaluation: bool = False
    ) -> Tensor:
        parameters = self.task_parameters(len(x), evaluation) | state.weights
        return self.classifier(parameters, x, state.step, statistics)

    # --- outer loop --------------------------------------------------------------------------------------------

    def run_train_iter(
        self, data_batch: DataBatch, epoch: float, current_iter: int | None = None
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """One outer update on a meta-batch; returns (losses, per-task query logits), left on the device.

        Args:
            data_batch: x_support, x_target, y_support, y_target; arrays or tensors.
            epoch: decides on derivative order, multi-step loss and learning rate; its whole part counts.
            current_iter: iterations done before this one; default: counted by this object.
        """
        if current_iter is not None:
            self.iterations_done = current_iter
        self._set_learning_rate(int(epoch))
        self.zero_grad()
        tasks = self._to_device(data_batch)
        total, losses, logits = len(tasks.x_support), [], []
        for chunk in self._passes(tasks):
            chunk_losses, chunk_logits = self.query_losses(chunk, int(epoch))
            (chunk_losses.sum() / total).backward()
            losses.append(chunk_losses.detach())
            logits.append(chunk_logits.detach())
        distributed.average_gradients(self.parameters())
        distributed.average(list(self.buffers()))
        self._clamp_gradients()
        self.optimizer.step()
        self.iterations_done += 1
        return self._report(torch.cat(losses), torch.cat(logits), tasks.y_query)

    def query_losses(self, tasks: Tasks, epoch: int) -> tuple[Tensor, Tensor]:
        """Training loss of each task (tasks,), in the graph, and the logits of the last query pass (tasks, n, way)."""
        options = self.options
        steps = options.number_of_training_steps_per_iter
        importances = step_importances(steps, epoch, options)
        second_order = options.second_order and epoch > options.first_order_to_second_order_epoch
        seen: list[BatchStatistics] | None = [] if options.tracks_statistics else None
        losses = torch.zeros((), device=tasks.x_query.device, dtype=tasks.x_query.dtype)
        order = SECOND_ORDER if second_order else FIRST_ORDER
        for state, importance in zip(
            self.inner_loop(tasks.x_support, tasks.y_support, steps, order, seen), importances, strict=True
        ):
            if importance > 0:
                logits = self._query_logits(state, tasks.x_query, seen)
                losses = losses + importance * cross_entropy(logits, tasks.y_query)
        update_running_statistics(self.classifier, seen or [])
        return losses, logits

    def _clamp_gradients(self) -> None:
        """MAML++ limits each entry of the network's gradient on ImageNet data."""
        if self.options.clamp_outer_gradients > 0:
            for parameter in self.classifier.parameters():
                if parameter.grad is not None:
                    parameter.grad.clamp_(-self.options.clamp_outer_gradients, self.options.clamp_outer_gradients)

    def _set_learning_rate(self, epoch: int) -> None:
        options = self.options
        schedule = options.lr_schedule or ("per_iteration" if options.contextual_grad else "per_epoch")
        position = self.iterations_done if schedule == "per_iteration" else epoch
        self.set_learning_rate(
            cosine(options.meta_learning_rate, options.min_learning_rate, position, options.total_epochs)
        )


class HeadOnBody(MAMLFewShotClassifier):
    """A base learner on the features of a gradient-trained network, in place of inner steps; for evaluation only."""

    def __init__(self, im_shape: Sequence[int], device: torch.device | str, args: object) -> None:
        super().__init__(im_shape, device, args)
        # Not a submodule: the checkpoints of the network know nothing of it.
        self._head = (ClassificationHead(str(self.options.head), enable_scale=False),)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Images (tasks, n, C, H, W) -> (tasks, n, d), by the network at its meta-parameters."""
        return self.classifier.features(self.task_parameters(len(images), evaluation=True), images, 0)

    def adapt(self, x_support: Tensor, y_support: Tensor) -> Support:  # type: ignore[override]
        return Support(self.features(x_support), y_support)

    def predict(self, state: Support, x_query: Tensor) -> Tensor:  # type: ignore[override]
        way = self.options.evaluation_task[0]
        logits, unsolved = solve(self._head[0], self.options, state, self.features(x_query), way)
        self._count_unsolved(unsolved)
        return logits


def build_learner(device: torch.device | str, options: Options) -> FewShotLearner:
    """The learner that the options ask for."""
    kind: type[FewShotLearner] = HeadOnBody if options.head else MAMLFewShotClassifier
    if options.learner == "head":
        kind = HeadFewShotClassifier
    return kind((options.batch_size, *options.image_shape), device, options)


def build_network(image_shape: tuple[int, int, int], options: Options) -> Backbone:
    norm = NormSettings(
        steps=options.number_of_training_steps_per_iter if options.per_step_bn_statistics else 0,
        tracked=options.tracks_statistics,
        shared_weights=options.enable_inner_loop_optimizable_bn_params,
        learnable=(options.learnable_bn_gamma, options.learnable_bn_beta),
    )
    way = options.num_classes_per_set
    try:
        if options.backbone == "ResNet-12":
            return ResNet12(image_shape, way, options.resnet_width_list, norm)
        return Conv4(
            image_shape,
            way,
            filters=options.cnn_num_filters,
            stages=options.num_stages,
            padding=options.conv_padding,
            max_pooling=options.max_pooling,
            bias=options.has_conv_bias,
            norm=norm,
        )
    except ValueError as error:
        raise UserError(f"{error}: use larger images or fewer stages") from error


def inner_loop_names(network: nn.Module, options: Options) -> list[str]:
    """Names of the parameters that the inner loop moves: all that are trained, batch norm's only when asked for."""
    names = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    if not options.enable_inner_loop_optimizable_bn_params:
        names = [name for name in names if "norm_layer" not in name]
    if options.inner_loop_part != "all":
        names = [name for name in names if ("linear" in name) == (options.inner_loop_part == "head")]
    return names


def build_rule(moved: Mapping[str, Tensor], options: Options) -> Rule:
    """The update rule for the tensors that the inner loop moves."""
    rate, steps = options.init_inner_loop_learning_rate, options.number_of_training_steps_per_iter
    if options.learnable_per_layer_per_step_inner_loop_learning_rate:
        return LSLR(moved, steps, rate)
    if options.meta_sgd:
        return MetaSGD(moved, rate)
    if options.alfa:
        return ALFA(moved, steps, rate, options.init_inner_loop_weight_decay, options.random_init)
    return GradientDescent(rate)


def step_importances(steps: int, epoch: int, options: Options) -> list[float]:
    """Weight of the query loss after each inner step; 0 means that it is not computed."""
    epochs = options.multi_step_loss_num_epochs
    if options.use_multi_step_loss_optimization and epoch < epochs:
        return multi_step_importances(steps, epoch, epochs)
    return [0.0] * (steps - 1) + [1.0]


def multi_step_importances(steps: int, epoch: int, epochs: int) -> list[float]:
    """MAML++'s multi-step loss: equal weights that move to the last step over `epochs` (golden README 3.6)."""
    floor = 0.03 / steps
    early = max(1 / steps - epoch / (steps * epochs), floor)
    last = min(1 / steps + epoch * (steps - 1) / (steps * epochs), 1 - (steps - 1) * floor)
    return [early] * (steps - 1) + [last]


def cosine(start: float, end: float, position: int, half_period: int) -> float:
    """Cosine from `start` at position 0 to `end` at `half_period`, and back again."""
    return end + (start - end) * (1 + math.cos(math.pi * position / half_period)) / 2
