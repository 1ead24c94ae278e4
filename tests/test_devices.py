"""Memory is measured in the system's own unit, and the setting that keeps freed memory is known to work."""

import ctypes
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from utils import devices
from utils.devices import host_memory_gib, keep_freed_memory, peak_memory_gib, prepare_device
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.mark.parametrize(("platform", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_peak_memory_is_in_gib_on_every_system(platform: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux counts in KiB, macOS in bytes."""
    monkeypatch.setattr(devices, "STATUS", Path("/nowhere"))
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=3 * 2**30 // unit))
    assert peak_memory_gib(CPU) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's own count")
def test_peak_memory_is_the_kernels_count() -> None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            assert peak_memory_gib(CPU) == pytest.approx(int(line.split()[1]) / 2**20, rel=0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child starts at zero")
def test_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    child = "import torch; from utils.devices import peak_memory_gib; print(peak_memory_gib(torch.device('cpu')))"
    parent = f"""
import subprocess, sys
held = b"x" * 2**31
subprocess.run([sys.executable, "-c", {child!r}], check=True)
"""
    run = subprocess.run([sys.executable, "-c", parent], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.05 < float(run.stdout) < 1.5


@pytest.mark.skipif(not devices.CLEAR.exists(), reason="the system does not forget the peak of memory")
def test_a_peak_of_memory_can_be_forgotten() -> None:
    code = """
import torch
from utils.devices import forget_peak, peak_memory_gib
cpu = torch.device("cpu")
large = torch.ones(2**28)
before = peak_memory_gib(cpu)
del large
forget_peak(cpu)
print(before - peak_memory_gib(cpu))
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(run.stdout) > 0.9


def test_a_gpu_that_is_not_there_is_named_with_what_hides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError, match=r"GPU 3 does not exist .* it has GPU 0 \(CUDA_VISIBLE_DEVICES=3 hides others"):
        devices.gpu_ids("3")


@pytest.fixture
def settings_of_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put torch's settings back afterwards."""
    cudnn, deterministic = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    for name in ("allow_tf32", "benchmark", "deterministic"):
        monkeypatch.setattr(cudnn, name, getattr(cudnn, name))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    tf32 = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.usefixtures("settings_of_torch")
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_gpu_tries_its_kernels_or_repeats_its_bits(deterministic: bool) -> None:
    prepare_device(torch.device("cuda"), deterministic=deterministic)
    cudnn = torch.backends.cudnn
    assert (cudnn.deterministic, cudnn.benchmark) == (deterministic, not deterministic)
    assert torch.are_deterministic_algorithms_enabled() == deterministic
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)


@pytest.mark.usefixtures("settings_of_torch")
def test_a_workspace_that_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    prepare_device(torch.device("cuda"), deterministic=True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("limit", [None, "max", str(2**30), str(2**63 - 4096)])
def test_memory_is_the_machines_or_what_its_container_may_take(
    limit: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 2**20, "SC_PAGE_SIZE": 2**12}[name])
    monkeypatch.setattr(devices, "CONTROL_GROUP", tmp_path)
    if limit:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
    assert host_memory_gib() == (1 if limit == str(2**30) else 4)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_memory_that_is_not_used_is_given_back() -> None:
    program = """
import torch
from utils.devices import forget_peak, keep_freed_memory
def used():
    return int(open("/proc/self/statm").read().split()[1])
keep_freed_memory()
block = torch.ones(2**26)
full = used()
del block
kept = used()
forget_peak(torch.device("cpu"))
print(full, kept, used())
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    full, kept, left = map(int, run.stdout.split())
    assert kept > 0.9 * full and full - left > 0.9 * 2**28 / 4096, run.stdout


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
