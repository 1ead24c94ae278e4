"""Weights of the official CxGrad, MAML++, ALFA and MetaOptNet programs, and what their names mean here."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from utils import checkpoints
from utils.errors import UserError

PIXELS_OF_MAP = {1: 28, 2: 32, 5: 84}  # side of the last map of four pooled stages -> usual side of the images

# Options of rules, and the part of an official name that shows that a rule was chosen.
SIGNS = {
    "contextual_grad": "gamma_generator.0.weight",
    "learnable_per_layer_per_step_inner_loop_learning_rate": "names_learning_rates",
    "alfa": "regularizer.0.weight",
    "random_init": "names_beta_dict_per_param",
    "attenuate": "attenuator.0.weight",
}
# Official beginnings of names -> ours; our own checkpoints hold the official ones too. Other names are the same.
OURS = {
    "gamma_generator.": "rules.CxGrad.generator.",
    "attenuator.": "rules.L2F.attenuator.",
    "regularizer.": "rules.ALFA.generator.",
    "inner_loop_optimizer.names_learning_rates_dict.": "rules.LSLR.rates.",
    "inner_loop_optimizer.names_alpha_dict.": "rules.ALFA.rates.",
    "inner_loop_optimizer.names_beta_dict.": "rules.ALFA.decays.",
    "inner_loop_optimizer.names_beta_dict_per_param.": "rules.ALFA.decay_factors.",
    "inner_loop_optimizer.rates.": "rules.MetaSGD.rates.",  # no official program: our earlier checkpoints
}
# Our earlier names of ResNet-12's layers; names in a ParameterDict have '-' for '.'.
EARLIER_RESNET = re.compile(r"block(\d+)_(?:conv(\d)|shortcut)([.-])(conv|norm_layer)(?=\3)")


def to_official(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same weights under the official names."""
    return _renamed(weights, {ours: official for official, ours in OURS.items()})


def _renamed(weights: Mapping[str, Tensor], beginnings: Mapping[str, str]) -> dict[str, Tensor]:
    def renamed(name: str) -> str:
        old = next((beginning for beginning in beginnings if name.startswith(beginning)), "")
        return beginnings.get(old, "") + name.removeprefix(old)

    return {renamed(name): tensor for name, tensor in weights.items()}


def _resnet_layer(earlier: re.Match[str]) -> str:
    block, number, dot, kind = earlier.groups()
    is_norm = kind == "norm_layer"
    layer = f"{'bn' if is_norm else 'conv'}{int(number) + 1}" if number else f"downsample{dot}{int(is_norm)}"
    return f"layer{int(block) + 1}{dot}{layer}"


def load_official(model: nn.Module, weights: Mapping[str, Any] | str | Path) -> None:
    """Copy official weights into `model`: a state dict with or without ``module.`` prefixes, a checkpoint or its file.

    A learner's `weights_in` finds them in a checkpoint, CxGrad's and MetaOptNet's alike. Running statistics that the
    model does not keep are left out. Raises UserError when a parameter is missing, is not one of the model's, or has
    another shape; the model is then unchanged.
    """
    state = weights if isinstance(weights, Mapping) else checkpoints.load(Path(weights))
    if {"network", "embedding"} & state.keys():
        learner: Any = model
        state = learner.weights_in(state)
    present = {EARLIER_RESNET.sub(_resnet_layer, name): tensor for name, tensor in without_prefix(state).items()}
    given, own = to_official(present), to_official(model.state_dict())
    given = {name: tensor for name, tensor in given.items() if name in own or ".running_" not in name}
    problems = [f"it lacks {name}" for name in own if name not in given]
    problems += [f"it has {name}, which the model has not" for name in given if name not in own]
    shapes = {name: (tuple(given[name].shape), tuple(own[name].shape)) for name in own if name in given}
    problems += [f"{name} is {its}, the model's is {ours}" for name, (its, ours) in shapes.items() if its != ours]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise UserError("another architecture: " + "; ".join(problems[:3]) + more)
    model.load_state_dict(_renamed(given, OURS))


def without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same weights as from a model that is not wrapped in DataParallel."""
    return {name.removeprefix("module."): tensor for name, tensor in weights.items()}


def infer_options(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return what the names and shapes of official weights show of the options of their training.

    The image side is taken to be a usual one; raises UserError where none fits, or where the network is not a 4-conv.
    """
    given = without_prefix(weights)
    first, linear = (given.get(f"classifier.layer_dict.{n}") for n in ("conv0.conv.weight", "linear.weights"))
    if first is None or linear is None or (first.dim(), linear.dim()) != (4, 2) or not len(first):
        raise UserError("these are not the weights of an official 4-conv network; say how it was trained with --config")
    side = round((linear.shape[1] / len(first)) ** 0.5)
    if side not in PIXELS_OF_MAP:
        raise UserError(f"a last map of {side}x{side} does not show the size of the images; say it with --config")
    layer = "classifier.layer_dict.conv0.norm_layer"
    norm = given.get(f"{layer}.running_mean", given.get(f"{layer}.weight", first))
    found: dict[str, Any] = {
        "num_classes_per_set": len(linear),
        "image_channels": first.shape[1],
        "image_height": PIXELS_OF_MAP[side],
        "image_width": PIXELS_OF_MAP[side],
        "cnn_num_filters": len(first),
        "num_stages": sum(name.endswith(".conv.weight") for name in given),
        "use_bias": "classifier.layer_dict.conv0.conv.bias" in given,
        "per_step_bn_statistics": norm.dim() == 2,
        **{option: any(sign in name for name in given) for option, sign in SIGNS.items()},
    }
    if found["contextual_grad"]:
        found["num_context_params"] = len(given["gamma_generator.0.bias"])
    rates = [t for n, t in given.items() if "names_learning_rates_dict" in n or "names_alpha_dict" in n]
    steps = len(rates[0]) - 1 if rates else len(norm) if found["per_step_bn_statistics"] else None
    if steps:
        found |= {"number_of_training_steps_per_iter": steps, "number_of_evaluation_steps_per_iter": steps}
    return found


def infer_embedding(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the options that official MetaOptNet weights of an embedding show; UserError if it is no known one."""
    given = without_prefix(weights)
    if "layer1.0.conv1.weight" in given:
        widths = "-".join(str(len(given[f"layer{i}.0.conv1.weight"])) for i in (1, 2, 3, 4))
        return {"backbone": "ResNet-12", "resnet_widths": widths}
    for name, backbone in (("encoder.0.block.0.weight", "conv64"), ("block1.0.weight", "R2D2Net")):
        if name in given:
            return {"backbone": backbone}
    raise UserError("these are not the weights of a MetaOptNet embedding: ProtoNet's, R2D2's or ResNet-12's")
