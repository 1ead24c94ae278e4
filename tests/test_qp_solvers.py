"""The structured solver against independent ones, in hard cases, and its gradients."""

import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import qp_solvers
from classification_heads import HEADS, Episode, one_hot_of_ranks
from qp_solvers import (
    Problem,
    Solution,
    active_set,
    box,
    crammer_singer,
    kkt_residual,
    solve,
    solve_crammer_singer_qpth,
)
from utils.errors import UserError

DOUBLE = torch.float64


def problem(
    seed: int, way: int = 3, shots: int = 3, dim: int = 5, noise: float = 1.0, common: float = 0.0, tasks: int = 2
) -> tuple[Tensor, Tensor]:
    """Kernel and one-hot labels of random supports; `common` is added to every coordinate."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(way).repeat(shots)
    centres = torch.randn(tasks, way, dim, generator=generator, dtype=DOUBLE)
    spread = torch.randn(tasks, way * shots, dim, generator=generator, dtype=DOUBLE)
    support = centres[:, labels] + noise * spread + common
    return support @ support.mT, torch.nn.functional.one_hot(labels, way).double().expand(tasks, -1, -1)


def solve_crammer_singer(kernel: Tensor, one_hot: Tensor, C_reg: float = 0.1) -> Solution:
    """With x (tasks, n, way) as in the papers."""
    solution = solve(crammer_singer(kernel, one_hot, C_reg))
    return solution._replace(x=solution.x.mT)


def by_clarabel(hessian: np.ndarray, linear: np.ndarray, rows: list[tuple[str, np.ndarray, np.ndarray]]) -> np.ndarray:
    """Minimise 1/2 x'Hx - linear'x under rows (kind, matrix, right side) of equalities and of <=."""
    clarabel = pytest.importorskip("clarabel")
    sparse = pytest.importorskip("scipy.sparse")
    options = clarabel.DefaultSettings()
    options.verbose = False
    options.tol_gap_abs = options.tol_gap_rel = options.tol_feas = 1e-12
    cones = [{"=": clarabel.ZeroConeT, "<": clarabel.NonnegativeConeT}[kind](len(right)) for kind, _, right in rows]
    matrix, right = np.concatenate([m for _, m, _ in rows]), np.concatenate([r for _, _, r in rows])
    upper = sparse.csc_matrix(np.triu(hessian))
    solver = clarabel.DefaultSolver(upper, -linear, sparse.csc_matrix(matrix), right, cones, options)
    found = solver.solve()
    assume(found.status == clarabel.SolverStatus.Solved)  # it may stop early where entries are large
    return np.array(found.x)


def crammer_singer_by_clarabel(kernel: Tensor, one_hot: Tensor, c: float) -> np.ndarray:
    n, way = one_hot.shape
    hessian = np.kron(kernel.numpy() + np.eye(n), np.eye(way))
    target = one_hot.numpy().ravel().astype(float)
    sums = np.kron(np.eye(n), np.ones((1, way)))
    rows = [("=", sums, np.zeros(n)), ("<", np.eye(n * way), c * target)]
    return by_clarabel(hessian, target, rows).reshape(n, way)


def objective(kernel: Tensor, one_hot: Tensor, dual: np.ndarray) -> float:
    return float(0.5 * np.sum(dual * ((kernel.numpy() + np.eye(len(dual))) @ dual)) - np.sum(dual * one_hot.numpy()))


# --- Crammer-Singer ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    way=st.integers(2, 6),
    shots=st.integers(1, 4),
    dim=st.sampled_from([1, 2, 4, 20]),
    noise=st.sampled_from([0.0, 0.01, 1.0, 5.0]),  # 0: every support point of a class is the same
    common=st.sampled_from([0.0, 1.0, 50.0]),
    c=st.sampled_from([1e-3, 0.1, 10.0]),
)
def test_structured_solver_agrees_with_clarabel(
    seed: int, way: int, shots: int, dim: int, noise: float, common: float, c: float
) -> None:
    kernel, one_hot = problem(seed, way, shots, dim, noise, common, tasks=1)
    solution = solve_crammer_singer(kernel, one_hot, c)
    ours, theirs = solution.x[0].numpy(), crammer_singer_by_clarabel(kernel[0], one_hot[0], c)
    assert solution.residual[0] < 1e-10
    # the objective is 1-strongly convex: a point whose value is e above the least is within sqrt(2e) of the solution
    worse = objective(kernel[0], one_hot[0], theirs) - objective(kernel[0], one_hot[0], ours)
    assert worse > -1e-9
    assert np.abs(ours - theirs).max() < 1e-7 + np.sqrt(2 * max(worse, 0)) + 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_kernels_of_any_size_are_solved(scale: float) -> None:
    kernel, one_hot = problem(1, way=5, shots=5, dim=40)
    assert solve_crammer_singer(scale * kernel, one_hot).residual.max() < 1e-10


@pytest.mark.parametrize(("way", "shots"), [(2, 1), (5, 1), (20, 1), (5, 15), (20, 3)])
def test_sizes_of_published_episodes_are_solved(way: int, shots: int) -> None:
    kernel, one_hot = problem(2, way, shots, dim=64, noise=0.5)
    assert solve_crammer_singer(kernel, one_hot).residual.max() < 1e-12


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers the host has read each time."""
    read: list[int] = []
    look = qp_solvers.look

    def counted(*values: Tensor) -> list[float]:
        read.append(len(values))
        return look(*values)

    monkeypatch.setattr(qp_solvers, "look", counted)
    return read


def test_first_guess_saves_rounds(looks: list[int]) -> None:
    kernel, one_hot = problem(12, way=5, shots=5, dim=200, noise=0.5)
    task = crammer_singer(kernel, one_hot, 0.1)
    guessed = active_set(task)[0].x
    rounds = looks.count(3)
    blind = active_set(task, torch.zeros_like(task.linear))[0].x
    assert rounds < looks.count(3) - rounds - 1
    torch.testing.assert_close(guessed, blind, rtol=1e-10, atol=1e-14)


def test_problems_that_cycle_are_solved_from_the_inside(looks: list[int]) -> None:
    kernel, one_hot = problem(0, way=7, shots=3, dim=2, noise=3.0, tasks=200)
    solution = solve_crammer_singer(kernel, one_hot, C_reg=0.0034)
    assert looks.count(3) > 12, "no task needed the interior point: choose a harder problem"
    assert solution.residual.max() < 1e-10


def test_a_task_alone_is_solved_as_in_a_batch() -> None:
    kernel, one_hot = problem(4, way=5, shots=3, tasks=5)
    together = solve_crammer_singer(kernel, one_hot).x
    alone = torch.cat([solve_crammer_singer(k[None], y[None]).x for k, y in zip(kernel, one_hot, strict=True)])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-16)


def test_unequal_shots_and_duplicated_supports_satisfy_the_optimality_conditions() -> None:
    kernel, _ = problem(5, way=3, shots=3, tasks=1)
    one_hot = torch.nn.functional.one_hot(torch.tensor([[0, 1, 1, 1, 1, 1, 1, 2, 2]])).double()
    order = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    solution = solve_crammer_singer(kernel[:, order][:, :, order], one_hot)
    descent = one_hot - (kernel[:, order][:, :, order] + torch.eye(9, dtype=DOUBLE)) @ solution.x
    multipliers = descent - descent.amin(2, keepdim=True)
    room = 0.1 * one_hot - solution.x
    assert solution.x.sum(2).abs().max() < 1e-14
    assert room.min() > -1e-14
    assert (multipliers * room).abs().max() < 1e-13


@pytest.mark.parametrize("common", [0.0, 20.0])
def test_gradient_is_that_of_central_differences(common: float) -> None:
    kernel, one_hot = problem(6, way=3, shots=2, common=common, tasks=1)

    def dual(square_root: Tensor) -> Tensor:
        return solve_crammer_singer(square_root @ square_root.mT, one_hot).x

    root = torch.linalg.cholesky(kernel + 1e-3 * torch.eye(6, dtype=DOUBLE))
    torch.autograd.gradcheck(dual, (root.requires_grad_(),), eps=1e-6, atol=1e-7, rtol=1e-4)


def test_kernels_that_are_not_finite_have_an_infinite_residual_and_no_gradient() -> None:
    kernel, one_hot = problem(7, tasks=4)
    good = solve_crammer_singer(kernel, one_hot).x
    kernel[1], kernel[2, 0, 0] = torch.nan, torch.inf
    leaf = kernel.clone().requires_grad_()
    solution = solve_crammer_singer(leaf, one_hot)
    (gradient,) = torch.autograd.grad(solution.x.sum(), leaf)
    assert solution.residual.isinf().tolist() == [False, True, True, False]
    assert (solution.x[1:3] == 0).all()
    assert (gradient[1:3] == 0).all()
    torch.testing.assert_close(solution.x[::3], good[::3], rtol=1e-9, atol=1e-13)


class Kernels(TorchDispatchMode):
    """Counts what a GPU would launch, about: views and allocations are free. Values must be read through `look`."""

    FREE = ("view", "transpose", "unsqueeze", "squeeze", "slice", "select", "expand", "diagonal", "detach", "empty")

    def __init__(self) -> None:
        super().__init__()
        self.count, self.looking = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.removeprefix("_unsafe_").removeprefix("new_")
        assert self.looking or name not in ("_local_scalar_dense", "item", "nonzero", "equal"), f"{name} outside look"
        self.count += not name.startswith(self.FREE)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("head", ["SVM-CS", "SVM-He", "SVM-WW"])
@pytest.mark.parametrize("shots", [1, 5, 15])
def test_a_batch_costs_a_gpu_few_kernels_and_waits(head: str, shots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(shots)
    centres = 0.3 * torch.randn(2, 5, 640, generator=generator)
    query, support = (
        (centres.repeat(1, n, 1) + 0.6 * torch.randn(2, 5 * n, 640, generator=generator)).relu().requires_grad_()
        for n in (6, shots)
    )
    kernels, waits, look = Kernels(), [], qp_solvers.look
    one_hot = one_hot_of_ranks(torch.arange(5).repeat(2, shots), 5)

    def looking(*values: Tensor) -> list[float]:
        waits.append(len(values))
        kernels.looking = True
        found = look(*values)
        kernels.looking = False
        return found

    monkeypatch.setattr(qp_solvers, "look", looking)
    with kernels:
        scores = HEADS[head](Episode(query, support, one_hot))
        scores.logits.square().sum().backward()
    assert scores.residual.max() < 1e-9
    assert kernels.count <= 400
    assert len(waits) <= 5


def test_residual_tells_wrong_points_from_the_solution() -> None:
    kernel, one_hot = problem(9)
    task: Problem = crammer_singer(kernel, one_hot, 0.1)
    solution: Solution = solve_crammer_singer(kernel, one_hot)
    assert kkt_residual(task, solution.x.mT).max() < 1e-12
    assert kkt_residual(task, solution.x.mT * 1.001).min() > 1e-4
    assert kkt_residual(task, solution.x.mT + 1e-5).min() > 1e-5
    assert kkt_residual(task, torch.full_like(task.linear, torch.nan)).isinf().all()
    alone = crammer_singer(0 * kernel, one_hot, 10.0)  # no point meets another, no bound is reached
    assert kkt_residual(alone, alone.linear - 1 / 3).max() < 1e-12
    assert kkt_residual(alone, alone.linear - 1 / 3 + 1e-5).min() > 1e-5, "only the rows' sums are wrong"


# --- box -----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 20),
    rank=st.integers(1, 20),
    size=st.sampled_from([1e-4, 1.0, 1e3]),
)
def test_box_problems_agree_with_clarabel(seed: int, n: int, rank: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(1, n, rank, generator=generator, dtype=DOUBLE)
    hessian = size * factor @ factor.mT  # singular where rank < n
    upper = torch.rand(1, n, generator=generator, dtype=DOUBLE) * (torch.arange(n) % 4 > 0)  # some may not move
    solution = solve(box(hessian, 1.0, upper))
    eye = np.eye(n)
    rows = [("<", eye, upper[0].numpy()), ("<", -eye, np.zeros(n))]
    theirs = by_clarabel(hessian[0].numpy(), np.ones(n), rows)
    assert solution.residual[0] < 1e-9
    product = hessian[0].numpy() @ solution.x[0, 0].numpy()  # unique even where x is not
    np.testing.assert_allclose(product, hessian[0].numpy() @ theirs, atol=1e-5 * max(1.0, float(product.max())))


def test_box_gradient_is_that_of_central_differences() -> None:
    root = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    upper = torch.full((1, 6), 0.5, dtype=DOUBLE)

    def dual(root: Tensor) -> Tensor:
        return solve(box(root @ root.mT, 1.0, upper)).x

    assert 0 < (dual(root) % 0.5 != 0).sum() < 6, "the bounds should matter"
    torch.autograd.gradcheck(dual, (root.requires_grad_(),), eps=1e-6, atol=1e-7, rtol=1e-4)


# --- qpth ----------------------------------------------------------------------------------------------------------


def test_qpth_in_float64_agrees_with_the_structured_solver() -> None:
    pytest.importorskip("qpth", reason="no qpth here; it needs numpy < 2")
    kernel, one_hot = problem(10, way=4, shots=3, dim=30)
    theirs = solve_crammer_singer_qpth(kernel, one_hot, double=True)
    assert theirs.residual.max() < 1e-5
    torch.testing.assert_close(theirs.x.mT, solve_crammer_singer(kernel, one_hot).x, rtol=0, atol=1e-6)


def test_missing_qpth_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qpth.qp", None)
    monkeypatch.setitem(sys.modules, "qpth", None)
    with pytest.raises(UserError, match=r"numpy < 2 and so Python 3\.12 or older\. .*qpth==0\.0\.18.*structured"):
        solve_crammer_singer_qpth(*problem(11))


@pytest.mark.parametrize("C_reg", [0.01, 1.0])
def test_large_kernels_of_few_dimensions_are_solved(C_reg: float) -> None:
    """Entries up to 1e7, 24 points in 8 dimensions: with 12 steps of the interior point, up to 34 of these 64 fail."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(64, 24, 8, generator=generator) + 2 * torch.randn(1, 1, 8, generator=generator)
    points = 300 * points.double()
    one_hot = torch.nn.functional.one_hot(torch.arange(6).repeat(4)).double().expand(64, -1, -1)
    solution = solve_crammer_singer(points @ points.mT, one_hot, C_reg)
    assert solution.residual.max() < 1e-6
