"""Trackers get the numbers of a run once each, also of one that is resumed."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.browser import Browser
from tests.test_documents import run_code
from tests.test_experiment_builder import command, folder_of, history
from train_maml_system import main
from utils import options
from utils.errors import UserError
from utils.options import parse_args
from utils.trackers import TRACKERS, TensorBoard, Tracker, register

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def registered_for_one_test_only() -> Iterator[None]:
    registries: list[dict[str, Any]] = [TRACKERS, options.declaration("tracker").choices]
    before = [*map(dict, registries)]
    yield
    for registry, kept in zip(registries, before, strict=True):
        registry.clear()
        registry.update(kept)


def curve(folder: Path, name: str) -> list[tuple[int, float]]:
    """(iteration, value) of a curve as TensorBoard shows it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "logs" / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


# --- TensorBoard ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("reports")
def test_tensorboard_gets_curves_pictures_and_options_of_a_run_that_is_resumed(toy_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = command(toy_data, tmp_path, "--tracker", "tensorboard")
    main([*words, "--total_epochs", "2"])
    main(words)
    folder = folder_of(tmp_path)
    rows = history(tmp_path)
    shown = curve(folder, "accuracy/validation")
    assert [step for step, _ in shown] == [4, 8, 12]
    assert [value for _, value in shown] == pytest.approx([row["val_accuracy"] for row in rows])
    assert [step for step, _ in curve(folder, "gamma/conv0")] == [4, 8, 12]
    events = EventAccumulator(str(folder / "logs" / "tensorboard"), {"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"loss/train", "learning_rate", "gradient_norm_unscaled/linear", "test/toy_1shot_single"} <= {
        *tags["scalars"]
    }
    assert {"learning", "gammas", "episode_toy"} <= {*tags["images"]}
    written = b"".join(file.read_bytes() for file in folder.glob("logs/tensorboard/*"))
    assert (
        b"context_params_learning_rate" in written and b"svm_max_iter" not in written and b"dataset_dir" not in written
    )


def test_what_a_stopped_process_tracked_of_later_iterations_is_not_shown(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = tmp_path / "logs" / "tensorboard"
    first = TensorBoard(folder, 0)
    for iteration in (4, 8, 12):
        first.scalars({"loss/train": 1.0}, iteration)
    second = TensorBoard(folder, 4)
    second.scalars({"loss/train": 2.0}, 8)
    second.close()
    assert curve(tmp_path, "loss/train") == [(4, 1), (8, 2)]


def test_where_tensorboard_is_missing_the_error_says_how_to_install_it(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if "tensorboard" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"^--tracker tensorboard needs TensorBoard: pip install tensorboard$"):
        main(command(toy_data, tmp_path, "--tracker", "tensorboard"))


@pytest.mark.slow
def test_tensorboards_page_shows_the_curves(toy_data: Path, tmp_path: Path, browser: Browser) -> None:
    pytest.importorskip("tensorboard")
    main(command(toy_data, tmp_path, "--tracker", "tensorboard"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    words = [
        "-m",
        "tensorboard.main",
        "--logdir",
        str(tmp_path),
        "--host",
        "127.0.0.1",
        "--port",
        address.split(":")[1],
    ]
    server = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(f"http://{address}/data/environment")
        with urlopen(f"http://{address}/data/plugin/scalars/tags", timeout=10) as answer:
            (tags,) = json.load(answer).values()
        assert "accuracy/validation" in tags
        document = browser.run("--virtual-time-budget=15000", "--dump-dom", f"http://{address}/#timeseries")
        assert "accuracy/validation" in document
    finally:
        server.terminate()
        server.wait(10)


def wait_for(address: str) -> None:
    end = time.monotonic() + 40
    while time.monotonic() < end:
        try:
            urlopen(address, timeout=5).close()
            return
        except (URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"{address} does not answer")


# --- others --------------------------------------------------------------------------------------------------------


def test_the_tracker_of_the_document_gets_every_epoch_and_the_test(
    toy_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_code("tracking.md", monkeypatch)
    main(command(toy_data, tmp_path, "--tracker", "json"))
    lines = (folder_of(tmp_path) / "logs" / "json" / "curves.jsonl").read_text().splitlines()
    *epochs, test = map(json.loads, lines)
    of_epochs = [line for line in epochs if "loss/train" in line]
    assert [line["iteration"] for line in of_epochs] == [4, 8, 12]
    assert [line["loss/train"] for line in of_epochs] == [row["train_loss"] for row in history(tmp_path)]
    assert [line["skipped/train"] for line in of_epochs] == [0, 0, 0]
    assert test["experiment"] == "experiment" and {"test/toy_1shot_single", "test/toy_1shot_ensemble"} < {*test}


def test_a_tracker_that_fails_is_one_warning(
    toy_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @register("broken")
    class Broken(Tracker):
        def scalars(self, values: Any, iteration: int) -> None:
            raise ConnectionError("no route to host")

    main(command(toy_data, tmp_path, "--tracker", "broken"))
    output = capsys.readouterr().out
    assert output.count("warning: ") == 2  # one of the numbers of an epoch, one of what is measured inside
    assert "warning: the tracker cannot be kept up to date (ConnectionError: no route to host)" in output
    assert len(history(tmp_path)) == 3


def test_an_unknown_tracker_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--tracker is 'wandb'; it is one of none, tensorboard"):
        parse_args(["--tracker", "wandb"])
    with pytest.raises(ValueError, match="there is a tensorboard already"):
        register("tensorboard")(Tracker)


def test_a_run_without_a_tracker_writes_nothing_for_one(finished: Path) -> None:
    assert {path.name for path in (folder_of(finished) / "logs").iterdir()} >= {"diagnostics.jsonl"}
    assert not list((folder_of(finished) / "logs").glob("*/"))
