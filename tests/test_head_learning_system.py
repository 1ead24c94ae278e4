"""The head learner: its updates, its checkpoints, and what happens where a head is not solved."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import head_learning_system
from few_shot_learning_system import MAMLFewShotClassifier, build_learner
from head_learning_system import HeadFewShotClassifier
from learner import cross_entropy
from meta_neural_network_architectures import Pass
from tests.golden import facts, load
from utils import metaoptnet
from utils.errors import UserError
from utils.options import Options

SHAPE = (2, 3, 16, 16)
SMALL: dict[str, Any] = {
    "learner": "head",
    "head": "Ridge",
    "image_height": 16,
    "image_width": 16,
    "num_classes_per_set": 3,
    "num_samples_per_class": 2,
    "num_target_samples": 2,
    "val_shot": 2,
    "val_query": 2,
    "normalization": "unit",
}


def learner(**changes: Any) -> HeadFewShotClassifier:
    return HeadFewShotClassifier(SHAPE, "cpu", Options.from_mapping(SMALL | changes))


def batch(way: int = 3, shot: int = 2, query: int = 2, seed: int = 0, tasks: int = 2, side: int = 16) -> list[Tensor]:
    """Tasks of images whose colour tells the class."""
    generator = torch.Generator().manual_seed(seed)
    colour = torch.rand(tasks, way, 1, 3, 1, 1, generator=generator)
    x = [colour + 0.3 * torch.randn(tasks, way, n, 3, side, side, generator=generator) for n in (shot, query)]
    y = [torch.arange(way)[:, None].repeat(tasks, 1, n) for n in (shot, query)]
    return [*x, *y]


def parameters_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("head", ["ProtoNet", "Ridge", "R2D2", "SVM-CS", "SVM-He", "SVM-WW"])
def test_training_lowers_the_loss_with_every_head(head: str) -> None:
    model = learner(head=head, meta_learning_rate=0.01)
    losses = [model.run_train_iter(batch(), 0)[0]["loss"].item() for _ in range(15)]
    assert np.mean(losses[-3:]) < np.mean(losses[:3])


@pytest.mark.parametrize("backbone", ["conv64", "R2D2Net", "ResNet-12"])
def test_every_backbone_trains_and_scores(backbone: str) -> None:
    changes = {"image_height": 32, "image_width": 32, "backbone": backbone}
    changes |= {"resnet_widths": "2-3-4-5"} if backbone == "ResNet-12" else {}
    model = HeadFewShotClassifier((2, 3, 32, 32), "cpu", Options.from_mapping(SMALL | changes))
    losses, _ = model.run_train_iter(batch(side=32), 0)
    scores, logits = model.run_validation_iter(batch(side=32))
    assert losses["loss"].isfinite() and scores["loss"].isfinite()
    assert [task.shape for task in logits] == [(6, 3), (6, 3)]


def test_one_update_is_nesterov_momentum_with_decay_of_every_parameter() -> None:
    model = learner(meta_learning_rate=0.1, outer_weight_decay=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.run_train_iter(batch(), 0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        step = parameter.grad + 0.01 * before[name]  # momentum starts as the gradient itself
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * (step + 0.9 * step), msg=name)


def test_support_and_query_images_are_two_batches_of_batch_norm() -> None:
    model = learner()
    model.run_train_iter(batch(), 0)
    assert model.embedding.get_buffer("encoder.0.block.1.num_batches_tracked").item() == 2


def test_validation_changes_nothing_and_does_not_depend_on_the_other_tasks() -> None:
    model = learner()
    model.run_train_iter(batch(), 0)
    before = parameters_of(model)
    together = torch.stack(model.run_validation_iter(batch(tasks=3))[1])
    alone = torch.stack(model.run_validation_iter([part[1:2] for part in batch(tasks=3)])[1])
    torch.testing.assert_close(together[1:2], alone)
    for name, tensor in parameters_of(model).items():
        assert torch.equal(tensor, before[name]), name


def test_a_model_trained_on_three_ways_is_scored_on_five() -> None:
    model = learner(test_way=5, val_shot=1, val_query=3)
    model.run_train_iter(batch(), 0)
    _, logits = model.run_validation_iter(batch(way=5, shot=1, query=3))
    assert logits[0].shape == (15, 5)
    with pytest.raises(UserError, match="5 ways"):
        model.run_validation_iter(batch(way=3))


def test_weights_survive_a_checkpoint_in_the_official_layout(tmp_path: Path) -> None:
    model, other = learner(), learner(seed=7)
    model.run_train_iter(batch(), 0)
    model.save_model(tmp_path / "best_model.pth", {})
    state = other.load_checkpoint(tmp_path / "best_model.pth")
    assert {"embedding", "head"} <= state.keys() and set(state["head"]) == {"scale"}
    for own, loaded in zip(parameters_of(model).items(), parameters_of(other).items(), strict=True):
        assert own[0] == loaded[0] and torch.equal(own[1], loaded[1])
    for one in (model, other):
        one.run_train_iter(batch(seed=1), 0)
    torch.testing.assert_close(parameters_of(other), parameters_of(model), rtol=0, atol=0)


def official_weights(backbone: str) -> dict[str, Tensor]:
    """Some weights with the names, shapes and types of the official program's."""
    listed = facts("state_dicts")
    network = {"conv64": "ProtoNetEmbedding", "R2D2Net": "R2D2Embedding", "ResNet-12": "ResNet12"}[backbone]
    return {name: torch.rand(shape).to(getattr(torch, dtype)) for name, shape, dtype in listed[network]["state_dict"]}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("backbone", ["conv64", "R2D2Net", "ResNet-12"])
def test_official_checkpoints_load_with_and_without_prefix(backbone: str, prefix: str, tmp_path: Path) -> None:
    given = official_weights(backbone)
    file = tmp_path / "best_model.pth"
    weights = {prefix + name: tensor for name, tensor in given.items()}
    torch.save({"embedding": weights, "head": {"scale": torch.tensor([2.5])}}, file)
    options = Options.from_mapping({"learner": "head", "head": "SVM", "dataset_name": "FC100", "backbone": backbone})
    model = HeadFewShotClassifier((1, 3, 32, 32), "cpu", options)
    model.load_checkpoint(file, with_optimizer=False)
    assert model.head.scale.item() == 2.5
    for name, tensor in given.items():
        assert torch.equal(model.embedding.state_dict()[name], tensor), name


def test_checkpoints_of_the_other_kind_of_learner_are_refused(tmp_path: Path) -> None:
    heads, steps = learner(), MAMLFewShotClassifier((1, 3, 20, 20), "cpu", SimpleNamespace(cnn_num_filters=2))
    heads.save_model(tmp_path / "heads", {})
    steps.save_model(tmp_path / "steps", {})
    before = parameters_of(heads)
    with pytest.raises(UserError, match="trained with --learner head"):
        steps.load_checkpoint(tmp_path / "heads")
    with pytest.raises(UserError, match="trained by gradient steps"):
        heads.load_checkpoint(tmp_path / "steps")
    torch.testing.assert_close(parameters_of(heads), before)


def unsolved_second_task(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    logits, _ = SOLVE(*arguments, **options)
    return logits, torch.tensor([0.0, 1.0])


SOLVE = head_learning_system.ClassificationHead.solve_and_score


@pytest.mark.parametrize(("on_failure", "tasks"), [("error", [0]), ("skip", [0]), ("use", [0, 1])])
def test_a_task_that_was_not_solved_is_left_out_unless_it_is_to_be_used(
    on_failure: str, tasks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = learner(head="SVM-CS")
    tasks_seen = expected._to_device(batch(), 3)
    losses = expected.query_losses(tasks_seen).losses
    losses[tasks].mean().backward()
    monkeypatch.setattr(
        head_learning_system.ClassificationHead, "solve_and_score", lambda *a, **k: unsolved_second_task(*a, **k)
    )
    model = learner(head="SVM-CS", svm_on_failure=on_failure)
    report, _ = model.run_train_iter(batch(), 0)
    assert report["unsolved"].item() == 1
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    report, _ = model.run_validation_iter(batch())
    counts = {name: report[name].item() for name in model.counts}
    if on_failure == "error":
        with pytest.raises(UserError, match=r"SVM-CS of 2 tasks was not solved"):
            model.check_scores(counts)
    else:
        model.check_scores(counts)
    model.check_scores({"unsolved": 0})


@pytest.mark.parametrize("head", ["SVM-CS", "Ridge", "ProtoNet"])
def test_the_cure_of_an_unsolved_task_names_only_options_that_the_head_has(head: str) -> None:
    model = learner(head=head)
    veto = model.veto({name: [1.0, 1.0] for name in model.checked} | {"solver": [0.0, math.inf]})
    assert veto is not None and veto.task == 1 and head in veto.problem and "--meta_learning_rate" in veto.cure
    assert ("--svm_on_failure" in veto.cure) == (head == "SVM-CS")


def test_embeddings_that_are_no_numbers_do_not_pass_as_an_unsolved_task() -> None:
    model = learner(head="SVM-CS", svm_on_failure="skip")
    x_support, *rest = batch()
    x_support[0, 0, 0] = float("nan")
    report, _ = model.run_train_iter([x_support, *rest], 0)
    assert not report["loss"].isfinite()


def test_loss_and_gradient_are_the_recorded_ones() -> None:
    arrays = load("metaoptnet", "loss_lr")
    for eps in (0.0, 0.1, 0.2):
        logits = torch.tensor(arrays["logits"], requires_grad=True)
        loss = cross_entropy(logits, torch.tensor(arrays["labels"]), eps).mean()
        loss.backward()
        assert loss.item() == pytest.approx(float(arrays[f"loss_eps{eps}"]), rel=1e-6)
        expected = torch.tensor(arrays[f"grad_eps{eps}"])
        assert logits.grad is not None
        assert (logits.grad - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_learning_rates_are_the_recorded_ones_and_the_proper_ones_come_an_epoch_later() -> None:
    recorded = load("metaoptnet", "loss_lr")["lr_per_epoch_1_to_60"]
    official = [metaoptnet.learning_rate(0.1, epoch, official=True) for epoch in range(60)]
    np.testing.assert_allclose(official, recorded, rtol=1e-6)
    proper = [metaoptnet.learning_rate(0.1, epoch, official=False) for epoch in range(60)]
    assert proper == [0.1, *official[:-1]]
    model = learner(lr_schedule="steps")
    model.run_train_iter(batch(), 20)
    assert model.learning_rate == pytest.approx(0.006)


def test_bfloat16_changes_the_arithmetic_but_not_the_type_of_the_result() -> None:
    exact, rounded = (learner(precision=precision) for precision in ("float32", "bf16"))
    one, other = (torch.stack(model.run_validation_iter(batch())[1]) for model in (exact, rounded))
    assert other.dtype == torch.float32
    difference = (one - other).abs().max() / one.abs().max()
    assert 1e-5 < difference < 0.1


def test_double_precision_runs_throughout() -> None:
    model = learner(head="SVM-CS").double()
    images = [part.double() if part.is_floating_point() else part for part in batch()]
    losses, logits = model.run_train_iter(images, 0)
    assert losses["loss"].dtype == logits[0].dtype == torch.float64


def test_a_head_sits_on_the_body_of_a_gradient_trained_network(tmp_path: Path) -> None:
    small = {"image_height": 16, "image_width": 16, "cnn_num_filters": 4, "num_classes_per_set": 3,
             "num_samples_per_class": 2, "num_target_samples": 2}  # fmt: skip
    trained = MAMLFewShotClassifier(SHAPE, "cpu", Options.from_mapping(small))
    trained.save_model(tmp_path / "best", {})
    options = Options.from_mapping(small | {"head": "Ridge", "test_way": 5, "evaluate_on_test_set_only": True})
    model = build_learner("cpu", options)
    assert isinstance(model, HeadFewShotClassifier)
    model.load_checkpoint(tmp_path / "best", with_optimizer=False)
    x_support, x_query, y_support, y_query = batch(way=5)
    _, logits = model.run_validation_iter([x_support, x_query, y_support, y_query])
    features = [
        torch.cat([trained.classifier.features(task.flatten(0, 1).unsqueeze(0), Pass()) for task in x])
        for x in (x_support, x_query)
    ]
    gram = features[0] @ features[0].mT + 50 * torch.eye(10)
    dual = torch.linalg.solve(gram, torch.nn.functional.one_hot(y_support.flatten(1), 5).float())
    torch.testing.assert_close(torch.stack(logits), 2 * features[1] @ features[0].mT @ dual, rtol=1e-4, atol=1e-5)


def test_predict_is_evaluation_whatever_came_after_adapt() -> None:
    model = learner(head="Ridge", backbone="ResNet-12", resnet_widths="2-3-4-5", dropblock_schedule="training")
    x_support, x_query, y_support, _ = (part.flatten(1, 2) for part in batch())
    state = model.adapt(x_support, y_support)
    expected = model.predict(state, x_query)
    model.train()
    torch.testing.assert_close(model.predict(state, x_query), expected)
    assert not model.training


def test_every_tensor_of_a_head_on_a_body_is_where_the_learner_is() -> None:
    options = Options.from_mapping({"head": "Ridge", "evaluate_on_test_set_only": True, "num_stages": 2})
    model = build_learner("meta", options)
    found = [tensor for module in vars(model)["_modules"].values() for tensor in module.state_dict().values()]
    assert model.get_parameter("head.scale").device.type == "meta"
    assert {tensor.device.type for tensor in found} == {"meta"}


def test_predictions_by_a_head_that_was_not_solved_are_not_numbers() -> None:
    model, images = learner(), batch()
    images[0][1] = images[0][1][:1, :1]  # one image for all classes, far from the origin: lambda is lost in rounding
    model.embedding.register_forward_hook(lambda module, inputs, features: features * 1e18)
    tasks = model._to_device(images)
    logits = model.predict(model.adapt(tasks.x_support, tasks.y_support), tasks.x_query)
    assert logits[0].isfinite().all() and logits[1].isnan().all()
