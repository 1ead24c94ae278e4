"""Memory is measured in the system's own unit, and the setting that keeps freed memory is known to work."""

import ctypes
import logging
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from utils.devices import keep_freed_memory, peak_memory_gib

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("platform", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_peak_memory_is_in_gib_on_every_system(platform: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux counts in KiB, macOS in bytes."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3 * 2**30 // unit))
    assert peak_memory_gib(CPU) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's own count")
def test_peak_memory_is_the_kernels_count() -> None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            assert peak_memory_gib(CPU) == pytest.approx(int(line.split()[1]) / 2**20, rel=0.05)


@pytest.mark.parametrize("results", [(1, 1), (1, 0), (0, 1)])
def test_a_setting_that_the_c_library_refuses_is_a_warning(
    results: tuple[int, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = iter(results)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=lambda *_: next(answers)))
    with caplog.at_level(logging.WARNING):
        keep_freed_memory()
    assert ("freed memory" in caplog.text) == (0 in results)


def test_a_c_library_without_such_settings_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    keep_freed_memory()
    assert caplog.text == ""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_blocks_that_are_freed_and_wanted_again_cost_no_page_faults() -> None:
    program = """
import ctypes, resource, torch
from utils.devices import keep_freed_memory
keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.empty(40 * 2**18).fill_(1) for _ in range(4)]  # 40 MiB each: more than glibc keeps by itself
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*[faults() for _ in range(12)])  # the heap needs a few rounds to settle
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    first, *_, last = map(int, run.stdout.split())
    assert last < 0.1 * first, run.stdout
