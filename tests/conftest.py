"""Fixtures shared by all tests.

What imports torch is imported in them: the process that hands out the tests needs none, and starts in a moment.
"""

import importlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import Browser
from utils.progress import set_up_logging

set_up_logging()  # so that capsys sees the messages of functions that an entry point would call

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


def stop_tracing() -> None:
    """Trace neither this thread nor those that it starts."""
    sys.settrace(None)
    threading.settrace(None)


os.register_at_fork(after_in_child=stop_tracing)  # tracing slows what it runs, which is not counted anyway


@pytest.fixture(scope="session", autouse=True)
def short_ends() -> Iterator[None]:
    """Leave out what a toy run would mostly do: draw a report at its end, wait until files have reached the disk.

    The tests of the report use `reports`; that files are told to reach the disk is a test of its own.
    """
    from utils import observer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observer, "update_report", lambda run: [])
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have runs draw their report, as they do outside of tests."""
    from utils import observer, report

    monkeypatch.setattr(observer, "update_report", report.update_report)


@contextmanager
def untraced() -> Iterator[None]:
    """Inside, coverage sees nothing."""
    tracers = sys.gettrace(), threading.gettrace()
    stop_tracing()
    try:
        yield
    finally:
        sys.settrace(tracers[0])
        threading.settrace(tracers[1])


@pytest.fixture
def no_coverage() -> Iterator[None]:
    """Do not trace a test that would take much longer then. pytest-cov's own marker does nothing under pytest-xdist."""
    with untraced():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Import libraries and tests untraced, which is faster, and the project itself in between."""
    if not hasattr(session.config, "workerinput"):  # the process that hands out the tests, or the only one
        return (yield)
    with untraced():
        for library in ("torch._dynamo", "torchvision", "matplotlib.figure", "sklearn.datasets"):
            importlib.import_module(library)
    for file in (*ROOT.glob("*.py"), *ROOT.glob("utils/*.py"), *ROOT.glob("preprocess/*.py")):
        importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    with untraced():
        return (yield)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of real archives and full recordings beside the checkout; its tests skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared (real archives, class splits, full recordings) is not here")
    return SHARED


@pytest.fixture
def browser(tmp_path: Path) -> Browser:
    """Return a real browser without a window; its tests skip where none is installed."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no browser is installed here (Debian: apt-get install chromium)")
    folder = tmp_path / "browser"
    folder.mkdir()
    return Browser(program, folder)


@pytest.fixture(scope="session")
def printer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a program that takes the place of Python and prints its arguments, one a line."""
    from tests.every_script import make_printer

    return make_printer(tmp_path_factory.mktemp("printer") / "printer")


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `toy`: 4 classes of 8 images in each split, too noisy to be told apart for certain."""
    folder = tmp_path_factory.mktemp("datasets")
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for k in range(4):
            class_folder = folder / "toy" / split / f"class_{k}"
            class_folder.mkdir(parents=True)
            colour = rng.normal(128, 12, 3)
            for i in range(8):
                pixels = rng.normal(colour + rng.normal(0, 10, 3), 40, (8, 8, 3)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(class_folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def finished(toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of results of one undisturbed run on `toy`."""
    from tests.test_experiment_builder import command
    from train_maml_system import main

    results = tmp_path_factory.mktemp("finished")
    main(command(toy_data, results))
    return results


@pytest.fixture(scope="session")
def cxgrad_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the experiment of a small CxGrad model; tests leave it as it is."""
    from tests.made_models import CXGRAD, train

    return train(tmp_path_factory.mktemp("cxgrad"), *CXGRAD)


@pytest.fixture(scope="session")
def ridge_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the experiment of a small model with a ridge head; tests leave it as it is."""
    from tests.made_models import RIDGE, train

    return train(tmp_path_factory.mktemp("ridge"), *RIDGE)


@pytest.fixture
def cxgrad(cxgrad_run: Path) -> Path:
    """Return the best checkpoint of the small CxGrad model."""
    from tests.made_models import best

    return best(cxgrad_run)


@pytest.fixture
def ridge(ridge_run: Path) -> Path:
    """Return the best checkpoint of the small model with a ridge head."""
    from tests.made_models import best

    return best(ridge_run)
