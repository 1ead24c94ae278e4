"""MetaOptNet's embedding networks: parity with recorded arrays, official weight names, DropBlock and its counter."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from meta_neural_network_architectures import DropBlock, ProtoNetConv64, R2D2Net, ResNet12Embedding, blank_squares
from tests import golden_metaoptnet
from tests.golden import facts, load, recipes

Arrays = dict[str, np.ndarray]

SMALL = (4, 6, 8, 10)
OFFICIAL: dict[str, Callable[[tuple[int, int, int]], Any]] = {
    "ResNet12": ResNet12Embedding,
    "R2D2Embedding": R2D2Net,
    "ProtoNetEmbedding": ProtoNetConv64,
}


def assert_close(ours: Tensor, recorded: np.ndarray, tolerance: float, name: str = "") -> None:
    """Equal up to `tolerance` times the largest recorded number."""
    limit = tolerance * np.abs(recorded).max()
    np.testing.assert_allclose(ours.detach().numpy(), recorded, rtol=0, atol=limit, err_msg=name)


def without_drop(network: nn.Module) -> nn.Module:
    """Batch norm trains, nothing is dropped: how the training-mode arrays were recorded."""
    for module in network.train().modules():
        if isinstance(module, nn.Dropout | DropBlock):
            module.eval()
    return network


# --- parity with the official program ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 84])
def test_resnet12_in_evaluation_equals_the_recorded_features_and_maps(size: int) -> None:
    recorded = load("metaoptnet", f"resnet12_eval_{size}")
    network = golden_metaoptnet.resnet12(size, torch.float32).eval()
    maps: list[Tensor] = []
    for layer in network.children():
        layer.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
    with torch.no_grad():
        features = network(torch.from_numpy(recipes.images(int(recorded["input_seed"]), 2, size)))
    assert features.shape == (2, network.out_features)
    assert_close(features, recorded["embedding"], 5e-6)
    for number, out in enumerate(maps, 1):
        statistics = torch.stack((out.mean(), out.std(correction=0), out.min(), out.max()))
        assert list(out.shape) == list(recorded[f"layer{number}_shape"])
        assert_close(statistics, recorded[f"layer{number}_stats"], 5e-6)
        assert_close(out[:, :2, :2, :2], recorded[f"layer{number}_head"], 5e-6)


def resnet12_training_step(recorded: Arrays, precision: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """Return the network after one forward and backward pass without drop, its features, images with their gradient."""
    network = without_drop(golden_metaoptnet.resnet12(32, precision))
    weights = np.random.RandomState(int(recorded["weight_matrix_seed"])).randn(4, 2560).astype(np.float32)
    images = torch.from_numpy(recipes.images(int(recorded["input_seed"]), 4, 32)).to(precision).requires_grad_()
    features = network(images)
    (features * torch.from_numpy(weights).to(precision)).sum().backward()
    return network, features, images


def test_resnet12_in_training_equals_the_recorded_float64_run() -> None:
    recorded = load("metaoptnet", "resnet12_train_nodrop_32")
    network, features, images = resnet12_training_step(recorded, torch.float64)
    assert images.grad is not None
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    assert list(gradients) == list(recorded["param_names"])
    assert_close(features, recorded["embedding_f64"], 1e-9)
    assert_close(images.grad, recorded["grad_input_f64"], 1e-9)
    norms = torch.stack([g.norm() for g in gradients.values()])
    largest = torch.stack([g.abs().max() for g in gradients.values()])
    np.testing.assert_allclose(norms, recorded["grad_norms_f64"], rtol=1e-9)
    np.testing.assert_allclose(largest, recorded["grad_absmax_f64"], rtol=1e-9)
    assert_close(gradients["layer1.0.conv1.weight"], recorded["grad_conv1_f64"], 1e-9)
    assert_close(gradients["layer4.0.bn3.weight"], recorded["grad_l4_bn3_f64"], 1e-9)
    assert_running_statistics(network, recorded, 1e-9)


def test_resnet12_in_float32_training_equals_the_recorded_features_and_running_statistics() -> None:
    recorded = load("metaoptnet", "resnet12_train_nodrop_32")
    network, features, images = resnet12_training_step(recorded, torch.float32)
    assert images.grad is not None
    assert_close(features, recorded["embedding_f32"], 1e-5)
    assert_running_statistics(network, recorded, 1e-6)
    # One activation that crosses its kink moves the gradient by 2.5 %, in the official program too.
    assert_close(images.grad, recorded["grad_input_f64"], 0.1)


def assert_running_statistics(network: nn.Module, recorded: Arrays, tolerance: float) -> None:
    for layer in ("layer1.0.bn1", "layer4.0.bn3"):
        for kind in ("running_mean", "running_var"):
            after = recorded[f"{layer.replace('.', '_')}_{kind}_after_f64"]
            assert_close(network.get_buffer(f"{layer}.{kind}"), after, tolerance, f"{layer}.{kind}")


@pytest.mark.parametrize("size", [32, 84])
@pytest.mark.parametrize("name", golden_metaoptnet.SMALL)
def test_small_networks_in_evaluation_equal_the_recorded_features(name: str, size: int) -> None:
    recorded = load("metaoptnet", name)
    network = golden_metaoptnet.small(name, size).eval()
    features = network(torch.from_numpy(recipes.images(int(recorded[f"input_seed_{size}"]), 2, size)))
    assert_close(features, recorded[f"embedding_eval_{size}"], 5e-6)


@pytest.mark.parametrize("name", golden_metaoptnet.SMALL)
def test_small_networks_in_training_equal_the_recorded_gradients_and_running_statistics(name: str) -> None:
    recorded = load("metaoptnet", name)
    network = without_drop(golden_metaoptnet.small(name, 32))
    images = torch.from_numpy(recipes.images(int(recorded["train_input_seed"]), 4, 32)).requires_grad_()
    features = network(images)
    weights = np.random.RandomState(int(recorded["train_weight_seed"])).randn(*features.shape).astype(np.float32)
    (features * torch.from_numpy(weights)).sum().backward()
    assert images.grad is not None
    assert_close(features, recorded["embedding_train"], 5e-6)
    assert_close(images.grad, recorded["grad_input_train"], 5e-6)
    for parameter, value in network.named_parameters():
        assert value.grad is not None
        gradient = recorded[f"grad/{parameter}"]
        if parameter.endswith("0.bias"):  # in front of batch norm: mathematically zero, both have rounding noise
            assert max(value.grad.abs().max().item(), np.abs(gradient).max()) < 1e-4
        else:
            assert_close(value.grad, gradient, 5e-6, parameter)
    after = {key.removeprefix("after/"): array for key, array in recorded.items() if key.startswith("after/")}
    assert len(after) == 8
    for buffer, array in after.items():
        assert_close(network.get_buffer(buffer), array, 5e-6, buffer)


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OFFICIAL)
def test_state_dict_is_the_official_one_plus_the_counters(name: str) -> None:
    listed = facts("state_dicts")[name]
    network = OFFICIAL[name]((3, 32, 32))
    state = {key: tensor for key, tensor in network.state_dict().items() if not key.endswith("drop.forwards")}
    ours = [[key, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for key, tensor in state.items()]
    assert ours == listed["state_dict"]
    assert sum(p.numel() for p in network.parameters()) == listed["n_parameters"]


@pytest.mark.parametrize("name", OFFICIAL)
def test_feature_counts_are_the_official_ones(name: str) -> None:
    dimensions = facts("state_dicts")["checkpoint"]["embedding_output_dims"]
    for size in (32, 84):
        assert OFFICIAL[name]((3, size, size)).out_features == dimensions[f"{name}@{size}"]


def test_convolutions_start_with_the_official_spread() -> None:
    torch.manual_seed(0)
    for network in (ProtoNetConv64((3, 32, 32)), ResNet12Embedding((3, 32, 32), (32, 32, 64, 64))):
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                out, _, side, _ = module.weight.shape
                expected = (2 / (side * side * out)) ** 0.5
                assert module.weight.std().item() == pytest.approx(expected, rel=0.15)


# --- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 16, 16), (3, 32, 32), (3, 47, 33), (1, 84, 84)], ids=str)
@pytest.mark.parametrize("network", [ProtoNetConv64, R2D2Net, ResNet12Embedding])
def test_any_image_size_and_channel_count_gives_the_announced_features(
    network: Callable[..., Any], shape: tuple[int, int, int]
) -> None:
    embedding = network(shape, SMALL)
    images = torch.randn(3, *shape)
    for mode in (True, False):
        assert embedding.train(mode)(images).shape == (3, embedding.out_features)


@pytest.mark.parametrize("network", [ProtoNetConv64, R2D2Net, ResNet12Embedding])
def test_too_small_images_are_refused(network: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="images of 15x40 are too small"):
        network((3, 15, 40))


@pytest.mark.parametrize("size", [32, 50, 84])
def test_average_pooling_is_the_mean_over_positions_at_any_size(size: int) -> None:
    torch.manual_seed(0)
    pooled = ResNet12Embedding((3, size, size), SMALL, avg_pool=True).eval()
    flat = ResNet12Embedding((3, size, size), SMALL).eval()
    flat.load_state_dict(pooled.state_dict())
    images = torch.randn(2, 3, size, size)
    features = pooled(images)
    assert features.shape == (2, pooled.out_features) == (2, SMALL[-1])
    torch.testing.assert_close(features, flat(images).view(2, SMALL[-1], -1).mean(2))


@pytest.mark.parametrize("network", [ProtoNetConv64, R2D2Net, ResNet12Embedding])
def test_memory_format_does_not_change_features_or_gradients(network: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    plain = without_drop(network((3, 32, 32), SMALL).double())
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    features = plain(images), last(images.to(memory_format=torch.channels_last))
    for one in features:
        one.square().sum().backward()
    torch.testing.assert_close(*features)
    for first, second in zip(plain.parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, msg="gradient")


@pytest.mark.parametrize("network", [ProtoNetConv64, R2D2Net, ResNet12Embedding])
@pytest.mark.parametrize("size", [32, 43])
def test_evaluation_gives_the_same_features_whether_gradients_are_kept_or_not(
    network: Callable[..., Any], size: int
) -> None:
    torch.manual_seed(0)
    model = network((3, size, size), SMALL).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor)
            nn.init.uniform_(module.running_var, 0.1, 2)
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    kept = model.eval()(images)
    with torch.no_grad():
        torch.testing.assert_close(model(images), kept)
    assert kept.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_where_the_recipe_has_it(training: bool) -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 3, 32, 32)
    third, fourth = R2D2Net((3, 32, 32), SMALL).train(training)(images).split((8 * 16, 10 * 4), 1)
    blanked = [(part == 0).float().mean().item() for part in (third, fourth)]
    assert blanked == pytest.approx([0.1, 0.3] if training else [0, 0], abs=0.03)
    layers = list(ResNet12Embedding((3, 32, 32), SMALL).train(training).children())
    for layer in layers[:2]:
        images = layer(images)
        assert (images == 0).float().mean().item() == pytest.approx(0.1 * training, abs=0.01)


# --- DropBlock -----------------------------------------------------------------------------------------------------


def counter_at(drop: DropBlock, forwards: int) -> DropBlock:
    drop.forwards.fill_(forwards)
    return drop


def kept(hits: np.ndarray, block_size: int, official: bool) -> np.ndarray:
    """Which elements stay, hit by hit: the definition, or what the official program does.

    That one repeats the list of hits and the list of the square's places side by side, so a hit meets every place only
    if the number of hits in the batch has no factor in common with the square's area. It blanks the centre anyway.
    """
    found = np.argwhere(hits)
    common = math.gcd(len(found), block_size**2) if official else 1
    keep = np.ones((*hits.shape[:2], hits.shape[2] + block_size - 1, hits.shape[3] + block_size - 1), dtype=bool)
    for rank, (image, channel, top, left) in enumerate(found):
        for place in range(block_size**2):
            if (place - rank) % common == 0 or place == (block_size - 1) // 2 * (block_size + 1):
                keep[image, channel, top + place // block_size, left + place % block_size] = False
    return keep


@pytest.mark.parametrize("case", ["bs5_H10", "bs5_H5", "bs2_H4", "bs2_H2", "bs1_H4", "bs3_H7"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_hits_blank_whole_squares_as_recorded(case: str, memory_format: torch.memory_format) -> None:
    recorded = load("metaoptnet", "dropblock")
    hits, x, block_size = recorded[f"{case}_mask"], torch.from_numpy(recorded[f"{case}_x"]), int(case[2])
    np.testing.assert_array_equal(kept(hits, block_size, official=True), recorded[f"{case}_block_mask"])
    out = blank_squares(x.to(memory_format=memory_format), torch.from_numpy(hits), block_size)
    keep = kept(hits, block_size, official=False)
    assert_close(out, x.numpy() * keep * (keep.size / keep.sum() if keep.any() else 0), 1e-6)
    if case == "bs2_H4":  # 12 hits, squares of 4: the only recorded case where the official squares have holes
        assert (keep <= recorded[f"{case}_block_mask"]).all()
    else:
        assert_close(out, recorded[f"{case}_out"], 1e-6)


def test_hit_probability_equals_the_recorded_table() -> None:
    table = load("metaoptnet", "dropblock")["gamma_table"]
    for block_size, side, forwards, gamma in table:
        drop = counter_at(DropBlock(int(block_size)), int(forwards))
        assert drop.gamma(int(side), int(side)).item() == pytest.approx(gamma, rel=1e-6)


def test_a_fully_blanked_batch_gives_zeros_and_zero_gradients() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    out = blank_squares(x, torch.ones(2, 3, 3, 3), 2)
    out.sum().backward()
    assert not out.any()
    assert x.grad is not None and not x.grad.any()


@pytest.mark.parametrize(("height", "width", "block_size"), [(4, 4, 2), (2, 2, 2), (10, 10, 5), (3, 10, 3)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_about_a_tenth_is_blanked_at_the_end_of_the_schedule(
    height: int, width: int, block_size: int, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    drop = counter_at(DropBlock(block_size), 50_000)
    gamma = drop.gamma(height, width).item()
    over = [np.convolve(np.ones(side - block_size + 1), np.ones(block_size)) for side in (height, width)]
    expected = 1 - np.mean(
        (1 - gamma) ** np.outer(*over)
    )  # `over`: squares over a position; less than 0.1 if they meet
    assert 0.09 < expected <= 0.1 + 1e-6
    x = torch.ones(400, 64, height, width).to(memory_format=memory_format)
    out = drop(x)
    assert out.is_contiguous(memory_format=memory_format)
    assert (out == 0).float().mean().item() == pytest.approx(expected, abs=0.005)
    assert out.mean().item() == pytest.approx(1, abs=1e-5)  # the rest is scaled up
    assert len(out.unique()) == 2  # by one ratio
    assert not torch.equal(drop(x), out)
    assert drop.eval()(x) is x


def test_nothing_is_blanked_at_the_start_of_the_schedule() -> None:
    torch.manual_seed(0)
    assert (DropBlock(2)(torch.ones(100, 64, 4, 4)) == 0).float().mean() < 1e-3


def test_blanking_repeats_with_the_seed() -> None:
    x = torch.randn(20, 8, 4, 4)
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs.append(counter_at(DropBlock(2), 40_000)(x))
    assert torch.equal(*outs)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16, torch.float64])
def test_maps_keep_their_precision(precision: torch.dtype) -> None:
    drop = counter_at(DropBlock(2), 40_000)
    out = drop(torch.ones(300, 320, 4, 4, dtype=precision))  # more elements than float16 can count
    assert out.dtype == precision
    assert out.double().mean().item() == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize(("shape", "sizes"), [((3, 84, 84), 5), ((3, 32, 32), 2), ((1, 28, 28), 1), ((3, 84, 32), 2)])
def test_square_size_follows_the_image_size(shape: tuple[int, int, int], sizes: int) -> None:
    network = ResNet12Embedding(shape, SMALL)
    assert [m.block_size for m in network.modules() if isinstance(m, DropBlock)] == [sizes, sizes]


@pytest.mark.parametrize("size", [0, 3, 5])
def test_squares_that_the_map_cannot_hold_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"dropblock_size {size}: images of 32x32 leave a map that allows 1 to 2"):
        ResNet12Embedding((3, 32, 32), SMALL, dropblock_size=size)


@pytest.mark.parametrize("schedule", ["training", "official"])
def test_training_never_waits_for_a_tensor_s_value(schedule: str) -> None:
    """Tensors without data cannot be read: on a GPU, nothing makes the host wait."""
    network = ResNet12Embedding((3, 32, 32), SMALL, dropblock_schedule=schedule).to("meta")
    network(torch.randn(2, 3, 32, 32, device="meta")).sum().backward()


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="'offical': choose from training, official"):
        ResNet12Embedding((3, 32, 32), SMALL, dropblock_schedule="offical")


# --- the schedule's counter ----------------------------------------------------------------------------------------


def counters(network: nn.Module) -> list[int]:
    return [int(m.forwards) for m in network.modules() if isinstance(m, DropBlock)]


@pytest.mark.parametrize(("schedule", "expected"), [("training", 2), ("official", 5)])
def test_only_the_official_schedule_counts_evaluation(schedule: str, expected: int) -> None:
    network = ResNet12Embedding((3, 32, 32), SMALL, dropblock_schedule=schedule)
    images = torch.randn(2, 3, 32, 32)
    for _ in range(2):
        network(images)  # support and query of one batch
    network.eval()
    with torch.no_grad():
        network(images)
    with torch.inference_mode():
        network(images)
    network(images)
    assert counters(network) == [expected, expected]


def test_the_counter_is_saved_and_restored(tmp_path: Path) -> None:
    network = ResNet12Embedding((3, 32, 32), SMALL)
    for _ in range(3):
        network(torch.randn(2, 3, 32, 32))
    torch.save(network.state_dict(), tmp_path / "file")
    restored = ResNet12Embedding((3, 32, 32), SMALL)
    restored.load_state_dict(torch.load(tmp_path / "file", weights_only=True))
    assert counters(restored) == counters(network) == [3, 3]
    assert counters(copy.deepcopy(network)) == [3, 3]


def test_official_weights_load_strictly_and_start_the_schedule_afresh() -> None:
    official_state = golden_metaoptnet.state("ResNet12", 3001)
    network = ResNet12Embedding((3, 32, 32))
    for module in network.modules():
        if isinstance(module, DropBlock):
            counter_at(module, 7)
    names = list(official_state)
    result = network.load_state_dict(official_state, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert counters(network) == [0, 0]
    assert list(official_state) == names  # the caller's mapping is left alone
    assert torch.equal(network.state_dict()["layer4.0.conv3.weight"], official_state["layer4.0.conv3.weight"])


def test_other_missing_or_unknown_weights_are_still_refused() -> None:
    network = ResNet12Embedding((3, 32, 32), SMALL)
    state = network.state_dict()
    with pytest.raises(RuntimeError, match=r"layer2\.0\.bn1\.weight"):
        network.load_state_dict({key: value for key, value in state.items() if key != "layer2.0.bn1.weight"})
    with pytest.raises(RuntimeError, match="unknown"):
        network.load_state_dict(state | {"unknown": torch.zeros(1)})


def test_the_counter_survives_a_change_of_precision() -> None:
    network = ResNet12Embedding((3, 32, 32), SMALL)
    for module in network.modules():
        if isinstance(module, DropBlock):
            counter_at(module, 20_001)  # not a bfloat16 number
    assert counters(network.bfloat16()) == [20_001, 20_001]
