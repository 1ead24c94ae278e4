"""The experiment scripts: each says how it is run and heeds the interface; any.sh makes the rows that have none.

One of each method and network runs dry here; `make scripts` runs all.
A row's hyperparameters are there to be edited, so no test here depends on one. Most tests put a small program in the
place of Python that prints its arguments, one a line.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch.distributed.run

import train_maml_system
from experiment_builder import experiment_folder
from tests import every_script
from tests.every_script import END, ROOT, ROWS, call, executable, failure
from utils.errors import UserError
from utils.options import Options, parse_args

FOLDER = ROOT / "experiment_scripts"
FIRST = {row.stem: row for row in reversed(ROWS)}.values()  # of each method and network, one
GLYPHS = FOLDER / "glyphs_5way_1shot" / "CxGrad_4conv.sh"
ANY = FOLDER / "any.sh"


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def passed_on(script: Path | str, *words: str, cwd: Path = ROOT, **variables: object) -> list[str]:
    """The arguments that reached the interpreter."""
    result = call(script, *words, cwd=cwd, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def options_of(arguments: list[str]) -> Options:
    return parse_args(arguments[arguments.index("train_maml_system.py") + 1 :])


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_script_opens_with_its_time_and_commands(row: Path) -> None:
    header = row.read_text().partition("\nsource ")[0] + "\n"
    assert "\n# Time and memory: " in header
    assert f"\n#   bash {row.relative_to(ROOT)} 0\n" in header
    assert f"\n#   TEST=1 bash {row.relative_to(ROOT)} 0\n" in header
    assert os.access(row, os.X_OK)


@pytest.mark.parametrize("name", ["glyphs_5way_1shot/CxGrad_4conv", "glyphs_5way/MetaOptNet_RR_conv64"])
def test_results_lie_where_the_script_lies(name: str, printer: Path) -> None:
    row = ["--dataset_name", "glyphs", "--num_classes_per_set", "5", "--num_samples_per_class", "1"]
    options = options_of(passed_on(FOLDER / f"{name}.sh", "cpu", *row, PYTHON=printer))
    assert experiment_folder(options) == Path("experiments", name)


def test_any_is_the_row_of_maml_with_what_the_method_adds(printer: Path) -> None:
    maml = options_of(passed_on(FOLDER / "FC100_5way_1shot" / "maml_4conv.sh", "cpu", PYTHON=printer))
    anil = options_of(passed_on(ANY, "anil", "fc-100", "1", "cpu", PYTHON=printer))
    changes = {"experiment_name": "ANIL_4conv", "inner_loop_part": "head", "num_samples_per_class": 1}
    assert asdict(anil) == asdict(maml) | changes


def test_any_is_the_row_of_metaoptnet_with_another_head_on_images_of_ones_own(printer: Path) -> None:
    ridge = options_of(passed_on(FOLDER / "CUB_5way" / "MetaOptNet_RR_conv64.sh", "cpu", PYTHON=printer))
    own = options_of(passed_on(ANY, "ProtoNet_conv64", "My birds", "5", "cpu", PYTHON=printer))
    changes = {"experiment_name": "ProtoNet_conv64", "head": "ProtoNet", "dataset_name": "My birds", "test_shots": "5"}
    assert asdict(own) == asdict(ridge) | changes


@pytest.mark.parametrize("row", [GLYPHS, FOLDER / "mini_imagenet_5way_5shot" / "L2F_resnet12.sh"], ids=name_of)
def test_any_runs_the_script_where_there_is_one(row: Path, printer: Path) -> None:
    data, _, shot = row.parent.name.removesuffix("shot").partition("_5way_")
    theirs = passed_on(ANY, row.stem, data, shot, "cpu", "--num_samples_per_class", "3", PYTHON=printer)
    assert options_of(theirs) == options_of(passed_on(row, "cpu", "--num_samples_per_class", "3", PYTHON=printer))


@pytest.mark.parametrize("network", ["", "_resnet12"])
def test_any_knows_every_method_that_its_error_names(network: str, printer: Path) -> None:
    result = call(ANY, "MANL", "CUB", "1", "cpu", PYTHON=printer)
    assert result.returncode == 2
    message, _, methods = result.stderr.strip().removesuffix(".").partition("; METHOD is one of ")
    assert message == "There is no method 'MANL'"
    names = [
        options_of(passed_on(ANY, f"{method}{network}", "CUB", "1", "cpu", PYTHON=printer)).experiment_name
        for method in methods.split(", ")
    ]
    assert len(set(names)) == len(names) >= 14


def test_any_heeds_the_interface(tmp_path: Path, printer: Path) -> None:
    words = ["MAML++", "omniglot", "10", "0,1", "--seed", "7"]
    arguments = passed_on(ANY, *words, cwd=tmp_path, PYTHON=printer, TEST=1, TEST_DATASET="CUB", DATASET_DIR="data")
    options = options_of(arguments)
    assert (options.gpu, options.num_samples_per_class, options.seed) == ("0,1", 10, 7)
    assert (options.evaluate_on_test_set_only, options.test_datasets) == (True, "CUB")
    assert options.dataset_dir == f"{tmp_path}/data"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: bash experiment_scripts/any.sh METHOD DATASET SHOT GPU_ID"),
        (["ALFA", "CUB", "1"], "usage: bash experiment_scripts/any.sh ALFA CUB 1 GPU_ID"),
        (["ALFA", "CUB", "1", "gpu"], 'not "gpu"'),
        (["ALFA_conv64", "CUB", "1", "0"], "ALFA does not work with conv64"),
    ],
    ids=str,
)
def test_any_says_what_is_wrong(words: list[str], message: str, printer: Path) -> None:
    result = call(ANY, *words, PYTHON=printer)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr


@pytest.mark.parametrize("words", ["CxGrad glyphs 2", "R2D2 omniglot 1,5", "ALFA my_images 1"])
def test_any_runs_dry(words: str, printer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, *options = passed_on(ANY, *words.split(), "cpu", "--dry_run", "true", PYTHON=printer)
    train_maml_system.main(options)
    assert capsys.readouterr().out.endswith(END)


@pytest.mark.usefixtures("no_coverage")  # the code of a whole run, of which other tests tell
@pytest.mark.parametrize("row", FIRST, ids=name_of)
def test_script_runs_dry(row: Path, printer: Path) -> None:
    assert failure(row, printer) == ""


def test_a_script_that_does_not_run_dry_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, broken = FOLDER / "omniglot_5way_1shot" / "maml_4conv.sh", tmp_path / "scripts" / "birds_5way" / "broken.sh"
    broken.parent.mkdir(parents=True)
    broken.write_text(sound.read_text().replace("--cnn_num_filters ", "--cnn_num_filters -"))
    shutil.copy(FOLDER / "run.sh", tmp_path / "scripts")
    monkeypatch.setattr(every_script, "ROWS", [broken, sound])
    assert every_script.main([]) == 1
    wrong, *_, last = capsys.readouterr().out.splitlines()
    assert wrong.startswith("birds_5way/broken.sh: ") and last.startswith("2 scripts: 1 ran dry, ")
    assert every_script.main(["omniglot"]) == 0 and every_script.main(["no such script"]) == 1


def test_dry_run_from_the_shell_leaves_nothing_behind(tmp_path: Path) -> None:
    words, folders = ("cpu", "--dry_run", "true"), {"TMPDIR": tmp_path, "DATASET_DIR": tmp_path}
    result = call(FOLDER / "demo.sh", *words, PYTHON=sys.executable, **folders)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith(END)
    left = [path.name for path in tmp_path.iterdir()]
    assert [name for name in left if not name.startswith("torchinductor_")] == []  # which importing torch may make


@pytest.mark.parametrize("gpus", ["cpu", "0", "3", "0,1", "4,5,6"])
def test_gpu_ids_reach_the_program(gpus: str, printer: Path) -> None:
    assert options_of(passed_on(GLYPHS, gpus, PYTHON=printer)).gpu == gpus


def test_several_gpus_are_a_process_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are none: what would be started."""
    started: list[str] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.distributed.run, "main", started.extend)
    monkeypatch.setattr(sys, "argv", ["train_maml_system.py", "--gpu", "1,3", "--seed", "5"])
    train_maml_system.main()
    assert started == ["--nproc_per_node", "2", "train_maml_system.py", "--gpu", "1,3", "--seed", "5"]


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
    where = executable(tmp_path / "where", "pwd")
    assert passed_on(script, "cpu", cwd=cwd, PYTHON=where) == [str(ROOT)]


def test_relative_data_folder_is_seen_from_where_the_user_stands(tmp_path: Path, printer: Path) -> None:
    options = options_of(passed_on(GLYPHS, "cpu", cwd=tmp_path, PYTHON=printer, DATASET_DIR="my data"))
    assert Path(options.dataset_dir) == tmp_path / "my data"
    (tmp_path / "here").symlink_to(printer)
    options = options_of(passed_on(GLYPHS, "cpu", cwd=tmp_path, PYTHON="./here", DATASET_DIR="/abs/data"))
    assert options.dataset_dir == "/abs/data"


def test_shell_becomes_the_program_so_that_signals_reach_it(tmp_path: Path) -> None:
    pid = executable(tmp_path / "pid", "echo $$")
    environment = {**os.environ, "PYTHON": str(pid)}
    with subprocess.Popen(["bash", GLYPHS, "cpu"], env=environment, stdout=subprocess.PIPE, text=True) as process:
        printed, _ = process.communicate()
    assert int(printed) == process.pid


def test_active_environment_is_used_before_any_other(tmp_path: Path) -> None:
    for name in ("venv", "conda"):
        executable(tmp_path / name / "bin" / "python", f"echo {name}")
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
    stub = executable(tmp_path / "stub", f'echo "$@" >>"{log}"')
    result = call(FOLDER / "demo.sh", "cpu", PYTHON=stub, TEST=1, TEST_DATASET="CUB")
    assert result.returncode == 0, result.stderr
    prepare, train, test, report = log.read_text().splitlines()
    assert prepare == "preprocess/preprocess.py --datasets glyphs digits glyphs_colour"
    assert "--evaluate_on_test_set_only" not in train
    assert "--test_datasets" not in train
    assert "--test_datasets digits,glyphs_colour --evaluate_on_test_set_only true" in test
    assert report == "utils/report.py experiments/glyphs_5way_1shot/CxGrad_4conv"


def test_demo_keeps_its_data_where_the_user_says(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stub = executable(tmp_path / "stub", f'echo "$@" >>"{log}"')
    assert call(FOLDER / "demo.sh", "cpu", cwd=tmp_path, PYTHON=stub, DATASET_DIR="data").returncode == 0
    prepare, *runs, _ = log.read_text().splitlines()
    assert prepare.endswith(f" --dataset_dir {tmp_path}/data")
    assert all(f"--dataset_dir {tmp_path}/data" in run for run in runs)


def test_demo_stops_where_a_step_fails(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stub = executable(tmp_path / "stub", f'echo "$@" >>"{log}"', 'case "$1" in train*) exit 3;; esac')
    assert call(FOLDER / "demo.sh", "cpu", PYTHON=stub).returncode == 3
    assert len(log.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "words", [["--dry_run"], ["--dry-run", "--seed", "3"], ["--dry_run=true"], ["--dry_run", "false"]]
)
def test_demo_knows_each_form_of_the_dry_run(words: list[str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    stub = executable(tmp_path / "stub", f'echo "$@" >>"{log}"')
    assert call(FOLDER / "demo.sh", "cpu", *words, PYTHON=stub).returncode == 0
    assert len(log.read_text().splitlines()) == (4 if "false" in words[-1] else 1)
