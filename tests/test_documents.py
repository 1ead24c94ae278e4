"""The documents' Python code runs, and their command lines can be copied: each reaches a program that takes it."""

import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import predict
import test as test_entry
import train_maml_system
from classification_heads import ClassificationHead
from classification_heads import register as register_head
from inner_loop_optimizers import Rule, register
from meta_neural_network_architectures import BACKBONES, EMBEDDINGS, register_backbone, register_embedding
from preprocess.preprocess import prepare
from tests.forked import run_forked
from tests.made_models import COMMON, CXGRAD
from tests.registries import forgotten_afterwards
from tests.test_few_shot_learning_system import tiny_batch, tiny_model
from utils import export, names, options
from utils.options import parse_args
from utils.synthetic import write_dataset

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
DOCUMENTS = [*ROOT.glob("*.md"), *sorted(DOCS.glob("*.md")), ROOT / "datasets" / "README.md"]
PLUG_INS = {"Nearest": "adding_a_head.md", "shrink": "adding_a_method.md"}  # words of commands -> who declares them
NOT_RUN = ("conda ", "source ", "pip ", "tensorboard ")  # these change an environment, or serve until they are stopped
STUB = """#!/bin/sh
printf '%s\\n' "$(basename "$0")" "$@"
"""
ENTRIES: dict[str, Callable[[list[str]], object]] = {
    "python predict.py": predict.main,
    "python test.py": test_entry.main,
    "python -m utils.export": export.main,
}


@pytest.fixture(autouse=True)
def registered_for_one_test_only() -> Iterator[None]:
    """Forget afterwards what the documents' code has registered."""
    with forgotten_afterwards():
        yield


def run_code(document: str, monkeypatch: pytest.MonkeyPatch, module: str = "of_a_document") -> list[types.ModuleType]:
    """Run each Python block of a document as a module of its own."""
    modules = []
    for code in re.findall(r"```python\n(.*?)```", (DOCS / document).read_text(), re.DOTALL):
        modules.append(types.ModuleType(module))
        monkeypatch.setitem(sys.modules, module, modules[-1])
        exec(compile(code, document, "exec"), vars(modules[-1]))
    return modules


def test_a_method_of_the_document_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    run_code("adding_a_method.md", monkeypatch)
    model = tiny_model(shrink=True, shrink_start=0.5)
    model.run_train_iter(tiny_batch(), 0)
    assert all(p.grad is not None and p.grad != 0 for p in model.rules["Shrink"].parameters())


def test_a_head_and_a_network_of_the_document_work(monkeypatch: pytest.MonkeyPatch) -> None:
    run_code("adding_a_head.md", monkeypatch)
    assert parse_args(["--head", "Nearest", "--nearest_softness", "2"]).learner == "head"
    support, labels = torch.eye(4).unsqueeze(0), torch.tensor([[0, 1, 0, 1]])
    logits = ClassificationHead("Nearest")(support + 0.1, support, labels, 2, 2, nearest_softness=2.0)
    assert torch.equal(logits.argmax(2), labels)
    assert EMBEDDINGS["Linear64"]((3, 8, 8), options.Options())(torch.rand(2, 3, 8, 8)).shape == (2, 64)
    assert "OneBlock" in BACKBONES
    model = tiny_model(backbone="OneBlock", contextual_grad=True, per_step_bn_statistics=True)
    model.run_train_iter(tiny_batch(), 0)
    assert all(p.grad is not None for p in model.parameters())


def test_a_data_set_of_the_document_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_code("adding_a_data_set.md", monkeypatch, "preprocess.stripes")
    monkeypatch.setitem(names.KNOWN, "stripes", names.Known("stripes"))
    prepare("stripes", tmp_path)
    assert len(list((tmp_path / "stripes" / "train").iterdir())) == 6
    assert len(list((tmp_path / "stripes").glob("*/*/*.png"))) == 240


def run_commands(document: str) -> list[str]:
    """Run each line of the shell blocks of a document in this process, and return the lines."""
    text = (DOCS / document).read_text()
    lines = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).splitlines()
    for line in lines:
        name = next(name for name in ENTRIES if line.startswith(f"{name} "))
        ENTRIES[name](shlex.split(line.removeprefix(name)))
    return lines


@pytest.fixture
def beside_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder in which the project's models and documents are found as in its own."""
    for name in ("models", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_code_on_predicting_runs(beside_the_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = map(vars, run_code("predicting.md", monkeypatch))
    truth = np.array([file.name[0] for file in first["query"]])
    assert np.mean(first["answers"] == truth) > 0.8
    assert (list(second["classes"]), second["estimate"]) == (["four", "three"], None)
    assert second["probabilities"].shape == (1, 2)


def test_the_commands_on_predicting_run(beside_the_project: Path) -> None:
    write_dataset(Path("datasets/glyphs"), classes=6, images=20, size=(32, 32))
    task = shlex.split("--dataset_name glyphs --num_classes_per_set 5 --num_samples_per_class 5 --val_shot 5")
    train_maml_system.main([*COMMON, *CXGRAD, *task, "--experiment_name", "CxGrad_4conv", "--total_epochs", "1"])
    assert len(run_commands("predicting.md")) == 4
    assert sorted(path.name for path in Path().glob("predictions*/*.csv")) == ["predictions.csv"] * 2
    assert (Path("my_model") / "logs" / "test_summary.json").is_file()


def test_the_readmes_command_for_predicting_runs(beside_the_project: Path) -> None:
    (line,) = re.findall(r"^python predict\.py .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    predict.main(shlex.split(line)[2:])
    assert Path("predictions/predictions.csv").is_file()


def test_every_script_that_a_document_names_is_there() -> None:
    texts = [file.read_text() for file in (ROOT / "README.md", ROOT / "datasets" / "README.md", *DOCS.glob("*.md"))]
    named = {name for text in texts for name in re.findall(r"experiment_scripts/[\w/]+\.sh", text)}
    assert len(named) > 5 and not [name for name in named if not (ROOT / name).exists()]


def test_wrong_plug_ins_are_refused_when_they_are_registered() -> None:
    with pytest.raises(ValueError, match="there is a LSLR already"):
        register(type("LSLR", (Rule,), {"flag": "alfa"}))
    for attributes in ({}, {"flag": "not_declared"}):
        with pytest.raises(ValueError, match="Vague has to name a boolean option as its flag"):
            register(type("Vague", (Rule,), attributes))
    for add in (register_head("Ridge"), register_backbone("4-CONV"), register_embedding("conv64")):
        with pytest.raises(ValueError, match=r"there is a .* already; give the new one another name"):
            add(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Bare has to declare with opt: softness"):
        options.add_options(type("Bare", (), {"__annotations__": {"softness": float}, "softness": 1.0}))
    assert parse_args([]) == options.Options()


# --- command lines ----------------------------------------------------------------------------------------------------


def blocks(document: Path) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)


COMMANDS = [
    pytest.param(line, id=f"{document.relative_to(ROOT)}: {line.partition('  ')[0]}")
    for document in DOCUMENTS
    for block in blocks(document)
    if "#SBATCH" not in block
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith(NOT_RUN)
]


@pytest.fixture(scope="session")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `python` and a `make` that print their names and what they are given, a line each."""
    folder = tmp_path_factory.mktemp("stubs")
    for name in ("python", "make"):
        (folder / name).write_text(STUB)
        (folder / name).chmod(0o755)
    return folder


@cache
def help_of(*program: str) -> str:
    """What `python PROGRAM --help` prints."""
    done = run_forked([sys.executable, *program, "--help"])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("no_coverage")  # dry runs, of which other tests tell
@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_line_of_the_documents_can_be_copied(
    line: str, stubs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not re.search(r"…|\.\.\.|<[a-z]", line), "a placeholder cannot be copied"
    environment = os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}", "PYTHON": str(stubs / "python")}
    shell = ["bash", "-c", line.partition(" | ")[0]]
    done = subprocess.run(shell, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    called, *words = done.stdout.splitlines()
    for word, document in PLUG_INS.items():
        if f"--{word}" in words or word in words:
            run_code(document, monkeypatch)
    if called == "make":
        subprocess.run(["make", "--dry-run", *words], cwd=ROOT, check=True, capture_output=True)
    elif re.search(r"_5way\w*/\w+\.sh 0\s*(#|$)", line):  # a row as it is, which `make scripts` runs dry
        assert parse_args(words[1:])
    elif words[0] == "train_maml_system.py" and "--help" not in words:
        train_maml_system.main([*words[1:], "--gpu", "cpu", "--dry_run", "true"])
        assert capsys.readouterr().out.endswith("dry run: trained, resumed, tested and cross-tested\n")
    elif words[0] == "test.py":
        assert test_entry.parse_command(words[1:])[0]
    else:
        program = words[:2] if words[0] == "-m" else words[:1]
        options = [word for word in words if re.match("--[a-z]", word)]
        assert [word for word in options if not re.search(rf"{word}\b", help_of(*program))] == []


def test_the_job_of_the_documents_is_a_shell_script() -> None:
    (job,) = (block for block in blocks(DOCS / "gpu.md") if "#SBATCH" in block)
    subprocess.run(["bash", "-n"], input=job, text=True, check=True)


def test_python_code_of_every_document_is_run_by_a_test() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    with_code = [path.name for path in DOCUMENTS if "```python\n" in path.read_text(encoding="utf-8")]
    assert [name for name in with_code if f'"{name}"' not in tests] == []


def test_links_of_the_documents_lead_somewhere() -> None:
    """Links to files of the project, as seen from the document."""
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} leads to {target}"


def test_the_readme_can_be_read_in_five_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000
