"""The rules of the inner loop: how a task's weights move from one step to the next.

A `Rule` has a part in the loop, and rules compose: the loop calls the chosen ones in the order of `RULES`, `start` once
and `before_step`, `update` and `update_state` in every step. Weights and gradients are dicts name -> (tasks, ...).
Nothing is modified in place, so the outer gradient flows through whatever the loop leaves attached to the graph.
A rule owns its networks, its learned values, its state and its options: all of it is declared in one place, here or in
a file of the user's, and `register` makes it known to the command line, the learner and the checkpoints.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from utils.options import GRADIENT, Options, add_check, add_options, add_plug_in, is_option, opt

Weights = dict[str, Tensor]
State = dict[str, Tensor]
SupportLoss = Callable[[Weights], Tensor]  # weights -> support loss of each task (tasks,), with batch norm at step 0


class InnerLoop(NamedTuple):
    """What a rule can know of the loop that it is built for."""

    tensors: Mapping[str, Tensor]  # the meta-parameters that the loop moves, by name
    head: Collection[str]  # the names of the linear classifier's
    steps: int  # in training


class Rule(nn.Module):
    """A rule is one idea about the inner loop; the defaults of all methods change nothing."""

    flag: ClassVar[str]  # the boolean option that chooses the rule
    sets_rate: ClassVar[bool] = False  # `update` makes the step, in place of plain gradient descent
    per_step: ClassVar[bool] = False  # it learns one value per training step
    conv_bias: ClassVar[bool | None] = None  # whether its official program has biases in the convolutions
    lr_schedule: ClassVar[str | None] = None  # the outer learning rate's schedule in its official program
    trains_network = True  # the outer update moves the network's own parameters too

    def __init__(self, loop: InnerLoop, options: Options) -> None:
        super().__init__()

    @classmethod
    def chosen(cls, options: Any) -> bool:
        """Return whether the options ask for this rule."""
        return bool(getattr(options, cls.flag))

    @classmethod
    def contradictions(cls, options: Any) -> Iterator[str]:
        """Yield sentences that say why the rule, which is chosen, cannot work with the other options."""
        yield from ()

    @classmethod
    def moved(cls, names: Sequence[str], head: Collection[str]) -> Sequence[str]:
        """Return the names of what inner steps move, out of those that they would move without this rule."""
        return names

    def start(self, weights: Weights, support_loss: SupportLoss) -> tuple[Weights, State]:
        """Return the weights before the first step, and the rule's state: tensors (tasks, ...).

        The loop differentiates each step's support loss by those that require a gradient as well as by the weights.
        """
        return weights, {}

    def before_step(self, weights: Weights, state: State, step: int) -> Weights:
        """Return the weights that the support images of this step go through, and that the step starts from."""
        return weights

    def update(self, weights: Weights, gradients: Weights, state: State, step: int) -> Weights:
        """Return the weights after a step along the gradients of the support loss; the state is that before it."""
        return weights

    def update_state(self, state: State, by_state: State, gradients: Weights) -> State:
        """Return the state after a step, from the gradients of the support loss by the state and by the weights."""
        return state


RULES: dict[str, type[Rule]] = {}


def register(rule: type[Rule]) -> type[Rule]:
    """Make a rule known under its class's name; its own options are added with `utils.options.add_options` before.

    Raises ValueError if there is a rule of that name, or `flag` is no option.
    """
    if rule.chosen.__qualname__ == Rule.chosen.__qualname__ and not is_option(getattr(rule, "flag", "")):
        raise ValueError(f"{rule.__name__} has to name a boolean option as its flag; declare one before it")
    add_plug_in(RULES, rule.__name__, rule)
    add_check(lambda options: rule.contradictions(options) if rule.chosen(options) else ())
    return rule


def chosen_rules(options: Options) -> list[type[Rule]]:
    """Return the rules that the options ask for, and plain gradient descent where none of them makes the step."""
    rules = [rule for rule in RULES.values() if rule.chosen(options)]
    return rules if any(rule.sets_rate for rule in rules) else [*rules, GradientDescent]


def official_bias(rules: Sequence[type[Rule]]) -> bool:
    """Return whether the rules' official programs have biases in the convolutions; any that has none decides."""
    said = [rule.conv_bias for rule in rules]
    return True in said and False not in said


@add_check
def check_together(options: Options) -> Iterator[str]:
    """Yield the contradictions between chosen rules, and with the numbers of steps."""
    rules = chosen_rules(options)
    if len(setters := [f"--{rule.flag}" for rule in rules if rule.sets_rate and rule is not GradientDescent]) > 1:
        yield f"{' and '.join(setters)} each set the inner learning rate; choose one"
    steps, more = options.number_of_training_steps_per_iter, options.number_of_evaluation_steps_per_iter
    per_step = [f"--{rule.flag}" for rule in rules if rule.per_step]
    per_step += ["--per_step_bn_statistics"] if options.per_step_bn_statistics else []
    if per_step and more > steps:
        yield (
            f"{' and '.join(per_step)}: one value per training step ({steps}) is learned, so "
            f"--number_of_evaluation_steps_per_iter {more} has none for the extra steps; use at most as many"
        )


# --- contextual gradient scaling (CxGrad) --------------------------------------------------------------------------


@add_options
class CxGradOptions(Options):
    contextual_grad: bool = opt(False, "CxGrad: scale the backbone's gradients by the task's context", only=GRADIENT)
    num_context_params: int = opt(
        100, "CxGrad: length of the context vector", at_least=1, at_most=10_000, only=GRADIENT, dry_run=4
    )
    context_params_learning_rate: float = opt(
        1.0, "CxGrad: step size of the context vector", at_least=0, only=GRADIENT, test="warn"
    )


@register
class CxGrad(Rule):
    """Contextual gradient scaling (Lee et al., WACV 2022, section 3): the task sets the norm of every body tensor.

    The state is the task's context (tasks, P). It starts from zero with one step whose gradient is a constant of the
    outer loop, and follows the support loss after that; a generator makes one norm, gamma, per tensor of it. See
    docs/arithmetic.md, section 6.
    """

    flag, conv_bias, lr_schedule = "contextual_grad", False, "per_iteration"

    def __init__(self, loop: InnerLoop, options: CxGradOptions) -> None:
        super().__init__(loop, options)
        self.names = [name for name in loop.tensors if name not in loop.head]
        self.size, self.learning_rate = options.num_context_params, options.context_params_learning_rate
        hidden, out = nn.Linear(self.size, self.size), nn.Linear(self.size, len(self.names))
        self.generator = nn.Sequential(hidden, nn.ReLU(), out, nn.Softplus())

    @classmethod
    def contradictions(cls, options: Options) -> Iterator[str]:
        if ANIL.chosen(options):
            yield "--contextual_grad scales the body's gradients, which --inner_loop_part head (ANIL) never takes"
        if L2F.chosen(options):
            yield "--contextual_grad sets the norm of the body's tensors, which undoes what --attenuate (L2F) did"
        if ALFA.chosen(options) and options.use_bias:
            yield (
                "--contextual_grad gives biases a norm too, which batch norm cancels, and --alfa would make its rates "
                "from their gradients, which are rounding noise; use --use_bias false"
            )

    def start(self, weights: Weights, support_loss: SupportLoss) -> tuple[Weights, State]:
        first = next(iter(weights.values()))
        context = first.new_zeros(len(first), self.size, requires_grad=True)
        loss = support_loss(self.before_step(weights, {"context": context}, 0))
        (gradient,) = torch.autograd.grad(loss.sum(), [context])
        return weights, {"context": (context - self.learning_rate * gradient).detach().requires_grad_()}

    def before_step(self, weights: Weights, state: State, step: int) -> Weights:
        return scale_by_context(weights, self.names, self.generator(state["context"]))

    def update_state(self, state: State, by_state: State, gradients: Weights) -> State:
        return {"context": state["context"] - self.learning_rate * by_state["context"]}


def scale_by_context(weights: Weights, names: Sequence[str], gammas: Tensor) -> Weights:
    """Give each named tensor the norm gamma: w <- gamma w / |w| (CxGrad, Lee et al. 2022, section 3).

    Behind batch norm the output hardly depends on a weight's norm while its gradient grows as 1/norm, so gamma sets
    the task's effective step size, lr/gamma^2, layer by layer.

    Args:
        names: the L tensors to scale, in the generator's order.
        gammas: (tasks, L).
    """
    scaled = dict(weights)
    for name, gamma in zip(names, gammas.unbind(1), strict=True):
        weight = weights[name].flatten(1)  # (tasks, numel)
        norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
        norm = norm + (norm == 0)  # zeros, such as a fresh bias, have no direction and stay zero
        scaled[name] = (gamma.unsqueeze(1) / norm * weight).view_as(weights[name])
    return scaled


# --- attenuation of the initialisation (L2F) -----------------------------------------------------------------------


@add_options
class L2FOptions(Options):
    attenuate: bool = opt(False, "L2F: attenuate the initial weights by the task's first gradients", only=GRADIENT)


@register
class L2F(Rule):
    """Multiply initial tensors by factors in (0, 1) made from mean gradients (L2F, Baik et al. 2020, equation 5).

    The gradients stay in the graph in first order and evaluation too, as in the official program.
    """

    flag, conv_bias = "attenuate", True

    def __init__(self, loop: InnerLoop, options: Options) -> None:
        super().__init__(loop, options)
        n = len(loop.tensors)
        self.attenuator = nn.Sequential(nn.Linear(n, n), nn.ReLU(), nn.Linear(n, n), nn.Sigmoid())

    def start(self, weights: Weights, support_loss: SupportLoss) -> tuple[Weights, State]:
        gradients = torch.autograd.grad(support_loss(weights).sum(), list(weights.values()), create_graph=True)
        factors = self.attenuator(means(dict(zip(weights, gradients, strict=True))))  # (tasks, N)
        pairs = zip(weights.items(), factors.unbind(1), strict=True)
        return {name: over_task(factor, weight) * weight for (name, weight), factor in pairs}, {}


def means(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the mean of each tensor: dict of N (tasks, ...) -> (tasks, N)."""
    return torch.stack([tensor.flatten(1).mean(1) for tensor in tensors.values()], 1)


def over_task(per_task: Tensor, tensor: Tensor) -> Tensor:
    """Return a view of (tasks,) that broadcasts over a tensor (tasks, ...)."""
    return per_task.view(-1, *[1] * (tensor.dim() - 1))


# --- rules that make the step --------------------------------------------------------------------------------------


class GradientDescent(Rule):
    """Move by w <- w - lr * gradient, with one fixed rate (MAML, Finn et al. 2017)."""

    sets_rate = True

    def __init__(self, loop: InnerLoop, options: Options) -> None:
        super().__init__(loop, options)
        self.learning_rate = options.init_inner_loop_learning_rate

    def update(self, weights: Weights, gradients: Weights, state: State, step: int) -> Weights:
        rate = -self.learning_rate
        return {name: torch.add(weights[name], gradient, alpha=rate) for name, gradient in gradients.items()}


@add_options
class LSLROptions(Options):
    learnable_per_layer_per_step_inner_loop_learning_rate: bool = opt(
        False, "LSLR (MAML++): learn one inner rate per tensor and step", only=GRADIENT
    )


@register
class LSLR(Rule):
    """Learn rates per layer and step (MAML++, Antoniou et al. 2019): one vector of steps + 1 rates per tensor.

    The last entry is never used; it is there because official checkpoints hold it.
    """

    flag = "learnable_per_layer_per_step_inner_loop_learning_rate"
    sets_rate = per_step = True

    def __init__(self, loop: InnerLoop, options: Options) -> None:
        super().__init__(loop, options)
        self.rates = one_per_step(loop, options.init_inner_loop_learning_rate)

    def update(self, weights: Weights, gradients: Weights, state: State, step: int) -> Weights:
        rates = self.rates
        return {name: weights[name] - rates[key(name)][step] * gradient for name, gradient in gradients.items()}


@add_options
class MetaSGDOptions(Options):
    meta_sgd: bool = opt(False, "Meta-SGD: learn one inner rate per weight", only=GRADIENT)


@register
class MetaSGD(Rule):
    """Learn a rate per weight (Meta-SGD, Li et al. 2017)."""

    flag, sets_rate = "meta_sgd", True

    def __init__(self, loop: InnerLoop, options: Options) -> None:
        super().__init__(loop, options)
        self.rates = one_per_weight(loop, options.init_inner_loop_learning_rate)

    def update(self, weights: Weights, gradients: Weights, state: State, step: int) -> Weights:
        return {name: weights[name] - self.rates[key(name)] * gradient for name, gradient in gradients.items()}


@add_options
class ALFAOptions(Options):
    alfa: bool = opt(False, "ALFA: make inner rates and decays from weights and gradients", only=GRADIENT)
    random_init: bool = opt(False, "ALFA: train only the rates, not the random initial network", only={"alfa": True})
    init_inner_loop_weight_decay: float = opt(
        0.0005, "ALFA: decay relative to the inner rate at the start", at_least=0, only=GRADIENT
    )


@register
class ALFA(Rule):
    """Generate rates and decays (ALFA, Baik et al. 2020): w <- (1 - beta b_k) w - alpha a_k gradient.

    alpha and beta are generated per task, tensor and step from the means of the weights and of their gradients; a_k and
    b_k are learned per tensor and step. From a random, untrained initialisation the decay has a learned factor per
    weight too.
    """

    flag, sets_rate, per_step, conv_bias = "alfa", True, True, True

    def __init__(self, loop: InnerLoop, options: ALFAOptions) -> None:
        super().__init__(loop, options)
        rate, n = options.init_inner_loop_learning_rate, 2 * len(loop.tensors)
        decay = options.init_inner_loop_weight_decay * rate
        self.generator = nn.Sequential(nn.Linear(n, n), nn.ReLU(), nn.Linear(n, n))
        self.rates = one_per_step(loop, rate)
        self.decays = one_per_step(loop, 1.0 if options.random_init else decay)
        self.decay_factors = one_per_weight(loop, decay) if options.random_init else None
        self.trains_network = not options.random_init

    @classmethod
    def contradictions(cls, options: ALFAOptions) -> Iterator[str]:
        if options.random_init and ANIL.chosen(options):
            yield "--random_init leaves the body untrained and --inner_loop_part head (ANIL) never moves it"
        if options.random_init and BOIL.chosen(options):
            yield "--random_init leaves the classifier untrained and --inner_loop_part body (BOIL) never moves it"

    def generate(self, weights: Weights, gradients: Weights) -> tuple[Tensor, Tensor]:
        """Return the alphas and the betas (tasks, N); the gradients count as constants here."""
        embedding = torch.cat([means(weights), means(gradients).detach()], 1)
        alphas, betas = self.generator(embedding).chunk(2, 1)
        return alphas, betas

    def update(self, weights: Weights, gradients: Weights, state: State, step: int) -> Weights:
        alphas, betas = self.generate(weights, gradients)
        updated = {}
        for name, alpha, beta in zip(gradients, alphas.unbind(1), betas.unbind(1), strict=True):
            weight = weights[name]
            rate = over_task(alpha * self.rates[key(name)][step], weight)
            decay = over_task(beta * self.decays[key(name)][step], weight)
            if self.decay_factors is not None:
                decay = decay * self.decay_factors[key(name)]
            updated[name] = (1 - decay) * weight - rate * gradients[name]
        return updated


def one_per_step(loop: InnerLoop, value: float) -> nn.ParameterDict:
    """Return one learned vector of steps + 1 equal values per tensor."""
    return nn.ParameterDict({key(name): nn.Parameter(torch.full((loop.steps + 1,), value)) for name in loop.tensors})


def one_per_weight(loop: InnerLoop, value: float) -> nn.ParameterDict:
    """Return one learned value per weight."""
    full = {key(name): torch.full_like(p, value, requires_grad=False) for name, p in loop.tensors.items()}
    return nn.ParameterDict({name: nn.Parameter(tensor) for name, tensor in full.items()})


def key(name: str) -> str:
    """Return a parameter's name inside a ParameterDict, where dots are not allowed."""
    return name.replace(".", "-")


# --- rules that move a part of the network -------------------------------------------------------------------------


@add_options
class PartOptions(Options):
    inner_loop_part: str = opt(
        "all",
        "what inner steps move: all; head (ANIL); body (BOIL)",
        choices=("all", "head", "body"),
        only=GRADIENT,
        test="warn",
    )


@register
class ANIL(Rule):
    """Inner steps move the classifier alone (ANIL, Raghu et al. 2020)."""

    part = "head"

    @classmethod
    def chosen(cls, options: Any) -> bool:
        return bool(options.inner_loop_part == cls.part)

    @classmethod
    def moved(cls, names: Sequence[str], head: Collection[str]) -> Sequence[str]:
        return [name for name in names if (name in head) == (cls.part == "head")]


@register
class BOIL(ANIL):
    """Inner steps move everything but the classifier (BOIL, Oh et al. 2021)."""

    part = "body"
