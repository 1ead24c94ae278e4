"""JSON files of the official CxGrad, MAML++ and ALFA programs: every key with every value that they hold."""

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import train_maml_system
from tests.golden import facts
from utils.options import DEAD_KEYS, Options, parse_args

SPELLED = {"ResNet12": "ResNet-12"}  # otherwise a value is taken as it stands
NEEDS = {"random_init": {"alfa": True}}  # keys that their files hold beside others
# What makes an official file one of a method; the other keys take each of their values in turn.
METHODS: dict[str, dict[str, Any]] = {
    "CxGrad": {"contextual_grad": True, "alfa": False, "random_init": False, "backbone": "4-CONV"},
    "MAML": {"contextual_grad": False, "alfa": False, "random_init": False},
    "MAML++": {
        "contextual_grad": False,
        "alfa": False,
        "random_init": False,
        "per_step_bn_statistics": True,
        "learnable_per_layer_per_step_inner_loop_learning_rate": True,
        "use_multi_step_loss_optimization": True,
        "second_order": "true",
    },
    "ALFA": {
        "contextual_grad": False,
        "alfa": True,
        "random_init": False,
        "learnable_per_layer_per_step_inner_loop_learning_rate": False,
    },
    "ALFA from random weights": {
        "contextual_grad": False,
        "alfa": True,
        "random_init": True,
        "learnable_per_layer_per_step_inner_loop_learning_rate": False,
    },
}
SHAPES = {"omniglot_dataset": (28, 1)}  # pixels and channels; of the other data sets 84, 3

Read = Callable[[dict[str, Any]], tuple[Options, list[str]]]


@pytest.fixture(scope="session")
def listed() -> dict[str, list[Any]]:
    """Every key of the 48 files with its values."""
    texts = facts("official_json_keys")
    return {key: [json.loads(text) for text in values] for key, values in texts.items()}


@pytest.fixture
def read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Read:
    """Return the options in a file that holds some values, and the keys that warnings name."""

    def read(values: dict[str, Any]) -> tuple[Options, list[str]]:
        caplog.clear()
        file = tmp_path / "official.json"
        file.write_text(json.dumps(values))
        options = parse_args(["--name_of_args_json_file", str(file)])
        return options, [record.getMessage().split("'")[1] for record in caplog.records]

    return read


def spellings(value: Any) -> Iterator[Any]:
    """The value as it stands, and as the text that the official programs' own files have in its place."""
    yield value
    if isinstance(value, bool):
        yield from (str(value), str(value).lower())
    elif isinstance(value, (int, float)):
        yield from (str(value), float(value))


def whole_file(listed: dict[str, list[Any]], method: str, dataset: str, shot: int, turn: int) -> dict[str, Any]:
    """A file with every key of the list."""
    size, channels = SHAPES.get(dataset, (84, 3))
    values = {key: values[turn % len(values)] for key, values in listed.items()}
    task = {"dataset_name": dataset, "dataset_path": dataset, "num_samples_per_class": shot, "image_channels": channels}
    return values | task | {"image_height": size, "image_width": size} | METHODS[method]


def test_every_value_of_the_official_files_keeps_its_meaning(listed: dict[str, list[Any]], read: Read) -> None:
    """A key has its value's effect, or one warning says that it has none."""
    for key, values in listed.items():
        for value in values:
            for spelt in spellings(value):
                options, warned = read(NEEDS.get(key, {}) | {key: spelt})
                assert warned == [key] * (key in DEAD_KEYS), (key, spelt)
                expected = SPELLED.get(value, value) if isinstance(value, str) else value
                assert key in DEAD_KEYS or getattr(options, key) == expected, (key, spelt)


def test_whole_official_files_are_taken(listed: dict[str, list[Any]], read: Read) -> None:
    made = itertools.product(METHODS, listed["dataset_name"], listed["num_samples_per_class"])
    for turn, (method, dataset, shot) in enumerate(made):
        values = whole_file(listed, method, dataset, shot, turn)
        options, warned = read(values)
        assert sorted(warned) == sorted(listed.keys() & DEAD_KEYS.keys())
        for key in values.keys() - DEAD_KEYS.keys() - {"backbone", "second_order"}:
            assert getattr(options, key) == values[key], (method, key)
    assert turn + 1 >= 48


@pytest.mark.parametrize("where", [-2, -1, "latest", "from_scratch", 7])
def test_a_file_cannot_say_where_a_run_stands(where: int | str, read: Read) -> None:
    """The official programs skip the key in a file, so that a run goes on from its latest checkpoint."""
    options, warned = read({"continue_from_epoch": where})
    assert (options.continue_from_epoch, warned) == ("latest", ["continue_from_epoch"])


@pytest.mark.parametrize("method", ["CxGrad", "ALFA"])
def test_a_whole_official_file_runs(
    method: str, listed: dict[str, list[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "official.json"
    file.write_text(json.dumps(whole_file(listed, method, "omniglot_dataset", 1, 0)))
    train_maml_system.main(["--name_of_args_json_file", str(file), "--gpu", "cpu", "--dry_run", "true"])
    assert capsys.readouterr().out.endswith("dry run: trained, resumed, tested and cross-tested\n")
