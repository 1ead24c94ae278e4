"""Check what training does on this machine's GPU: that it is right, never waits and repeats itself, and how fast it is.

make check-gpu                                          the first GPU, or the CPU where there is none
make check-gpu ARGS="--only parity waits"               two of the sections
python benchmarks/check_gpu.py --gpu 1 --minutes 5

Prints one line per check and writes them after every section to benchmarks/results/check_gpu_DEVICE.json. A check that
raises an exception is a line with the reason. The exit status is 1 if a line says FAILED, else 0. On a CPU the networks
are tiny and what needs a GPU is left out, so that the whole takes less than a minute; its times mean nothing.
"""

import argparse
import faulthandler
import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, device
from torch.autograd import DeviceType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import qp_solvers  # noqa: E402
from benchmarks.cases import (  # noqa: E402
    CXGRAD_84,
    METHODS,
    all_learners,
    gradient_options,
    head_options,
    made_batch,
    made_episodes,
    torch_operations,
    without_chance,
)
from benchmarks.common import RESULTS, machine, one_line, rounded, synchronise, text  # noqa: E402
from experiment_builder import Experiment  # noqa: E402
from few_shot_learning_system import build_learner  # noqa: E402
from head_learning_system import HeadFewShotClassifier  # noqa: E402
from learner import FewShotLearner  # noqa: E402
from utils import distributed, entry  # noqa: E402
from utils.devices import choose_device  # noqa: E402
from utils.files import write_text  # noqa: E402
from utils.options import Options  # noqa: E402
from utils.synthetic import write_dataset  # noqa: E402

OK, FAILED, MEASURED, NOT_AVAILABLE, LEFT_OUT = "ok", "FAILED", "measured", "not available", "left out"
WARM_UP = 4  # iterations on a GPU that set up its libraries, choose algorithms and capture the graph
REPEATED = 3  # iterations after them, of whose times the median counts; also those of an epoch of `repeats`

Figures = dict[str, float | str]


class Outcome(NamedTuple):
    """This is what a check found."""

    verdict: str
    figures: Figures
    note: str = ""


Work = Callable[[], Outcome]
Checks = Iterator[tuple[str, Work]]


class NotAvailable(Exception):
    """This machine or this version cannot do what a check is about; the message says why."""


def require(available: bool, otherwise: str) -> None:
    if not available:
        raise NotAvailable(otherwise)


def judged(right: bool, figures: Figures) -> Outcome:
    return Outcome(OK if right else FAILED, figures)


def on_gpu(where: device) -> bool:
    return where.type == "cuda"


# --- is it right ---------------------------------------------------------------------------------------------------


def environment(where: device) -> Checks:
    yield "versions", lambda: Outcome(MEASURED, {**machine(str(where))})
    yield "GPU", partial(gpu_facts, where)


def gpu_facts(where: device) -> Outcome:
    require(on_gpu(where), "the CPU is checked")
    facts = torch.cuda.get_device_properties(where)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
    figures: Figures = {"driver": driver, "capability": f"{facts.major}.{facts.minor}"}
    return Outcome(MEASURED, {**figures, "GiB": facts.total_memory / 2**30, "GPUs": torch.cuda.device_count()})


class Bounds(NamedTuple):
    """These are bounds of relative errors in float64, and in float32 of the loss and the gradient's cosine."""

    gradient: float = 1e-6
    loss: float = 1e-9
    float32_loss: float = 1e-4
    float32_cosine: float = 0.999


# A CPU's float32 has an error of 8e-4 in the loss and a cosine of 0.9974 there.
BOUNDS_84 = Bounds(float32_loss=1e-2, float32_cosine=0.98)


def parity(where: device) -> Checks:
    for name, options in all_learners(where):
        yield name, partial(equals_cpu, where, options)
    if on_gpu(where):
        yield "CxGrad, 84x84", partial(equals_cpu, where, partial(gradient_options, where, **CXGRAD_84), BOUNDS_84)


def equals_cpu(where: device, make_options: Callable[[], Options], bounds: Bounds = Bounds()) -> Outcome:  # noqa: B008
    """Compare outer gradients with those by PyTorch's own operations on the CPU in float64."""
    options = make_options()
    with torch_operations():
        expected, loss = outer_gradient(options, device("cpu"), torch.float64)
    double, double_loss = outer_gradient(options, where, torch.float64)
    single, single_loss = outer_gradient(options, where, torch.float32, before=WARM_UP if on_gpu(where) else 1)
    gradient_error, loss_error = relative_error(double, expected), abs(double_loss / loss - 1)
    float32_loss, float32_cosine = abs(single_loss / loss - 1), cosine(single, expected)
    right = gradient_error <= bounds.gradient and loss_error <= bounds.loss
    right = right and float32_loss <= bounds.float32_loss and float32_cosine >= bounds.float32_cosine
    errors: Figures = {"float64 gradient": gradient_error, "float64 loss": loss_error}
    return judged(right, {**errors, "float32 loss": float32_loss, "float32 cosine": float32_cosine})


def outer_gradient(options: Options, where: device, dtype: torch.dtype, before: int = 0) -> tuple[Tensor, float]:
    """Return the outer gradient of a meta-batch, float64 on the CPU, and the loss, after `before` other meta-batches.

    The iterations before it let a GPU capture its graph, which the last one then replays with another input.
    """
    model = without_chance(build_learner(where, options)).to(dtype)
    return gradient_and_loss(model, [made_batch(options, where, seed) for seed in range(before, -1, -1)])


def gradient_and_loss(model: FewShotLearner, batches: Sequence[Sequence[Tensor]]) -> tuple[Tensor, float]:
    """Return the outer gradient and the loss of the last meta-batch, all with the same weights."""
    with mock.patch.object(model.optimizer, "step"):  # some optimisers change the gradients too
        for batch in batches:
            losses, _ = model.run_train_iter(batch, 0)
    found = [p.grad.detach().flatten().double().cpu() for p in model.parameters() if p.grad is not None]
    return torch.cat(found), losses["loss"].item()


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a, b, dim=0).item()


def precision(where: device) -> Checks:
    yield "CxGrad, 84x84, outer gradient", partial(cosines, where)


def cosines(where: device) -> Outcome:
    """Compare the outer gradient in float32 and in TF32, which is off in gradient learners, with float64."""
    require(on_gpu(where), "TF32 needs a GPU")
    options = gradient_options(where, **CXGRAD_84)
    exact, _ = outer_gradient(options, where, torch.float64)
    single, _ = outer_gradient(options, where, torch.float32)
    model = build_learner(where, options)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    tf32, _ = gradient_and_loss(model, [made_batch(options, where)])
    return Outcome(MEASURED, {"cosine of float32": cosine(single, exact), "cosine of TF32": cosine(tf32, exact)})


def processes(where: device) -> Checks:
    yield "CxGrad, gradient of two processes", partial(two_equal_one, where)


def two_equal_one(where: device) -> Outcome:
    """Compare the outer gradient of two processes, which torchrun starts, with that of one."""
    require(not on_gpu(where) or torch.cuda.device_count() > 1, "needs two GPUs")
    with tempfile.TemporaryDirectory(prefix="check_gpu_") as folder:
        file = Path(folder) / "gradient.pt"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
        command = [*launcher, "--gpu", "0,1" if on_gpu(where) else "cpu", "--minutes", "2", "--rank-to", str(file)]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the processes ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        found = torch.load(file, weights_only=True)["gradient"]
    one, _ = outer_gradient(gradient_options(where, **METHODS["CxGrad"]), where, torch.float64)
    return judged((error := relative_error(found, one)) <= Bounds().gradient, {"float64 gradient": error})


def gradient_of_rank(where: device, file: Path) -> None:
    """Do the share of one process of `two_equal_one`; the first one writes the mean gradient of all."""
    with distributed.processes(where):
        rank, options = distributed.rank(), gradient_options(where, **METHODS["CxGrad"])
        share = [part[rank : rank + 1] for part in made_batch(options, where)]
        gradient, _ = gradient_and_loss(build_learner(where, options).double(), [share])
        if distributed.is_main():
            torch.save({"gradient": gradient}, file)


# --- does it wait, does it repeat itself -----------------------------------------------------------------------------

READS_OF_AN_SVM = 8  # per iteration at most


def waits(where: device) -> Checks:
    reason = "needs a GPU; tests/test_stand_in_cuda.py checks it on stand-in tensors"
    if not on_gpu(where):
        yield "all learners", lambda: Outcome(NOT_AVAILABLE, {}, reason)
        return
    for name, options in all_learners(where):
        yield name, partial(never_waits, where, options)


def never_waits(where: device, make_options: Callable[[], Options]) -> Outcome:
    """Run iterations, episodes included, where waiting of the host is an error; SVMs may read through `look`."""
    options, plain_look, reads = make_options(), qp_solvers.look, 0
    model, episodes = build_learner(where, options), made_episodes(options, where)

    def look(*values: Tensor) -> list[float]:
        nonlocal reads
        reads += 1
        torch.cuda.set_sync_debug_mode("default")
        found = plain_look(*values)
        torch.cuda.set_sync_debug_mode("error")
        return found

    for i in range(WARM_UP):
        model.run_train_iter(episodes.batch(i * options.batch_size, options.batch_size), 0)
    with mock.patch.object(qp_solvers, "look", look):
        torch.cuda.set_sync_debug_mode("error")
        for i in range(REPEATED):
            model.run_train_iter(episodes.batch(i * options.batch_size, options.batch_size), 0)
    return judged(reads <= REPEATED * READS_OF_AN_SVM, {"reads per iteration": reads / REPEATED})


def repeats(where: device) -> Checks:
    learners: dict[str, Callable[..., Options]] = {
        "CxGrad": partial(gradient_options, where, **METHODS["CxGrad"]),
        "MAML++": partial(gradient_options, where, **METHODS["MAML++"]),
        "ResNet-12, Ridge": partial(head_options, where, "Ridge", "ResNet-12"),
        "ResNet-12, SVM-CS": partial(head_options, where, "SVM-CS", "ResNet-12"),
    }
    for words, deterministic in (("", False), (", --deterministic true", True)):
        for name, options in learners.items():
            yield name + words, partial(same_bits, where, options, deterministic)


def same_bits(where: device, make_options: Callable[..., Options], deterministic: bool) -> Outcome:
    """Train twice, and once in two parts; on a GPU equal bits are promised with --deterministic only."""
    with tempfile.TemporaryDirectory(prefix="check_gpu_") as folder:
        run = {"dataset_name": "made", "dataset_dir": folder, "num_evaluation_tasks": 2}
        run |= {"total_iter_per_epoch": REPEATED}
        run |= {"deterministic": True} if deterministic else {}
        write_dataset(Path(folder) / "made", 6, 8)

        def trained(name: str, *epochs: int) -> dict[str, Tensor]:
            for total in epochs:
                options = make_options(**run, experiments_dir=f"{folder}/{name}", total_epochs=total)
                model = build_learner(where, options)
                Experiment(options, model).train()
            return {name: tensor.cpu() for name, tensor in model.state_dict().items()}

        once = trained("once", 2)
        others = {"again": trained("again", 2), "resumed": trained("resumed", 1, 2)}
    differing = {name: sum(not torch.equal(t, once[n]) for n, t in other.items()) for name, other in others.items()}
    outcome = judged(
        not any(differing.values()), {f"tensors that differ, {n}": count for n, count in differing.items()}
    )
    return outcome if deterministic or not on_gpu(where) else outcome._replace(verdict=MEASURED)


# --- times, memory and kernels -------------------------------------------------------------------------------------


def times(where: device) -> Checks:
    """Yield CxGrad's training iteration in all forms: of both published recipes on a GPU."""
    for shot, tasks in ((1, 4), (5, 2)) if on_gpu(where) else ((1, 2),):
        for captured, grouped, ours, benchmark in itertools.product((False, True), repeat=4):
            if on_gpu(where) or not (captured or benchmark):
                words = ["captured" if captured else "eager", "grouped" if grouped else "per task"]
                words += ["our operations" if ours else "torch's", "benchmark" if benchmark else "no benchmark"]
                name = f"{shot}-shot x{tasks}, {', '.join(words)}"
                shape = {"num_samples_per_class": shot, "batch_size": tasks, "tasks_per_pass": tasks if grouped else 1}
                yield name, partial(iteration_time, where, shape, captured, ours, benchmark)


def iteration_time(where: device, shape: dict[str, int], captured: bool, ours: bool, benchmark: bool) -> Outcome:
    graph = {"cuda_graph": "auto" if captured else "off"}
    options = gradient_options(where, **(CXGRAD_84 if on_gpu(where) else METHODS["CxGrad"]) | shape | graph)
    with nullcontext() if ours else torch_operations(), mock.patch.object(logging.Logger, "warning") as warn:
        model = build_learner(where, options)
        torch.backends.cudnn.benchmark = benchmark
        figures = milliseconds(where, model, made_batch(options, where))
    said = "; ".join(str(call.args[0] % call.args[1:]) for call in warn.call_args_list)  # why nothing was captured
    return Outcome(FAILED if captured and said else MEASURED, figures, said)


def milliseconds(where: device, model: FewShotLearner, batch: Sequence[Tensor]) -> Figures:
    """Return the median time of a training iteration and, on a GPU, the most memory that it used and held."""
    batch, seconds = [part.float() if part.is_floating_point() else part for part in batch], []
    if on_gpu(where):
        torch.cuda.reset_peak_memory_stats(where)
    try:
        for _ in range(WARM_UP + REPEATED if on_gpu(where) else REPEATED):
            begin = time.perf_counter()
            model.run_train_iter(batch, 0)
            synchronise(where)
            seconds.append(time.perf_counter() - begin)
    except torch.OutOfMemoryError as error:
        raise NotAvailable("the GPU's memory is too small for it") from error
    figures: Figures = {"ms": 1000 * statistics.median(seconds[-REPEATED:])}
    if on_gpu(where):
        used, held = torch.cuda.max_memory_allocated(where), torch.cuda.max_memory_reserved(where)
        figures |= {"GiB used": used / 2**30, "GiB held": held / 2**30}
    return figures


def head_times(where: device) -> Checks:
    layouts = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    for head, kind, layout in itertools.product(("Ridge", "SVM-CS"), ("float32", "tf32", "bf16"), layouts):
        if on_gpu(where) or kind != "tf32":
            yield f"ResNet-12, {head}, {kind}, {layout}", partial(head_time, where, head, kind, layouts[layout])


def head_time(where: device, head: str, kind: str, layout: torch.memory_format) -> Outcome:
    size = {"batch_size": 8, "num_samples_per_class": 5, "num_target_samples": 6} if on_gpu(where) else {}
    options = head_options(where, head, "ResNet-12", precision=kind, **size)
    model = build_learner(where, options)
    assert isinstance(model, HeadFewShotClassifier)
    model.embedding.to(memory_format=layout)
    return Outcome(MEASURED, milliseconds(where, model, made_batch(options, where)))


def kernels(where: device) -> Checks:
    """Yield the 20 slowest kernels of a training iteration of CxGrad, on a CPU the 20 slowest operators."""
    slowest: list[tuple[str, Figures]] = []
    yield "all together", partial(profiled, where, slowest)
    for name, figures in slowest:
        yield name, partial(Outcome, MEASURED, figures)


def profiled(where: device, slowest: list[tuple[str, Figures]]) -> Outcome:
    """Return the sums over all kernels, and add the slowest ones to the list."""
    options = gradient_options(where, **CXGRAD_84 if on_gpu(where) else METHODS["CxGrad"])
    model, batch = build_learner(where, options), made_batch(options, where)
    figures = milliseconds(where, model, batch)
    with torch.profiler.profile() as profile:
        model.run_train_iter(batch, 0)
        synchronise(where)
    found = [
        (
            event.key[:60],
            (event.self_device_time_total if on_gpu(where) else event.self_cpu_time_total) / 1000,
            event.count,
        )
        for event in profile.key_averages()
        if not on_gpu(where) or event.device_type == DeviceType.CUDA
    ]
    found.sort(key=lambda entry: -entry[1])
    slowest += [(name, {"ms": ms, "calls": count}) for name, ms, count in found[:20]]
    total: Figures = {"ms": sum(entry[1] for entry in found), "calls": sum(entry[2] for entry in found)}
    return Outcome(MEASURED, {**total, "ms of an iteration": figures["ms"]})


# --- running -------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[device], Checks]] = {
    section.__name__: section
    for section in (environment, parity, waits, repeats, processes, precision, times, head_times, kernels)
}


@contextmanager
def settings_kept() -> Iterator[None]:
    """Restore PyTorch's settings of the process, which learners and checks change."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before
        torch.use_deterministic_algorithms(False)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.empty_cache()


def outcome_of(work: Work, deadline: float) -> Outcome:
    """Return what a check found, whatever happens to it."""
    if time.monotonic() > deadline:
        return Outcome(LEFT_OUT, {}, "the time was over; --minutes gives more")
    try:
        with settings_kept():
            return work()
    except NotAvailable as reason:
        return Outcome(NOT_AVAILABLE, {}, str(reason))
    except Exception as error:
        return Outcome(FAILED, {}, one_line(error)[:300])


def check(where: device, names: Sequence[str], minutes: float, file: Path) -> int:
    """Run the sections, print their lines, write `file` after each, and return the number of failures."""
    deadline, failures, tables = time.monotonic() + 60 * minutes, 0, dict[str, list[dict[str, Any]]]()
    for section in names:
        tables[section] = []
        for name, work in SECTIONS[section](where):
            verdict, figures, note = outcome_of(work, deadline)
            failures += verdict == FAILED
            tables[section].append({"check": name, "verdict": verdict, "note": note, **rounded(figures)})
            shown = [f"{figure} {text(rounded(value))}" for figure, value in figures.items()]
            print(f"{section:11} {name:60} {verdict:13} {', '.join([*shown, note] if note else shown)}", flush=True)
        record = {"benchmark": "check_gpu", "machine": machine(str(where)), "failures": failures, "tables": tables}
        write_text(file, json.dumps(record, indent=2) + "\n")
    return failures


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", help="GPU id or cpu [the first GPU if there is one, else cpu]")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run [all]")
    parser.add_argument("--minutes", type=float, default=10, help="after so many it ends, whatever is left [10]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record [benchmarks/results]")
    parser.add_argument("--rank-to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    where = choose_device(options.gpu)
    if not on_gpu(where):
        torch.set_num_threads(1)  # more would only wait for one another, so small are the networks
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for --deterministic; PyTorch reads it once only
    faulthandler.dump_traceback_later(60 * options.minutes, exit=True, file=2)  # a hang ends too
    try:
        if options.rank_to:
            gradient_of_rank(where, options.rank_to)
            return
        kind = machine(str(where))["device"].replace(" ", "_") if on_gpu(where) else "cpu"
        file = options.results / f"check_gpu_{kind}.json"
        failures = check(where, options.only, 0.9 * options.minutes, file)
    finally:
        faulthandler.cancel_dump_traceback_later()
    print(f"{failures} failed; written to {os.path.relpath(file)}")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(entry.run(main))
