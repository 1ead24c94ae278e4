"""Exported models answer as the checkpoints do, hold nothing private, and replace only what is theirs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import test as test_entry
import train_maml_system as train_entry
from predictor import Predictor
from tests.made_models import CXGRAD, arguments, best, write_classes
from utils import checkpoints
from utils.checkpoints import DamagedCheckpoint
from utils.errors import UserError
from utils.export import FILES, export, main
from utils.images import list_images

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "models" / "glyphs_CxGrad"


@pytest.fixture(params=["cxgrad_run", "ridge_run"])
def experiment(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.fixture
def model(cxgrad_run: Path, tmp_path: Path) -> Path:
    export(cxgrad_run, tmp_path / "model")
    return tmp_path / "model"


def front_matter(folder: Path) -> dict[str, Any]:
    """The head of a card, whose values are JSON, which is YAML too, or plain words."""
    start, head, _ = (folder / "README.md").read_text().split("---\n", 2)
    assert start == ""
    pairs = (line.split(": ", 1) for line in head.splitlines())
    return {name: json.loads(value) if value[0] in "[{" else value for name, value in pairs}


# --- the same model ------------------------------------------------------------------------------------------------


def test_an_exported_model_is_the_checkpoint(experiment: Path, tmp_path: Path) -> None:
    main([str(experiment), str(tmp_path / "model")])
    assert {path.name for path in (tmp_path / "model").iterdir()} == FILES
    state, exported = checkpoints.load(best(experiment)), checkpoints.load(tmp_path / "model")
    for part in {"network", "embedding", "head"} & state.keys():
        assert exported[part].keys() == state[part].keys()
        assert all(torch.equal(exported[part][name], tensor) for name, tensor in state[part].items())
    assert exported["normalization"] == tuple(map(tuple, state["normalization"]))
    assert exported["iterations_done"] == state["iterations_done"]

    files = list_images(write_classes(tmp_path / "images", 2, 3, 1))
    labels = [file.parent.name for file in files]
    ours, theirs = (Predictor.load(p, "cpu").fit(files, labels) for p in (best(experiment), tmp_path / "model"))
    assert (ours.predict_proba(files) == theirs.predict_proba(files)).all()


def test_the_test_program_scores_an_exported_model_as_its_checkpoint(experiment: Path, tmp_path: Path) -> None:
    export(experiment, tmp_path / "model")
    words = ["--dataset_dir", str(experiment.parents[2] / "datasets"), "--episode", "5", "--query", "3", "--gpu", "cpu"]
    shutil.copy(best(experiment), tmp_path / "copy")
    test_entry.main(["--load", str(tmp_path / "copy"), *words])
    test_entry.main(["--load", str(tmp_path / "model"), *words])
    ours, theirs = (
        json.loads((folder / "logs" / "test_summary.json").read_text())[0] for folder in (tmp_path, tmp_path / "model")
    )
    names = ("accuracy", "loss", "dataset", "trained_on", "steps", "head", "way", "shot", "batch_norm", "normalization")
    assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    assert theirs["model"] == "model"


def test_an_experiment_in_a_folder_of_its_own_choice_is_exported(tmp_path: Path) -> None:
    train_entry.main(arguments(tmp_path, *CXGRAD, "--save_path", str(tmp_path / "run")))
    export(tmp_path / "run", tmp_path / "model")
    assert checkpoints.load(tmp_path / "model")["options"]["save_path"] is None


# --- what is in it -------------------------------------------------------------------------------------------------


def test_nothing_of_this_machine_is_in_it(model: Path, cxgrad_run: Path) -> None:
    assert checkpoints.load(best(cxgrad_run))["options"]["dataset_dir"] == str(cxgrad_run.parents[2] / "datasets")
    for path in model.iterdir():
        assert str(cxgrad_run.parents[2]).encode() not in path.read_bytes(), path.name
    options = json.loads((model / "options.json").read_text())["options"]
    assert (options["dataset_dir"], options["experiments_dir"], options["gpu"]) == ("datasets", "experiments", None)


def test_a_model_is_taken_where_the_tracker_of_its_training_is_not_known(cxgrad_run: Path, tmp_path: Path) -> None:
    path = best(shutil.copytree(cxgrad_run, tmp_path / "run"))
    state = checkpoints.load(path)
    checkpoints.save(state | {"options": state["options"] | {"tracker": "tensorboard"}}, path)
    export(tmp_path / "run", tmp_path / "model")
    assert checkpoints.load(tmp_path / "model")["options"]["tracker"] == "none"


def test_results_are_those_of_the_exported_epoch(
    model: Path, cxgrad_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tested = json.loads((cxgrad_run / "logs" / "test_summary.json").read_text())
    assert [result["model"] for result in tested] == ["single best", "top-2 ensemble"]
    assert json.loads((model / "test_summary.json").read_text()) == tested[:1]
    capsys.readouterr()
    export(cxgrad_run, tmp_path / "again")
    assert "left out: 1 results of ensembles, of checkpoints other than epoch_" in capsys.readouterr().out
    run = shutil.copytree(cxgrad_run, tmp_path / "run")
    (run / "logs" / "test_summary.json").write_text(json.dumps([tested[0], tested[0] | {"changed": "a=1"}]))
    export(run, tmp_path / "other")
    assert json.loads((tmp_path / "other" / "test_summary.json").read_text()) == tested[:1]


def test_the_card_says_what_the_model_is_and_what_was_measured(model: Path) -> None:
    card, (result,) = (model / "README.md").read_text(), json.loads((model / "test_summary.json").read_text())
    accuracy, ci = 100 * result["accuracy"], 100 * result["ci95_per_episode"]
    assert f"| colours | 3-way 2-shot | {accuracy:.2f} ± {ci:.2f} % | 5 | 3 | 3 inner steps | transductive |\n" in card
    assert "| method | CxGrad (Lee et al., WACV 2022, arXiv 2110.10353) |\n" in card
    assert "2 to 3, as it has a linear classifier" in card
    assert "answers depend on what else is classified" in card
    head = front_matter(model)
    assert (head["library_name"], head["pipeline_tag"]) == ("pytorch", "image-classification")
    (index,) = head["model-index"]
    assert index["name"] == "model"
    assert index["results"][0]["metrics"][0]["value"] == result["accuracy"]
    assert index["results"][0]["dataset"] == {"type": "colours", "name": "colours", "split": "test"}


def test_the_card_of_a_head_says_so(ridge_run: Path, tmp_path: Path) -> None:
    export(ridge_run, tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| method | MetaOptNet-RR (Lee et al., CVPR 2019" in card
    assert "| classes | 2 or more |" in card
    assert "| Ridge lambda_reg=" in card or "| Ridge |" in card


def test_a_model_that_was_not_tested_says_so(
    cxgrad_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cxgrad_run / "saved_models", tmp_path / "run" / "saved_models")
    export(tmp_path / "run", tmp_path / "model")
    assert "warning: the experiment was not meta-tested" in capsys.readouterr().out
    assert "\nNot meta-tested.\n" in (tmp_path / "model" / "README.md").read_text()
    assert "model-index" not in front_matter(tmp_path / "model")


# --- what is refused -----------------------------------------------------------------------------------------------


def test_an_earlier_export_is_replaced_and_an_empty_folder_filled(
    model: Path, cxgrad_run: Path, ridge_run: Path
) -> None:
    export(ridge_run, model)
    assert "embedding" in checkpoints.load(model)
    export(cxgrad_run, model)
    assert "network" in checkpoints.load(model)
    (model.parent / "empty").mkdir()
    export(cxgrad_run, model.parent / "empty")
    assert sorted(path.name for path in model.parent.iterdir()) == ["empty", "model"]


def edit_card(model: Path) -> None:
    (model / "README.md").write_text("license: mine")


def tear_weights(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"torn")


def add_notes(model: Path) -> None:
    (model / "notes.txt").write_text("mine")


def remove_options(model: Path) -> None:
    (model / "options.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit_card, "README.md is not as it was exported"),
        (tear_weights, "model.safetensors is not as it was exported"),
        (add_notes, "holds notes.txt beside an export"),
        (remove_options, "is there and is no export of this program"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_with_anything_of_the_users_is_left_alone(
    change: Callable[[Path], None], message: str, model: Path, cxgrad_run: Path
) -> None:
    change(model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    with pytest.raises(UserError, match=f"{message}; move it away or choose another folder"):
        export(cxgrad_run, model)
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_a_file_in_the_place_of_the_folder_is_left_alone(cxgrad_run: Path, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("mine")
    with pytest.raises(UserError, match="model is there and is no export"):
        export(cxgrad_run, tmp_path / "model")
    assert (tmp_path / "model").read_text() == "mine"


def test_what_cannot_be_exported_is_said(cxgrad_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no experiment .*absent; name a folder such as"):
        export(tmp_path / "absent", tmp_path / "model")
    with pytest.raises(UserError, match=r"has no checkpoint of a finished epoch: there is no .*saved_models/best"):
        export(tmp_path, tmp_path / "model")
    shutil.copytree(cxgrad_run, tmp_path / "run")
    (tmp_path / "run" / "logs" / "test_summary.json").write_text("[{")
    with pytest.raises(UserError, match=r"test_summary.json is damaged .* move it away and test again"):
        export(tmp_path / "run", tmp_path / "model")
    state = checkpoints.load(best(cxgrad_run))
    checkpoints.save({"network": state["network"]}, tmp_path / "official" / "best")
    with pytest.raises(UserError, match="official/best does not say how it was trained"):
        export(tmp_path / "official", tmp_path / "model")
    assert not list(tmp_path.glob("*model*")) and not list(tmp_path.glob(".*"))


def test_a_folder_that_cannot_be_written_is_named(cxgrad_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write .*model"):
        export(cxgrad_run, tmp_path / "file" / "model")


# --- folders that are damaged or no export -------------------------------------------------------------------------


def swap_weights(model: Path) -> None:
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model.safetensors").write_bytes(data)


def break_options(model: Path) -> None:
    (model / "options.json").write_text("{")


def nest_options(model: Path) -> None:
    (model / "options.json").write_text("[" * 100_000)


def empty_options(model: Path) -> None:
    (model / "options.json").write_text("[]")


def remove_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tear_weights, "model.safetensors is not the file that options.json was written with"),
        (swap_weights, "model.safetensors is not the file that options.json was written with"),
        (remove_weights, "FileNotFoundError"),
        (remove_options, "FileNotFoundError"),
        (break_options, "JSONDecodeError"),
        (empty_options, "TypeError"),
        (nest_options, "nested too deeply"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_found_when_a_model_is_loaded(damage: Callable[[Path], None], message: str, model: Path) -> None:
    damage(model)
    with pytest.raises(DamagedCheckpoint, match=rf"the model in .*model is damaged, or not one that .*{message}"):
        Predictor.load(model, "cpu")


def test_a_folder_that_is_no_model_is_refused_with_the_cure(cxgrad_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no exported model; utils.export makes them"):
        checkpoints.load(tmp_path)
    with pytest.raises(UserError, match=r"holds no exported model; name one of its checkpoints: saved_models/best"):
        checkpoints.load(cxgrad_run)


def test_options_of_a_method_that_is_not_here_are_named(model: Path) -> None:
    described = json.loads((model / "options.json").read_text())
    described["options"]["shrinking"] = True
    (model / "options.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="model: there is no option 'shrinking'"):
        Predictor.load(model, "cpu")


# --- the model that comes with the project -------------------------------------------------------------------------


@pytest.mark.parametrize("folder", sorted(SHIPPED.parent.iterdir()), ids=lambda folder: folder.name)
def test_a_shipped_model_is_small_whole_and_states_its_accuracy(folder: Path) -> None:
    assert {path.name for path in folder.iterdir() if path.is_file()} == FILES
    assert sum((folder / name).stat().st_size for name in FILES) < 1_000_000
    options = checkpoints.load(folder)["options"]
    assert options["contextual_grad"] is folder.name.endswith("_CxGrad")
    results = json.loads((folder / "test_summary.json").read_text())
    own = next(row for row in results if row["dataset"] == options["dataset_name"])
    assert f"| {100 * own['accuracy']:.2f} ± " in (folder / "README.md").read_text()
    assert own["accuracy"] > 0.65


def test_the_shipped_model_reads_handwritten_digits_that_are_in_the_project() -> None:
    folder = ROOT / "docs" / "example_images"
    support, query = list_images(folder / "support"), list_images(folder / "query")
    predictor = Predictor.load(SHIPPED, "cpu").fit(support, [file.parent.name for file in support])
    right = predictor.predict(query) == np.array([file.name[0] for file in query])  # files are DIGIT_NUMBER.png
    assert right.mean() > 0.8
    assert sum(path.stat().st_size for path in [*support, *query]) < 50_000
