"""Every method on the built-in data set, same episodes, same budget, several seeds: mean and spread of the meta-test.

python benchmarks/methods.py                                    glyphs 5-way 1-shot, 300 iterations, seeds 0 1 2
python benchmarks/methods.py --iterations 600 --device cuda --jobs 1

A method is what experiment_scripts/any.sh makes of it; only epochs, seeds and folders are set here.
A seed decides the initial weights and the training tasks; validation and test tasks are the same for all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import Failed, Row, attempt, command_line, finish, start  # noqa: E402

EPOCHS = 3
METHODS = ["ALFA", "ALFA_L2F", "ALFA_random_init", "ANIL", "BOIL", "CxGrad", "L2F", "MAMLpp", "MetaSGD", "maml"]


def train_and_test(method: str, seed: int, options: argparse.Namespace) -> Row:
    """Accuracy of the best epoch and of the ensemble, and seconds, of one run."""
    folder = options.experiments_dir / f"seed_{seed}"
    arguments = {
        "seed": seed,
        "train_seed": seed,
        "experiments_dir": folder,
        "total_epochs": EPOCHS,
        "total_iter_per_epoch": options.iterations // EPOCHS,
        "num_evaluation_tasks": options.tasks,
    }
    extra = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    start = time.perf_counter()
    gpu = options.device.removeprefix("cuda:").replace("cuda", "0")
    command = ["bash", str(ROOT / "experiment_scripts" / "any.sh"), method, "glyphs", "1", gpu, *extra]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    seconds = time.perf_counter() - start
    single, ensemble = json.loads(
        (folder / "glyphs_5way_1shot" / f"{method}_4conv" / "logs" / "test_summary.json").read_text()
    )[:2]
    return {"accuracy": single["accuracy"], "ensemble": ensemble["accuracy"], "seconds": seconds}


def environment() -> dict[str, str]:
    """One thread for each of the processes that run side by side."""
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def summary(method: str, of_method: list[Future[Row]]) -> list[Row]:
    """Return a row of mean and standard deviation over the seeds, in %, and the mean seconds of a run."""
    row: Row = {"method": method}
    runs = [run.result() for run in of_method]
    for kind in ("accuracy", "ensemble"):
        values = [100 * run[kind] for run in runs]
        row |= {f"{kind}_mean": statistics.mean(values), f"{kind}_std": statistics.stdev(values)}
    return [row | {"seconds": statistics.mean(run["seconds"] for run in runs)}]


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--iterations", type=int, default=300, help="of each run [%(default)s]")
    parser.add_argument("--tasks", type=int, default=200, help="validation and test tasks [%(default)s]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side [%(default)s]")
    parser.add_argument("--experiments_dir", type=Path, default=ROOT / "experiments" / "methods")
    options = start(parser)
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = {m: [pool.submit(train_and_test, m, seed, options) for seed in options.seeds] for m in options.methods}
    rows: list[Row] = []
    for method, of_method in runs.items():
        rows += attempt(partial(summary, method, of_method), {"method": method})
    finish("methods", options, {"glyphs 5-way 1-shot, % correct": rows}, "glyphs")


if __name__ == "__main__":
    main()
