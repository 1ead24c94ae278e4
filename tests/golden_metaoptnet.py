"""Our numbers for the recorded arrays of MetaOptNet, and their errors. Run as a script, it prints the table.

    python tests/golden_metaoptnet.py

An error is max|ours - recorded| / max|recorded| of an array; of duals it is max|ours - recorded|. The `exact` arrays
are float64 solutions of the heads' mathematical problems by other means.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from classification_heads import ClassificationHead, Episode, one_hot_of_ranks
from learner import cross_entropy
from meta_neural_network_architectures import DropBlock, ProtoNetConv64, R2D2Net, ResNet12Embedding
from qp_solvers import crammer_singer, solve
from tests.golden import facts, load, recipes
from utils.metaoptnet import learning_rate

CASES = tuple(recipes.EPISODES)
EXACT: dict[str, dict[str, dict[str, Any]]] = {  # head -> suffix of the arrays -> options
    "ProtoNet": {"default": {}, "unnormalized": {"normalize": False}, "exact": {}},
    "R2D2": {"exact": {}},
    "Ridge": {"exact": {}, "lam1_exact": {"lambda_reg": 1.0}},
    "SVM-CS": {"exact": {}, "C0.01_exact": {"C_reg": 0.01}},
    "SVM-He": {"tiled_exact": {}},
    "SVM-WW": {"symmetric_exact": {}},
}
SMALL: dict[str, tuple[Callable[[tuple[int, int, int]], Any], str]] = {  # network, its name in state_dicts.json
    "protonet_small": (lambda shape: ProtoNetConv64(shape, (8, 8, 8, 8)), "ProtoNetEmbedding_small(h=8,z=8)"),
    "r2d2_small": (lambda shape: R2D2Net(shape, (8, 12, 16, 20)), "R2D2Embedding_small(h1=8,h2=12,h3=16,z=20)"),
}
CONV1 = "layer1.0.conv1.weight"
QPTH = {
    f"{precision}_it{passes}": (precision == "f64", passes) for precision in ("f32", "f64") for passes in (3, 15, 20)
}


class Golden:
    """One recorded head and case; `tiled` arrays have their support in another order."""

    def __init__(self, head: str, case: str) -> None:
        self.head, self.case = head, case
        self.arrays = load("metaoptnet", f"heads_{head}_{case}") | recipes.episode(*recipes.EPISODES[case])

    def episode(self, dtype: torch.dtype, tiled: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """Query, support, labels and way."""
        suffix = "_tiled" if tiled else ""
        query, support = (torch.from_numpy(self.arrays[n]).to(dtype) for n in ("query", f"support{suffix}"))
        return query, support, torch.from_numpy(self.arrays[f"support_labels{suffix}"]), int(self.case[0])

    def ours(self, suffix: str, dtype: torch.dtype, **options: Any) -> dict[str, np.ndarray]:
        """Logits and gradients by array name without the suffix, computed by this project."""
        query, support, labels, way = self.episode(dtype, suffix.startswith("tiled"))
        query.requires_grad_()
        support.requires_grad_()
        head = ClassificationHead(self.head)
        logits = head(query, support, labels, way, labels.shape[1] // way, **options)
        (logits * torch.from_numpy(self.arrays["rand_matrix"])).sum().backward()
        found = {
            "logits": logits,
            "grad_query": query.grad,
            "grad_support": support.grad,
            "grad_scale": head.scale.grad,
        }
        return {name: tensor.detach().numpy() for name, tensor in found.items() if tensor is not None}

    def errors(self, suffix: str, dtype: torch.dtype, **options: Any) -> dict[str, float]:
        ours = self.ours(suffix, dtype, **options)
        recorded = {name: self.arrays.get(f"{name}_{suffix}") for name in ours}
        return {name: relative_error(ours[name], array) for name, array in recorded.items() if array is not None}

    def dual_error(self, suffix: str, dtype: torch.dtype, C_reg: float = 0.1) -> float:
        """Of SVM-CS, absolute."""
        query, support, labels, way = self.episode(dtype)
        one_hot = one_hot_of_ranks(labels, way)
        dual = solve(crammer_singer(Episode(query, support, one_hot).kernel(), one_hot, C_reg)).x.mT
        return float(np.abs(dual.flatten(1).numpy() - self.arrays[f"dual_{suffix}"]).max())


def relative_error(ours: np.ndarray, recorded: np.ndarray) -> float:
    return float(np.abs(ours - recorded).max() / np.abs(recorded).max())


def table() -> Iterator[str]:
    for head, variants in EXACT.items():
        for suffix, options in variants.items():
            for case in CASES:
                for dtype in (torch.float32, torch.float64):
                    golden = Golden(head, case)
                    errors = golden.errors(suffix, dtype, **options)
                    if f"dual_{suffix}" in golden.arrays and head == "SVM-CS":
                        errors["dual (abs)"] = golden.dual_error(suffix, dtype, **options)
                    shown = "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
                    yield f"{head:9} {suffix:16} {case}  {str(dtype).removeprefix('torch.')}  {shown}"


def state(network: str, seed: int) -> dict[str, torch.Tensor]:
    """Return the weights of a recorded run; `network` is a name of state_dicts.json."""
    listed = facts("state_dicts")[network]["state_dict"]
    return {name: torch.from_numpy(array) for name, array in recipes.network_state(listed, seed).items()}


def small(name: str, size: int) -> torch.nn.Module:
    """Return one of the two small networks with the recorded weights."""
    build, listed = SMALL[name]
    network: torch.nn.Module = build((3, size, size))
    network.load_state_dict(state(listed, int(load("metaoptnet", name)["weight_seed"])))
    return network


def resnet12(size: int, dtype: torch.dtype) -> ResNet12Embedding:
    """Return the network with the recorded weights."""
    network = ResNet12Embedding((3, size, size))
    network.load_state_dict(state("ResNet12", 3001))
    return network.to(dtype)


def evaluated() -> Iterator[tuple[str, float]]:
    """Features in evaluation, float32."""
    for size in (32, 84):
        recorded = load("metaoptnet", f"resnet12_eval_{size}")
        images = torch.from_numpy(recipes.images(int(recorded["input_seed"]), 2, size))
        with torch.no_grad():
            features = resnet12(size, torch.float32).eval()(images)
        yield f"ResNet-12 {size} px, float32: features", relative_error(features.numpy(), recorded["embedding"])
    for name in SMALL:
        recorded = load("metaoptnet", name)
        for size in (32, 84):
            images = torch.from_numpy(recipes.images(int(recorded[f"input_seed_{size}"]), 2, size))
            features = small(name, size).eval()(images)
            error = relative_error(features.detach().numpy(), recorded[f"embedding_eval_{size}"])
            yield f"{name} {size} px, float32: features", error


def trained() -> Iterator[tuple[str, float]]:
    """ResNet-12 in training mode without drop, float64."""
    recorded = load("metaoptnet", "resnet12_train_nodrop_32")
    network = resnet12(32, torch.float64).train()
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout | DropBlock):
            module.eval()
    images = torch.from_numpy(recipes.images(int(recorded["input_seed"]), 4, 32)).double().requires_grad_()
    matrix = np.random.RandomState(int(recorded["weight_matrix_seed"])).randn(4, 2560).astype(np.float32)
    features = network(images)
    (features * torch.from_numpy(matrix)).sum().backward()
    found = {"embedding": features, "grad_input": images.grad, "grad_conv1": network.get_parameter(CONV1).grad}
    for name, tensor in found.items():
        assert tensor is not None
        error = relative_error(tensor.detach().numpy(), recorded[f"{name}_f64"])
        yield f"ResNet-12 32 px training, float64: {name}", error


def recipe() -> Iterator[tuple[str, float]]:
    """Loss, its gradient, learning rates, DropBlock's rates."""
    recorded = load("metaoptnet", "loss_lr")
    for smoothing in (0.0, 0.1, 0.2):
        logits = torch.tensor(recorded["logits"], requires_grad=True)
        loss = cross_entropy(logits, torch.tensor(recorded["labels"]), smoothing).mean()
        loss.backward()
        assert logits.grad is not None
        yield f"loss, smoothing {smoothing}", relative_error(loss.detach().numpy(), recorded[f"loss_eps{smoothing}"])
        yield f"its gradient, {smoothing}", relative_error(logits.grad.numpy(), recorded[f"grad_eps{smoothing}"])
    rates = np.array([learning_rate(0.1, epoch, official=True) for epoch in range(60)])
    yield "learning rates of 60 epochs", relative_error(rates, recorded["lr_per_epoch_1_to_60"])
    rows = load("metaoptnet", "dropblock")["gamma_table"]
    gammas = []
    for block_size, side, forwards, _ in rows:
        drop = DropBlock(int(block_size))
        drop.forwards.fill_(int(forwards))
        gammas.append(drop.gamma(int(side), int(side)).item())
    yield "DropBlock's gamma", relative_error(np.array(gammas), rows[:, 3])


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in table():
        print(line)
    for name, error in itertools.chain(evaluated(), trained(), recipe()):
        print(f"{name:50} {error:.1e}")
