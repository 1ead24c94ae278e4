"""The experiment scripts: what they pass on, and that every option in them is a real one.

Most tests put a small program in the place of Python that prints the arguments it was given, one a line.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from utils.options import Options, parse_args

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "experiment_scripts"
ROWS = sorted(FOLDER.glob("*_5way_*/*.sh"))
GLYPHS = FOLDER / "glyphs_5way_1shot" / "CxGrad_4conv.sh"
READ_BY_SCRIPTS = {
    "TEST",
    "TEST_DATASET",
    "TEST_BATCH_SIZE",
    "DATASET_DIR",
    "PYTHON",
    "VIRTUAL_ENV",
    "CONDA_PREFIX",
}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


every_row = pytest.mark.parametrize("row", ROWS, ids=name_of)


def program(path: Path, *lines: str) -> Path:
    """An executable shell script at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def printer(tmp_path: Path) -> Path:
    return program(tmp_path / "printer", "printf '%s\\n' \"$@\"")


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


def test_every_row_has_its_two_scripts() -> None:
    data_sets = ["mini_imagenet", "tiered_imagenet", "CIFAR_FS", "CUB", "glyphs"]
    expected = {
        f"{data}_5way_{shot}shot/{method}_4conv"
        for data in data_sets
        for shot in (1, 5)
        for method in ("CxGrad", "maml")
    }
    assert {name_of(row) for row in ROWS} == expected


@pytest.mark.parametrize("script", [*ROWS, FOLDER / "demo.sh", FOLDER / "run.sh", ROOT / ".ci" / "run"], ids=name_of)
def test_shell_syntax_is_right(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@every_row
def test_script_is_short_and_opens_with_its_row_accuracy_time_and_commands(row: Path) -> None:
    lines = row.read_text().splitlines()
    code = [line for line in lines if line and not line.startswith("#")]
    header = "\n".join(lines[: lines.index(code[0])])
    shot = row.parent.name.removesuffix("shot")[-1]
    assert 5 <= len(code) <= 15
    assert re.search(rf"^# (CxGrad|MAML).* 4-CONV.* 5-way {shot}-shot", header, re.MULTILINE)
    assert "# Published accuracy: " in header
    assert "# Time and memory: " in header
    assert f"#   bash {row.relative_to(ROOT)} 0\n" in header
    assert f"#   TEST=1 bash {row.relative_to(ROOT)} 0\n" in header


@every_row
def test_options_are_real_and_say_what_the_folder_and_file_say(row: Path, printer: Path) -> None:
    options = options_of(passed_on(row, "cpu", PYTHON=printer))
    assert (
        row.parent.name
        == f"{options.dataset_name}_{options.num_classes_per_set}way_{options.num_samples_per_class}shot"
    )
    assert options.experiment_name == row.stem
    assert options.contextual_grad == row.stem.startswith("CxGrad")
    assert options.second_order
    assert not options.use_multi_step_loss_optimization
    assert not options.evaluate_on_test_set_only


@pytest.mark.parametrize("row", [row for row in ROWS if "glyphs" not in row.parent.name], ids=name_of)
def test_published_rows_follow_the_published_recipe(row: Path, printer: Path) -> None:
    options = options_of(passed_on(row, "cpu", PYTHON=printer))
    side = 32 if options.dataset_name == "CIFAR_FS" else 84
    assert options.image_shape == (3, side, side)
    assert (options.cnn_num_filters, options.num_stages, options.num_target_samples) == (48, 4, 15)
    assert options.batch_size == {1: 4, 5: 2}[options.num_samples_per_class]
    assert (options.number_of_training_steps_per_iter, options.number_of_evaluation_steps_per_iter) == (5, 5)
    assert (options.init_inner_loop_learning_rate, options.meta_learning_rate) == (0.01, 0.001)
    assert options.min_learning_rate == options.meta_learning_rate
    assert (options.total_epochs, options.total_iter_per_epoch, options.num_evaluation_tasks) == (
        100,
        500,
        600,
    )
    assert (options.num_context_params, options.context_params_learning_rate, options.top_n_models) == (
        100,
        1.0,
        5,
    )


@every_row
def test_no_script_spells_an_option_twice(row: Path) -> None:
    words = shlex.split(row.read_text(), comments=True)
    names = [word for word in words if word.startswith("--")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("gpu", ["cpu", "0", "3"])
def test_one_device_is_handed_to_the_entry(gpu: str, printer: Path) -> None:
    arguments = passed_on(GLYPHS, gpu, PYTHON=printer)
    assert arguments[0] == "train_maml_system.py"
    assert options_of(arguments).gpu == gpu


@pytest.mark.parametrize(("gpus", "processes"), [("0,1", "2"), ("4,5,6", "3")])
def test_several_gpus_go_through_torchrun(gpus: str, processes: str, printer: Path) -> None:
    arguments = passed_on(GLYPHS, gpus, PYTHON=printer)
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        processes,
        "train_maml_system.py",
    ]
    assert arguments[:6] == torchrun
    assert options_of(arguments).gpu == gpus


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
    assert options.test_dataset == "CUB"
    assert options.test_batch_size == 7


def test_variables_that_are_empty_add_nothing(printer: Path) -> None:
    plain = passed_on(GLYPHS, "cpu", PYTHON=printer)
    empty = passed_on(GLYPHS, "cpu", PYTHON=printer, TEST="", TEST_DATASET="", TEST_BATCH_SIZE="", DATASET_DIR="")
    assert empty == plain
    assert not {"--evaluate_on_test_set_only", "--test_dataset", "--test_batch_size", "--dataset_dir"} & set(plain)


def test_test_variable_that_is_neither_yes_nor_no_is_an_error(printer: Path) -> None:
    result = call(GLYPHS, "cpu", PYTHON=printer, TEST="CUB")
    assert result.returncode == 2
    assert "TEST is 'CUB'" in result.stderr


def test_own_options_come_last_and_keep_their_spaces(printer: Path) -> None:
    own = ["--batch_size", "1", "--experiment_name", "my run", "--test_dataset", "digits"]
    arguments = passed_on(GLYPHS, "cpu", *own, PYTHON=printer, TEST=1, TEST_DATASET="CUB", DATASET_DIR="/data")
    assert arguments[-6:] == own
    options = options_of(arguments)
    assert (options.batch_size, options.experiment_name, options.test_dataset) == (1, "my run", "digits")


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
    options = options_of(passed_on(GLYPHS, "cpu", cwd=tmp_path, PYTHON="./printer", DATASET_DIR="/abs/data"))
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
    prepare, train, digits, colour, report = log.read_text().splitlines()
    assert prepare == "preprocess/preprocess.py --datasets glyphs digits glyphs_colour"
    assert "--evaluate_on_test_set_only" not in train
    assert "--test_dataset" not in train
    assert "--test_dataset digits --evaluate_on_test_set_only true" in digits
    assert "--test_dataset glyphs_colour --evaluate_on_test_set_only true" in colour
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
