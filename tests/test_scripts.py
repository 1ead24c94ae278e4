"""The experiment scripts: what they pass on, that every option in them is a real one, and that each of them runs.

Most tests put a small program in the place of Python that prints the arguments it was given, one a line.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import train_maml_system
from utils.errors import UserError
from utils.options import Options, parse_args

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "experiment_scripts"
ROWS = sorted(FOLDER.glob("*_5way_*/*.sh"))
HEAD_ROWS = sorted(FOLDER.glob("*_5way/*.sh"))  # trained once, tested 1-shot and 5-shot
GLYPHS = FOLDER / "glyphs_5way_1shot" / "CxGrad_4conv.sh"
# 1-shot with meta-batch 2, as published; other 1-shot rows have 4.
L2F_OF_MINI_IMAGENET = FOLDER / "mini_imagenet_5way_1shot" / "L2F_resnet12.sh"
READ_BY_SCRIPTS = {
    "TEST",
    "TEST_DATASET",
    "TEST_BATCH_SIZE",
    "DATASET_DIR",
    "PYTHON",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
}
DATA_SETS = ["mini_imagenet", "tiered_imagenet", "CIFAR_FS", "FC100", "CUB", "omniglot", "glyphs"]
LSLR = "learnable_per_layer_per_step_inner_loop_learning_rate"

# What makes a method: the options of MAML, and what each method has instead.
PLAIN = {
    LSLR: False,
    "per_step_bn_statistics": False,
    "use_multi_step_loss_optimization": False,
    "lr_schedule": None,
    "init_inner_loop_learning_rate": 0.01,
    "inner_loop_part": "all",
    "contextual_grad": False,
    "meta_sgd": False,
    "alfa": False,
    "random_init": False,
    "attenuate": False,
}
MAML_PLUS_PLUS = {
    LSLR: True,
    "per_step_bn_statistics": True,
    "use_multi_step_loss_optimization": True,
    "lr_schedule": "per_epoch",
    "init_inner_loop_learning_rate": 0.1,
}
METHODS: dict[str, dict[str, object]] = {
    "CxGrad": {"contextual_grad": True},
    "maml": {},
    "MAMLpp": MAML_PLUS_PLUS,
    "ALFA": {"alfa": True},
    "L2F": {"attenuate": True},
    "ALFA_L2F": {"alfa": True, "attenuate": True},
    "ALFA_random_init": {"alfa": True, "random_init": True},
    "ANIL": {"inner_loop_part": "head"},
    "BOIL": {"inner_loop_part": "body"},
    "MetaSGD": {"meta_sgd": True},
}
WITH_RESNET = {
    "maml": ["mini_imagenet", "tiered_imagenet"],
    "L2F": ["mini_imagenet"],
    "ALFA": ["mini_imagenet", "tiered_imagenet", "CIFAR_FS", "FC100"],
}  # where a result is published

RESNET = ["resnet_widths", "tasks_per_pass", "checkpoint_inner_steps"]
ALFA = ["alfa", "init_inner_loop_weight_decay", "random_init"]
# The lines of a row and the options that each may hold, in this order.
LINES = [
    ["dataset_name", "image_height", "image_width", "image_channels", "normalization"],
    ["num_classes_per_set", "num_samples_per_class", "num_target_samples", "batch_size", "rotate_classes"],
    ["backbone", "cnn_num_filters", "num_stages", "max_pooling", *RESNET],
    ["batch_norm", "per_step_bn_statistics", "use_bias"],
    ["inner_loop_part", "number_of_training_steps_per_iter", "number_of_evaluation_steps_per_iter"],
    ["init_inner_loop_learning_rate", LSLR],
    ["contextual_grad", "num_context_params", "context_params_learning_rate", "meta_sgd", *ALFA, "attenuate"],
    ["second_order", "first_order_to_second_order_epoch", "total_epochs", "total_iter_per_epoch"],
    ["use_multi_step_loss_optimization", "multi_step_loss_num_epochs"],
    ["meta_learning_rate", "min_learning_rate", "lr_schedule", "clamp_outer_gradients"],
    ["num_evaluation_tasks", "top_n_models", "seed", "train_seed", "val_seed"],
]
# Heads by the names of their scripts, and where a row with each network is published or asked for.
HEADS = {"MetaOptNet_SVM": "SVM-CS", "MetaOptNet_RR": "Ridge", "ProtoNet": "ProtoNet", "R2D2": "R2D2"}
NETWORKS = {"resnet12": "ResNet-12", "conv64": "conv64", "r2d2net": "R2D2Net"}
FULL = [f"{head}_{network}" for head in ("MetaOptNet_SVM", "MetaOptNet_RR") for network in ("resnet12", "conv64")]
HEADS_OF = {
    "mini_imagenet": FULL,
    "tiered_imagenet": FULL,
    "CIFAR_FS": [*FULL, "ProtoNet_resnet12", "ProtoNet_conv64", "R2D2_r2d2net"],
    "FC100": [*FULL, "ProtoNet_resnet12", "ProtoNet_conv64", "R2D2_r2d2net"],
    "glyphs": ["MetaOptNet_SVM_conv64", "MetaOptNet_RR_conv64", "ProtoNet_conv64"],
}
HEAD_LINES = [
    ["learner", "head", "svm_solver", "svm_on_failure"],
    LINES[0],
    ["augment"],
    LINES[1],
    ["test_way", "val_shot", "val_query", "test_shots"],
    ["backbone", "resnet_widths", "avg_pool", "dropblock_schedule"],
    ["batch_norm", "precision"],
    ["total_epochs", "total_iter_per_epoch"],
    ["meta_learning_rate", "lr_schedule", "outer_weight_decay", "label_smoothing"],
    ["num_evaluation_tasks", "save_epoch", "top_n_models", "seed", "train_seed", "val_seed"],
]
# What a method may change in the rows of one data set.
OF_METHOD = {
    *PLAIN,
    *("use_bias", "min_learning_rate", "multi_step_loss_num_epochs", "clamp_outer_gradients"),
    *("backbone", "cnn_num_filters", "tasks_per_pass", "checkpoint_inner_steps"),
    "experiment_name",
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def method_of(row: Path) -> str:
    return row.stem.rpartition("_")[0]


def data_of(row: Path) -> tuple[str, int]:
    """Data set and shot."""
    name, shot = row.parent.name.split("_5way_")
    return name, int(shot.removesuffix("shot"))


every_row = pytest.mark.parametrize("row", ROWS, ids=name_of)
every_head_row = pytest.mark.parametrize("row", HEAD_ROWS, ids=name_of)


def program(path: Path, *lines: str) -> Path:
    """An executable shell script at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def printer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program(tmp_path_factory.mktemp("printer") / "printer", "printf '%s\\n' \"$@\"")


def call(script: Path | str, *words: str, cwd: Path = ROOT, **variables: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in READ_BY_SCRIPTS}
    environment |= {name: str(value) for name, value in variables.items()}
    return subprocess.run(["bash", str(script), *words], cwd=cwd, env=environment, capture_output=True, text=True)


def passed_on(script: Path | str, *words: str, cwd: Path = ROOT, **variables: object) -> list[str]:
    """The arguments that reached the interpreter."""
    result = call(script, *words, cwd=cwd, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def options_of(arguments: list[str]) -> Options:
    return parse_args(arguments[arguments.index("train_maml_system.py") + 1 :])


@pytest.fixture(scope="session")
def words_of(printer: Path) -> Callable[[Path], list[str]]:
    """What a row hands to Python on a CPU. Each row runs once."""
    known: dict[Path, list[str]] = {}

    def words(row: Path) -> list[str]:
        if row not in known:
            known[row] = passed_on(row, "cpu", PYTHON=printer)
        return known[row]

    return words


def code_of(row: Path) -> list[str]:
    return [line for line in row.read_text().splitlines() if line and not line.startswith("#")]


def options_in(line: str) -> list[str]:
    return [word.removeprefix("--") for word in shlex.split(line) if word.startswith("--")]


def test_every_row_has_its_script() -> None:
    conv = {(data, f"{method}_4conv") for data in DATA_SETS for method in METHODS}
    resnet = {(data, f"{method}_resnet12") for method, data_sets in WITH_RESNET.items() for data in data_sets}
    expected = {f"{data}_5way_{shot}shot/{name}" for data, name in conv | resnet for shot in (1, 5)}
    assert {name_of(row) for row in ROWS} == expected


@every_row
def test_script_is_short_and_opens_with_its_row_accuracy_time_and_commands(row: Path) -> None:
    lines, code = row.read_text().splitlines(), code_of(row)
    header = "\n".join(lines[: lines.index(code[0])])
    network = {"4conv": "4-CONV", "resnet12": "ResNet-12"}[row.stem.rpartition("_")[2]]
    assert 5 <= len(code) <= 15
    assert max(map(len, lines)) <= 120
    assert re.search(rf"^# .+, {network}, .+ 5-way {data_of(row)[1]}-shot.*: .*arXiv \d{{4}}\.\d{{5}}", header, re.M)
    assert "\n# Published accuracy: " in header
    assert "\n# Time and memory: " in header
    assert f"#   bash {row.relative_to(ROOT)} 0\n" in header
    assert f"#   TEST=1 bash {row.relative_to(ROOT)} 0\n" in header
    assert os.access(row, os.X_OK)


@every_row
def test_each_line_holds_one_group_of_options_in_one_order(row: Path) -> None:
    source, opening, *lines, closing, run = code_of(row)
    assert (source, opening) == ('source "$(dirname "${BASH_SOURCE[0]}")/../run.sh"', "row=(")
    assert (closing, run) == (")", 'run_row "$@"')
    for line, group in zip(lines, LINES, strict=True):
        names = options_in(line)
        assert names == [name for name in group if name in names]


@every_row
def test_options_are_real_and_say_what_the_folder_and_file_say(
    row: Path, words_of: Callable[[Path], list[str]]
) -> None:
    options = options_of(words_of(row))
    data, shot = data_of(row)
    assert (options.dataset_name, options.num_classes_per_set, options.num_samples_per_class) == (data, 5, shot)
    assert options.experiment_name == row.stem
    assert options.backbone == {"4conv": "4-CONV", "resnet12": "ResNet-12"}[row.stem.rpartition("_")[2]]
    method = {name: getattr(options, name) for name in PLAIN}
    assert method == PLAIN | METHODS[method_of(row)]
    assert options.has_conv_bias == (method_of(row) == "MAMLpp" or options.alfa or options.attenuate)
    assert (options.second_order, options.first_order_to_second_order_epoch) == (True, -1)
    assert not options.evaluate_on_test_set_only


@pytest.mark.parametrize("data", DATA_SETS)
@pytest.mark.parametrize("shot", [1, 5])
def test_rows_of_one_data_set_differ_only_in_their_method(
    data: str, shot: int, words_of: Callable[[Path], list[str]]
) -> None:
    rows = [row for row in ROWS if data_of(row) == (data, shot) and row != L2F_OF_MINI_IMAGENET]
    first, *others = (asdict(options_of(words_of(row))) for row in rows)
    differing = {name for other in others for name in other if other[name] != first[name]}
    assert differing <= OF_METHOD


def test_no_two_scripts_are_the_same_run(words_of: Callable[[Path], list[str]]) -> None:
    runs = {row: asdict(options_of(words_of(row))) | {"experiment_name": None} for row in ROWS}
    assert len({str(run) for run in runs.values()}) == len(ROWS)


@pytest.mark.parametrize("row", [row for row in ROWS if data_of(row)[0] not in ("glyphs", "omniglot")], ids=name_of)
def test_published_rows_follow_the_published_recipe(row: Path, words_of: Callable[[Path], list[str]]) -> None:
    options = options_of(words_of(row))
    data, shot = data_of(row)
    native = data in ("CIFAR_FS", "FC100")
    assert options.image_shape == ((3, 32, 32) if native else (3, 84, 84))
    assert options.normalization == ("channel" if native else "unit")
    assert (options.cnn_num_filters, options.num_stages, options.num_target_samples) == (48, 4, 15)
    assert options.batch_size == (2 if row == L2F_OF_MINI_IMAGENET else {1: 4, 5: 2}[shot])
    assert (options.number_of_training_steps_per_iter, options.number_of_evaluation_steps_per_iter) == (5, 5)
    assert options.meta_learning_rate == 0.001
    assert (options.total_epochs, options.total_iter_per_epoch, options.num_evaluation_tasks) == (100, 500, 600)
    assert (options.num_context_params, options.context_params_learning_rate) == (100, 1.0)
    assert (options.top_n_models, options.batch_norm) == (5, "transductive")


@pytest.mark.parametrize("row", [row for row in ROWS if method_of(row) != "MAMLpp"], ids=name_of)
def test_outer_rate_is_constant(row: Path, words_of: Callable[[Path], list[str]]) -> None:
    options = options_of(words_of(row))
    assert options.min_learning_rate == options.meta_learning_rate
    assert options.clamp_outer_gradients == 0


@pytest.mark.parametrize("row", [row for row in ROWS if method_of(row) == "MAMLpp"], ids=name_of)
def test_maml_plus_plus_lowers_its_outer_rate_and_starts_with_a_multi_step_loss(
    row: Path, words_of: Callable[[Path], list[str]]
) -> None:
    options = options_of(words_of(row))
    assert options.min_learning_rate == pytest.approx(options.meta_learning_rate / 100)
    assert options.clamp_outer_gradients == (10 if "imagenet" in options.dataset_name else 0)
    assert options.multi_step_loss_num_epochs == (2 if options.dataset_name == "glyphs" else 15)


@pytest.mark.parametrize("row", [row for row in ROWS if data_of(row)[0] == "omniglot"], ids=name_of)
def test_omniglot_rows_turn_classes_and_have_as_many_queries_as_shots(
    row: Path, words_of: Callable[[Path], list[str]]
) -> None:
    options = options_of(words_of(row))
    assert options.rotate_classes
    assert options.image_shape == (1, 28, 28)
    assert options.num_target_samples == options.num_samples_per_class
    assert (options.batch_size, options.cnn_num_filters, options.total_epochs) == (8, 64, 150)


@pytest.mark.parametrize("row", [row for row in ROWS if row.stem.endswith("resnet12")], ids=name_of)
def test_resnet_rows_hold_memory_down(row: Path, words_of: Callable[[Path], list[str]]) -> None:
    options = options_of(words_of(row))
    assert options.resnet_width_list == [64, 128, 256, 512]
    assert (options.tasks_per_pass, options.checkpoint_inner_steps) == (1, True)


def test_every_head_has_its_scripts() -> None:
    assert {name_of(row) for row in HEAD_ROWS} == {
        f"{data}_5way/{name}" for data, names in HEADS_OF.items() for name in names
    }


@every_head_row
def test_head_script_is_short_and_opens_with_its_row_accuracy_time_and_commands(row: Path) -> None:
    lines, code = row.read_text().splitlines(), code_of(row)
    header = "\n".join(lines[: lines.index(code[0])])
    network = NETWORKS[row.stem.rpartition("_")[2]]
    assert 5 <= len(code) <= 15 and max(map(len, lines)) <= 120
    assert re.search(rf"^# .+, {network}, .+ 5-way: .*arXiv \d{{4}}\.\d{{5}}", header, re.M)
    assert re.search(r"^# Published accuracy(, 1-shot and 5-shot: .* % and .* %|: none known)", header, re.M)
    assert "\n# Time and memory: " in header
    assert f"#   TEST=1 bash {row.relative_to(ROOT)} 0\n" in header
    assert os.access(row, os.X_OK)
    for line, group in zip(code[2:-2], HEAD_LINES, strict=True):
        names = options_in(line)
        assert names == [name for name in group if name in names]


@every_head_row
def test_head_rows_follow_the_published_recipe(row: Path, words_of: Callable[[Path], list[str]]) -> None:
    options = options_of(words_of(row))
    data, (head, _, network) = row.parent.name.removesuffix("_5way"), row.stem.rpartition("_")
    usual = Options.from_mapping({"learner": "head", "dataset_name": data})
    assert (options.dataset_name, options.head, options.backbone) == (data, HEADS[head], NETWORKS[network])
    shots = {"mini_imagenet": 5 if network == "conv64" else 15, "tiered_imagenet": 10, "FC100": 15}
    assert options.training_task == (5, shots.get(data, 5), 6)
    assert options.label_smoothing == (0.1 if data == "mini_imagenet" else 0)
    assert options.augment == (data != "glyphs")
    assert options.test_shot_list == [1, 5]
    of_row = {"dataset_name", "head", "backbone", "num_samples_per_class", "label_smoothing", "augment", "test_way"}
    of_row |= {"test_shots", "experiment_name", "gpu"} | (
        {"image_height", "image_width"} if data == "glyphs" else set()
    )
    own, expected = asdict(options), asdict(usual)
    assert {name for name in own if own[name] != expected[name]} <= of_row


@pytest.mark.parametrize("script", [FOLDER / "demo.sh", FOLDER / "run.sh", ROOT / ".ci" / "run"], ids=name_of)
def test_shell_syntax_is_right(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("row", ROWS + HEAD_ROWS, ids=name_of)
def test_every_script_runs_dry(
    row: Path, words_of: Callable[[Path], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    entry, *words = words_of(row)
    assert entry == "train_maml_system.py"
    train_maml_system.main([*words, "--dry_run", "true"])
    assert capsys.readouterr().out.endswith("dry run: trained, resumed, tested and cross-tested\n")


@pytest.mark.parametrize(
    "name", ["omniglot_5way_1shot/MAMLpp_4conv.sh", "FC100_5way_5shot/ALFA_resnet12.sh", "demo.sh"]
)
def test_dry_run_from_the_shell_leaves_nothing_behind(name: str, tmp_path: Path) -> None:
    result = call(
        FOLDER / name, "cpu", "--dry_run", "true", PYTHON=sys.executable, TMPDIR=tmp_path, DATASET_DIR=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("dry run: trained, resumed, tested and cross-tested\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("gpu", ["cpu", "0", "3"])
def test_one_device_is_handed_to_the_entry(gpu: str, printer: Path) -> None:
    arguments = passed_on(GLYPHS, gpu, PYTHON=printer)
    assert arguments[0] == "train_maml_system.py"
    assert options_of(arguments).gpu == gpu


@pytest.mark.parametrize("gpus", ["0,1", "4,5,6"])
def test_gpu_ids_reach_the_program(gpus: str, printer: Path) -> None:
    assert options_of(passed_on(GLYPHS, gpus, PYTHON=printer)).gpu == gpus


def test_several_gpus_are_a_process_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are none: what would be started."""
    started: list[str] = []

    def launch(program: str, words: list[str]) -> None:
        started.extend(words)
        sys.exit()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(os, "execv", launch)
    monkeypatch.setattr(sys, "argv", ["train_maml_system.py", "--gpu", "1,3", "--seed", "5"])
    with pytest.raises(SystemExit):
        train_maml_system.main()
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert started == [sys.executable, *torchrun, "train_maml_system.py", "--gpu", "1,3", "--seed", "5"]


def test_gpus_that_are_not_there_are_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="GPU 1, 2 does not exist on this machine: it has GPU 0"):
        train_maml_system.main(["--gpu", "0,1,2"])


@pytest.mark.parametrize("words", [[], ["gpu0"], ["0,"], ["--total_epochs", "2"], [""]], ids=str)
def test_missing_or_wrong_gpu_id_prints_the_usage(words: list[str], printer: Path) -> None:
    result = call(GLYPHS, *words, PYTHON=printer)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("usage: bash experiment_scripts/glyphs_5way_1shot/CxGrad_4conv.sh GPU_ID")
    assert "TEST=1" in result.stderr


def test_test_variables_become_options(printer: Path) -> None:
    arguments = passed_on(GLYPHS, "cpu", PYTHON=printer, TEST=1, TEST_DATASET="CUB", TEST_BATCH_SIZE=7)
    options = options_of(arguments)
    assert options.evaluate_on_test_set_only
    assert options.test_datasets == "CUB"
    assert options.test_batch_size == 7


def test_variables_that_are_empty_add_nothing(printer: Path) -> None:
    plain = passed_on(GLYPHS, "cpu", PYTHON=printer)
    empty = passed_on(GLYPHS, "cpu", PYTHON=printer, TEST="", TEST_DATASET="", TEST_BATCH_SIZE="", DATASET_DIR="")
    assert empty == plain
    assert not {"--evaluate_on_test_set_only", "--test_datasets", "--test_batch_size", "--dataset_dir"} & set(plain)


def test_test_variable_that_is_neither_yes_nor_no_is_an_error(printer: Path) -> None:
    result = call(GLYPHS, "cpu", PYTHON=printer, TEST="CUB")
    assert result.returncode == 2
    assert "TEST is 'CUB'" in result.stderr


def test_own_options_come_last_and_keep_their_spaces(printer: Path) -> None:
    own = ["--batch_size", "1", "--experiment_name", "my run", "--test_dataset", "digits"]
    arguments = passed_on(GLYPHS, "cpu", *own, PYTHON=printer, TEST=1, TEST_DATASET="CUB", DATASET_DIR="/data")
    assert arguments[-6:] == own
    options = options_of(arguments)
    assert (options.batch_size, options.experiment_name, options.test_datasets) == (1, "my run", "digits")


@pytest.mark.parametrize(
    ("cwd", "script"),
    [
        (ROOT, "experiment_scripts/glyphs_5way_1shot/CxGrad_4conv.sh"),
        (FOLDER, "glyphs_5way_1shot/CxGrad_4conv.sh"),
        (GLYPHS.parent, "CxGrad_4conv.sh"),
        (Path("/"), str(GLYPHS)),
    ],
    ids=["root", "experiment_scripts", "beside_it", "elsewhere"],
)
def test_scripts_run_from_anywhere_and_in_the_root(cwd: Path, script: str, tmp_path: Path) -> None:
    where = program(tmp_path / "where", "pwd")
    assert passed_on(script, "cpu", cwd=cwd, PYTHON=where) == [str(ROOT)]


def test_relative_data_folder_is_seen_from_where_the_user_stands(tmp_path: Path, printer: Path) -> None:
    options = options_of(passed_on(GLYPHS, "cpu", cwd=tmp_path, PYTHON=printer, DATASET_DIR="my data"))
    assert Path(options.dataset_dir) == tmp_path / "my data"
    (tmp_path / "here").symlink_to(printer)
    options = options_of(passed_on(GLYPHS, "cpu", cwd=tmp_path, PYTHON="./here", DATASET_DIR="/abs/data"))
    assert options.dataset_dir == "/abs/data"


def test_shell_becomes_the_program_so_that_signals_reach_it(tmp_path: Path) -> None:
    pid = program(tmp_path / "pid", "echo $$")
    environment = {**os.environ, "PYTHON": str(pid)}
    with subprocess.Popen(["bash", GLYPHS, "cpu"], env=environment, stdout=subprocess.PIPE, text=True) as process:
        printed, _ = process.communicate()
    assert int(printed) == process.pid


def test_active_environment_is_used_before_any_other(tmp_path: Path) -> None:
    for name in ("venv", "conda"):
        program(tmp_path / name / "bin" / "python", f"echo {name}")
    venv, conda = tmp_path / "venv", tmp_path / "conda"
    assert passed_on(GLYPHS, "cpu", CONDA_PREFIX=conda)[-1] == "conda"
    assert passed_on(GLYPHS, "cpu", VIRTUAL_ENV=venv)[-1] == "venv"
    assert passed_on(GLYPHS, "cpu", VIRTUAL_ENV=venv, CONDA_PREFIX=conda)[-1] == "venv"
    assert passed_on(GLYPHS, "cpu", VIRTUAL_ENV=tmp_path / "gone", CONDA_PREFIX=conda)[-1] == "conda"


def test_environment_without_torch_is_named(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    result = call(GLYPHS, "cpu", CONDA_PREFIX=bare)
    assert result.returncode == 2
    assert f"{bare}/bin/python has no torch" in result.stderr


def test_python_that_is_no_program_is_named() -> None:
    result = call(GLYPHS, "cpu", PYTHON="/no/such/python")
    assert result.returncode == 2
    assert "/no/such/python" in result.stderr


def test_demo_prepares_trains_cross_tests_and_reports(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stub = program(tmp_path / "stub", f'echo "$@" >>"{log}"')
    result = call(FOLDER / "demo.sh", "cpu", PYTHON=stub, TEST=1, TEST_DATASET="CUB")
    assert result.returncode == 0, result.stderr
    prepare, train, test, report = log.read_text().splitlines()
    assert prepare == "preprocess/preprocess.py --datasets glyphs digits glyphs_colour"
    assert "--evaluate_on_test_set_only" not in train
    assert "--test_datasets" not in train
    assert "--test_datasets digits,glyphs_colour --evaluate_on_test_set_only true" in test
    assert report == "utils/report.py experiments/glyphs_5way1shot/CxGrad_4conv"


def test_demo_keeps_its_data_where_the_user_says(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stub = program(tmp_path / "stub", f'echo "$@" >>"{log}"')
    assert call(FOLDER / "demo.sh", "cpu", cwd=tmp_path, PYTHON=stub, DATASET_DIR="data").returncode == 0
    prepare, *runs, _ = log.read_text().splitlines()
    assert prepare.endswith(f" --dataset_dir {tmp_path}/data")
    assert all(f"--dataset_dir {tmp_path}/data" in run for run in runs)


def test_demo_stops_where_a_step_fails(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stub = program(tmp_path / "stub", f'echo "$@" >>"{log}"', 'case "$1" in train*) exit 3;; esac')
    assert call(FOLDER / "demo.sh", "cpu", PYTHON=stub).returncode == 3
    assert len(log.read_text().splitlines()) == 2
