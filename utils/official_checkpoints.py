"""Weights of the official CxGrad program, whose parameter names this project keeps."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from utils import checkpoints
from utils.errors import UserError


def load_official(model: nn.Module, weights: Mapping[str, Tensor] | str | Path) -> None:
    """Copy official weights (a state dict with or without ``module.`` prefixes, or a checkpoint file) into `model`.

    Running statistics that the model does not keep are left out. Raises UserError when a parameter is missing, is not
    one of the model's, or has another shape; the model is then unchanged.
    """
    state: Mapping[str, Tensor] = (
        weights if isinstance(weights, Mapping) else checkpoints.load(Path(weights))["network"]
    )
    given = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    own = model.state_dict()
    given = {name: tensor for name, tensor in given.items() if name in own or ".running_" not in name}
    problems = [f"it lacks {name}" for name in own if name not in given]
    problems += [f"it has {name}, which the model has not" for name in given if name not in own]
    problems += [
        f"{name} is {tuple(given[name].shape)}, the model's is {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError("another architecture: " + "; ".join(problems[:3]) + more)
    model.load_state_dict(given)
