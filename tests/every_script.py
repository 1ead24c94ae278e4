"""Runs every experiment script dry, a few at a time: make scripts

python -m tests.every_script CUB resnet12        those in whose names all of these words are

Prints a line for each script that fails, and how many did not. The exit status is 1 if any did.
"""

import io
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import torch
import torch._dynamo  # here once, and not in every process: torch.optim imports it

import train_maml_system
from utils.progress import set_up_logging

ROOT = Path(__file__).resolve().parents[1]
ROWS = sorted((ROOT / "experiment_scripts").glob("*_5way*/*.sh"))
READ_BY_SCRIPTS = ("TEST", "TEST_DATASET", "TEST_BATCH_SIZE", "DATASET_DIR", "PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX")
END = "dry run: trained, resumed, tested and cross-tested\n"


def executable(path: Path, *lines: str) -> Path:
    """Write and return a shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


def make_printer(path: Path) -> Path:
    """Write and return a program that takes the place of Python and prints its arguments, one a line."""
    return executable(path, "printf '%s\\n' \"$@\"")


def call(script: Path | str, *words: str, cwd: Path = ROOT, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run a shell script, which reads none but these of the variables that it may read."""
    environment = {name: value for name, value in os.environ.items() if name not in READ_BY_SCRIPTS}
    environment |= {name: str(value) for name, value in variables.items()}
    return subprocess.run(["bash", str(script), *words], cwd=cwd, env=environment, capture_output=True, text=True)


def failure(row: Path, printer: Path) -> str:
    """Run a script dry, on the CPU, and return what it printed if that failed, otherwise ""."""
    called = call(row, "cpu", "--dry_run", "true", PYTHON=printer)
    printed = io.StringIO()
    try:
        entry, *words = called.stdout.splitlines()
        with redirect_stdout(printed), redirect_stderr(printed):
            train_maml_system.main(words)
        ended = entry == "train_maml_system.py" and printed.getvalue().endswith(END)
    except (Exception, SystemExit):
        ended = False
        printed.write(traceback.format_exc())
    return "" if ended else called.stderr + printed.getvalue()


def main(parts: list[str]) -> int:
    rows = [row for row in ROWS if all(part in f"{row.parent.name}/{row.name}" for part in parts)]
    begun, failed = time.monotonic(), 0
    set_up_logging()
    fork = multiprocessing.get_context("fork")
    with (
        tempfile.TemporaryDirectory() as folder,
        fork.Pool(initializer=partial(torch.set_num_threads, 1)) as pool,
    ):
        printer = make_printer(Path(folder) / "printer")
        for row, wrong in zip(rows, pool.imap(partial(failure, printer=printer), rows), strict=True):
            if wrong:
                failed += 1
                print(f"{row.parent.name}/{row.name}: {wrong}", flush=True)
    print(f"{len(rows)} scripts: {len(rows) - failed} ran dry, {time.monotonic() - begun:.0f} seconds")
    return int(bool(failed) or not rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
