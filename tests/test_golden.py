"""The recorded numbers that every clone has are the full recordings' own, and their inputs are made again exactly."""

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from tests.golden import HERE, compress, facts, load, recipes
from tests.golden_metaoptnet import state


def test_remade_tasks_have_the_recorded_checksums() -> None:
    made = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in recipes.tasks().items()}
    for name, case in facts("manifest").items():
        assert made == case["sha256"], name


@pytest.mark.parametrize("size", [32, 84])
def test_remade_images_and_weights_start_as_recorded(size: int) -> None:
    recorded, weights = load("metaoptnet", f"resnet12_eval_{size}"), state("ResNet12", 3001)
    heads = {"input": recipes.images(int(recorded["input_seed"]), 2, size), "conv1": weights["layer1.0.conv1.weight"]}
    heads["last_var"] = weights["layer4.0.downsample.1.running_var"]
    for name, array in heads.items():
        np.testing.assert_array_equal(np.asarray(array).ravel()[:16], recorded[f"{name}_head"], err_msg=name)


@pytest.mark.parametrize("program", ["cxgrad", "metaoptnet"])
def test_stored_arrays_are_the_full_recordings(program: str, shared: Path) -> None:
    for file in sorted((shared / "golden" / program).glob("*.npz")):
        stored = load(program, file.stem)
        with np.load(file) as full:
            kept = {name for name in full.files if compress.is_kept(file.stem, name)}
            assert kept == stored.keys()
            for name, array in stored.items():
                assert array.dtype == full[name].dtype
                np.testing.assert_array_equal(array, full[name], err_msg=f"{file.stem}/{name}")


def test_stored_facts_are_those_beside_the_recordings(shared: Path) -> None:
    for name in compress.FACTS:
        assert (HERE / Path(name).name).read_bytes() == (shared / "golden" / name).read_bytes(), name


@pytest.mark.parametrize("case", recipes.EPISODES)
def test_remade_episodes_are_the_recorded_ones(case: str, shared: Path) -> None:
    made = recipes.episode(*recipes.EPISODES[case])
    for file in (shared / "golden" / "metaoptnet").glob(f"heads_*_{case}.npz"):
        with np.load(file) as full:
            for name, array in made.items():
                np.testing.assert_array_equal(array, full[name], err_msg=f"{file.stem}/{name}")


def test_every_cited_section_of_the_arithmetic_exists() -> None:
    root = HERE.parents[1]
    sections = set(re.findall(r"^## (\d+)\. ", (root / "docs" / "arithmetic.md").read_text(), re.MULTILINE))
    code = [path.read_text() for folder in (root, root / "tests") for path in folder.glob("*.py")]
    cited = {number for text in code for number in re.findall(r"arithmetic\.md, section (\d+)", text)}
    assert cited and cited <= sections


def test_recordings_stay_small() -> None:
    assert sum(file.stat().st_size for file in HERE.iterdir() if file.is_file()) < 3_000_000
