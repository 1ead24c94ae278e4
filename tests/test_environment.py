"""Where a run was computed is in its records, also where it went on elsewhere."""

import json
import sys
from pathlib import Path

import pytest
import torch

from utils import environment
from utils.environment import commit, machine, read_environments, record_environment
from utils.errors import UserError

CPU = torch.device("cpu")


def test_device_versions_commit_and_memory_are_recorded(tmp_path: Path) -> None:
    record_environment(tmp_path / "environment.json", CPU)
    (entry,) = read_environments(tmp_path / "environment.json")
    assert entry["device"].startswith("CPU, ")
    assert (entry["torch"], entry["python"]) == (torch.__version__, ".".join(map(str, sys.version_info[:3])))
    assert (entry["processes"], entry["commit"]) == (1, commit())
    assert entry["peak_memory_gib"] > 0.05  # torch alone takes more


def test_the_highest_peak_stays(tmp_path: Path) -> None:
    file = tmp_path / "environment.json"
    record_environment(file, CPU)
    (entry,) = read_environments(file)
    file.write_text(json.dumps([entry | {"peak_memory_gib": 1000.0}]))
    record_environment(file, CPU)
    assert read_environments(file) == [entry | {"peak_memory_gib": 1000.0}]


def test_a_run_that_goes_on_elsewhere_has_an_entry_for_each_place(tmp_path: Path) -> None:
    file = tmp_path / "environment.json"
    file.write_text(json.dumps([{"device": "GPU of before", "peak_memory_gib": 3.0}]))
    record_environment(file, CPU)
    assert [entry["device"] for entry in read_environments(file)] == ["GPU of before", machine("cpu")["device"]]


@pytest.mark.parametrize("text", ["[{}]", "[", "[3]", '[{"peak_memory_gib": "much"}]'])
def test_a_damaged_record_is_named_with_the_cure(text: str, tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text(text)
    with pytest.raises(UserError, match=r"environment\.json is damaged .* remove it and call the command again"):
        record_environment(tmp_path / "environment.json", CPU)


def test_a_machine_without_git_or_a_copy_without_its_history_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert commit() == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == ""
