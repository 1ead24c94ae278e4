"""What must hold for any task, any method of the inner loop and any head, on tasks that hypothesis draws.

Everything is float64. Two results are the same if they differ by rounding only, see `assert_same`.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from classification_heads import HEADS, ClassificationHead
from data import Episodes
from few_shot_learning_system import MAMLFewShotClassifier
from inner_loop_optimizers import RULES, GradientDescent
from learner import cross_entropy
from tests.test_few_shot_learning_system import TINY
from utils.errors import UserError
from utils.image_cache import open_split
from utils.options import Options

# What is drawn is small already; to look for something smaller would take minutes.
some = settings(max_examples=10, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
few = settings(some, max_examples=3)

pytestmark = pytest.mark.usefixtures("no_coverage")  # the same lines for every rule and head

WAY, SHOT, QUERY, SIDE = 4, 2, 3, 8  # the way is not steps + 1, so that shapes tell what holds one value per class
SMALL = TINY | {"image_height": SIDE, "image_width": SIDE, "num_classes_per_set": WAY}
NETWORKS: tuple[dict[str, Any], ...] = (
    {},
    {"backbone": "ResNet-12", "resnet_widths": "3-4"},
    {"per_step_bn_statistics": True, "second_order": False},
    {"enable_inner_loop_optimizable_bn_params": True, "use_multi_step_loss_optimization": True},
)
seeds = st.integers(0, 2**31 - 1)


def assert_same(found: Tensor, expected: Tensor, name: str = "") -> None:
    """Fail unless the tensors differ by at most 1e-9 of the largest entry."""
    assert found.shape == expected.shape, name
    bound = 1e-9 * expected.abs().max().item() + 1e-12
    assert (found - expected).abs().max().item() <= bound, name


# --- methods of the inner loop -------------------------------------------------------------------------------------


def combinations() -> Iterator[dict[str, Any]]:
    """Yield the options of all combinations of rules that go together; a rule that is registered takes part."""
    Options()  # which imports the rules
    flags = [rule.flag for rule in RULES.values() if hasattr(rule, "flag")]
    for chosen, part in itertools.product(itertools.product((False, True), repeat=len(flags)), ("all", "head", "body")):
        options = dict(zip(flags, chosen, strict=True)) | {"inner_loop_part": part}
        for more in ({}, {"random_init": True}) if options["alfa"] else ({},):
            try:
                Options.from_mapping(SMALL | options | more)
            except UserError:
                continue
            yield options | more


METHODS = list(combinations())


def methods_with(rule: str) -> st.SearchStrategy[dict[str, Any]]:
    """Return options of a small learner: a combination that has the rule, and a network where they go together."""
    chosen: Callable[[Options], bool] = (
        RULES[rule].chosen if rule in RULES else lambda options: not any(r.chosen(options) for r in RULES.values())
    )
    fitting = [method for method in METHODS if chosen(Options.from_mapping(SMALL | method))]
    return st.builds(lambda method, network: SMALL | method | network, *map(st.sampled_from, (fitting, NETWORKS)))


every_rule = pytest.mark.parametrize("rule", [GradientDescent.__name__, *RULES])


def learner(options: dict[str, Any], seed: int = 0) -> MAMLFewShotClassifier:
    """Return a learner none of whose learned values equals another, as after some training."""
    model = MAMLFewShotClassifier((2, 3, SIDE, SIDE), "cpu", Options.from_mapping(options)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_(0.8 + 0.4 * noise).add_(0.01 * noise)
    return model


def batch(tasks: int, seed: int) -> list[Tensor]:
    """Return images and labels (tasks, way, images, ...) of the support and the query of some tasks."""
    generator = torch.Generator().manual_seed(seed)
    x = [torch.rand(tasks, WAY, n, 3, SIDE, SIDE, generator=generator, dtype=torch.float64) for n in (SHOT, QUERY)]
    y = [torch.arange(WAY).view(1, WAY, 1).repeat(tasks, 1, n) for n in (SHOT, QUERY)]
    return [*x, *y]


def trained_on(model: MAMLFewShotClassifier, tasks: Sequence[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return the outer gradients of a copy of the learner and its query logits."""
    model = copy.deepcopy(model)
    _, logits = model.run_train_iter(tasks, 0)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, logits


@every_rule
@few
@given(data=st.data(), seed=seeds)
def test_outer_gradients_do_not_depend_on_passes_ranks_or_the_order_of_tasks(
    rule: str, data: st.DataObject, seed: int
) -> None:
    """Each rank has an equal share of the tasks, and the gradients are the mean over ranks."""
    model, tasks = learner(data.draw(methods_with(rule)), seed), batch(4, seed)
    model.options.tasks_per_pass = 4
    expected, logits = trained_on(model, tasks)
    assert expected and all(gradient.isfinite().all() for gradient in expected.values())

    model.options.tasks_per_pass = data.draw(st.integers(1, 3), "tasks per pass")
    ranks = data.draw(st.sampled_from((1, 2, 4)), "ranks")
    shares = [trained_on(model, share)[0] for share in zip(*(part.chunk(ranks) for part in tasks), strict=True)]
    order = data.draw(st.permutations(range(4)), "order of tasks")
    in_order, logits_in_order = trained_on(model, [part[order] for part in tasks])
    for name, gradient in expected.items():
        assert_same(torch.stack([share[name] for share in shares]).mean(0), gradient, name)
        assert_same(in_order[name], gradient, name)
    assert_same(torch.stack(logits_in_order), torch.stack(logits)[order])


@few
@given(per_step=st.booleans(), tasks_per_pass=st.integers(1, 3), seed=seeds)
def test_running_statistics_do_not_depend_on_passes(per_step: bool, tasks_per_pass: int, seed: int) -> None:
    """They do depend on the order of tasks, the last of which weighs most in a moving average."""
    found = []
    for size in (4, tasks_per_pass):
        kind = {"per_step_bn_statistics": True} if per_step else {"batch_norm": "running"}
        model = learner(SMALL | kind | {"tasks_per_pass": size}, seed)
        model.run_train_iter(batch(4, seed), 0)
        found.append(dict(model.named_buffers()))
    assert len(found[0]) == 4
    for name, statistics in found[0].items():
        assert_same(found[1][name], statistics, name)


def with_permuted_classes(model: MAMLFewShotClassifier, order: Sequence[int]) -> MAMLFewShotClassifier:
    """Return a copy in which class k has the rows of class order[k], in all that holds one value per class.

    That is the linear classifier and, for Meta-SGD and for ALFA from a random network, the rates of its weights.
    """
    model = copy.deepcopy(model)
    shapes = {tensor.shape for tensor in model.classifier.layer_dict["linear"].parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "linear" in name and parameter.shape in shapes:
                parameter.copy_(parameter[list(order)])
    return model


@every_rule
@few
@given(data=st.data(), seed=seeds)
def test_permuting_the_classes_permutes_the_logits_once_the_learned_rows_are_permuted_too(
    rule: str, data: st.DataObject, seed: int
) -> None:
    """It holds for every method, in training and evaluation, and in any order of the images.

    Without the rows it holds for none of them: the classifier's learned initialisation tells the classes apart.
    """
    model = learner(data.draw(methods_with(rule)), seed)
    order = data.draw(st.permutations(range(WAY)).filter(lambda drawn: drawn != sorted(drawn)), "order of classes")
    x_support, x_query, y_support, y_query = tasks = batch(2, seed)
    places = torch.argsort(torch.tensor(order))  # class order[k] is called k now
    renamed = [x_support, x_query, places[y_support], places[y_query]]
    shuffled = data.draw(st.permutations(range(WAY * SHOT)), "order of support images")
    for i in (0, 2):
        renamed[i] = renamed[i].flatten(1, 2)[:, shuffled].unflatten(1, (WAY, SHOT))
    permuted = with_permuted_classes(model, order)
    for score in (MAMLFewShotClassifier.run_validation_iter, lambda m, t: copy.deepcopy(m).run_train_iter(t, 0)):
        losses, expected = score(model, tasks)
        renamed_losses, logits = score(permuted, renamed)
        assert_same(torch.stack(logits), torch.stack(expected)[:, :, order])
        assert_same(renamed_losses["loss"], losses["loss"])
        assert (torch.stack(score(model, renamed)[1]) - torch.stack(logits)).abs().max() > 1e-6


@every_rule
@few
@given(data=st.data(), seed=seeds)
def test_a_support_that_is_there_twice_changes_nothing(rule: str, data: st.DataObject, seed: int) -> None:
    """The support loss is a mean, and batch norm divides by the number of images."""
    model, tasks = learner(data.draw(methods_with(rule)), seed), batch(2, seed)
    twice = [tasks[0].repeat(1, 1, 2, 1, 1, 1), tasks[1], tasks[2].repeat(1, 1, 2), tasks[3]]
    expected, found = (trained_on(model, one) for one in (tasks, twice))
    assert_same(torch.stack(found[1]), torch.stack(expected[1]))
    for name, gradient in expected[0].items():
        assert_same(found[0][name], gradient, name)


# --- heads ---------------------------------------------------------------------------------------------------------

every_head = pytest.mark.parametrize("name", HEADS)


def episode(seed: int, shots: Sequence[int], tasks: int = 3, dim: int = 30) -> tuple[Tensor, Tensor, Tensor]:
    """Return query (tasks, n, dim), support and labels 0, 1, ... of classes with so many shots."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(shots)).repeat_interleave(torch.tensor(shots)).repeat(tasks, 1)
    centres = torch.randn(tasks, len(shots), dim, generator=generator, dtype=torch.float64)
    noise = torch.randn(tasks, labels.shape[1], dim, generator=generator, dtype=torch.float64)
    support = centres.gather(1, labels.unsqueeze(2).expand(-1, -1, dim)) + noise
    query = torch.randn(tasks, 5, dim, generator=generator, dtype=torch.float64)
    return query, support, labels


shots = st.lists(st.integers(1, 4), min_size=2, max_size=4)


@every_head
@some
@given(data=st.data(), seed=seeds, shots=shots)
def test_a_heads_logits_follow_the_classes_not_their_ids_or_the_order_of_the_support(
    name: str, data: st.DataObject, seed: int, shots: list[int]
) -> None:
    """Column k is the task's k-th smallest id. A head has no initialisation, so this holds as it is."""
    (query, support, labels), way = episode(seed, shots), len(shots)
    different = st.lists(st.integers(-(10**12), 10**12), min_size=way, max_size=way, unique=True)
    ids = torch.tensor([data.draw(different, "ids") for _ in labels])  # (tasks, way)
    rows = data.draw(st.permutations(range(sum(shots))), "order of the support")
    head = ClassificationHead(name)
    renamed = head(query, support[:, rows], ids.gather(1, labels)[:, rows], way, 0)
    columns = ids.argsort(1).unsqueeze(1).expand_as(renamed)
    assert_same(renamed, head(query, support, labels, way, 0).gather(2, columns))


@every_head
@some
@given(cut=st.integers(1, 2), seed=seeds, shots=shots)
def test_a_heads_logits_and_gradients_do_not_depend_on_the_cut_into_passes_or_ranks(
    name: str, cut: int, seed: int, shots: list[int]
) -> None:
    """These are gradients by embeddings. An embedding's own depend on it: its batch norm sees all images of a pass."""
    *embedded, labels = episode(seed, shots)
    found = []
    for sizes in ([3], [cut, 3 - cut]):
        head = ClassificationHead(name).double()
        inputs = [part.clone().requires_grad_() for part in embedded]
        parts = zip(*(part.split(sizes) for part in (*inputs, labels)), strict=True)
        logits = torch.cat([head(query, support, y, len(shots), 0) for query, support, y in parts])
        cross_entropy(logits, torch.zeros(logits.shape[:2], dtype=torch.long)).mean().backward()
        found.append([logits.detach(), *(tensor.grad for tensor in (*inputs, head.scale))])
    for tensor, expected in zip(*reversed(found), strict=True):
        assert_same(tensor, expected)


# A head's options, and those that keep losses and regularisation in balance where each point is there twice.
BALANCED: dict[str, tuple[dict[str, float], dict[str, float]]] = {
    "ProtoNet": ({}, {}),
    **dict.fromkeys(("R2D2", "Ridge"), ({"lambda_reg": 2.0}, {"lambda_reg": 4.0})),
    **dict.fromkeys(("SVM-He", "SVM-WW"), ({"C_reg": 0.1}, {"C_reg": 0.05})),
}


@pytest.mark.parametrize("name", BALANCED)
@some
@given(seed=seeds, shots=shots)
def test_a_support_that_is_there_twice_weighs_twice_in_a_heads_loss(name: str, seed: int, shots: list[int]) -> None:
    """So ProtoNet's means stay, and other heads give the same logits once their regularisation is doubled too.

    Not so SVM-CS: MetaOptNet adds the identity to its kernel, one more regularisation, which has no option.
    """
    query, support, labels = episode(seed, shots)
    head, way, (once, twice) = ClassificationHead(name), len(shots), BALANCED[name]
    doubled = head(query, support.repeat(1, 2, 1), labels.repeat(1, 2), way, 0, **twice)
    assert_same(doubled, head(query, support, labels, way, 0, **once))


# --- images --------------------------------------------------------------------------------------------------------


def normalised(folder: Path, pixels: np.ndarray) -> list[Tensor]:
    """Return a task of images (classes, images, H, W, C), written to files, by the statistics of their channels."""
    for k, images in enumerate(pixels):
        (folder / "TOYS" / "train" / f"class_{k}").mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image).save(folder / "TOYS" / "train" / f"class_{k}" / f"{i}.png")
    split = open_split(folder, "TOYS", "train", (3, SIDE, SIDE), workers=1)
    device = torch.device("cpu")
    episodes = Episodes(split, 3, 2, 2, 0, split.mean, split.std, device, torch.float64)
    return list(episodes.batch(0, 2))


@some
@given(channel=st.integers(0, 2), factor=st.integers(1, 3), shift=st.integers(0, 63), seed=seeds)
def test_scaling_and_shifting_a_channel_leaves_channel_normalised_images_alone(
    tmp_path_factory: pytest.TempPathFactory, channel: int, factor: int, shift: int, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 64, (3, 4, SIDE, SIDE, 3), dtype=np.uint8)
    other = pixels.copy()
    other[..., channel] = factor * other[..., channel] + shift  # at most 252
    found, expected = (normalised(tmp_path_factory.mktemp("images"), images) for images in (other, pixels))
    for tensor, before in zip(found, expected, strict=True):
        assert_same(tensor, before)
