"""MetaOptNet's command lines, files and protocol, end to end on a tiny data set."""

import csv
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import head_learning_system
import test as test_entry
from augmentation import augment, crop_padding, draw
from data import Episodes, base_seed, training_episodes
from head_learning_system import HeadFewShotClassifier
from tests.forked import run_forked
from tests.test_experiment_builder import train_without_a_report
from train_maml_system import main
from utils import checkpoints
from utils.errors import UserError
from utils.image_cache import open_split
from utils.metaoptnet import published_statistics
from utils.options import Options, parse_args
from utils.synthetic import write_dataset


def test_a_training_line_of_metaoptnet_means_here_what_it_means_there() -> None:
    line = (
        "--gpu 0,1,2,3 --save-path ./experiments/mini --num-epoch 40 --save-epoch 5 --train-shot 15 --val-shot 5 "
        "--train-query 6 --val-query 15 --val-episode 1000 --train-way 6 --test-way 5 --network ResNet --head SVM "
        "--dataset miniImageNet --episodes-per-batch 4 --eps 0.1"
    )
    options = parse_args(line.split())
    assert (options.learner, options.head, options.backbone) == ("head", "SVM-CS", "ResNet-12")
    assert (options.training_task, options.evaluation_task) == ((6, 15, 6), (5, 5, 15))
    assert (options.total_epochs, options.save_epoch, options.batch_size) == (40, 5, 4)
    assert (options.num_evaluation_tasks, options.label_smoothing) == (1000, 0.1)
    assert (options.save_path, options.gpu, options.dataset_name) == ("./experiments/mini", "0,1,2,3", "miniImageNet")
    assert (options.image_shape, options.normalization, options.augment) == ((3, 84, 84), "published", True)


def test_naming_a_head_brings_metaoptnets_defaults_and_those_of_the_data_set() -> None:
    options = parse_args(["--head", "Ridge", "--dataset", "CIFAR_FS", "--train-shot", "5"])
    assert options.learner == "head" and options.batch_norm != Options().batch_norm
    assert options.image_height < parse_args(["--head", "Ridge", "--dataset", "miniImageNet"]).image_height
    assert options.training_task[1] == 5 != parse_args(["--head", "Ridge"]).training_task[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--head Rigde", "it is one of ProtoNet, R2D2, Ridge"),
        ("--head Ridge --svm_solver qpth", "--svm_solver has no effect with --head Ridge; it needs --head SVM-CS"),
        (
            "--head SVM --svm_max_iter 3",
            "--svm_max_iter has no effect with --svm_solver structured; it needs --svm_solver qpth",
        ),
        ("--head SVM --eps 0.9", r"with 5 ways it is from 0 to 0\.8"),
        ("--learner head --alfa true", "--alfa has no effect with --learner head"),
        ("--eps 0.1", "--label_smoothing has no effect with --learner gradient"),
        ("--learner head --backbone 4-CONV", "with --learner head it is one of ResNet-12, conv64, R2D2Net"),
        ("--backbone conv64", "with --learner gradient it is one of 4-CONV, ResNet-12"),
        ("--learner gradient --head Ridge", "tested with a --head, not trained with one"),
        ("--test_way 10", "classifies 5 ways with a linear layer, so it cannot be tested with 10"),
        (
            "--learner head --dataset CUB --normalization published",
            "no pixel statistics of CUB in 3 channels are published",
        ),
        ("--test_shots 1,five", "it takes numbers such as 1,5"),
        ("--head Ridge --avg_pool true", "--avg_pool has no effect with --backbone conv64"),
        (
            "--head Ridge --svm_on_failure skip",
            "no effect with --head Ridge; it needs --head SVM-CS or SVM-He or SVM-WW",
        ),
        ("--head Ridge --network ResNet --resnet_widths 2-3-4", "it takes four numbers"),
        ("--learner head --head None", "--learner head needs a --head"),
        ("--head SVM --train-way 1", "--num_classes_per_set is 1; it must be from 2 to"),
        ("--head Ridge --dataset CIFAR_FS --image_channels 1", "in 1 channels are published"),
        ("--test_datasets CUB,", "it takes different names"),
        ("--test_datasets CIFAR-FS,CIFAR_FS", "it takes different names"),
        ("--save_epoch -1", "it must be at least 0"),
        ("--head SVM --batch_norm transductive", "with --learner head it is one of running"),
    ],
)
def test_contradictions_are_named(line: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_args(line.split())


def test_published_statistics_are_fractions_of_one() -> None:
    mean, std = published_statistics("CIFAR-FS") or ((), ())
    assert len(mean) == len(std) == 3 and all(0 < value < 1 for value in (*mean, *std))
    assert published_statistics("glyphs") is None


# --- end to end ----------------------------------------------------------------------------------------------------

TINY = (
    "--dataset toy --image_height 16 --image_width 16 --normalization channel --train-way 3 --test-way 4 "
    "--train-shot 2 --val-shot 2 --train-query 2 --val-query 2 --val-episode 3 --episodes-per-batch 2 "
    "--total_iter_per_epoch 2 --head SVM --network ProtoNet --gpu cpu"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "toy", 5, 8, (16, 16))
    write_dataset(folder / "OTHER", 5, 8, (12, 12), seed=1)
    return folder


def line(data: Path, folder: Path, *more: str) -> list[str]:
    return [*TINY.split(), "--dataset_dir", str(data), "--save-path", str(folder), *more]


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    main(
        line(data, folder, "--num-epoch", "4", "--save-epoch", "2", "--max_models_to_save", "1", "--top_n_models", "1")
    )
    return folder


def test_checkpoints_have_metaoptnets_names_and_every_nth_epoch_is_kept(finished: Path) -> None:
    best = checkpoints.load(finished / "best_model.pth")["history"][-1]["epoch"]
    kept = {f"epoch_{epoch}.pth" for epoch in {2, 4, int(best)}}
    assert {path.name for path in finished.glob("*.pth")} == {"best_model.pth", "last_epoch.pth"} | kept
    assert {"embedding", "head", "optimizer", "options"} <= checkpoints.load(finished / "last_epoch.pth").keys()
    with (finished / "logs" / "summary_statistics.csv").open() as file:
        assert [row["unsolved"] for row in csv.DictReader(file)] == ["0"] * 4


def test_a_run_that_is_continued_ends_with_the_same_weights(data: Path, finished: Path, tmp_path: Path) -> None:
    more = ["--save-epoch", "2", "--max_models_to_save", "1", "--top_n_models", "1"]
    main(line(data, tmp_path, "--num-epoch", "2", *more))
    main(line(data, tmp_path, "--num-epoch", "4", *more))
    one, other = (checkpoints.load(folder / "last_epoch.pth") for folder in (finished, tmp_path))
    torch.testing.assert_close(one["embedding"], other["embedding"], rtol=0, atol=0)
    assert [row["val_accuracy"] for row in one["history"]] == [row["val_accuracy"] for row in other["history"]]


def test_shots_and_data_sets_are_scored_at_once_with_a_table_and_a_picture(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(line(data, finished, "--evaluate_on_test_set_only", "true", "--max_models_to_save", "1", "--top_n_models", "1",
              "--test_shots", "1,3", "--test_datasets", "toy,OTHER", "--num-epoch", "4"))  # fmt: skip
    results = json.loads((finished / "logs" / "test_summary.json").read_text())
    asked = {(row["dataset"], row["shot"]) for row in results if row["model"] == "single best"}
    assert {(name, shot) for name in ("toy", "OTHER") for shot in (1, 3)} <= asked
    assert all(row["way"] == 4 and row["head"] == "SVM-CS structured" and row["steps"] is None for row in results)
    with (finished / "logs" / "cross_domain.csv").open() as file:
        table = {row["model"]: row for row in csv.DictReader(file)}
    single = next(row for row in results if (row["dataset"], row["shot"], row["model"]) == ("OTHER", 3, "single best"))
    assert table["3-shot, single best"]["OTHER"].startswith(f"{100 * single['accuracy']:.2f} ± ")
    assert (finished / "visual_outputs" / "cross_domain.png").read_bytes().startswith(b"\x89PNG")
    assert "3-shot, ensemble" in capsys.readouterr().out


def test_a_test_line_of_metaoptnet_scores_an_official_file(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("qpth", reason="no qpth here; it needs numpy < 2")
    options = Options.from_mapping({"learner": "head", "head": "SVM", "dataset_name": "FC100"})
    model = HeadFewShotClassifier((1, 3, 32, 32), "cpu", options)
    weights = {f"module.{name}": tensor for name, tensor in model.embedding.state_dict().items()}
    torch.save({"embedding": weights, "head": model.head.state_dict()}, tmp_path / "best_model.pth")
    write_dataset(tmp_path / "FC100", 5, 8, (32, 32))
    load = ["--load", str(tmp_path / "best_model.pth"), "--gpu", "cpu", "--dataset_dir", str(tmp_path)]
    protocol = ["--episode", "3", "--way", "5", "--shot", "1", "--query", "4", "--network", "ProtoNet"]
    test_entry.main([*load, *protocol, "--head", "SVM", "--dataset", "FC100"])
    test_entry.main(
        [*load, *protocol, "--head", "SVM", "--dataset", "FC100", "--svm_solver", "qpth", "--svm_max_iter", "3"]
    )
    exact, stopped = json.loads((tmp_path / "logs" / "test_summary.json").read_text())
    assert (exact["head"], stopped["head"]) == ("SVM-CS structured", "SVM-CS qpth 3")
    assert (exact["way"], exact["shot"], exact["query"], exact["normalization"]) == (5, 1, 4, "published")
    assert exact["loss"] != stopped["loss"]
    with pytest.raises(UserError, match="does not say which head"):
        test_entry.main([*load, "--dataset", "FC100"])
    with pytest.raises(UserError, match="does not say what it was trained on"):
        test_entry.main([*load, "--head", "SVM"])
    with pytest.raises(UserError, match="is not what was trained, which is conv64"):
        test_entry.main([*load, *protocol[:-1], "ResNet", "--head", "SVM", "--dataset", "FC100"])


def test_the_solver_of_training_is_kept_when_its_iterations_are_limited(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    pytest.importorskip("qpth", reason="no qpth here; it needs numpy < 2")
    state = checkpoints.load(finished / "best_model.pth")
    checkpoints.save(state | {"options": state["options"] | {"svm_solver": "qpth"}}, tmp_path / "best_model.pth")
    load = ["--load", str(tmp_path / "best_model.pth"), "--gpu", "cpu", "--dataset_dir", str(data), "--query", "1"]
    test_entry.main([*load, "--episode", "2", "--svm_max_iter", "3"])
    test_entry.main([*load, "--episode", "2", "--head", "Ridge"])
    test_entry.main([*load, "--episode", "2", "--svm_solver", "structured", "--C_reg", "0.5"])
    heads = [row["head"] for row in json.loads((tmp_path / "logs" / "test_summary.json").read_text())]
    assert heads == ["SVM-CS qpth 3", "Ridge", "SVM-CS structured C_reg=0.5"]


def test_our_own_file_is_scored_with_another_head_way_and_shot(data: Path, finished: Path) -> None:
    test_entry.main(["--load", str(finished / "best_model.pth"), "--gpu", "cpu", "--dataset_dir", str(data),
                     "--head", "ProtoNet", "--way", "5", "--shot", "4", "--query", "1", "--episode", "5"])  # fmt: skip
    (row,) = [row for row in json.loads((finished / "logs" / "test_summary.json").read_text()) if row["episodes"] == 5]
    assert (row["head"], row["way"], row["shot"], row["query"]) == ("ProtoNet", 5, 4, 1)


def test_two_processes_average_their_gradients_and_running_statistics(data: Path, tmp_path: Path) -> None:
    """Each normalises by its own share of the batch, as replicas do; after an update they are one model."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = line(data, tmp_path, "--num-epoch", "1", "--total_iter_per_epoch", "1", "--augment", "false")
    done = run_forked([sys.executable, *launcher, str(train_without_a_report(tmp_path)), *words])
    assert done.returncode == 0, done.stderr
    options = parse_args(words)
    shape = (2, *options.image_shape)
    split = open_split(data, "toy", "train", options.image_shape)
    batch = Episodes(split, *options.training_task, 0, split.mean, split.std, torch.device("cpu")).batch(0, 2)
    halves = [HeadFewShotClassifier(shape, "cpu", options) for _ in range(2)]
    for rank, model in enumerate(halves):
        losses = model.query_losses(model._to_device([part[rank : rank + 1] for part in batch])).losses
        losses.mean().backward()
    ours, other = halves
    for one, two in zip(ours.parameters(), other.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        one.grad.add_(two.grad).div_(2)
    ours.optimizer.step()
    saved = checkpoints.load(tmp_path / "last_epoch.pth")["embedding"]
    for name, tensor in ours.embedding.state_dict().items():
        expected = (tensor + other.embedding.state_dict()[name]) / 2 if "running" in name else tensor
        torch.testing.assert_close(saved[name], expected, rtol=1e-4, atol=1e-6, msg=name)


# --- what the network draws ----------------------------------------------------------------------------------------


def r2d2(data: Path, folder: Path, *more: str) -> dict[str, torch.Tensor]:
    """The embedding after a tiny run of a network with dropout."""
    words = line(data, folder, "--network", "R2D2", "--num-epoch", "2", *more)
    main(words)
    return checkpoints.load(folder / "last_epoch.pth")["embedding"]


def test_dropout_is_a_function_of_seed_and_iteration_also_in_a_run_that_is_continued(
    data: Path, tmp_path: Path
) -> None:
    whole = r2d2(data, tmp_path / "whole")
    torch.rand(17)  # whatever else was drawn before
    r2d2(data, tmp_path / "parts", "--num-epoch", "1")
    torch.rand(5)
    torch.testing.assert_close(r2d2(data, tmp_path / "parts"), whole, rtol=0, atol=0)


def test_training_images_are_augmented_support_and_query_each_by_their_own_draws(data: Path) -> None:
    options = parse_args(line(data, data))
    split = open_split(data, "toy", "train", options.image_shape)
    normalization = (split.mean, split.std)
    device = torch.device("cpu")
    augmented = training_episodes(split, options, device, normalization).batch(0, 2)
    plain = training_episodes(split, dataclasses.replace(options, augment=False), device, normalization).batch(0, 2)
    rows = training_episodes(split, options, device, normalization).indices(0)
    for part, images, untouched in zip(("support", "query"), augmented[:2], plain[:2], strict=True):
        assert not torch.equal(images, untouched), part
    draws = draw([base_seed(options.train_seed, "train")], rows.size, 4)
    first_query = 2  # rows are way-major, support before query
    pixels = torch.from_numpy(split.images[rows.ravel()[first_query : first_query + 1]])
    expected = augment(pixels, draws.take(np.array([first_query])), 4, torch.from_numpy) / 255
    expected = (expected - torch.tensor(split.mean).view(-1, 1, 1)) / torch.tensor(split.std).view(-1, 1, 1)
    torch.testing.assert_close(augmented.x_target[0, 0, 0], expected[0], rtol=1e-4, atol=1e-4)


def test_crops_are_padded_as_metaoptnet_pads_them() -> None:
    for dataset, pixels in {"FC100": 4, "miniImageNet": 8}.items():
        assert crop_padding(parse_args(["--head", "Ridge", "--dataset", dataset]).image_height) == pixels


def test_an_svm_that_is_not_solved_stops_training_with_the_iteration(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_learning_system, "UNSOLVED", -1.0)  # no solution is that good
    with pytest.raises(UserError, match=r"the SVM-CS was not solved at iteration 0 \(training tasks 0 to"):
        main(line(data, tmp_path, "--num-epoch", "1"))
    main(line(data, tmp_path / "skip", "--num-epoch", "1", "--svm_on_failure", "skip"))
    assert checkpoints.load(tmp_path / "skip" / "last_epoch.pth")["history"][0]["unsolved"] == 4


@pytest.mark.parametrize("solver", ["structured", "qpth"])
def test_embeddings_that_grow_without_bound_are_named_not_thrown(solver: str, data: Path, tmp_path: Path) -> None:
    if solver == "qpth":
        pytest.importorskip("qpth", reason="no qpth here; it needs numpy < 2")
    words = line(data, tmp_path, "--num-epoch", "9", "--meta_learning_rate", "1e8", "--svm_solver", solver)
    with pytest.raises(UserError, match=r"was not solved|an embedding is|are not finite"):
        main(words)


def test_another_data_set_in_the_same_folder_is_another_run(data: Path, finished: Path) -> None:
    words = line(data, finished, "--num-epoch", "9", "--dataset", "OTHER")
    with pytest.raises(UserError, match="--dataset_name is OTHER, but the run was started with toy"):
        main(words)
    with pytest.raises(UserError, match="--backbone is R2D2Net, but the run was started with conv64"):
        main(line(data, finished, "--num-epoch", "9", "--network", "R2D2"))
