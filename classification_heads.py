"""Base learners that MetaOptNet fits on the embeddings of one episode: closed-form and convex, differentiable through.

Every head is a function of an `Episode`, the embeddings with a leading task dimension, and its own options; `register`
makes it known to `ClassificationHead` and to --head. Kernels and all that is solved with them are float64, whatever the
embeddings' type, unless qpth is to solve in float32.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from qp_solvers import Factors, adjoint, box, crammer_singer, search, solve, solve_crammer_singer_qpth
from utils.errors import UserError
from utils.options import Options, add_choice, add_options, add_plug_in, check_names, declaration, opt, tuned


@add_options
class HeadOptions(Options):
    svm_solver: str = tuned(
        "structured",
        "structured: exact, in float64; qpth: the interior-point package that the paper used, in float32",
        choices=("structured", "qpth"),
        only={"head": "SVM-CS"},
    )
    svm_max_iter: int | None = tuned(
        None,
        "qpth: iterations at most [15]; MetaOptNet's test program stops after 3, which scores differently",
        at_least=1,
        only={"svm_solver": "qpth"},
    )
    svm_on_failure: str = tuned(
        "error",
        "what a task does whose SVM was not solved: error: it is left out of the update and the run stops; "
        "skip: it is left out and counted; use: it counts as it is, as skip does in tests. qpth's tasks pass as solved "
        "unless they are no numbers",
        choices=("error", "skip", "use"),
        only={"head": ()},
    )
    C_reg: float | None = opt(
        None,
        "C of an SVM; default: the head's own, as MetaOptNet has it",
        at_least=1e-9,
        only={"head": ()},
        test="warn",
    )
    lambda_reg: float | None = opt(
        None, "weight of the squared norm in a ridge regression [50]", at_least=1e-9, only={"head": ()}, test="warn"
    )


# What a head's parameter of this name is called among the options; others have the same name.
OPTION_OF = {"solver": "svm_solver", "max_iter": "svm_max_iter"}


class Scores(NamedTuple):
    """Logits of a batch of episodes, and how well the problem behind them was solved."""

    logits: Tensor  # (tasks, n_query, n_way)
    residual: Tensor  # (tasks,), relative KKT residual (see qp_solvers.Solution); 0 for ProtoNet


HEADS: dict[str, Callable[..., Scores]] = {}


def register(name: str, *aliases: str) -> Callable[[Callable[..., Scores]], Callable[..., Scores]]:
    """Make a function of an `Episode` and keyword options a --head.

    The options of its parameters' names are passed to it, and have an effect with it.
    """

    def add(learner: Callable[..., Scores]) -> Callable[..., Scores]:
        add_plug_in(HEADS, name, learner)
        add_choice("head", name, aliases=aliases)
        affected = [OPTION_OF.get(parameter, parameter) for parameter in _option_names(learner)]
        affected += ["svm_on_failure"] if "C_reg" in affected else []
        for option in set(affected) & {"C_reg", "lambda_reg", "svm_on_failure"}:
            declaration(option).only["head"] += (name,)
        return learner

    return add


def head_options(options: Options) -> dict[str, Any]:
    """What the head that the options name is called with."""
    names = _option_names(HEADS[str(options.head)])
    values = {name: getattr(options, OPTION_OF.get(name, name), None) for name in names}
    return {name: value for name, value in values.items() if value is not None}


class ClassificationHead(nn.Module):
    """This module is one of `HEADS`, its logits multiplied by a learned scale.

    Args:
        base_learner: ProtoNet, Ridge, R2D2, SVM-CS (or SVM), SVM-He or SVM-WW.
        enable_scale: without it the scale stays 1; it is in the state dict all the same.
    """

    def __init__(self, base_learner: str = "SVM-CS", enable_scale: bool = True) -> None:
        super().__init__()
        base_learner = declaration("head").aliases.get(base_learner, base_learner)
        if base_learner not in HEADS:
            raise UserError(f"there is no head {base_learner!r}: choose one of {', '.join(HEADS)}.")
        self.base_learner = base_learner
        self.scale = nn.Parameter(torch.ones(1), requires_grad=enable_scale)

    def forward(
        self, query: Tensor, support: Tensor, support_labels: Tensor, n_way: int, n_shot: int, **options: Any
    ) -> Tensor:
        """Return the logits of `solve_and_score`."""
        return self.solve_and_score(query, support, support_labels, n_way, n_shot, **options).logits

    def solve_and_score(
        self, query: Tensor, support: Tensor, support_labels: Tensor, n_way: int, n_shot: int, **options: Any
    ) -> Scores:
        """Return logits (tasks, n_query, n_way) in the embeddings' type (float32 for half types), and the residual.

        Args:
            query: (tasks, n_query, d), of any float type.
            support: (tasks, n_support, d), in any order.
            support_labels: (tasks, n_support); column k is the task's k-th smallest class id.
            n_shot: support points per class; not needed, and classes may differ in it.
            options: `solver` (structured or qpth), `max_iter` and `double_precision` (of qpth), `C_reg`, `lambda_reg`,
                `normalize` (ProtoNet); None is the head's default. One that does not concern this head is ignored.

        Raises:
            UserError: shapes that do not fit, an unknown option, or (where looking costs nothing: on the CPU) a task
                whose support does not have n_way classes.
        """
        _check_shapes(query, support, support_labels)
        learner = HEADS[self.base_learner]
        with torch.autocast(query.device.type, enabled=False):
            dtype = torch.promote_types(torch.promote_types(query.dtype, support.dtype), torch.float32)
            wide = dtype if query.device.type == "cpu" else torch.float64  # elsewhere float32 may mean TF32
            episode = Episode(query.to(wide), support.to(wide), one_hot_of_ranks(support_labels, n_way))
            scores = learner(episode, **_options_of(learner, options))
            return scores._replace(logits=scores.logits.to(dtype) * self.scale)


def _check_shapes(query: Tensor, support: Tensor, labels: Tensor) -> None:
    fits = query.dim() == support.dim() == 3 and query.shape[::2] == support.shape[::2]
    if not fits or labels.shape != support.shape[:2]:
        raise UserError(
            f"query {tuple(query.shape)}, support {tuple(support.shape)} and support_labels {tuple(labels.shape)} do "
            "not fit together: they must be (tasks, n_query, d), (tasks, n_support, d) and (tasks, n_support)."
        )
    if not (query.is_floating_point() and support.is_floating_point()):
        raise UserError(f"embeddings must be of a float type, not {query.dtype} and {support.dtype}.")


def _options_of(learner: Callable[..., Scores], options: dict[str, Any]) -> dict[str, Any]:
    """Return those of the options that `learner` takes."""
    known = {name for head in HEADS.values() for name in _option_names(head)}
    check_names(options, known, f"heads have {', '.join(sorted(known))}: ")
    return {n: options[n] for n in _option_names(learner) if options.get(n) is not None}


@functools.cache
def _option_names(learner: Callable[..., Scores]) -> list[str]:
    return list(inspect.signature(learner).parameters)[1:]  # after the episode


def one_hot_of_ranks(labels: Tensor, way: int) -> Tensor:
    """Class ids (tasks, n), any integers -> (tasks, n, way) float64; the k-th smallest id of a task is column k."""
    ordered, order = labels.sort(1)
    steps = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    ranks = torch.zeros_like(order).scatter(1, order[:, 1:], steps)
    if labels.device.type == "cpu" and bool((ranks.amax(1) != way - 1).any()):
        found = sorted(set((ranks.amax(1) + 1).tolist()))
        raise UserError(f"n_way is {way}, but the support of a task has {found} classes: pass the labels' own number.")
    return (ranks.unsqueeze(2) == torch.arange(way, device=labels.device)).double()


# --- embeddings ----------------------------------------------------------------------------------------------------


class Episode(NamedTuple):
    """An episode holds embeddings of a batch of tasks, and the classes of the support."""

    query: Tensor  # (tasks, n_query, d)
    support: Tensor  # (tasks, n, d)
    one_hot: Tensor  # (tasks, n, way), float64

    def double(self) -> "Episode":
        return Episode(self.query.double(), self.support.double(), self.one_hot)

    def kernel(self) -> Tensor:
        """Return inner products of the support embeddings, (tasks, n, n) float64."""
        support = self.support.double()
        return support @ support.mT

    def decide(self, coefficients: Tensor) -> Tensor:
        """Return (tasks, n_query, way), K(query, support) times `coefficients` (tasks, way, n) of the support points.

        By way of the classes' weights these are (n_query + n) * d * way products, not n_query * n * d.
        """
        return _Products.apply(self.query, coefficients.to(self.support.dtype) @ self.support)


class _Products(torch.autograd.Function):
    """A B', each gradient formed in its own layout: with few rows in B, torch's own way takes five times as long."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return left @ right.mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        return gradient @ right, gradient.mT @ left


# --- closed forms --------------------------------------------------------------------------------------------------


@register("ProtoNet")
def proto_net(episode: Episode, normalize: bool = True) -> Scores:
    """Return minus the squared distance to each class's mean (Snell et al. 2017), divided by d if `normalize`."""
    query, support, one_hot = episode.double()
    means = one_hot.mT @ support / one_hot.sum(1).unsqueeze(2)  # (tasks, way, d)
    lengths = query.square().sum(2, keepdim=True) + means.square().sum(2).unsqueeze(1)
    distances = lengths - 2 * query @ means.mT
    return Scores(-distances / (query.shape[2] if normalize else 1), distances.new_zeros(len(distances)))


@register("R2D2")
def r2d2(episode: Episode, lambda_reg: float = 50.0) -> Scores:
    """Solve ridge regression on the one-hot labels (Bertinetto et al. 2019): query X'(X X' + lambda I)^-1 Y."""
    episode = episode.double()  # float32 products would do for lambda = 50, not for 1
    kernel = episode.kernel()
    eye = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    system = kernel + lambda_reg * eye
    dual = torch.cholesky_solve(episode.one_hot, torch.linalg.cholesky_ex(system).L)
    with torch.no_grad():  # where lambda is lost in the kernel's rounding, dual is finite or not, and wrong
        residual = torch.baddbmm(episode.one_hot, system, dual, beta=-1).abs().amax(dim=(1, 2))
    return Scores(episode.decide(dual.mT), residual)


@register("Ridge")
def ridge(episode: Episode, lambda_reg: float = 50.0) -> Scores:
    """MetaOptNet's ridge head. Its QP has a linear term of -2 Y, so the logits are twice those of R2D2."""
    scores = r2d2(episode, lambda_reg)
    return scores._replace(logits=2 * scores.logits)


# --- support vector machines ---------------------------------------------------------------------------------------


@register("SVM-CS", "SVM")
def svm_cs(
    episode: Episode,
    C_reg: float = 0.1,
    solver: str = "structured",
    max_iter: int | None = None,
    double_precision: bool = False,
) -> Scores:
    """Solve the multi-class SVM of Crammer and Singer 2001, MetaOptNet's main head."""
    if solver == "qpth":
        support, one_hot = episode.support.double() if double_precision else episode.support, episode.one_hot
        solution = solve_crammer_singer_qpth(support @ support.mT, one_hot, C_reg, max_iter or 15, double_precision)
        return Scores(episode.decide(solution.x), solution.residual)
    if solver != "structured":
        raise UserError(f"there is no solver {solver!r}: SVM-CS has structured and qpth.")
    if max_iter is not None:
        raise UserError(
            "max_iter stops qpth early; the structured solver always goes to the solution. "
            "Leave --svm_max_iter out, or choose --svm_solver qpth."
        )
    weights, residual = _ClassWeights.apply(episode.support, episode.one_hot, C_reg)
    return Scores(_Products.apply(episode.query, weights), residual)


class _ClassWeights(torch.autograd.Function):
    """A'X for the dual A of Crammer and Singer's problem with the kernel X X', and the residual of A.

    float32 products see X without its mean over the support, and the mean as one more row: real, all-positive
    embeddings share one large component, one eigenvalue of their kernel is hundreds of times the rest, and products of
    them as they are would cost two digits of the logits. The kernel's gradient has rank 2 way (see qp_solvers.adjoint)
    and is never formed.
    """

    @staticmethod
    def forward(ctx: Any, support: Tensor, one_hot: Tensor, C_reg: float) -> tuple[Tensor, Tensor]:
        tasks, n, dim = support.shape
        points = support.new_empty(tasks, n + 1, dim)
        points[:, n:] = centre = support.mean(1, keepdim=True)
        torch.sub(support, centre, out=points[:, :n])
        kernel = _with_last(_with_last((points @ points.mT).double()).mT)
        kernel = (kernel + kernel.mT) / 2  # float32 products need not be symmetric to the last digit
        problem = crammer_singer(kernel, one_hot, C_reg)
        (x, residual), factors = search(problem)
        weights = _and_sum(x, points) @ points  # (tasks, way, d)
        ctx.problem = problem
        ctx.save_for_backward(points, weights, x, *factors)
        ctx.mark_non_differentiable(residual)
        return weights, residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        points, weights, x, *factors = ctx.saved_tensors
        v = adjoint(ctx.problem, Factors(*factors), _with_last((points @ gradient.mT).mT.double()))
        by_weights = torch.baddbmm(gradient, _and_sum(v, points), points, alpha=-1)
        left = torch.cat([x, -v], 1).to(points.dtype)  # (tasks, 2 way, n)
        return left.mT @ torch.cat([by_weights, weights], 1), None, None


def _with_last(products: Tensor) -> Tensor:
    """Turn products with n points less a mean, then with the mean -> with the points themselves (..., n)."""
    return products[..., :-1] + products[..., -1:]


def _and_sum(coefficients: Tensor, points: Tensor) -> Tensor:
    """Coefficients (tasks, way, n) of points -> those of the points less their mean and of the mean, in their type."""
    return torch.cat([coefficients, coefficients.sum(2, keepdim=True)], 2).to(points.dtype)


@register("SVM-He")
def svm_he(episode: Episode, C_reg: float = 0.01) -> Scores:
    """Solve the multi-class SVM of He et al. 2012 with one variable per support point.

    Codes V_i = (way y_i - 1) / (way - 1); minimise 1/2 a'(K o V V')a - sum a over 0 <= a <= C. A class's logit sums
    a_i K(query, i) over its own support points.
    """
    episode = episode.double()
    one_hot = episode.one_hot
    way = one_hot.shape[2]
    codes = (way * one_hot - 1) / (way - 1)
    solution = solve(box(episode.kernel() * (codes @ codes.mT), 1.0, torch.full_like(one_hot[:, :, 0], C_reg)))
    return Scores(episode.decide(solution.x * one_hot.mT), solution.residual)


@register("SVM-WW")
def svm_ww(episode: Episode, C_reg: float = 1e-5) -> Scores:
    """Solve the multi-class SVM of Weston and Watkins 1999, with a bias in the kernel (K + 1).

    Point i pushes class m != y_i away by a[i, m] in [0, C] and attracts its own class by their sum, so that the
    coefficients of the classes are B = y o (a 1) - a; minimise 1/2 tr(B'(K + 1)B) - 2 sum a.
    """
    episode = episode.double()
    one_hot = episode.one_hot
    tasks, n, way = one_hot.shape
    own = one_hot.mT  # (tasks, way, n)
    eye = torch.eye(way, dtype=own.dtype, device=own.device)[:, None, :, None]
    same = (one_hot @ own)[:, None, :, None, :]
    # (tasks, m, i, p, j): how a[i, m] meets a[j, p] in B'B; variables are class-major, m * n + i
    meeting = same - one_hot[:, None, :, :, None] - own[:, :, None, None, :] + eye
    kernel = episode.kernel() + 1
    hessian = (meeting * kernel[:, None, :, None, :]).reshape(tasks, way * n, way * n)
    solution = solve(box(hessian, 2.0, C_reg * (1 - own).flatten(1)))
    pushes = solution.x.view(tasks, way, n)
    coefficients = own * pushes.sum(1, keepdim=True) - pushes
    return Scores(episode.decide(coefficients) + coefficients.sum(2).unsqueeze(1), solution.residual)
