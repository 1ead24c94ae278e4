"""Our numbers for every recorded array of MetaOptNet's heads, and their errors. Run as a script, it prints the table.

    python tests/golden_metaoptnet.py

An error is max|ours - recorded| / max|recorded| of an array; of duals it is max|ours - recorded|. The `exact` arrays
are float64 solutions of the heads' mathematical problems by other means, see the golden README.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from classification_heads import ClassificationHead, Episode, one_hot_of_ranks
from qp_solvers import solve_crammer_singer

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "metaoptnet"
CASES = ("5w1s", "5w5s", "3w4s")
EXACT: dict[str, dict[str, dict[str, Any]]] = {  # head -> suffix of the arrays -> options
    "ProtoNet": {"default": {}, "unnormalized": {"normalize": False}, "exact": {}},
    "R2D2": {"exact": {}},
    "Ridge": {"exact": {}, "lam1_exact": {"lambda_reg": 1.0}},
    "SVM-CS": {"exact": {}, "C0.01_exact": {"C_reg": 0.01}},
    "SVM-He": {"tiled_exact": {}},
    "SVM-WW": {"symmetric_exact": {}},
}
QPTH = {
    f"{precision}_it{passes}": (precision == "f64", passes) for precision in ("f32", "f64") for passes in (3, 15, 20)
}


class Golden:
    """One recorded head and case; `tiled` arrays have their support in another order."""

    def __init__(self, head: str, case: str) -> None:
        self.head, self.case = head, case
        self.arrays = dict(np.load(GOLDEN / f"heads_{head}_{case}.npz", allow_pickle=False))

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

    def dual_error(self, suffix: str, dtype: torch.dtype, **options: Any) -> float:
        """Of SVM-CS, absolute."""
        query, support, labels, way = self.episode(dtype)
        one_hot = one_hot_of_ranks(labels, way)
        dual = solve_crammer_singer(Episode(query, support, one_hot).kernel(), one_hot, **options).dual
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in table():
        print(line)
