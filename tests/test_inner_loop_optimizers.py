"""Rules plug in: one that is defined in a file of its own trains, resumes, is saved and is listed in --help."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import train_maml_system
import utils.options as options_module
from experiment_builder import experiment_folder
from few_shot_learning_system import FIRST_ORDER
from inner_loop_optimizers import InnerLoop, Rule, State, Weights, register
from tests.registries import forgotten_afterwards
from tests.test_few_shot_learning_system import tiny_batch, tiny_model
from utils import checkpoints
from utils.errors import UserError
from utils.options import Options, add_options, command_line_parser, opt, parse_args
from utils.synthetic import write_dataset


class DecayOptions(Options):
    decay_test: bool = opt(False, "Decay: multiply weights by a learned factor, which the task sees again as its state")
    decay_start: float = opt(0.9, "Decay: the factor at the start", at_least=0)


class Decay(Rule):
    flag = "decay_test"

    def __init__(self, loop: InnerLoop, options: DecayOptions) -> None:
        super().__init__(loop, options)
        self.factor = torch.nn.Parameter(torch.tensor(options.decay_start))

    def start(self, weights: Weights, support_loss: Any) -> tuple[Weights, State]:
        return weights, {"factor": self.factor.expand(len(next(iter(weights.values()))))}

    def before_step(self, weights: Weights, state: State, step: int) -> Weights:
        return {name: torch.einsum("t,t...->t...", state["factor"], weight) for name, weight in weights.items()}

    def update_state(self, state: State, by_state: State, gradients: Weights) -> State:
        return {"factor": state["factor"] - 0.01 * by_state["factor"]}


class MomentumOptions(Options):
    momentum_test: bool = opt(False, "Momentum: inner steps follow a running sum of the gradients")


class Momentum(Rule):
    """A state that the support loss does not depend on, and a step that needs it."""

    flag, sets_rate = "momentum_test", True

    def start(self, weights: Weights, support_loss: Any) -> tuple[Weights, State]:
        return weights, {name: torch.zeros_like(weight) for name, weight in weights.items()}

    def update(self, weights: Weights, gradients: Weights, state: State, step: int) -> Weights:
        sums = self.update_state(state, {}, gradients)
        return {name: weight - 0.01 * sums[name] for name, weight in weights.items()}

    def update_state(self, state: State, by_state: State, gradients: Weights) -> State:
        return {name: 0.9 * state[name] + gradient for name, gradient in gradients.items()}


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """Register the rules as a file of the user's would, while these tests run."""
    with forgotten_afterwards():
        add_options(DecayOptions)
        register(Decay)
        add_options(MomentumOptions)
        register(Momentum)
        yield


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


@pytest.mark.parametrize("others", [{}, {"contextual_grad": True}, {"checkpoint_inner_steps": True}], ids=str)
def test_a_step_may_follow_a_running_sum_of_the_gradients(others: dict[str, Any]) -> None:
    model = tiny_model(momentum_test=True, second_order=False, **others)
    tasks = model._to_device(tiny_batch())
    first, second = model.inner_loop(tasks.x_support, tasks.y_support, 2, FIRST_ORDER)
    for name, weight in second.used.items():
        moved = 0.01 * (0.9 * first.gradients[name] + second.gradients[name])
        torch.testing.assert_close(second.weights[name], weight - moved)
    model.run_train_iter(tiny_batch(), 0)
    model.run_validation_iter(tiny_batch())


def test_a_plug_in_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "_pending", ["shrnk"])
    with pytest.raises(UserError, match=r"PLUGINS in utils/options\.py names 'shrnk'"):
        parse_args([])
