"""Every method on the built-in data set, same episodes, same budget, several seeds: mean and spread of the meta-test.

python benchmarks/methods.py                                    glyphs 5-way 1-shot, 300 iterations, seeds 0 1 2
python benchmarks/methods.py --iterations 600 --gpu 0 --jobs 1

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.iteration import machine  # noqa: E402
from utils.tables import aligned  # noqa: E402

EPOCHS = 3
METHODS = ["ALFA", "ALFA_L2F", "ALFA_random_init", "ANIL", "BOIL", "CxGrad", "L2F", "MAMLpp", "MetaSGD", "maml"]


def train_and_test(method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
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
    command = ["bash", str(ROOT / "experiment_scripts" / "any.sh"), method, "glyphs", "1", options.gpu, *extra]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise SystemExit(f"{method} failed:\n{done.stdout}{done.stderr}")
    seconds = time.perf_counter() - start
    single, ensemble = json.loads(
        (folder / "glyphs_5way_1shot" / f"{method}_4conv" / "logs" / "test_summary.json").read_text()
    )[:2]
    return {"accuracy": single["accuracy"], "ensemble": ensemble["accuracy"], "seconds": round(seconds, 1)}


def environment() -> dict[str, str]:
    """One thread for each of the processes that run side by side."""
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="cpu", help="a GPU id or cpu [%(default)s]")
    parser.add_argument("--iterations", type=int, default=300, help="of each run [%(default)s]")
    parser.add_argument("--tasks", type=int, default=200, help="validation and test tasks [%(default)s]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side [%(default)s]")
    parser.add_argument("--experiments_dir", type=Path, default=ROOT / "experiments" / "methods")
    options = parser.parse_args()
    jobs = [(method, seed) for method in METHODS for seed in options.seeds]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(lambda job: train_and_test(job[0], job[1], options), jobs))

    where = machine(options.gpu)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    print(f"glyphs 5-way 1-shot, {options.iterations} iterations, {options.tasks} test tasks, seeds {options.seeds}")
    rows, table = [], [["method", "single best, %", "ensemble, %", "seconds"]]
    for method in METHODS:
        of_method = [run for (job, _), run in zip(jobs, runs, strict=True) if job == method]
        row: dict[str, Any] = {"method": method, "runs": of_method}
        cells = [method]
        for kind in ("accuracy", "ensemble"):
            values = [100 * run[kind] for run in of_method]
            row[kind] = {"mean": statistics.mean(values), "std": statistics.stdev(values)}
            cells.append(f"{row[kind]['mean']:.2f} ± {row[kind]['std']:.2f}")
        rows.append(row)
        seconds = statistics.mean(run["seconds"] for run in of_method)
        table.append([*cells, f"{seconds:.0f}"])
    print(*aligned(table), sep="\n")
    settings = {"iterations": options.iterations, "tasks": options.tasks, "seeds": options.seeds, "jobs": options.jobs}
    file = ROOT / "benchmarks" / "results" / f"methods_glyphs_{options.gpu}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"machine": where, "settings": settings, "rows": rows}, indent=2) + "\n")
    print(f"written to {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
