"""The files that set up an environment agree with one another."""

import itertools
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [
    Requirement(line.split("#")[0])
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if line.strip() and not line.lstrip().startswith("#")
]


def pinned_on_linux(python: str) -> dict[str, str]:
    """Version of each package that a Linux machine with this Python gets."""
    machine = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
    }
    chosen = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate(machine)]
    assert len({pin.name for pin in chosen}) == len(chosen)
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in chosen}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_pins_meet_what_the_project_asks_for(python: str) -> None:
    pins = pinned_on_linux(python)
    for text in [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]:
        asked = Requirement(text)
        if asked.marker is None or asked.marker.evaluate({"python_version": python}):
            assert asked.specifier.contains(pins[canonicalize_name(asked.name)]), text


def test_qpth_and_the_numpy_that_it_needs_are_for_python_before_3_13() -> None:
    assert all("qpth" in pinned_on_linux(python) for python in ("3.11", "3.12"))
    assert "qpth" not in pinned_on_linux("3.13")
    assert pinned_on_linux("3.12")["numpy"].startswith("1.") and pinned_on_linux("3.13")["numpy"].startswith("2.")


@pytest.mark.parametrize("pin", PINS, ids=lambda pin: pin.name)
def test_every_requirement_is_one_exact_version(pin: Requirement) -> None:
    assert pin.url is None
    assert re.fullmatch(r"==[^*,]+", str(pin.specifier))


def test_requirements_name_no_host_and_say_how_they_were_made() -> None:
    text = (ROOT / "requirements.txt").read_text()
    assert "uv pip compile" in text
    assert not re.search(r"https?:|index-url|find-links", text)


def test_conda_file_installs_the_same_pins() -> None:
    text = (ROOT / "environment.yml").read_text()
    assert "python=3.11" in text
    assert "-r requirements.txt" in text


def make(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *words], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with spaces in its name that holds the Makefile and the pins only."""
    folder = tmp_path / "a fresh checkout"
    folder.mkdir()
    for name in ("Makefile", "requirements.txt"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def test_make_lists_its_targets(checkout: Path) -> None:
    listed = make(checkout).stdout
    assert re.findall(r"^make (\S+)", listed, re.MULTILINE) == [
        "help",
        "demo",
        "test",
        "scripts",
        "torture",
        "lint",
        "format",
        "bench",
        "check-gpu",
    ]
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_missing_python_is_named_with_the_cure(target: str, checkout: Path) -> None:
    result = make(checkout, target, "PYTHON=/no/such/python")
    assert result.returncode != 0
    assert "no /no/such/python here" in result.stderr
    assert "make PYTHON=" in result.stderr


def test_old_python_is_refused_before_anything_is_made(checkout: Path) -> None:
    old = checkout / "old_python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.2 || exit 1\n')
    old.chmod(0o755)
    result = make(checkout, "test", "PYTHON=./old_python")
    assert result.returncode != 0
    assert "Python 3.9.2" in result.stderr
    assert "3.11, 3.12 or 3.13" in result.stderr
    assert not (checkout / ".venv").exists()


def test_environment_whose_python_is_gone_is_kept_and_named(checkout: Path) -> None:
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/gone/python3.11")
    result = make(checkout, "test")
    assert result.returncode != 0
    assert "rm -rf .venv" in result.stderr
    assert python.is_symlink()


def test_environment_that_is_up_to_date_is_not_installed_again(checkout: Path) -> None:
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".requirements-installed").touch()
    planned = make(checkout, "--dry-run", "test").stdout
    assert "pytest" in planned
    assert "uv pip install" not in planned
    os.utime(checkout / "requirements.txt", (2**31, 2**31))
    assert "uv pip install" in make(checkout, "--dry-run", "test").stdout
