"""Options: precedence, types, and errors that name the option and the nearest right one."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils.errors import UserError
from utils.options import Options, all_fields, command_line_parser, declaration, parse_args


def test_command_line_wins_over_json_which_wins_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"batch_size": 7, "seed": "3", "second_order": "False"}))
    options = parse_args(["--name_of_args_json_file", str(file), "--batch_size", "2"])
    assert (options.batch_size, options.seed, options.second_order) == (2, 3, False)
    assert options.cnn_num_filters == Options().cnn_num_filters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contxtual_grad", "true"], r"there is no option '--contxtual_grad'; did you mean '--contextual_grad'\?"),
        (["--num_sample_per_class=5"], r"did you mean '--num_samples_per_class'\?"),
        (["--batch_size", "many"], r"--batch_size is 'many'; it takes a whole number"),
        (["--batch_size", "2.5"], r"--batch_size is '2.5'; it takes a whole number"),
        (["--batch_size", "0"], r"--batch_size is 0; it must be at least 1"),
        (["--second_order", "yes"], r"--second_order is 'yes'; it takes true or false"),
        (["--normalization", "mean"], r"--normalization is 'mean'; it is one of unit, channel"),
        (["--top_n_models", "6"], r"--top_n_models 6 needs more checkpoints than --max_models_to_save 5 keeps"),
        (["--min_learning_rate", "0.1"], r"--min_learning_rate 0.1 is above --meta_learning_rate 0.001"),
        (["--continue_from_epoch", "last"], r"--continue_from_epoch is 'last': latest, from_scratch or a number"),
        (["--train_seed", "-1"], r"--train_seed is -1; it must be from 0"),
        (["--meta_learning_rate", "nan"], r"--meta_learning_rate is nan; it must be a number from 0 up"),
        (["--image_channels", "2"], r"--image_channels is 2"),
        (["--num_evaluation_tasks", "1"], r"is 1; it must be at least 2 \(.*one task has no confidence interval"),
        (["stray"], r"'stray' belongs to no option"),
    ],
)
def test_bad_options_are_named(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_args(arguments)


@pytest.mark.parametrize(
    "option", ["--per_step_bn_statistics", "--learnable_per_layer_per_step_inner_loop_learning_rate"]
)
def test_more_evaluation_steps_than_learned_values_is_a_contradiction(option: str) -> None:
    with pytest.raises(UserError, match=r"one value per training step \(5\)"):
        parse_args([option, "true", "--number_of_evaluation_steps_per_iter", "10"])
    parse_args(["--number_of_evaluation_steps_per_iter", "10"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"batch_sise": 3}', r"options.json: there is no option 'batch_sise'; did you mean 'batch_size'\?"),
        ("{", r"options.json is not JSON"),
        ("[1]", r"must hold one JSON object"),
        ('{"batch_size": [1]}', r"--batch_size is \[1\]; it takes a whole number"),
        ('{"batch_size": true}', r"--batch_size is True; it takes a whole number"),
        ('{"total_epochs": 1e400}', r"--total_epochs is inf; it takes a whole number"),
        ('{"seed": null}', r"--seed needs a value"),
    ],
)
def test_bad_json_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "options.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        parse_args(["--name_of_args_json_file", str(file)])


def test_official_json_files_run_and_dead_keys_give_one_warning_each(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Keys of the official CxGrad, MAML++ and ALFA files, among them those that their programs never read."""
    dead = {"weight_decay": 0.0, "evalute_on_test_set_only": False, "gpu_to_use": 0, "dropout_rate_value": 0.0}
    dead |= {"task_learning_rate": 0.1, "continue_from_epoch": -2, "num_of_gpus": 1, "samples_per_iter": 1}
    live = {
        "backbone": "4-CONV",
        "contextual_grad": True,
        "second_order": "true",
        "init_inner_loop_weight_decay": 0.0005,
    }
    file = tmp_path / "official.json"
    file.write_text(json.dumps({**dead, **live}))
    options = parse_args(["--name_of_args_json_file", str(file), "--second_order", "false"])
    assert (options.contextual_grad, options.second_order, options.continue_from_epoch) == (True, False, "latest")
    named = [record.getMessage().split("'")[1] for record in caplog.records]
    assert sorted(named) == sorted(dead)


def test_missing_json_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the options file .*absent.json"):
        parse_args(["--name_of_args_json_file", str(tmp_path / "absent.json")])


def test_saved_options_can_be_read_back(tmp_path: Path) -> None:
    options = parse_args(["--lr_schedule", "per_epoch", "--gpu", "cpu", "--meta_learning_rate", "3e-3"])
    file = tmp_path / "options.json"
    file.write_text(json.dumps(dataclasses.asdict(options)))
    again = parse_args(["--name_of_args_json_file", str(file)])
    assert dataclasses.replace(again, name_of_args_json_file=None) == options


def test_objects_may_hold_text_and_other_attributes() -> None:
    options = Options.from_object(SimpleNamespace(batch_size="3", second_order="true", unrelated=1))
    assert (options.batch_size, options.second_order) == (3, True)


def test_every_option_has_a_meaning() -> None:
    text = command_line_parser().format_help()
    for field in all_fields():
        assert f"--{field.name} " in text and len(declaration(field.name).meaning) > 10


def test_other_names_of_an_option_are_good_in_files_and_old_checkpoints(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"eps": 0.2, "head": "Ridge", "test_dataset": "CUB"}))
    options = parse_args(["--name_of_args_json_file", str(file)])
    assert (options.learner, options.label_smoothing, options.test_dataset_list) == ("head", 0.2, ["CUB"])
