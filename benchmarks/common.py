"""This module holds what the benchmarks share: the machine's line, turns, child processes, tables, records, documents.

python benchmarks/common.py --docs      write the tables of docs/benchmarks.md anew from benchmarks/results/*.json

A record is a JSON file {"benchmark", "machine", "settings", "tables": {question: rows}}; a row is a dict from column
names to numbers, texts or [lowest, median, highest]. A variant that fails is a row with the reason under "failed".
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils.devices import keep_freed_memory, peak_memory_gib  # noqa: E402
from utils.environment import machine  # noqa: E402
from utils.tables import aligned  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- tables: made by benchmarks/common.py --docs -->\n", "<!-- end of tables -->\n"
DOCUMENTED = (
    "iteration",
    "evaluation",
    "head_training",
    "svm_head",
    "data",
    "augmentation",
    "memory",
    "methods",
    "explain",
)
TIMEOUT = 1800  # seconds that a child process may take
WARM_UP_GPU = 5  # calls in which cuDNN chooses its kernels and a gradient learner captures its graph

T = TypeVar("T")
Row = dict[str, Any]
Tables = Mapping[str, Sequence[Row]]


class Failed(Exception):
    """A variant could not be measured; the message is one line that says why."""


def machine_line(where: Mapping[str, str]) -> str:
    """Return the facts of `machine` in one line."""
    return ", ".join(f"{name} {value}" for name, value in where.items())


# --- the command line ------------------------------------------------------------------------------------------------


def command_line(description: str | None, threads: int | None = None) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has; `threads` is the default, None means all cores."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="[%(default)s]")
    parser.add_argument("--threads", type=int, default=threads, help="of the CPU [%(default)s; None: all cores]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record [benchmarks/results]")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def start(parser: argparse.ArgumentParser, child: Callable[..., Any] | None = None) -> argparse.Namespace:
    """Parse the command line, set this process up as training does, and print the machine's line.

    A process that `run_child` started prints what `child(options, *what)` returns and ends here.
    """
    options = parser.parse_args()
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"PyTorch sees no GPU here for --device {options.device}; --device cpu runs without one")
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cpu":
        keep_freed_memory()
    if options.child:
        assert child is not None
        print(json.dumps(child(options, *json.loads(options.child))))
        sys.exit()
    print(machine_line(machine(options.device)), flush=True)
    return options


# --- measuring -------------------------------------------------------------------------------------------------------


def run_child(*what: Any, command: Sequence[str] = ()) -> Any:
    """Return what this script's `child` makes of `what` in a process of its own; raises Failed with its last words.

    Another `command` (interpreter, script, options) may answer instead.
    """
    command = [*(command or (sys.executable, *sys.argv)), "--child", json.dumps(what)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"no result after {TIMEOUT} s") from error
    except OSError as error:
        raise Failed(str(error)) from error
    if done.returncode < 0:
        raise Failed(f"ended by {signal.Signals(-done.returncode).name}; out of memory?")
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise Failed(said.removeprefix(f"{Failed.__module__}.Failed: "))
    return json.loads(done.stdout.splitlines()[-1])


def in_turns(variants: Mapping[str, Callable[[], T]], rounds: int) -> tuple[dict[str, list[T]], dict[str, str]]:
    """Call every variant once a round, so that a drift of the machine's speed meets them all alike.

    Returns the results of each variant, and the reason of each that failed, which is not called again.
    """
    found: dict[str, list[T]] = {name: [] for name in variants}
    failures: dict[str, str] = {}
    for _ in range(rounds):
        for name, work in variants.items():
            if name in failures:
                continue
            try:
                found[name].append(work())
            except Exception as error:
                failures[name] = one_line(error)
                del found[name]
    return found, failures


def compare(
    case: Row, variants: Mapping[str, Callable[[], Row]], rounds: int, count: str = "", of: int = 1
) -> list[Row]:
    """Return a row for every variant of one case, measured in turns: medians, and its time over the first variant's.

    A variant returns `seconds` and other numbers; `count` names what it did `of` in them, for a column of its rate.
    """
    found, failures = in_turns(variants, rounds)
    first, rows = found.get(next(iter(variants))), []
    for name in variants:
        row = {**case, "variant": name}
        if name in failures:
            rows.append(row | {"failed": failures[name]})
            continue
        row |= {key: statistics.median(result[key] for result in found[name]) for key in found[name][0]}
        if count:
            row[f"{count}_per_second"] = of / row["seconds"]
        if first and found[name] is not first:
            row["time_over_first"] = spread(*([result["seconds"] for result in each] for each in (found[name], first)))
        rows.append(row)
    return rows


def one_line(error: Exception) -> str:
    """Return an error's first line, with the error's kind unless it is Failed."""
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, Failed) else f"{type(error).__name__}: {text}"


def attempt(work: Callable[[], list[Row]], case: Row) -> list[Row]:
    """Return the rows that `work` makes, or one of this case with the reason why there are none."""
    try:
        return work()
    except Exception as error:
        return [case | {"failed": one_line(error)}]


def spread(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return lowest, median and highest ratio, pair by pair."""
    ratios = sorted(a / b for a, b in zip(over, under, strict=True))
    return [ratios[0], statistics.median(ratios), ratios[-1]]


def timed(work: Callable[[], Any], device: str, warm_up: int | None = None, repetitions: int = 1) -> Row:
    """Return the seconds of the fastest repetition, after one call to warm up on a CPU and `WARM_UP_GPU` on a GPU."""
    seconds = []
    if warm_up is None:
        warm_up = 1 if device == "cpu" else WARM_UP_GPU
    for _ in range(warm_up + repetitions):
        begin = time.perf_counter()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - begin)
    return {"seconds": min(seconds[warm_up:])}


def timed_alone(work: Callable[[], Any], device: str, warm_up: int | None = None, repetitions: int = 1) -> Row:
    """Return what `timed` does and the peak memory, in a process that does nothing else of size."""
    return timed(work, device, warm_up, repetitions) | {"peak_gib": peak_memory_gib(torch.device(device))}


def synchronise(device: torch.device | str) -> None:
    """Wait until a GPU has done what was queued."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


# --- tables and records ----------------------------------------------------------------------------------------------


def rounded(value: Any) -> Any:
    """Return four significant digits of every float in nested lists and dicts."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    return [rounded(entry) for entry in value] if isinstance(value, list | tuple) else value


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the header and a line of texts for each row; a column that a row does not have is a dash there."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    names.sort(key=lambda name: name == "failed")
    return [[name.replace("_", " ") for name in names], *([text(row.get(name)) for name in names] for row in rows)]


def text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        lowest, median, highest = map(text, value)
        return median if lowest == highest else f"{median} ({lowest} .. {highest})"
    return f"{value:g}" if isinstance(value, float) else str(value)


def finish(benchmark: str, options: argparse.Namespace, tables: Tables, name: str = "") -> None:
    """Print the tables and write them to RESULTS/BENCHMARK[_NAME]_DEVICE.json."""
    where, tables = machine(options.device), rounded(dict(tables))
    for question, rows in tables.items():
        print(question, *aligned(cells(rows)), sep="\n", flush=True)
    kind = "cpu" if options.device == "cpu" else where["device"].replace(" ", "_")
    file = options.results / ("_".join(filter(None, (benchmark, name, kind))) + ".json")
    file.parent.mkdir(parents=True, exist_ok=True)
    settings = {n: v for n, v in vars(options).items() if n not in ("child", "results", "device")}
    record = {"benchmark": benchmark, "machine": where, "settings": settings, "tables": tables}
    file.write_text(json.dumps(record, indent=2, default=str) + "\n")
    print(f"written to {os.path.relpath(file)}")


# --- documents -------------------------------------------------------------------------------------------------------


def markdown(folder: Path = RESULTS) -> str:
    """Return the tables of the folder's records, by benchmark and device."""
    records = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    parts = []
    for benchmark in DOCUMENTED:
        for record in (record for record in records if record.get("benchmark") == benchmark):
            given = {name: value for name, value in record["settings"].items() if value is not None}
            parts.append(f"### {benchmark}\n\n{machine_line({**record['machine'], **given})}\n")
            for question, rows in record["tables"].items():
                header, *body = cells(rows)
                lines = [header, ["---"] * len(header), *body]
                parts.append(f"{question}:\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines))
    return "\n".join(parts)


def with_tables(document: str, tables: str) -> str:
    """Return the document with other tables between its two marks."""
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", required=True, help="write docs/benchmarks.md")
    parser.parse_args()
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(), markdown()))


if __name__ == "__main__":
    main()
