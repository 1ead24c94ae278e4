"""A trained model used scikit-learn's way: load it, fit it to a few labelled images, predict others.

predictor = Predictor.load("models/glyphs_CxGrad").fit(images, labels)
predictor.predict(more_images)

Images are file names, Pillow images or uint8 arrays, of any sizes; they are resized, and normalised as in training.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import Scaling
from few_shot_learning_system import build_learner
from learner import FewShotLearner
from utils import checkpoints
from utils.devices import choose_device, send
from utils.errors import UserError
from utils.images import ImageShape, decode_image, fitted_image
from utils.official_checkpoints import to_official
from utils.options import Options, changed
from utils.progress import progress_bar

AT_ONCE = 256  # images in a pass whose answers do not depend on one another
LEFT_OUT = 100  # images that the leave-one-out estimate leaves out, at most

Picture = str | Path | Image.Image | np.ndarray
Pictures = Sequence[Picture] | np.ndarray  # an array of them is (n, H, W, C) uint8


class Estimate(NamedTuple):
    """A leave-one-out estimate of the accuracy: of how many images that were left out the answer was right."""

    right: int
    of: int

    @property
    def accuracy(self) -> float:
        return self.right / self.of

    @property
    def ci95(self) -> tuple[float, float]:
        """Return Wilson's 95 % interval, which is sensible for few images and where all answers are right."""
        z, n, p = 1.96, self.of, self.accuracy
        centre, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


class Predictor:
    """A classifier of images that `fit` adapts to new classes; it does not change the trained model.

    Args:
        state: what `utils.checkpoints.load` returned.
        path: where from, for messages.
        device: where to compute.
        one_by_one: normalise each query image with the support images only, so that its answer does not depend on the
            other queries (Nichol et al. 2018, Reptile). Changes nothing unless batch norm is transductive.

    Attributes:
        classes_: the different labels, sorted, after `fit`.
    """

    classes_: np.ndarray
    _model: FewShotLearner

    def __init__(self, state: dict[str, Any], path: Path, device: torch.device, one_by_one: bool = False) -> None:
        if "options" not in state:
            raise UserError(
                f"{path} does not say how it was trained; prediction takes checkpoints of this program and folders of "
                "utils.export. test.py can score official checkpoints"
            )
        self.options = Options.from_mapping(state["options"], str(path), saved=True)
        self.device, self.one_by_one = device, one_by_one
        self._state, self._path = state, path
        mean, std = state.get("normalization") or (None, None)
        self._scaled = Scaling(mean, std, device, torch.float32)
        self._ways = 0  # of the model; 0: none is built yet

    @classmethod
    def load(cls, path: str | Path, gpu: str | None = None, one_by_one: bool = False) -> "Predictor":
        """Load a checkpoint of training, or a folder of `utils.export`, onto a GPU ("0"), "cpu", or what there is.

        Raises UserError where it is not there or damaged.
        """
        return cls(checkpoints.load(Path(path)), Path(path), choose_device(gpu), one_by_one)

    @property
    def transductive(self) -> bool:
        """Return whether the images of a batch are normalised by their own statistics."""
        return self.options.batch_norm == "transductive"

    @property
    def image_shape(self) -> ImageShape:
        return self.options.image_shape

    # --- scikit-learn's verbs ----------------------------------------------------------------------------------

    def fit(self, images: Pictures, labels: Sequence[Any] | np.ndarray) -> "Predictor":
        """Adapt to support images; classes may differ in their numbers of images.

        Raises UserError for fewer than two classes, more than the model can tell apart, an unreadable image.
        """
        if len(images) != len(labels):
            raise UserError(f"{len(images)} images and {len(labels)} labels do not fit together; give one for each")
        classes, numbers = np.unique(np.asarray(labels), return_inverse=True)
        support = self.pixels(images)
        self._use_ways(len(classes))
        self.classes_, self._numbers, self._support = classes, numbers, support
        self._adapted = self._adapt(self._support, numbers)
        return self

    def predict_proba(self, images: Pictures) -> np.ndarray:
        """Return the probability of each class, (images, classes) float64 in the order of `classes_`.

        Raises UserError before `fit`, for an unreadable image, and where the answers are not finite.
        """
        if not hasattr(self, "_adapted"):
            raise UserError("this predictor knows no classes yet; call fit with a few images of each first")
        if not len(images):
            return np.empty((0, len(self.classes_)))
        logits = self._logits(self._adapted, self._support, self.pixels(images))
        return logits.double().softmax(1).cpu().numpy()

    def predict(self, images: Pictures) -> np.ndarray:
        """Return the most probable label of each image, (images,)."""
        best = self.predict_proba(images).argmax(1)
        answers: np.ndarray = self.classes_[best]
        return answers

    def leave_one_out(self) -> Estimate | None:
        """Predict support images by the others: one of each class is left out at a time, at most LEFT_OUT in all.

        Were it one of a single class, that class would be rarer than the others just when it is the answer, and the
        estimate too low. Images that are alone in their class stay, as nothing would be left of it; None if all are.
        An image is normalised together with the others, as with `one_by_one`.

        Raises UserError where the answers are not finite.
        """
        classes = [np.flatnonzero(self._numbers == number) for number in range(len(self.classes_))]
        classes = [images for images in classes if len(images) > 1]
        if not classes:
            return None
        rounds = range(max(map(len, classes)))[:: -(-sum(map(len, classes)) // LEFT_OUT)]
        right = of = 0
        with progress_bar(len(rounds), 0, "leave one out") as bar:
            for number in rounds:
                out = np.array([images[number] for images in classes if number < len(images)])
                others = np.delete(np.arange(len(self._numbers)), out)
                adapted = self._adapt(self._support[others], self._numbers[others])
                for i in out:
                    logits = self._with_company(adapted, self._support[others], self._support[i : i + 1])
                    right += int(logits.argmax(1).item() == self._numbers[i])
                of += len(out)
                bar.update()
        return Estimate(right, of)

    # --- images ------------------------------------------------------------------------------------------------

    def pixels(self, images: Pictures) -> np.ndarray:
        """Return images as the model sees them, (n, H, W, C) uint8; raises UserError for the unreadable ones."""
        fitted, bad = [], []
        for i, image in enumerate(images):
            try:
                fitted.append(self._fitted(image))
            except MemoryError:
                raise
            except Exception as error:  # Pillow's readers raise nearly any type on a damaged file
                named = image if isinstance(image, str | Path) else f"image {i}"
                bad.append(f"{named} ({type(error).__name__}: {error})")
        if bad:
            more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise UserError(f"cannot read {'; '.join(bad[:3])}{more}. Mend or leave out what is named")
        channels, height, width = self.image_shape
        return np.stack(fitted) if fitted else np.empty((0, height, width, channels), np.uint8)

    def _fitted(self, image: Picture) -> np.ndarray:
        if isinstance(image, str | Path):
            return decode_image(Path(image), self.image_shape)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8:
                raise ValueError(f"an array of {image.dtype}; arrays are uint8, (H, W), (H, W, 1) or (H, W, 3)")
            return fitted_image(
                Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image), self.image_shape
            )
        return fitted_image(image.copy(), self.image_shape)  # which may turn it in place

    def _scale(self, pixels: np.ndarray) -> Tensor:
        """Turn pixels (n, H, W, C) into what networks take, (1, n, C, H, W)."""
        images = send(torch.from_numpy(pixels), self.device).permute(0, 3, 1, 2)
        return self._scaled(images.to(torch.float32, memory_format=torch.contiguous_format)).unsqueeze(0)

    # --- the model ---------------------------------------------------------------------------------------------

    def _use_ways(self, ways: int) -> None:
        """Build the model for so many classes; raises UserError for a number that it cannot tell apart."""
        trained = self.options.num_classes_per_set
        if ways < 2:
            raise UserError(f"{ways} class{'es' * (ways != 1)} given: there is nothing to tell apart; give two or more")
        if ways > trained and not self.options.head:
            raise UserError(
                f"{ways} classes given, but {self._path} has a linear classifier of {trained}: give 2 to {trained}, "
                f"train with --num_classes_per_set {ways}, or take a model with a head, which tells any number apart"
            )
        if self._ways == ways:
            return
        changes = {"test_way": ways} if self.options.head else {"num_classes_per_set": ways, "test_way": None}
        model = build_learner(self.device, changed(self.options, changes))
        model.load_state(of_first_classes(self._state, model), self._path, with_optimizer=False)
        self._model, self._ways = model, ways

    def _adapt(self, pixels: np.ndarray, numbers: np.ndarray) -> Any:
        return self._model.adapt(self._scale(pixels), send(torch.from_numpy(numbers), self.device).unsqueeze(0))

    def _logits(self, adapted: Any, support: np.ndarray, query: np.ndarray) -> Tensor:
        """Return logits (n, way) of query pixels (n, H, W, C)."""
        if self.transductive and self.one_by_one:
            return torch.cat([self._with_company(adapted, support, query[i : i + 1]) for i in range(len(query))])
        size = len(query) if self.transductive else AT_ONCE
        return torch.cat([self._answer(adapted, query[i : i + size]) for i in range(0, len(query), size)])

    def _with_company(self, adapted: Any, support: np.ndarray, query: np.ndarray) -> Tensor:
        """Return the logits (n, way) of query pixels that support images are normalised with, if anything is."""
        company = [query, support] if self.transductive else [query]
        return self._answer(adapted, np.concatenate(company))[: len(query)]

    def _answer(self, adapted: Any, pixels: np.ndarray) -> Tensor:
        logits = self._model.predict(adapted, self._scale(pixels)).squeeze(0)
        if not logits.isfinite().all():
            raise UserError(f"{self._path} answers with numbers that are not finite; its training may have diverged")
        return logits


def of_first_classes(state: dict[str, Any], model: FewShotLearner) -> dict[str, Any]:
    """Return a checkpoint's state with only those rows of its linear classifier that the model has, the first ones."""
    if "network" not in state:
        return state
    own = to_official(model.state_dict())
    rows = {name: len(tensor) for name, tensor in own.items() if "linear" in name and tensor.dim()}
    return state | {
        "network": {name: t[: rows.get(name)] if name in rows else t for name, t in state["network"].items()}
    }
