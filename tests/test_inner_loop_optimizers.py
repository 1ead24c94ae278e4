"""Rules plug in: one that is defined in a file of its own trains, resumes, is saved and is listed in --help."""

from pathlib import Path
from typing import Any

import pytest
import torch

import train_maml_system
from experiment_builder import experiment_folder
from inner_loop_optimizers import InnerLoop, Rule, State, Weights, register
from tests.test_few_shot_learning_system import tiny_batch, tiny_model
from utils import checkpoints
from utils.errors import UserError
from utils.options import Options, add_options, command_line_parser, opt, parse_args
from utils.synthetic import write_dataset


@add_options
class DecayOptions(Options):
    decay_test: bool = opt(False, "Decay: multiply weights by a learned factor, which the task sees again as its state")
    decay_start: float = opt(0.9, "Decay: the factor at the start", at_least=0)


@register
class Decay(Rule):
    flag = "decay_test"

    def __init__(self, loop: InnerLoop, options: DecayOptions) -> None:
        super().__init__(loop, options)
        self.factor = torch.nn.Parameter(torch.tensor(options.decay_start))

    def start(self, weights: Weights, support_loss: Any) -> tuple[Weights, State]:
        return weights, {"factor": self.factor.expand(len(next(iter(weights.values()))))}

    def before_step(self, weights: Weights, state: State, step: int) -> Weights:
        return {name: torch.einsum("t,t...->t...", state["factor"], weight) for name, weight in weights.items()}

    def update_state(self, state: State, gradients: State) -> State:
        return {"factor": state["factor"] - 0.01 * gradients["factor"]}


def test_a_rule_of_ones_own_is_an_option_with_help_bounds_and_checks() -> None:
    assert "--decay_test" in command_line_parser().format_help()
    options = parse_args(["--decay_test"])
    assert isinstance(options, DecayOptions) and options.decay_test is True
    with pytest.raises(UserError, match="--decay_start is -1"):
        parse_args(["--decay_test", "--decay_start", "-1"])


@pytest.mark.parametrize("others", [{}, {"alfa": True}, {"contextual_grad": True}, {"second_order": False}], ids=str)
def test_a_rule_of_ones_own_learns_with_others_whatever_the_cut_of_the_meta_batch(others: dict[str, Any]) -> None:
    gradients = []
    for tasks_per_pass in (1, 2):
        model = tiny_model(decay_test=True, tasks_per_pass=tasks_per_pass, **others)
        model.run_train_iter(tiny_batch(), 0)
        assert torch.equal(model.run_validation_iter(tiny_batch())[1][0], model.run_validation_iter(tiny_batch())[1][0])
        gradients.append(dict(model.rules.named_parameters())["Decay.factor"].grad)
    assert gradients[0] is not None and gradients[0] != 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_rule_of_ones_own_trains_resumes_exactly_and_is_tested(tmp_path: Path) -> None:
    write_dataset(tmp_path / "TOYS", 3, 3, (16, 16))
    line = ["--dataset_name", "TOYS", "--dataset_dir", str(tmp_path), "--gpu", "cpu", "--decay_test",
            "--batch_size", "1",
            "--image_height", "16", "--image_width", "16", "--num_stages", "2", "--cnn_num_filters", "3",
            "--num_classes_per_set", "3", "--num_target_samples", "1", "--total_iter_per_epoch", "2",
            "--num_evaluation_tasks", "2", "--experiments_dir", str(tmp_path)]  # fmt: skip
    for name, runs in (("whole", ("2",)), ("resumed", ("1", "2"))):
        for epochs in runs:
            train_maml_system.main([*line, "--experiment_name", name, "--total_epochs", epochs])
    folder = experiment_folder(parse_args([*line, "--experiment_name", "whole"]))
    whole, resumed = (checkpoints.load(folder.with_name(name) / "saved_models" / "latest")["network"] for name in
                      ("whole", "resumed"))  # fmt: skip
    assert whole["rules.Decay.factor"] != 0.9
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    with pytest.raises(UserError, match=r"--decay_start is 0\.8, but the run was started with 0\.9"):
        train_maml_system.main([*line, "--experiment_name", "whole", "--total_epochs", "3", "--decay_start", "0.8"])
    assert (folder / "logs" / "test_summary.csv").exists()
