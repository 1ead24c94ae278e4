"""The predictor answers as the evaluation does, for any classes, and says what it cannot do."""

from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from data import evaluation_episodes, open_dataset
from few_shot_learning_system import build_learner
from predictor import LEFT_OUT, Estimate, Predictor
from tests.made_models import CXGRAD, best, train, write_classes
from utils import checkpoints
from utils.errors import UserError
from utils.images import list_classes, list_images
from utils.options import Options


@pytest.fixture(params=["cxgrad", "ridge"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


def labelled(folder: Path) -> tuple[list[Path], list[str]]:
    files = list_images(folder)
    return files, [file.parent.name for file in files]


def images_of(folder: Path, *sizes: int, seed: int = 5) -> tuple[list[Path], list[str]]:
    return labelled(write_classes(folder, *sizes, seed=seed))


def test_answers_are_those_of_the_evaluation_on_the_same_images(checkpoint: Path) -> None:
    """Sizes, channels, normalisation and adaptation are thus those of training."""
    state = checkpoints.load(checkpoint)
    options = Options.from_mapping(state["options"], saved=True)
    split = open_dataset(options, "colours", "test")
    episodes = evaluation_episodes(split, options, torch.device("cpu"), state["normalization"])
    model = build_learner("cpu", options)
    model.load_state(state, checkpoint, with_optimizer=False)
    _, (logits,) = model.run_validation_iter(episodes.batch(0, 1))

    listing = list_classes(Path(options.dataset_dir) / "colours" / "test")
    files = np.array([listing.root / file for file in listing.files])[episodes.indices(0)]  # (way, shot + query)
    support, query = files[:, : episodes.shot].ravel(), files[:, episodes.shot :].ravel()
    labels = np.repeat(np.arange(3), episodes.shot)
    found = Predictor.load(checkpoint, "cpu").fit(list(support), labels).predict_proba(list(query))
    np.testing.assert_allclose(found, logits.double().softmax(1).numpy(), atol=1e-5)


def test_new_classes_are_told_apart(checkpoint: Path, tmp_path: Path) -> None:
    files, labels = images_of(tmp_path / "images", 12, 9, 10)
    shown = [i for i, file in enumerate(files) if int(file.stem) < 3]
    asked = [i for i in range(len(files)) if i not in shown]
    predictor = Predictor.load(str(checkpoint), "cpu").fit([files[i] for i in shown], [labels[i] for i in shown])
    answers = predictor.predict([str(files[i]) for i in asked])
    assert list(predictor.classes_) == ["class_0", "class_1", "class_2"]
    assert np.mean(answers == np.array(labels)[asked]) > 0.8
    probabilities = predictor.predict_proba([files[i] for i in asked])
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert (predictor.classes_[probabilities.argmax(1)] == answers).all()


def test_classes_may_differ_in_their_numbers_of_images_and_come_in_any_order(checkpoint: Path, tmp_path: Path) -> None:
    files, labels = images_of(tmp_path / "support", 1, 4, 2)
    query = list_images(write_classes(tmp_path / "query", 3, 3, 3, seed=6))
    found = Predictor.load(checkpoint, "cpu").fit(files, labels).predict_proba(query)
    mixed = np.random.default_rng(0).permutation(len(files))
    again = Predictor.load(checkpoint, "cpu").fit([files[i] for i in mixed], [labels[i] for i in mixed])
    np.testing.assert_allclose(again.predict_proba(query), found, atol=1e-4)


@pytest.fixture(scope="module")
def meta_sgd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has a rate for each weight, those of the linear classifier among them."""
    return best(train(tmp_path_factory.mktemp("meta_sgd"), *CXGRAD[:6], "--meta_sgd", "true"))


@pytest.mark.parametrize("name", ["cxgrad", "meta_sgd"])
def test_fewer_classes_use_the_first_rows_of_the_linear_classifier(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    state = checkpoints.load(request.getfixturevalue(name))
    files, labels = images_of(tmp_path / "support", 2, 3)

    def answers() -> np.ndarray:
        return Predictor(state, tmp_path, torch.device("cpu")).fit(files, labels).predict_proba(files)

    before = answers()
    weights = state["network"]["classifier.layer_dict.linear.weights"]
    weights[2] += 1
    assert (answers() == before).all()
    weights[1] += 1
    assert (answers() != before).any()


def test_a_linear_classifier_takes_its_ways_at_most_and_a_head_any(cxgrad: Path, ridge: Path, tmp_path: Path) -> None:
    files, labels = images_of(tmp_path / "support", 2, 2, 2, 2, 2)
    assert Predictor.load(ridge, "cpu").fit(files, labels).predict_proba(files).shape == (10, 5)
    with pytest.raises(UserError, match=r"5 classes given, but .*best has a linear classifier of 3: give 2 to 3"):
        Predictor.load(cxgrad, "cpu").fit(files, labels)


def test_transductive_answers_depend_on_other_queries_unless_one_by_one(cxgrad: Path, tmp_path: Path) -> None:
    files, labels = images_of(tmp_path / "support", 2, 2, 2)
    query = list_images(write_classes(tmp_path / "query", 2, 2, 2, seed=6))
    together, apart = (Predictor.load(cxgrad, "cpu", one_by_one=one).fit(files, labels) for one in (False, True))
    assert together.transductive
    assert not np.allclose(together.predict_proba(query)[:2], together.predict_proba(query[:2]), atol=1e-3)
    np.testing.assert_allclose(apart.predict_proba(query)[:2], apart.predict_proba(query[:2]), atol=1e-6)


def test_inductive_answers_do_not_depend_on_other_queries(ridge: Path, tmp_path: Path) -> None:
    files, labels = images_of(tmp_path / "support", 2, 2, 2)
    query = list_images(write_classes(tmp_path / "query", 2, 2, 2, seed=6))
    predictor = Predictor.load(ridge, "cpu").fit(files, labels)
    assert not predictor.transductive
    np.testing.assert_allclose(predictor.predict_proba(query)[:2], predictor.predict_proba(query[:2]), atol=1e-5)


def test_files_pillow_images_and_arrays_of_any_kind_are_the_same_image(cxgrad: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20)).astype(np.uint8)
    grey = Image.fromarray(pixels)
    kinds: dict[str, Any] = {name: grey.convert(name) for name in ("RGB", "RGBA", "P", "LA")}
    predictor = Predictor.load(cxgrad, "cpu")
    (expected,) = predictor.pixels([grey])
    assert expected.shape == (16, 16, 3)
    for name, image in kinds.items():
        image.save(tmp_path / f"{name}.png")
        found = predictor.pixels([tmp_path / f"{name}.png", str(tmp_path / f"{name}.png"), image])
        assert (found == expected).all(), name
    for array in (pixels, pixels[:, :, None], np.stack([pixels] * 3, 2)):
        assert (predictor.pixels([array]) == expected).all()
    assert (predictor.pixels([expected]) == expected).all()


def test_an_image_of_the_caller_is_left_as_it_is(cxgrad: Path) -> None:
    image = Image.new("RGB", (20, 30))
    image.getexif()[0x0112] = 6  # turned by 90 degrees
    Predictor.load(cxgrad, "cpu").pixels([image])
    assert image.size == (20, 30)


def test_what_cannot_work_is_said(cxgrad: Path, tmp_path: Path) -> None:
    files, labels = images_of(tmp_path / "support", 2, 2)
    predictor = Predictor.load(cxgrad, "cpu")
    with pytest.raises(UserError, match="knows no classes yet; call fit"):
        predictor.predict(files)
    with pytest.raises(UserError, match="4 images and 3 labels do not fit together"):
        predictor.fit(files, labels[1:])
    with pytest.raises(UserError, match="1 class given: there is nothing to tell apart"):
        predictor.fit(files[:2], labels[:2])
    with pytest.raises(UserError, match="0 classes given"):
        predictor.fit([], [])
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    with pytest.raises(UserError, match=r"cannot read .*torn.jpg \(OSError: Truncated.*; .*absent.png \(FileNotFound"):
        predictor.fit([tmp_path / "torn.jpg", tmp_path / "absent.png", *files[2:]], labels)
    with pytest.raises(UserError, match=r"cannot read image 1 \(ValueError: an array of float64"):
        predictor.fit([np.zeros((8, 8), np.uint8), np.zeros((8, 8))], labels[1:3])


def test_a_fit_that_fails_leaves_the_predictor_as_it_was(cxgrad: Path, tmp_path: Path) -> None:
    files, labels = images_of(tmp_path / "support", 2, 2, 2)
    predictor = Predictor.load(cxgrad, "cpu").fit(files, labels)
    before = predictor.predict_proba(files)
    with pytest.raises(UserError, match="absent"):
        predictor.fit([*files[:3], tmp_path / "absent.png"], labels[:4])
    assert (predictor.predict_proba(files) == before).all()


def test_no_images_have_no_answers(cxgrad: Path, tmp_path: Path) -> None:
    predictor = Predictor.load(cxgrad, "cpu").fit(*images_of(tmp_path / "support", 2, 2))
    assert predictor.predict_proba([]).shape == (0, 2)
    assert predictor.predict([]).shape == (0,)


def test_a_checkpoint_that_does_not_say_how_it_was_trained_is_refused(cxgrad: Path, tmp_path: Path) -> None:
    checkpoints.save({"network": checkpoints.load(cxgrad)["network"]}, tmp_path / "train_model_1")
    with pytest.raises(UserError, match="train_model_1 does not say how it was trained"):
        Predictor.load(tmp_path / "train_model_1", "cpu")


def test_a_model_that_diverged_is_not_believed(cxgrad: Path, tmp_path: Path) -> None:
    state = checkpoints.load(cxgrad)
    state["network"]["classifier.layer_dict.linear.bias"].fill_(torch.nan)
    predictor = Predictor(state, cxgrad, torch.device("cpu")).fit(*images_of(tmp_path / "support", 2, 2))
    with pytest.raises(UserError, match="not finite"):
        predictor.predict_proba(list_images(tmp_path / "support"))


# --- leave one out -------------------------------------------------------------------------------------------------


def test_leave_one_out_is_high_for_right_labels_and_low_for_wrong_ones(checkpoint: Path, tmp_path: Path) -> None:
    files, labels = images_of(tmp_path / "support", 6, 6, 6)
    right = Predictor.load(checkpoint, "cpu").fit(files, labels).leave_one_out()
    wrong = Predictor.load(checkpoint, "cpu").fit(files, [labels[(i * 7) % 18] for i in range(18)]).leave_one_out()
    assert right and wrong and right.of == wrong.of == 18
    assert right.accuracy > 0.8
    assert wrong.accuracy < 0.6


def test_what_is_left_out_makes_no_class_rarer_than_another(checkpoint: Path, tmp_path: Path) -> None:
    predictor = Predictor.load(checkpoint, "cpu").fit(*images_of(tmp_path / "support", 4, 4, 4))
    sizes: list[list[int]] = []
    adapt = predictor._adapt

    def noted(pixels: np.ndarray, numbers: np.ndarray) -> Any:
        sizes.append(np.bincount(numbers).tolist())
        return adapt(pixels, numbers)

    with mock.patch.object(predictor, "_adapt", noted):
        estimate = predictor.leave_one_out()
    assert estimate and estimate.of == 12
    assert sizes == [[3, 3, 3]] * 4


def test_images_alone_in_their_class_are_never_left_out(checkpoint: Path, tmp_path: Path) -> None:
    estimate = Predictor.load(checkpoint, "cpu").fit(*images_of(tmp_path / "support", 1, 3, 2)).leave_one_out()
    assert estimate and estimate.of == 5
    assert Predictor.load(checkpoint, "cpu").fit(*images_of(tmp_path / "one", 1, 1, 1)).leave_one_out() is None


def test_of_many_images_an_even_part_is_left_out(ridge: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2 * LEFT_OUT + 30, 8, 8, 3)).astype(np.uint8)
    estimate = Predictor.load(ridge, "cpu").fit(pixels, np.arange(len(pixels)) % 2).leave_one_out()
    assert estimate and LEFT_OUT / 2 < estimate.of <= LEFT_OUT


def test_leave_one_out_leaves_the_predictor_as_it_was(checkpoint: Path, tmp_path: Path) -> None:
    files, labels = images_of(tmp_path / "support", 2, 3)
    predictor = Predictor.load(checkpoint, "cpu").fit(files, labels)
    before = predictor.predict_proba(files)
    predictor.leave_one_out()
    assert (predictor.predict_proba(files) == before).all()


@pytest.mark.parametrize(("right", "of"), [(0, 3), (5, 5), (13, 20)])
def test_the_interval_is_wilsons(right: int, of: int) -> None:
    expected = binomtest(right, of).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(Estimate(right, of).ci95, (expected.low, expected.high), atol=1e-4)
