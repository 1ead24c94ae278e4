"""The augmentation of batches is torchvision's of single PIL images: pixel by pixel, and in what chance may do."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from augmentation import BRIGHTNESS, CONTRAST, ORDERS, SATURATION, Draws, augment, draw

SIZES = [(32, 32, 4), (84, 84, 8), (10, 7, 3), (6, 9, 0)]  # height, width, padding


def _images(number: int, height: int, width: int, channels: int = 3) -> torch.Tensor:
    """(number, height, width, channels) uint8: noise, smooth, nearly black, nearly white and grey ones in turns."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (number, height, width, channels)).astype(np.uint8)
    ramp = np.linspace(0, 255, height)[:, None, None] * np.ones((1, width, channels)) / [1.0, 1.7, 3.1][:channels]
    pixels[1::5] = ramp
    pixels[2::5] //= 12
    pixels[3::5] = 255 - pixels[3::5] // 12
    pixels[4::5] = pixels[4::5, :, :, :1]
    return torch.from_numpy(pixels)


def _torchvision(pixels: torch.Tensor, draws: Draws, padding: int) -> np.ndarray:
    """(n, C, H, W) uint8: each image by itself, with the same random numbers."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    adjust = {
        BRIGHTNESS: functional.adjust_brightness,
        CONTRAST: functional.adjust_contrast,
        SATURATION: functional.adjust_saturation,
    }
    results = []
    for array, (row, column), flip, order, factors in zip(pixels.numpy(), *draws, strict=True):
        image = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)
        image = functional.crop(functional.pad(image, padding), row, column, *array.shape[:2])
        for step in ORDERS[order]:
            image = adjust[step](image, float(factors[step]))
        image = functional.hflip(image) if flip else image
        results.append(np.asarray(image).reshape(array.shape).transpose(2, 0, 1))
    return np.stack(results)


def _check(pixels: torch.Tensor, draws: Draws, padding: int) -> None:
    ours = augment(pixels, draws, padding, torch.from_numpy)
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    np.testing.assert_array_equal(ours.numpy(), _torchvision(pixels, draws, padding))


@pytest.mark.parametrize(("height", "width", "padding"), SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_is_torchvisions_bit_by_bit(height: int, width: int, padding: int, channels: int) -> None:
    draws = draw(range(6), 20, padding)
    assert len(set(zip(draws.orders, draws.flips, strict=True))) == 12
    _check(_images(120, height, width, channels), draws, padding)


@pytest.mark.parametrize("factor", [0.6, 0.75, 1.0, 1.3125, 1.4])
@pytest.mark.parametrize("step", [BRIGHTNESS, CONTRAST, SATURATION])
def test_each_step_of_the_jitter_is_torchvisions(step: int, factor: float) -> None:
    """The other two steps have the factor 1, which changes nothing."""
    factors = np.ones((10, 3), np.float32)
    factors[:, step] = factor
    zeros = np.zeros(10, np.int64)
    draws = Draws(np.full((10, 2), 2), zeros.astype(bool), zeros, factors)
    pixels = _images(10, 16, 16)
    _check(pixels, draws, padding=2)
    assert np.array_equal(_torchvision(pixels, draws, 2), pixels.permute(0, 3, 1, 2).numpy()) == (factor == 1)


def test_every_crop_is_torchvisions() -> None:
    """All 25 corners with both flips, whose steps differ from one image to the next."""
    corners = np.array(list(product(range(5), range(5), range(2))))
    drawn = draw([3], 50, 2)
    _check(_images(50, 12, 8), drawn._replace(corners=corners[:, :2], flips=corners[:, 2] == 1), padding=2)


def test_a_batch_of_images_that_all_take_one_order_or_a_single_image() -> None:
    drawn = draw([0], 9, 4)
    _check(_images(9, 32, 32), drawn._replace(orders=np.full(9, 5)), padding=4)
    _check(_images(1, 32, 32), drawn.take(np.array([7])), padding=4)


def test_the_pixels_given_are_left_as_they_are() -> None:
    pixels = _images(12, 32, 32)
    before = pixels.clone()
    augment(pixels, draw([0], 12, 4), 4, torch.from_numpy)
    assert torch.equal(pixels, before)


def test_only_one_array_travels_to_the_device() -> None:
    sent = []

    def send(array: np.ndarray) -> torch.Tensor:
        sent.append(array)
        return torch.from_numpy(array)

    augment(_images(12, 32, 32), draw([0], 12, 4), 4, send)
    assert len(sent) == 1


def test_tasks_alone_or_together_are_the_same() -> None:
    """Task i depends on its seed only, whatever tasks share its batch."""
    pixels, seeds = _images(60, 32, 32), [17, 4, 2**32 - 1]
    together = draw(seeds, 20, 4)
    batch = augment(pixels, together, 4, torch.from_numpy)
    for t, seed in enumerate(seeds):
        own, alone = slice(20 * t, 20 * (t + 1)), draw([seed], 20, 4)
        for ours, theirs in zip(alone, together, strict=True):
            np.testing.assert_array_equal(ours, theirs[own])
        assert torch.equal(augment(pixels[own], alone, 4, torch.from_numpy), batch[own])
    assert not np.array_equal(together.factors[:20], together.factors[20:40])


def test_what_was_drawn_today_is_drawn_for_ever() -> None:
    """A run resumed under another numpy or on another machine goes on with the same images."""
    drawn = draw([12345], 3, 8)
    assert drawn.corners.tolist() == [[3, 5], [3, 11], [7, 15]]
    assert drawn.flips.tolist() == [False, False, False] and drawn.orders.tolist() == [4, 1, 1]
    np.testing.assert_allclose(drawn.factors[2], [1.1871425, 0.776108, 0.6652756], rtol=1e-6)


def test_some_of_the_images_in_another_order_keep_what_was_drawn_for_them() -> None:
    pixels, draws = _images(20, 32, 32), draw([5], 20, 4)
    chosen = np.array([11, 3, 19, 4])
    expected = augment(pixels, draws, 4, torch.from_numpy)[chosen]
    assert torch.equal(augment(pixels[chosen], draws.take(chosen), 4, torch.from_numpy), expected)


# --- what chance decides, against torchvision's own draws -----------------------------------------------------

MANY = 4000


@pytest.fixture(scope="module")
def ours() -> Draws:
    return draw(range(100), MANY // 100, padding=4)


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    """Draws of torchvision's transforms from a fixed seed: orders of the three steps, factors and corners."""
    transforms = pytest.importorskip("torchvision.transforms")
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4)
    padded = torch.empty(3, 40, 40)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [
            jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) for _ in range(MANY)
        ]
        corners = [transforms.RandomCrop.get_params(padded, (32, 32))[:2] for _ in range(MANY)]
    # the fourth step, hue, does nothing
    orders = [ORDERS.index(tuple(step for step in order.tolist() if step < 3)) for order, *_ in drawn]
    return {
        "orders": np.array(orders),
        "factors": np.array([factors[:3] for _, *factors in drawn]),
        "corners": np.array(corners),
    }


def _same_frequencies(ours: np.ndarray, theirs: np.ndarray, values: int) -> float:
    counts = [np.bincount(drawn, minlength=values) for drawn in (ours, theirs)]
    assert len(counts[0]) == len(counts[1]) == values and np.min(counts) > 0
    return float(stats.chi2_contingency(counts).pvalue)


def test_orders_of_the_steps_are_as_frequent_as_torchvisions(ours: Draws, theirs: dict[str, Any]) -> None:
    assert _same_frequencies(ours.orders, theirs["orders"], 6) > 0.01


@pytest.mark.parametrize("axis", [0, 1])
def test_corners_are_as_frequent_as_torchvisions(ours: Draws, theirs: dict[str, Any], axis: int) -> None:
    assert _same_frequencies(ours.corners[:, axis], theirs["corners"][:, axis], 9) > 0.01


@pytest.mark.parametrize("step", [BRIGHTNESS, CONTRAST, SATURATION])
def test_factors_have_torchvisions_distribution(ours: Draws, theirs: dict[str, Any], step: int) -> None:
    assert stats.ks_2samp(ours.factors[:, step], theirs["factors"][:, step]).pvalue > 0.01
    assert ours.factors[:, step].min() >= np.float32(0.6) and ours.factors[:, step].max() <= np.float32(1.4)


def test_half_of_the_images_are_flipped(ours: Draws) -> None:
    assert stats.binomtest(int(ours.flips.sum()), MANY, 0.5).pvalue > 0.01


def test_the_numbers_of_an_image_are_independent(ours: Draws) -> None:
    columns = np.column_stack([ours.corners, ours.flips, ours.orders, ours.factors])
    correlations = np.corrcoef(columns, rowvar=False) - np.eye(columns.shape[1])
    assert np.abs(correlations).max() < 4 / np.sqrt(MANY)
    neighbours = [np.corrcoef(column[1:], column[:-1])[0, 1] for column in columns.T]  # of one task mostly
    assert np.abs(neighbours).max() < 4 / np.sqrt(MANY)


def test_whole_images_have_torchvisions_distribution() -> None:
    """One image, augmented many times by either: mean and spread of every pixel agree."""
    transforms = pytest.importorskip("torchvision.transforms")
    pixels = _images(2, 8, 8)[1]
    official = transforms.Compose(
        [transforms.RandomCrop(8, padding=1), transforms.ColorJitter(0.4, 0.4, 0.4), transforms.RandomHorizontalFlip()]
    )
    image = Image.fromarray(pixels.numpy())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = np.stack([np.asarray(official(image)) for _ in range(MANY)]).transpose(0, 3, 1, 2).astype(np.float64)
    ours = augment(pixels.expand(MANY, -1, -1, -1), draw(range(100), MANY // 100, 1), 1, torch.from_numpy).double()
    error = np.sqrt((theirs.var(axis=0) + ours.var(dim=0).numpy()) / MANY)
    assert (np.abs(theirs.mean(axis=0) - ours.mean(dim=0).numpy()) < 4.5 * error).all()
    np.testing.assert_allclose(ours.std(dim=0), theirs.std(axis=0), rtol=0.1)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
def test_on_a_gpu_the_pixels_are_the_same_and_nobody_waits_for_it() -> None:
    device = torch.device("cuda")
    pixels, draws = _images(60, 32, 32), draw([0, 1, 2], 20, 4)
    expected, resident = augment(pixels, draws, 4, torch.from_numpy), pixels.to(device)

    def send(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).pin_memory().to(device, non_blocking=True)

    augment(resident, draws, 4, send)
    try:
        torch.cuda.set_sync_debug_mode("error")
        ours = augment(resident, draws, 4, send)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert ours.device.type == "cuda" and torch.equal(ours.cpu(), expected)
