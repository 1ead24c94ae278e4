"""Batched quadratic programs of MetaOptNet's base learners, solved exactly and differentiated through their solution.

`structured` is our solver: float64 inside, a primal-dual active set (a semismooth Newton method; Hintermüller, Ito and
Kunisch 2003) with a Mehrotra interior point for the tasks that it does not settle, and the gradient by implicit
differentiation on the final active set. Crammer and Singer's dual has way * n variables, but its Hessian is `way`
copies of one n x n kernel and its equalities couple only the entries of one row, so a Newton step costs `way` systems
of n x n and one n x n Schur complement. `qpth` is the package that the paper used, on the dense problem.

Every device runs the same program. The host reads from it in `look` only: once before the active set, once a round, and
once for the residuals; ordinary episodes need 1 to 3 rounds. The interior point reads once a step.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.errors import UserError

ROUNDS = 12  # of the active set before the interior point takes over, and after it; ordinary episodes need 1 to 3
GUESSING_STEPS = 4  # before the first round; each costs a tenth of one, and together they save up to two
BARRIER_STEPS = 40  # of the interior point at most; 12 are usual but for kernels with entries from 1e5 up
CENTRED = 1e-12  # relative gap of slacks and multipliers at which the interior point stops
ACCEPTED = 1e-9  # relative KKT residual above which a task goes to the interior point
UNREFINED = 1e-11  # relative error of a Newton system that is left as it is
ROUNDING = 1e-5  # part of the terms of H x below which a gradient cannot be told from 0 to 1e-10 in float64
SINGULAR = 1e-10  # added to a box problem's Hessian, relative to its diagonal; refinement takes its effect out again


class Solution(NamedTuple):
    """This is a batch of solved problems.

    `residual` is the largest violation of the optimality conditions relative to the problem's own size: for a solved
    task below 1e-10 while the kernel's entries are below 1e5, up to 1e-7 where they reach 1e8; inf for a kernel that is
    not finite. The solution of the latter is 0 and so is its gradient: a lost task spoils nobody else's numbers, and
    the caller has to look at the residual.
    """

    x: Tensor  # (tasks, blocks, n)
    residual: Tensor  # (tasks,)


class Problem(NamedTuple):
    """Minimise the sum over blocks b of 1/2 x_b'H x_b - linear_b'x_b within bounds; the blocks may have to sum to 0."""

    hessian: Tensor  # (tasks, n, n), shared by the blocks
    linear: Tensor  # (tasks, blocks, n); one-hot where the rows sum to 0
    lower: Tensor  # (tasks, blocks, n), 0 or -inf
    upper: Tensor  # (tasks, blocks, n)
    rows_sum_to_zero: bool

    def descent(self, x: Tensor) -> Tensor:
        """Return the negative gradient of the objective."""
        return torch.baddbmm(self.linear, x, self.hessian, alpha=-1)


# --- the problems of the heads -------------------------------------------------------------------------------------


def crammer_singer(kernel: Tensor, one_hot: Tensor, C_reg: float) -> Problem:
    """Minimise 1/2 tr(A'(K + I)A) - sum_i A[i, y_i] over A (n, way) with A 1 = 0 and A <= C * one_hot; x is A'.

    The dual of Crammer and Singer 2001 as MetaOptNet states it; the identity is part of the objective.

    Args:
        kernel: (tasks, n, n), symmetric and positive semi-definite, of any float type.
        one_hot: (tasks, n, way), the class of each support point; shots may differ.
    """
    target = one_hot.mT.double().contiguous()  # (tasks, way, n): each class a block
    unbounded = torch.full_like(target, -torch.inf)
    return Problem(_add_diagonal(kernel.double(), 1.0), target, unbounded, C_reg * target, rows_sum_to_zero=True)


def box(hessian: Tensor, linear: float, upper: Tensor) -> Problem:
    """Minimise 1/2 x'Hx - linear * sum x over 0 <= x <= upper, with one block.

    Where H is singular x need not be unique; H x is.

    Args:
        hessian: (tasks, n, n), symmetric and positive semi-definite, of any float type.
        upper: (tasks, n); an entry with an upper bound of 0 stays 0.
    """
    upper = upper.double().unsqueeze(1)
    return Problem(hessian.double(), torch.full_like(upper, linear), torch.zeros_like(upper), upper, False)


def _add_diagonal(matrices: Tensor, value: float) -> Tensor:
    return matrices + value * torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def solve_crammer_singer_qpth(
    kernel: Tensor, one_hot: Tensor, C_reg: float = 0.1, max_iter: int = 15, double: bool = False
) -> Solution:
    """Solve the same problem by the qpth package, dense over all n * way variables, as the paper's program calls it.

    Args:
        max_iter: interior-point passes at most; the official test run stops after 3, far from the solution.
        double: solve in float64 instead of float32. The residual is then below 1e-6; in float32 about 1e-3.
    """
    try:
        from qpth.qp import QPFunction
    except ImportError as error:
        raise UserError(
            f"--svm_solver qpth needs the package qpth ({error}), which needs numpy < 2 and so Python 3.12 or older. "
            "There, install it with `pip install qpth==0.0.18`; elsewhere use --svm_solver structured, which is exact"
        ) from error
    tasks, n, way = one_hot.shape
    options: dict[str, Any] = {"dtype": torch.float64 if double else torch.float32, "device": kernel.device}
    # sample-major: entry i * way + m of a flattened dual is A[i, m]
    hessian = _add_diagonal(torch.kron(kernel.to(**options), torch.eye(way, **options)), 1.0)
    target = one_hot.to(**options).flatten(1)
    bounds = torch.eye(n * way, **options).expand(tasks, -1, -1)
    row_sums = torch.eye(n, **options).repeat_interleave(way, 1).expand(tasks, -1, -1)
    solve = QPFunction(verbose=-1, maxIter=max_iter)
    try:
        dual = solve(hessian, -target, bounds, C_reg * target, row_sums, torch.zeros(tasks, n, **options))
    except RuntimeError as error:  # one kernel that is too large for its precision; nothing says which
        if "SPD" not in str(error):
            raise
        dual = torch.full_like(target, torch.nan)
    x = dual.view(tasks, n, way).mT
    return Solution(x, kkt_residual(crammer_singer(kernel.detach(), one_hot, C_reg), x.detach().double()))


def solve(problem: Problem) -> Solution:
    """Return the solution, differentiable with respect to the Hessian, once."""
    return Solution(*_Solve.apply(problem.hessian, problem._replace(hessian=problem.hessian.detach())))


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
        (x, residual), factors = search(problem)
        ctx.problem = problem
        ctx.save_for_backward(x, *factors)
        ctx.mark_non_differentiable(residual)
        return x, residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        x, *saved = ctx.saved_tensors
        outer = adjoint(ctx.problem, Factors(*saved), gradient).mT @ x
        return -(outer + outer.mT) / 2, None


# --- Newton systems ------------------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """This is a Newton system on the free entries, ready to solve."""

    free: Tensor  # (tasks, blocks, n), 1 or 0
    inverse: Tensor  # (tasks, blocks, n, n), of the free part of each block's matrix; elsewhere 0 but for rounding
    schur: Tensor  # (tasks, n, n), Cholesky factor of the sum of the blocks' inverses; (tasks, 0, 0) without row sums


def factorise(problem: Problem, free: Tensor, barrier: Tensor | float = 0.0) -> Factors:
    """Factorise H restricted to the `free` entries (1 or 0), plus the diagonal `barrier`, block by block."""
    held = 1 - free
    system = problem.hessian.unsqueeze(1) * free.unsqueeze(-1) * free.unsqueeze(-2)
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    if not problem.rows_sum_to_zero:  # this H may be singular, K + I is not
        diagonal += SINGULAR * diagonal.amax(-1, keepdim=True).clamp_min(1e-300)
    diagonal += held + barrier * free
    inverse = inverse_of(system)
    inverse.diagonal(dim1=-2, dim2=-1).sub_(held)
    return with_schur(free, inverse) if problem.rows_sum_to_zero else Factors(free, inverse, inverse[:, 0, :0, :0])


def factorise_from(whole: Tensor, side: Tensor, size: int) -> Factors:
    """The same from H's own inverse `whole` (tasks, n, n), by elimination of the held entries: cheap when they are few.

    `side` is 1 for held entries and 0 for free ones; no block holds more than `size`.
    """
    tasks, blocks, n = side.shape
    real, where = side.topk(size, sorted=False)  # (tasks, blocks, size), 1 for held entries, 0 for padding
    first = torch.arange(0, tasks * n, n, device=side.device).view(-1, 1, 1)
    rows = whole.flatten(0, 1).index_select(0, (where + first).flatten()).view(tasks, blocks, size, n)
    rows *= real.unsqueeze(3)
    corner = rows.gather(3, where.unsqueeze(2).expand(-1, -1, size, -1)) * real.unsqueeze(2)
    corner.diagonal(dim1=2, dim2=3).add_(1 - real)
    reduced = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(corner).L, rows, upper=False)
    return with_schur(1 - side, whole.unsqueeze(1) - reduced.mT @ reduced)


def with_schur(free: Tensor, inverse: Tensor) -> Factors:
    return Factors(free, inverse, torch.linalg.cholesky_ex(inverse.sum(1)).L)


def inverse_of(matrices: Tensor) -> Tensor:
    """Inverse of positive definite matrices; not finite, or wrong, for one that has no Cholesky factor."""
    lower = torch.linalg.cholesky_ex(matrices).L
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    half = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return half.mT @ half


def solve_free(factors: Factors, right: Tensor, excess: Tensor | float = 0.0) -> tuple[Tensor, Tensor | float]:
    """Solve H x + nu = right on the free entries with sum_b x_b = -excess: x (tasks, blocks, n), nu (tasks, 1, n).

    Where nothing is said of row sums, nu is 0.
    """
    free, inverse, schur = factors
    right = right * free
    x = _times(right, inverse)
    if not schur.numel():
        return x * free, 0.0
    nu = torch.cholesky_solve((x.sum(1) + excess).unsqueeze(2), schur).mT
    return _times((right - nu) * free, inverse) * free, nu


def _times(rows: Tensor, matrices: Tensor) -> Tensor:
    """Multiply each block's row by its matrix: a quarter of the time of a matrix times a column."""
    return torch.bmm(rows.flatten(0, 1).unsqueeze(1), matrices.flatten(0, 1)).view_as(rows)


def newton(problem: Problem, factors: Factors, x: Tensor, passes: int) -> tuple[Tensor, Tensor]:
    """Solve for the free entries from `x`; also the negative gradient minus the rows' multipliers.

    Passes after the first are iterative refinement. Products with an inverse are not backward stable: a kernel with one
    large eigenvalue, as that of all-positive embeddings, would give multipliers of the wrong sign. For a singular box
    problem they are proximal steps.
    """
    for _ in range(passes):
        change, nu = solve_free(factors, problem.descent(x), x.sum(1))
        x = x + change
    return x, problem.descent(x) - nu


def adjoint(problem: Problem, factors: Factors, gradient: Tensor) -> Tensor:
    """The v for which the gradient of H is -sum_b v_b x_b', made symmetric, if that of x is `gradient`.

    On the free entries F and with multipliers nu of the row sums, H_FF x_F + nu = linear_F - H_FU x_U and sum_b x = 0
    hold in a neighbourhood of a problem whose bounds are strictly active or inactive: v solves the same system with
    the gradient on the right.
    """
    if problem.rows_sum_to_zero:
        return solve_free(factors, gradient)[0]
    return newton(problem._replace(linear=gradient), factors, torch.zeros_like(gradient), passes=3)[0]


def kkt_residual(problem: Problem, x: Tensor) -> Tensor:
    """Relative violation of the optimality conditions by x, (tasks,); inf where something is not finite.

    A step of x along the negative gradient, clipped to the bounds, must lead back to x; each of the two is measured in
    units of its own largest entry. Nothing of a solver's own state goes in.
    """
    product = x @ problem.hessian
    descent = problem.linear - product
    size = _size(x).clamp_min(1e-300)
    cancelling = _size(problem.hessian) * x.abs().sum(2).amax(1).view(-1, 1, 1)
    slope = _size(torch.cat([product, problem.linear, ROUNDING * cancelling.expand_as(product)], 1))
    if problem.rows_sum_to_zero:
        descent = descent - descent.amin(1, keepdim=True)  # a row's multiplier is what its free entries share
    violations = (x + descent * (size / slope)).clamp(problem.lower, problem.upper) - x
    if problem.rows_sum_to_zero:
        violations = torch.cat([violations, x.sum(1, keepdim=True)], 1)
    return (_size(violations) / size).flatten().nan_to_num(nan=torch.inf)


def _size(x: Tensor) -> Tensor:
    return x.abs().amax((1, 2), keepdim=True)  # (tasks, 1, 1)


# --- search --------------------------------------------------------------------------------------------------------


def look(*values: Tensor) -> list[float]:
    """Read numbers from the device: on a GPU the one place where the host waits for it."""
    found: list[float] = torch.stack(values).tolist()
    return found


def search(problem: Problem) -> tuple[Solution, Factors]:
    """Each task's solution as far as it was found, x = 0 and nothing free where nothing finite was, and its system."""
    solution, factors = active_set(problem)
    if look(solution.residual.amax())[0] <= ACCEPTED:
        return solution, factors
    lost = (solution.residual > ACCEPTED).nonzero().squeeze(1)
    part = problem._replace(**{name: getattr(problem, name)[lost] for name in problem._fields[:4]})
    others, other_factors = active_set(part, interior_point(part))
    better = others.residual < solution.residual[lost]
    for old, new in zip((*solution, *factors), (*others, *other_factors), strict=True):
        old[lost[better]] = new[better]
    gone = solution.residual.isinf()
    for tensor, harmless in zip((solution.x, *factors), (0, 0, 0, 1), strict=True):
        tensor[gone] = harmless
    return solution, factors


def active_set(problem: Problem, side: Tensor | None = None) -> tuple[Solution, Factors]:
    """Return the state after at most `ROUNDS` rounds from `side`: 1 held at the upper bound, -1 at the lower, 0 free.

    A finished task repeats its last round, so that a round is one batch. Without `side` it starts from a guess.
    """
    whole = inverse_of(problem.hessian) if problem.rows_sum_to_zero else None
    if side is None:
        side = (problem.lower == problem.upper).double() if whole is None else guess_sides(problem, whole)
    passes, (size,) = 1 if problem.rows_sum_to_zero else 3, look(side.sum(2).amax())
    for _ in range(ROUNDS):
        factors = factorise(problem, 1 - side.abs()) if whole is None else factorise_from(whole, side, int(size))
        # a lower bound that can hold an entry is 0
        x, slope = newton(problem, factors, problem.upper * side.clamp_min(0), passes)
        following = next_sides(problem, x, slope * (1 - factors.free))
        error = (slope * factors.free).abs().nan_to_num_(0, 0)  # a lost task asks for nothing
        wrong, moved, following_size = look(error.amax(), torch.dist(following, side), following.sum(2).amax())
        if passes == 1 and wrong > UNREFINED:
            passes = 2  # for this round once more, and from now on
        elif moved:
            side, size = following, following_size
        else:
            break
    return Solution(x, kkt_residual(problem, x)), factors


def guess_sides(problem: Problem, whole: Tensor) -> Tensor:
    """Return sides after a few projected gradient steps on the multipliers of the bounds, from H's inverse `whole`."""
    steps = whole / whole.diagonal(dim1=1, dim2=2).amax(1).view(-1, 1, 1)  # about its largest eigenvalue
    start = (problem.linear - problem.linear.mean(1, keepdim=True)) @ whole - problem.upper
    excess, push = start, torch.zeros_like(start)  # of x over its bounds; the multipliers in units of x
    for _ in range(GUESSING_STEPS):
        push = (push + excess).clamp_min(0)
        centred = torch.sub(push, push.sum(1, keepdim=True), alpha=1 / push.shape[1])
        excess = torch.baddbmm(start, centred, steps, alpha=-1)
    return next_sides(problem, excess + problem.upper, push)


def next_sides(problem: Problem, x: Tensor, multiplier: Tensor) -> Tensor:
    """Hold what has left its bounds (multiplier 0) or is pushed outwards, let go the rest.

    Where the rows sum to 0, the least firmly held entry of a row that would have none free is let go as well.
    """
    pushed = x + multiplier
    firmness = pushed - problem.upper
    if problem.rows_sum_to_zero:
        return (firmness > firmness.amin(1, keepdim=True).clamp_min(0)).double()
    pinned = problem.lower == problem.upper
    return ((firmness > 0) | pinned).double() - ((pushed < problem.lower) & ~pinned).double()


def interior_point(problem: Problem) -> Tensor:
    """Return sides that a predictor-corrector method (Mehrotra 1992) leads to from inside the bounds.

    A task that is done, or whose step is not finite, stays where it is. Rows sum to 0 throughout.
    """
    sign = torch.tensor([1.0, -1.0], dtype=problem.linear.dtype, device=problem.linear.device).view(2, 1, 1, 1)
    bounds = torch.stack([problem.upper, problem.lower])  # (2, tasks, blocks, n), as all that has to do with bounds
    has = bounds.isfinite() & (problem.lower < problem.upper)
    free, bounded = has[0].double(), has.sum((0, 2, 3)).clamp_min(1).view(-1, 1, 1)
    force, x = _size(problem.linear), problem.upper / 2  # x strictly inside, but for entries with lower = upper
    if problem.rows_sum_to_zero:
        x = x - (x.sum(1, keepdim=True) - x) / max(x.shape[1] - 1, 1)
    nu, multiplier = torch.zeros_like(x[:, :1]), force * has
    for _ in range(BARRIER_STEPS):
        room = (sign * (bounds - x)).where(has, 1)
        factors = factorise(problem, free, (multiplier / room).sum(0))
        slope = problem.descent(x) - nu
        gap = (room * multiplier).sum((0, 2, 3)).view(-1, 1, 1)
        target = torch.zeros_like(room)  # of room * multiplier: 0, then what corrects the step towards 0
        for corrects in (False, True):
            dx, dnu = solve_free(factors, slope - (sign * target / room).sum(0))
            change = ((target + sign * multiplier * dx) / room - multiplier).where(has, 0)
            used = torch.maximum(sign * dx / room, -change / multiplier).where(has, 0)
            part = 1 / used.amax((0, 2, 3)).clamp_min(1).view(-1, 1, 1)  # the longest step inside the bounds
            if not corrects:
                left = ((room - sign * part * dx) * (multiplier + part * change)).sum((0, 2, 3)).view(-1, 1, 1)
                target = ((left / gap).clamp(0, 1) ** 3 * gap / bounded + sign * dx * change) * has
        part = 0.995 * part
        new = (x + part * dx, nu + part * dnu, multiplier + part * change)
        finite = (new[0] + new[2].sum(0)).sum((1, 2), keepdim=True).isfinite()
        moves = (gap > CENTRED * bounded * force * _size(x)) & finite
        x, nu, multiplier = (n.where(moves, old) for n, old in zip(new, (x, nu, multiplier), strict=True))
        if not look(moves.any())[0]:
            break
    return next_sides(problem, x, (multiplier[0] - multiplier[1]) / force * _size(x))
