"""Heads against the recorded and exact arrays, and what must hold for any episode."""

import importlib.util

import pytest
import torch
from torch import Tensor

from classification_heads import HEADS, ClassificationHead, one_hot_of_ranks
from qp_solvers import crammer_singer, solve
from tests.golden_metaoptnet import CASES, EXACT, QPTH, Golden
from utils.errors import UserError

WAY = 3
VARIANTS = [(head, suffix, case) for head, suffixes in EXACT.items() for suffix in suffixes for case in CASES]
needs_qpth = pytest.mark.skipif(
    importlib.util.find_spec("qpth") is None,
    reason="no qpth here; it needs numpy < 2",
)


def episode(
    shots: tuple[int, ...] = (2, 2, 2), tasks: int = 2, dim: int = 7, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, support and labels 0, 1, ... with so many shots; classes well apart."""
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(tasks, len(shots), dim, generator=generator, dtype=torch.float64)
    labels = torch.arange(len(shots)).repeat_interleave(torch.tensor(shots)).repeat(tasks, 1)
    noise = torch.randn(tasks, labels.shape[1], dim, generator=generator, dtype=torch.float64)
    support = centres.gather(1, labels.unsqueeze(2).expand(-1, -1, dim)) + 0.3 * noise
    query = centres + 0.1 * torch.randn(centres.shape, generator=generator, dtype=torch.float64)
    return query.to(dtype), support.to(dtype), labels


# --- recorded arrays -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "suffix", "case"), VARIANTS)
def test_float32_embeddings_give_the_exact_arrays(head: str, suffix: str, case: str) -> None:
    errors = Golden(head, case).errors(suffix, torch.float32, **EXACT[head][suffix])
    tolerance = {"logits": 1e-6, "grad_query": 1e-6, "grad_support": 2e-6, "grad_scale": 5e-6}
    assert {"logits", "grad_query", "grad_support"} <= errors.keys()
    assert all(error < tolerance[name] for name, error in errors.items()), errors


@pytest.mark.parametrize(("head", "suffix", "case"), [v for v in VARIANTS if v[1].endswith("exact")])
def test_float64_embeddings_give_the_exact_arrays(head: str, suffix: str, case: str) -> None:
    errors = Golden(head, case).errors(suffix, torch.float64, **EXACT[head][suffix])
    assert all(error < 1e-9 for error in errors.values()), errors


@pytest.mark.parametrize("case", CASES)
def test_duals_are_the_exact_ones(case: str) -> None:
    assert Golden("SVM-CS", case).dual_error("exact", torch.float32) < 1e-7
    assert Golden("SVM-CS", case).dual_error("exact", torch.float64) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_recorded_programs_agree_within_their_own_accuracy(case: str) -> None:
    errors = Golden("SVM-CS", case).errors("f64_it15", torch.float32)
    assert errors["logits"] < 1e-6
    assert errors["grad_query"] < 1e-6
    assert errors["grad_support"] < 1e-3
    assert Golden("SVM-CS", case).errors("f32_it15", torch.float32)["logits"] < 1e-3
    assert Golden("SVM-WW", case).errors("nocheck_f64", torch.float32)["logits"] < 1e-6
    ridge = Golden("Ridge", case).errors("default", torch.float32)
    assert max(ridge["logits"], ridge["grad_query"]) < 2e-6


@needs_qpth
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("suffix", QPTH)
def test_qpth_is_called_as_the_paper_did(suffix: str, case: str) -> None:
    double, passes = QPTH[suffix]
    options = {"solver": "qpth", "max_iter": passes, "double_precision": double}
    errors = Golden("SVM-CS", case).errors(suffix, torch.float32, **options)
    early = {"logits": 5e-5, "grad_query": 5e-5, "grad_support": 2e-4}  # float32 stopped after 3 passes
    late = {"logits": 1e-3, "grad_query": 1e-3}  # its converged support gradients are noise
    exact = {"logits": 1e-6, "grad_query": 1e-6, "grad_support": 1e-5}
    tolerance = exact if double else early if passes == 3 else late
    assert all(errors[name] < bound for name, bound in tolerance.items()), errors


@needs_qpth
def test_qpth_stopped_early_says_so_in_its_residual_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    head, data = ClassificationHead("SVM"), episode(shots=(5, 5, 5))
    residuals = [head.solve_and_score(*data, WAY, 5, solver="qpth", max_iter=n).residual.max() for n in (3, 15)]
    assert residuals[0] > 0.1 and residuals[1] < 0.01  # how far qpth gets in 15 steps depends on the processor
    assert capfd.readouterr() == ("", "")


def test_ridge_is_twice_r2d2() -> None:
    data = episode()
    logits = [ClassificationHead(name)(*data, WAY, 2, lambda_reg=2.0) for name in ("Ridge", "R2D2")]
    torch.testing.assert_close(logits[0], 2 * logits[1])


@pytest.mark.parametrize("name", ["Ridge", "R2D2"])
def test_the_residual_is_large_where_lambda_is_lost_in_rounding(name: str) -> None:
    query, support, labels = episode(tasks=2)
    support[1] = 1e9 * support[1, :1]  # all points are the same one
    residual = ClassificationHead(name).solve_and_score(query, support, labels, WAY, 2).residual
    assert residual[0] < 1e-12 and not residual[1] < 1e-3


# --- any episode ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_queries_are_given_to_their_class_with_unequal_shots(name: str) -> None:
    shots = (2, 2, 2) if name == "SVM-He" else (1, 4, 2)  # He's logits are sums over a class's own support points
    options = {"C_reg": 0.1} if name == "SVM-WW" else {}  # so are WW's while all its duals sit on their bounds
    logits = ClassificationHead(name)(*episode(shots, tasks=4, dim=30), WAY, 2, **options)
    assert (logits.argmax(2) == torch.arange(WAY)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_half_precision_embeddings_give_float32_logits_of_the_same_numbers(name: str, dtype: torch.dtype) -> None:
    query, support, labels = episode(dtype=dtype)
    support.requires_grad_()
    head = ClassificationHead(name)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(query, support, labels, WAY, 2)
    (gradient,) = torch.autograd.grad(logits.sum(), support)
    assert (logits.dtype, gradient.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(logits, head(query.float(), support.float(), labels, WAY, 2))


@pytest.mark.parametrize("name", HEADS)
def test_gradients_are_those_of_central_differences(name: str) -> None:
    query, support, labels = episode(shots=(2, 1, 1), tasks=1)
    options = {"C_reg": 0.02} if name == "SVM-WW" else {}  # at the default all its duals sit on a bound
    head = ClassificationHead(name)
    inputs = (query.requires_grad_(), (2 * support).requires_grad_())
    torch.autograd.gradcheck(lambda q, s: head(q, s, labels, WAY, 2, **options), inputs, atol=1e-6, rtol=1e-4)


def test_a_large_common_component_costs_float32_embeddings_no_accuracy() -> None:
    query, support, labels = episode(shots=(5, 5, 5), dim=600, dtype=torch.float32)
    common = 8 * torch.rand(600, generator=torch.Generator().manual_seed(1))  # a kernel entry of 13 000
    query, support = query + common, support + common
    logits = ClassificationHead()(query, support, labels, WAY, 5)
    exact = ClassificationHead()(query.double(), support.double(), labels, WAY, 5)
    assert (logits - exact).abs().max() < 2e-6 * exact.abs().max()


def test_residual_is_reported_and_a_lost_task_spoils_no_other() -> None:
    query, support, labels = episode()
    clean = ClassificationHead().solve_and_score(query, support, labels, WAY, 2)
    assert clean.residual.max() < 1e-12
    broken = support.clone()
    broken[0, 0, 0] = torch.nan
    broken.requires_grad_()
    scores = ClassificationHead().solve_and_score(query, broken, labels, WAY, 2)
    (gradient,) = torch.autograd.grad(scores.logits[1].sum(), broken)
    assert scores.residual[0] == torch.inf
    assert torch.equal(scores.logits[1], clean.logits[1])
    assert gradient[1].isfinite().all()


def test_scale_multiplies_the_logits_and_can_be_fixed() -> None:
    head, plain = ClassificationHead("Ridge"), ClassificationHead("Ridge", enable_scale=False)
    assert {n: t.shape for n, t in head.state_dict().items()} == {"scale": (1,)}
    head.load_state_dict({"scale": torch.tensor([3.0])})
    torch.testing.assert_close(head(*episode(), WAY, 2), 3 * plain(*episode(), WAY, 2))
    assert head.scale.requires_grad
    assert not plain.scale.requires_grad


def test_training_step_of_every_head_is_finite_in_float32() -> None:
    query, support, labels = episode(dtype=torch.float32)
    for name in HEADS:
        head = ClassificationHead(name)
        head(query, support, labels, WAY, 2).square().mean().backward()
        assert head.scale.grad is not None
        assert head.scale.grad.isfinite().all()


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_unknown_names_and_options_are_named() -> None:
    data = episode()
    with pytest.raises(UserError, match=r"no head 'Rigde'.*Ridge"):
        ClassificationHead("Rigde")
    with pytest.raises(UserError, match=r"lamda_reg.*lambda_reg"):
        ClassificationHead("Ridge")(*data, WAY, 2, lamda_reg=1.0)
    with pytest.raises(UserError, match="no solver 'cvx'"):
        ClassificationHead("SVM")(*data, WAY, 2, solver="cvx")
    with pytest.raises(UserError, match="--svm_solver qpth"):
        ClassificationHead("SVM")(*data, WAY, 2, max_iter=3)


def test_options_of_other_heads_and_none_are_left_alone() -> None:
    data, head = episode(), ClassificationHead("Ridge")
    assert torch.equal(head(*data, WAY, 2, solver="qpth", C_reg=3.0, lambda_reg=None), head(*data, WAY, 2))


@pytest.mark.parametrize("way", [2, 4])
def test_a_wrong_number_of_classes_is_an_error(way: int) -> None:
    with pytest.raises(UserError, match=rf"n_way is {way}.*\[3\] classes"):
        ClassificationHead()(*episode(), way, 2)


def test_shapes_that_do_not_fit_are_an_error() -> None:
    query, support, labels = episode()
    for wrong in ((query[0], support, labels), (query, support[:1], labels), (query, support, labels[:, :2])):
        with pytest.raises(UserError, match="do not fit together"):
            ClassificationHead()(*wrong, WAY, 2)
    with pytest.raises(UserError, match="float type"):
        ClassificationHead()(query.long(), support, labels, WAY, 2)


def test_ranks_count_distinct_ids() -> None:
    ranks = one_hot_of_ranks(torch.tensor([[9, 9, 2, 5], [1, 0, 0, 7]]), 3).argmax(2)
    assert ranks.tolist() == [[2, 2, 0, 1], [1, 0, 0, 2]]


def test_rows_of_the_dual_sum_to_zero_and_give_the_logits() -> None:
    query, support, labels = episode()
    dual = solve(crammer_singer(support @ support.mT, one_hot_of_ranks(labels, WAY), 0.1)).x.mT
    assert dual.sum(2).abs().max() < 1e-15
    torch.testing.assert_close(query @ support.mT @ dual, ClassificationHead()(query, support, labels, WAY, 2))


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.bool])
def test_class_ids_may_be_of_any_integer_type(kind: torch.dtype) -> None:
    labels = torch.tensor([[1, 0, 0, 1]])
    query, support = torch.randn(1, 3, 5), torch.randn(1, 4, 5)
    head = ClassificationHead("SVM-CS")
    assert torch.equal(head(query, support, labels.to(kind), 2, 2), head(query, support, labels, 2, 2))


def test_a_task_whose_kernel_has_no_factor_is_lost_alone() -> None:
    torch.manual_seed(0)
    query, support = torch.randn(2, 3, 5), torch.randn(2, 4, 5)
    support[1] = support[1, :1] * 1e9
    labels = torch.tensor([[0, 1, 0, 1]] * 2)
    head = ClassificationHead("SVM-CS")
    logits, residual = head.solve_and_score(query, support, labels, 2, 2)
    alone = head(query[:1], support[:1], labels[:1], 2, 2)
    torch.testing.assert_close(logits[:1], alone)
    assert residual[0] < 1e-9 < residual[1]
