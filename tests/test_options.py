"""Options: precedence, types, and errors that name the option and the nearest right one."""

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import pytest

import utils.options as options_module
from classification_heads import head_options
from utils.errors import UserError
from utils.options import (
    Options,
    Policy,
    add_check,
    add_choice,
    add_options,
    all_defaults,
    changed,
    command_line_parser,
    declaration,
    differences,
    opt,
    parse_args,
    unmet,
)


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
        (["--batch_size"], r"--batch_size.* expected one argument \(--help lists all\)"),
        (["--batch_size", "9" * 5000], r"--batch_size is '9{30}.*; it takes a whole number"),
        (["--batch_size", "1" + "0" * 300], r"--batch_size is 10{30}.*; it must be from 1 to 1000000000 "),
        (["--num_classes_per_set", "1"], r"--num_classes_per_set is 1; it must be from 2 to 10000 "),
        (["--resnet_widths", "9" * 5000, "--backbone", "ResNet-12"], r"--resnet_widths is '9{30}.*; it takes numbers"),
        (["--test_shots", "1,²"], r"--test_shots is '1,²'; it takes numbers such as 1,5"),
        (["--experiment_name", ""], r"--experiment_name is ''; it takes text that can stand in"),
        (["--dataset_name", "a\nb"], r"--dataset_name is 'a\\nb'; it takes text that can stand in"),
        (["--learner", "HEAD", "--head", "Rigde"], r"--head is 'Rigde'; it is one of ProtoNet"),
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
        ("[" * 100_000, r"options.json is not JSON: it is nested too deeply"),
        ('{"batch_size": 1%s}' % ("0" * 400), r"--batch_size is 10{30}.*; it takes a whole number"),
        ('{"experiment_name": "a\\u0000b"}', r"--experiment_name is 'a.x00b'; it takes text that can stand in"),
        (
            '{"experiment_name": "\\ud800"}',
            r"--experiment_name is '.ud800'; it takes text that can stand in",
        ),
    ],
)
def test_bad_json_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "options.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        parse_args(["--name_of_args_json_file", str(file)])


def test_of_an_option_that_json_sets_twice_the_last_value_counts_but_for_the_command_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in the official programs, whose files may hold such pairs; eps is another name of label_smoothing."""
    file = tmp_path / "options.json"
    file.write_text('{"head": "Ridge", "label_smoothing": 0.1, "eps": 0.2, "seed": 1, "seed": 2}')
    words = ["--name_of_args_json_file", str(file)]
    options = parse_args(words)
    assert (options.label_smoothing, options.seed) == (0.2, 2)
    assert [record.getMessage() for record in caplog.records] == [
        "'label_smoothing' is set twice, to 0.1 and to 0.2; the latter counts",
        "'seed' is set twice, to 1 and to 2; the latter counts",
    ]
    assert parse_args([*words, "--label_smoothing", "0.3"]).label_smoothing == 0.3


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


def test_an_official_object_may_say_where_its_run_stands() -> None:
    """Its continue_from_epoch is -2, -1 or a number, as in the official JSON files, where it has no effect either."""
    assert Options.from_object(SimpleNamespace(continue_from_epoch=-2)).continue_from_epoch == "latest"


def test_every_option_has_a_meaning() -> None:
    text = command_line_parser().format_help()
    for name in all_defaults():
        assert f"--{name} " in text and len(declaration(name).meaning) > 10


def test_other_names_of_an_option_are_good_in_files_and_old_checkpoints(tmp_path: Path) -> None:
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"eps": 0.2, "head": "Ridge", "test_dataset": "CUB"}))
    options = parse_args(["--name_of_args_json_file", str(file)])
    assert (options.learner, options.label_smoothing, options.test_dataset_list) == ("head", 0.2, ["CUB"])


# --- declarations --------------------------------------------------------------------------------------------------


def another(name: str, value: Any) -> Any:
    """A value of the option that is not `value`."""
    if choices := declaration(name).choices:
        return next((choice for choice in choices if choice != value), "another")
    if isinstance(value, bool) or value is None:
        return not value
    return f"{value}x" if isinstance(value, str) else value + 1


@pytest.mark.parametrize("purpose", ["resume", "test"])
def test_every_option_has_a_policy_which_is_applied(purpose: Literal["resume", "test"]) -> None:
    """A run that had another value is found out, unless the declaration says to ignore it or it has no effect."""
    lines: list[list[str]] = [
        [],
        ["--head", "SVM", "--svm_solver", "qpth", "--network", "ResNet"],
        ["--head", "Ridge"],
        ["--alfa", "--on_nonfinite", "skip"],
    ]
    never_idle = set()
    for now in map(parse_args, lines):
        for name in all_defaults():
            policy = getattr(declaration(name), purpose)
            assert policy in get_args(Policy), name
            before = dataclasses.asdict(now) | {name: another(name, getattr(now, name))}
            idle = unmet(declaration(name).only, now) is not None
            expected = [] if policy == "ignore" or idle else [(name, policy)]
            assert [(one.name, one.policy) for one in differences(before, now, purpose)] == expected, name
            never_idle |= set() if idle else {name}
    assert never_idle == set(all_defaults())


def test_an_option_that_an_older_checkpoint_does_not_know_counts_as_its_default() -> None:
    before = dataclasses.asdict(Options())
    del before["max_pooling"]
    assert not differences(before, Options(), "resume")
    assert [one.name for one in differences(before, Options(max_pooling=False), "resume")] == ["max_pooling"]
    assert not differences(before | {"dataset_name": "mini-ImageNet"}, Options(), "resume")
    assert [one.name for one in differences(before | {"dataset_name": 3}, Options(), "resume")] == ["dataset_name"]


def test_a_flag_alone_means_true() -> None:
    assert parse_args(["--alfa", "--seed", "3"]) == parse_args(["--alfa", "true", "--seed", "3"])
    assert parse_args(["--seed", "3", "--alfa"]) == Options(seed=3, alfa=True)  # type: ignore[call-arg]
    assert parse_args(["--dry-run"]).dry_run
    with pytest.raises(UserError, match="--alfa is 'stray'; it takes true or false"):
        parse_args(["--alfa", "stray"])


def test_regularisation_of_heads_is_reachable() -> None:
    options = parse_args(["--head", "SVM", "--C_reg", "0.5"])
    assert head_options(options) == {"solver": "structured", "C_reg": 0.5}
    other = dataclasses.asdict(options) | {"C_reg": 1.0}
    assert [(one.name, one.policy) for one in differences(other, options, "test")] == [("C_reg", "warn")]
    assert head_options(parse_args(["--head", "Ridge", "--lambda_reg", "10"])) == {"lambda_reg": 10}
    with pytest.raises(UserError, match="--C_reg has no effect with --head Ridge; it needs --head SVM-CS or"):
        parse_args(["--head", "Ridge", "--C_reg", "0.5"])
    with pytest.raises(UserError, match=r"--C_reg is 0\.0; it must be a number from 1e-09 up"):
        parse_args(["--head", "SVM", "--C_reg", "0"])


def test_changes_reset_what_they_make_idle() -> None:
    trained = parse_args(["--head", "SVM", "--svm_solver", "qpth", "--svm_max_iter", "5"])
    assert head_options(changed(trained, {"svm_max_iter": 3})) == {"solver": "qpth", "max_iter": 3}
    assert head_options(changed(trained, {"head": "Ridge"})) == {}
    with pytest.raises(UserError, match="--svm_max_iter has no effect with --svm_solver structured"):
        changed(trained, {"svm_solver": "structured", "svm_max_iter": 3})


@pytest.fixture
def plug_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test adds to the options is gone after it."""
    Options()  # the project's own plug-ins stay
    monkeypatch.setattr(options_module, "_current", options_module._current)
    monkeypatch.setattr(options_module, "_checks", [*options_module._checks])
    monkeypatch.setattr(declaration("head"), "choices", dict(declaration("head").choices))


@pytest.mark.usefixtures("plug_ins")
def test_a_plug_in_declares_options_choices_and_checks_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Options()

    @add_options
    class OfTheRule(Options):
        sharpness: float = opt(2.0, "how sharp the made-up rule is", at_least=1, only={"learner": "gradient"})

    add_choice("head", "Nearest", only={"learner": "head"})

    @add_check
    def even(options: Any) -> Iterator[str]:
        if options.sharpness % 2:
            yield f"--sharpness {options.sharpness:g} is odd"

    options = parse_args(["--sharpness", "4"])
    assert isinstance(options, OfTheRule) and options.sharpness == 4 and options.batch_size == Options().batch_size
    assert dataclasses.replace(options, seed=1).sharpness == copy.deepcopy(options).sharpness == 4
    assert dataclasses.asdict(options)["sharpness"] == 4
    for older in (Options.from_object(before), dataclasses.replace(before, seed=1)):
        assert isinstance(older, OfTheRule) and older.sharpness == 2
    assert [one.name for one in differences({"sharpness": 4.0}, Options(), "resume")] == ["sharpness"]
    assert parse_args(["--head", "nearest"]).head == "Nearest"
    for words, message in (
        (["--sharpness", "0.5"], "--sharpness is 0.5; it must be a number from 1 up"),
        (["--sharpness", "3"], "--sharpness 3 is odd"),
        (["--head", "Ridge", "--sharpnes", "4"], r"did you mean '--sharpness'\?"),
        (["--learner", "head", "--sharpness", "4"], "--sharpness has no effect with --learner head"),
        (["--head", "Farthest"], "it is one of ProtoNet, .*Nearest"),
    ):
        with pytest.raises(UserError, match=message):
            parse_args(words)
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert "--sharpness FLOAT" in text and "how sharp the made-up rule is [2.0]" in text and "Nearest" in text
    with pytest.raises(ValueError, match="Twice declares what is an option already: seed"):

        @add_options
        class Twice:
            seed: int = opt(1, "the seed again")
