"""Batched quadratic programs of MetaOptNet's base learners, solved exactly and differentiated through their solution.

`structured` is our solver: float64 inside, a primal-dual active set (a semismooth Newton method; Hintermüller, Ito and
Kunisch 2003) with a Mehrotra interior point for the tasks that it does not settle, and the gradient by implicit
differentiation on the final active set. Crammer and Singer's dual has way * n variables, but its Hessian is `way`
copies of one n x n kernel and its equalities couple only the entries of one row, so a Newton step costs `way` systems
of n x n and one n x n Schur complement. `qpth` is the package that the paper used, on the dense problem.

Away from the CPU the number of rounds is fixed and finished tasks are masked, so that the host reads nothing back.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from utils.errors import UserError

ROUNDS = 12  # of the active set before the interior point takes over, and after it; ordinary episodes need 1 to 4
GUESSING_STEPS = 4  # before the first round; each costs a tenth of one, and together they save up to two
BARRIER_STEPS = 40  # of the interior point; 12 are enough but for kernels with entries from 1e5 up
FIXED_BARRIER_STEPS, FIXED_ROUNDS = 25, 5  # where the host may not look: the interior point first, then the active set
CENTRED = 1e-12  # relative gap of slacks and multipliers at which the interior point stops
ACCEPTED = 1e-9  # relative KKT residual above which a task goes to the interior point
UNREFINED = 1e-11  # relative error of a Newton system that is left as it is
ROUNDING = 1e-5  # part of the terms of H x below which a gradient cannot be told from 0 to 1e-10 in float64
SINGULAR = 1e-10  # added to a box problem's Hessian, relative to its diagonal; refinement takes its effect out again


class QPSolution(NamedTuple):
    """A batch of solved problems.

    `residual` is the largest violation of the optimality conditions relative to the problem's own size: for a solved
    task below 1e-10 while the kernel's entries are below 1e5, up to 1e-7 where they reach 1e8; inf for a kernel that is
    not finite. The dual of the latter is 0 and so is its gradient: a lost task spoils nobody else's numbers, and the
    caller has to look at the residual.
    """

    dual: Tensor  # (tasks, n, way), or (tasks, n) for one variable per support point
    residual: Tensor  # (tasks,)
    iterations: Tensor  # (tasks,), Newton systems factorised for the task; 0 from qpth, which does not say


class Problem(NamedTuple):
    """Minimise the sum over blocks b of 1/2 x_b'H x_b - linear_b'x_b within bounds; the blocks may have to sum to 0."""

    hessian: Tensor  # (tasks, n, n), shared by the blocks
    linear: Tensor  # (tasks, blocks, n); one-hot where the rows sum to 0
    lower: Tensor  # (tasks, blocks, n), 0 or -inf
    upper: Tensor  # (tasks, blocks, n)
    rows_sum_to_zero: bool

    def of_tasks(self, index: Tensor) -> "Problem":
        hessian, linear, lower, upper = (t[index] for t in self[:4])
        return Problem(hessian, linear, lower, upper, self.rows_sum_to_zero)

    def descent(self, x: Tensor) -> Tensor:
        """Negative gradient of the objective."""
        return self.linear - x @ self.hessian


# --- the problems of the heads -------------------------------------------------------------------------------------


def solve_crammer_singer(kernel: Tensor, one_hot: Tensor, C_reg: float = 0.1, fixed: bool | None = None) -> QPSolution:
    """Minimise 1/2 tr(A'(K + I)A) - sum_i A[i, y_i] over A (n, way) with A 1 = 0 and A <= C * one_hot.

    The dual of Crammer and Singer 2001 as MetaOptNet states it; the identity is part of the objective. Differentiable
    with respect to `kernel`, once.

    Args:
        kernel: (tasks, n, n), symmetric and positive semi-definite, of any float type.
        one_hot: (tasks, n, way), the class of each support point; shots may differ.
        fixed: run the same rounds for every task; by default everywhere but on the CPU.
    """
    solution = _solve(crammer_singer(kernel, one_hot, C_reg), fixed)
    return solution._replace(dual=solution.dual.mT)


def crammer_singer(kernel: Tensor, one_hot: Tensor, C_reg: float) -> Problem:
    target = one_hot.mT.double().contiguous()  # (tasks, way, n): class-major inside, each class a block
    return Problem(
        hessian=_add_diagonal(kernel.double(), 1.0),
        linear=target,
        lower=torch.full_like(target, -torch.inf),
        upper=C_reg * target,
        rows_sum_to_zero=True,
    )


def solve_box(hessian: Tensor, linear: Tensor, upper: Tensor, fixed: bool | None = None) -> QPSolution:
    """Minimise 1/2 x'Hx - linear'x over 0 <= x <= upper, H positive semi-definite and possibly singular.

    Differentiable with respect to `hessian`, once. Where H is singular x need not be unique; H x is.

    Args:
        hessian: (tasks, n, n), symmetric, of any float type.
        linear, upper: (tasks, n); an entry with an upper bound of 0 stays 0.
    """
    target, high = linear.double().unsqueeze(1), upper.double().unsqueeze(1)
    problem = Problem(hessian.double(), target, torch.zeros_like(high), high, rows_sum_to_zero=False)
    solution = _solve(problem, fixed)
    return solution._replace(dual=solution.dual.squeeze(1))


def _add_diagonal(matrices: Tensor, value: float) -> Tensor:
    return matrices + value * torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)


def solve_crammer_singer_qpth(
    kernel: Tensor, one_hot: Tensor, C_reg: float = 0.1, max_iter: int = 15, double: bool = False
) -> QPSolution:
    """The same problem by the qpth package, dense over all n * way variables, as the paper's program calls it.

    Args:
        max_iter: interior-point passes at most; the official test run stops after 3, far from the solution.
        double: solve in float64 instead of float32. The residual is then below 1e-6; in float32 about 1e-3.
    """
    tasks, n, way = one_hot.shape
    dtype = torch.float64 if double else torch.float32
    options: dict[str, Any] = {"dtype": dtype, "device": kernel.device}
    # sample-major: entry i * way + m of a flattened dual is A[i, m]
    blocks = torch.einsum("tij,ab->tiajb", kernel.to(dtype), torch.eye(way, **options))
    hessian = _add_diagonal(blocks.reshape(tasks, n * way, n * way), 1.0)
    target = one_hot.to(dtype).flatten(1)
    bounds = torch.eye(n * way, **options).expand(tasks, -1, -1)
    row_sums = torch.eye(n, **options).repeat_interleave(way, 1).expand(tasks, -1, -1)
    solve = _qp_function()(verbose=-1, maxIter=max_iter)
    try:
        dual = solve(hessian, -target, bounds, C_reg * target, row_sums, torch.zeros(tasks, n, **options))
    except RuntimeError as error:  # one kernel that is too large for its precision; nothing says which
        if "SPD" not in str(error):
            raise
        dual = torch.full_like(target, torch.nan)
    dual = dual.view(tasks, n, way)
    residual = kkt_residual(crammer_singer(kernel.detach(), one_hot, C_reg), dual.detach().mT.double())
    return QPSolution(dual, residual, torch.zeros(tasks, dtype=torch.int64, device=kernel.device))


def _qp_function() -> Any:
    try:
        from qpth.qp import QPFunction
    except ImportError as error:
        raise UserError(
            f"--svm_solver qpth needs the package qpth ({error}): install it with `pip install qpth==0.0.18`, "
            "which needs numpy below 2, or use --svm_solver structured."
        ) from error
    return QPFunction


# --- differentiation -----------------------------------------------------------------------------------------------


def _solve(problem: Problem, fixed: bool | None) -> QPSolution:
    constant = problem._replace(hessian=problem.hessian.detach())
    return QPSolution(*_Solve.apply(problem.hessian, constant, fixed))


class _Solve(torch.autograd.Function):
    """Dual, residual and iterations of a problem, differentiable with respect to its Hessian."""

    @staticmethod
    def forward(ctx: Any, hessian: Tensor, problem: Problem, fixed: bool | None) -> tuple[Tensor, Tensor, Tensor]:
        state = search(problem, fixed)
        ctx.problem = problem
        ctx.save_for_backward(state.x, *state.factors)
        ctx.mark_non_differentiable(state.residual, state.iterations)
        return state.x, state.residual, state.iterations

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        x, *saved = ctx.saved_tensors
        outer = adjoint(ctx.problem, Factors(*saved), gradient).mT @ x
        return -(outer + outer.mT) / 2, None, None


# --- Newton systems ------------------------------------------------------------------------------------------------


class Factors(NamedTuple):
    """A Newton system on the free entries, ready to solve."""

    free: Tensor  # (tasks, blocks, n), 1 or 0
    inverse: Tensor  # (tasks, blocks, n, n), of the free part of each block's matrix; elsewhere 0 but for rounding
    schur: Tensor  # (tasks, n, n), Cholesky factor of the sum of the blocks' inverses; (tasks, 0, 0) without row sums


def factorise(problem: Problem, free: Tensor, barrier: Tensor | None = None) -> Factors:
    """Factorise H restricted to the `free` entries (1 or 0), plus the diagonal `barrier`, block by block."""
    held = 1 - free
    system = problem.hessian.unsqueeze(1) * free.unsqueeze(-1)
    system *= free.unsqueeze(-2)
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    if not problem.rows_sum_to_zero:  # this H may be singular, K + I is not
        diagonal += SINGULAR * diagonal.amax(-1, keepdim=True).clamp_min(1e-300)
    diagonal += held if barrier is None else held + barrier * free
    inverse = inverse_of(system)
    inverse.diagonal(dim1=-2, dim2=-1).sub_(held)
    if problem.rows_sum_to_zero:
        return with_schur(free, inverse)
    return Factors(free, inverse, inverse.new_empty(len(inverse), 0, 0))


def factorise_from(whole: Tensor, free: Tensor) -> Factors:
    """The same from H's own inverse `whole` (tasks, n, n), by elimination of the held entries: cheap when they are few.

    Their largest number in a block is the size of the systems, and the host has to know it.
    """
    tasks, blocks, n = free.shape
    size = n - int(free.sum(2).min())
    real, where = (1 - free).topk(size, sorted=False)  # (tasks, blocks, size), 1 for held entries, 0 for padding
    first = torch.arange(0, tasks * n, n, device=free.device).view(-1, 1, 1)
    rows = whole.flatten(0, 1).index_select(0, (where + first).flatten()).view(tasks, blocks, size, n)
    rows = rows * real.unsqueeze(3)
    corner = rows.gather(3, where.unsqueeze(2).expand(-1, -1, size, -1)) * real.unsqueeze(2)
    corner.diagonal(dim1=2, dim2=3).add_(1 - real)
    reduced = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(corner).L, rows, upper=False)
    return with_schur(free, whole.unsqueeze(1) - reduced.mT @ reduced)


def with_schur(free: Tensor, inverse: Tensor) -> Factors:
    return Factors(free, inverse, torch.linalg.cholesky_ex(inverse.sum(1)).L)


def inverse_of(matrices: Tensor) -> Tensor:
    """Inverse of positive definite matrices; LAPACK's routine is fastest on the CPU but loops over a batch on CUDA."""
    lower, info = torch.linalg.cholesky_ex(matrices)
    if lower.device.type == "cpu":
        # LAPACK refuses to invert what has no factor; as no numbers it costs nobody but its own task.
        lower.masked_fill_((info > 0)[..., None, None], torch.nan)
        return torch.cholesky_inverse(lower).mT  # symmetric, and contiguous this way
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    half = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return half.mT @ half


def solve_free(factors: Factors, right: Tensor, row_sums: Tensor | float) -> tuple[Tensor, Tensor]:
    """Solve H x + nu = right on the free entries with sum_b x_b = row_sums: x (tasks, blocks, n), nu (tasks, 1, n).

    Where nothing is said of row sums, nu is 0.
    """
    free, inverse, schur = factors
    x = _times(right * free, inverse)
    if not schur.numel():
        return x * free, torch.zeros_like(x[:, :1])
    nu = torch.cholesky_solve((x.sum(1) - row_sums).unsqueeze(2), schur).mT
    return (x - _times(nu, inverse)) * free, nu


def _times(rows: Tensor, matrices: Tensor) -> Tensor:
    """Each block's row times its matrix: a quarter of the time of a matrix times a column."""
    return (rows.unsqueeze(2) @ matrices).squeeze(2)


def adjoint(problem: Problem, factors: Factors, gradient: Tensor) -> Tensor:
    """The v for which the gradient of H is -sum_b v_b x_b', made symmetric, if that of x is `gradient`.

    On the free entries F and with multipliers nu of the row sums, H_FF x_F + nu = linear_F - H_FU x_U and sum_b x = 0
    hold in a neighbourhood of a problem whose bounds are strictly active or inactive: v solves the same system with
    the gradient on the right.
    """
    v, _nu = solve_free(factors, gradient, 0.0)
    if not problem.rows_sum_to_zero:
        v, _slope = refine(problem._replace(linear=gradient), factors, v)
    return v.where(factors.free > 0, 0)  # a lost task's factors need not be finite


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


class State(NamedTuple):
    """A candidate solution of each task, with what backward needs."""

    x: Tensor  # (tasks, blocks, n)
    residual: Tensor  # (tasks,)
    iterations: Tensor  # (tasks,)
    factors: Factors


def search(problem: Problem, fixed: bool | None = None) -> State:
    """The solution of each task as far as it was found: x = 0 and nothing free where nothing finite was."""
    fixed = problem.hessian.device.type != "cpu" if fixed is None else fixed
    if fixed:
        state = _from_the_inside(problem, FIXED_BARRIER_STEPS, FIXED_ROUNDS, fixed)
    else:
        state = active_set(problem, None, ROUNDS, fixed)
        lost = (state.residual > ACCEPTED).nonzero().squeeze(1)
        if not len(lost):
            return state
        state = _insert(state, _from_the_inside(problem.of_tasks(lost), BARRIER_STEPS, ROUNDS, fixed), lost)
    found = state.residual.isfinite().view(-1, 1, 1)
    factors = state.factors._replace(free=state.factors.free * found)
    return state._replace(x=state.x.where(found, 0), factors=factors)


def _from_the_inside(problem: Problem, steps: int, rounds: int, fixed: bool) -> State:
    """The active set started where an interior point leads; a task's iterations count both."""
    point = start_inside(problem)
    for _ in range(steps):
        point = barrier_step(problem, point)
    state = active_set(problem, point.sides(problem), rounds, fixed)
    return state._replace(iterations=state.iterations + steps)


def _insert(state: State, others: State, index: Tensor) -> State:
    """`state` with `others`, which are the tasks `index`, where those solve their problems better."""
    better = others.residual < state.residual[index]
    index = index[better]

    def put(old: Tensor, new: Tensor) -> Tensor:
        return old.index_copy(0, index, new[better])

    x, residual, iterations = (put(*pair) for pair in zip(state[:3], others[:3], strict=True))
    factors = (put(*pair) for pair in zip(state.factors, others.factors, strict=True))
    return State(x, residual, iterations, Factors(*factors))


# --- active set ----------------------------------------------------------------------------------------------------


def active_set(problem: Problem, side: Tensor | None, rounds: int, fixed: bool) -> State:
    """The state after at most `rounds` rounds from `side`: 1 held at the upper bound, -1 at the lower, 0 free.

    A finished task repeats its last round, so that a round is one batch. Without `side` it starts from a guess.
    """
    whole = inverse_of(problem.hessian) if problem.rows_sum_to_zero and not fixed else None
    if side is None:
        side = (problem.lower == problem.upper).double() if whole is None else guess_sides(problem, whole)
    iterations = torch.ones(len(side), dtype=torch.int64, device=side.device)
    for left in reversed(range(rounds)):
        free = (side == 0).double()
        factors = factorise(problem, free) if whole is None else factorise_from(whole, free)
        x, following = active_set_round(problem, side, factors, fixed)
        changed = (following != side).flatten(1).any(1)
        if not left or not (fixed or changed.any()):
            break
        iterations = iterations + changed
        side = following
    return State(x, kkt_residual(problem, x), iterations, factors)


def guess_sides(problem: Problem, whole: Tensor) -> Tensor:
    """Sides after a few projected gradient steps on the multipliers of the bounds, from H's inverse `whole`."""
    steps = whole / whole.diagonal(dim1=1, dim2=2).amax(1).view(-1, 1, 1)  # about its largest eigenvalue
    start = (problem.linear - problem.linear.mean(1, keepdim=True)) @ whole - problem.upper
    excess, push = start, torch.zeros_like(start)  # of x over its bounds; the multipliers in units of x
    for _ in range(GUESSING_STEPS):
        push = (push + excess).clamp_min(0)
        excess = torch.baddbmm(start, push - push.mean(1, keepdim=True), steps, alpha=-1)
    return _next_sides(problem, excess + problem.upper, push)


def active_set_round(problem: Problem, side: Tensor, factors: Factors, fixed: bool) -> tuple[Tensor, Tensor]:
    """Solve with the entries of `side` held at their bounds: x, and the sides to try next."""
    held = problem.upper * (side > 0)  # a lower bound that can hold an entry is 0
    moved, nu = solve_free(factors, problem.descent(held), -held.sum(1))
    x = held + moved
    slope = problem.descent(x) - nu
    if fixed or not problem.rows_sum_to_zero or (slope * factors.free).abs().max() > UNREFINED:
        x, slope = refine(problem, factors, x)
    return x, _next_sides(problem, x, slope * (1 - factors.free))


def _next_sides(problem: Problem, x: Tensor, multiplier: Tensor) -> Tensor:
    """Hold what has left its bounds (multiplier 0) or is pushed outwards, let go the rest.

    Where the rows sum to 0, the least firmly held entry of a row that would have none free is let go as well.
    """
    pushed = x + multiplier
    firmness = pushed - problem.upper
    if problem.rows_sum_to_zero:
        return (firmness > firmness.amin(1, keepdim=True).clamp_min(0)).double()
    pinned = problem.lower == problem.upper
    return ((firmness > 0) | pinned).double() - ((pushed < problem.lower) & ~pinned).double()


def refine(problem: Problem, factors: Factors, x: Tensor) -> tuple[Tensor, Tensor]:
    """Iterative refinement of the free entries; returns x and the negative gradient minus the rows' multipliers.

    Products with an inverse are not backward stable: a kernel with one large eigenvalue, as that of all-positive
    embeddings, would give multipliers of the wrong sign. For a singular box problem these are proximal steps.
    """
    for _ in range(1 if problem.rows_sum_to_zero else 2):
        change, nu = solve_free(factors, problem.descent(x), -x.sum(1))
        x = x + change
    return x, problem.descent(x) - nu


# --- interior point ------------------------------------------------------------------------------------------------


class Barrier(NamedTuple):
    """An interior iterate, whose rows sum to 0: multipliers of bounds that are not there stay 0."""

    x: Tensor  # (tasks, blocks, n)
    nu: Tensor  # (tasks, 1, n), multipliers of the row sums
    above: Tensor  # (tasks, blocks, n), multipliers of the upper bounds
    below: Tensor  # (tasks, blocks, n), of the lower

    def plus(self, step: Tensor, direction: "Barrier") -> "Barrier":
        return Barrier(*(old + step * change for old, change in zip(self, direction, strict=True)))

    def sides(self, problem: Problem) -> Tensor:
        """Which bounds look active: multiplier against slack, each in units of its largest."""
        net = (self.above - self.below) / _size(problem.linear)
        return _next_sides(problem, self.x, net * _size(self.x))


class Slacks(NamedTuple):
    """Room of an iterate to its bounds; 1 where there is no bound or no room by definition."""

    upper: Tensor
    lower: Tensor
    has_upper: Tensor  # 1 or 0
    has_lower: Tensor

    def gap(self, point: Barrier, x: Tensor | float = 0.0) -> Tensor:
        """Mean product of slack and multiplier after the slacks have moved by x, (tasks, 1, 1)."""
        products = (self.upper - x) * point.above * self.has_upper + (self.lower + x) * point.below * self.has_lower
        bounds = (self.has_upper + self.has_lower).sum((1, 2), keepdim=True)
        return products.sum((1, 2), keepdim=True) / bounds.clamp_min(1)


def start_inside(problem: Problem) -> Barrier:
    force = _size(problem.linear).expand_as(problem.linear)
    below = force.where(problem.lower.isfinite(), 0)
    inside = problem.upper / 2  # strictly, but for entries with lower = upper
    if problem.rows_sum_to_zero:
        inside = inside - (inside.sum(1, keepdim=True) - inside) / max(inside.shape[1] - 1, 1)
    return Barrier(inside, torch.zeros_like(problem.linear[:, :1]), force, below)


def slacks(problem: Problem, x: Tensor) -> Slacks:
    has_upper = problem.lower < problem.upper
    has_lower = has_upper & problem.lower.isfinite()
    upper = (problem.upper - x).where(has_upper, 1)
    lower = (x - problem.lower).where(has_lower, 1)
    return Slacks(upper, lower, has_upper.double(), has_lower.double())


def barrier_step(problem: Problem, point: Barrier) -> Barrier:
    """One predictor-corrector step (Mehrotra 1992); a task that is done, or whose step is not finite, stays."""
    room = slacks(problem, point.x)
    factors = factorise(problem, room.has_upper, point.above / room.upper + point.below / room.lower)
    gap = room.gap(point)
    guess = newton_direction(problem, point, room, factors, 0.0, 0.0)
    reached = point.plus(longest_step(point, room, guess), guess)
    centring = (room.gap(reached, reached.x - point.x) / gap).clamp(0, 1) ** 3 * gap
    direction = newton_direction(
        problem, point, room, factors, centring + guess.x * guess.above, centring - guess.x * guess.below
    )
    after = point.plus(0.995 * longest_step(point, room, direction), direction)
    moves = (gap > CENTRED * _size(problem.linear) * _size(point.x)) & torch.stack(
        [t.isfinite().all(2, keepdim=True).all(1, keepdim=True) for t in (after.x, after.above, after.below)]
    ).all(0)
    return Barrier(*(new.where(moves, old) for new, old in zip(after, point, strict=True)))


def newton_direction(
    problem: Problem, point: Barrier, room: Slacks, factors: Factors, above: Tensor | float, below: Tensor | float
) -> Barrier:
    """Newton's step towards slack * multiplier = `above` and `below`, and a vanishing gradient of the Lagrangian."""
    slope = problem.descent(point.x) - point.nu
    below = below * room.has_lower
    x, nu = solve_free(factors, (slope - above / room.upper + below / room.lower) * room.has_upper, 0.0)
    new_above = (above + point.above * x) / room.upper
    new_below = (below - point.below * x) / room.lower
    return Barrier(x, nu, (new_above - point.above) * room.has_upper, (new_below - point.below) * room.has_lower)


def longest_step(point: Barrier, room: Slacks, direction: Barrier) -> Tensor:
    """The part of a step, at most 1, that keeps slacks and multipliers positive, (tasks, 1, 1)."""
    used = torch.stack(
        [
            direction.x / room.upper * room.has_upper,
            -direction.x / room.lower * room.has_lower,
            (-direction.above / point.above).where(room.has_upper > 0, 0),
            (-direction.below / point.below).where(room.has_lower > 0, 0),
        ]
    )
    return 1 / used.amax((0, 2, 3)).clamp_min(1).view(-1, 1, 1)
