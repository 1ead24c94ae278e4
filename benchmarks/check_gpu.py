"""Check what training does on this machine's GPU: that it is right, never waits and repeats itself, and how fast it is.

make check-gpu                                          the first GPU, or the CPU where there is none
make check-gpu ARGS="--only parity waits"               two of the sections
python benchmarks/check_gpu.py --gpu 1 --minutes 5

Prints one line per check and writes them after every section to benchmarks/results/check_gpu_DEVICE.json. A check that
raises an exception is a line with the reason. The exit status is 1 if a line says FAILED, else 0. On a CPU the networks
are tiny and what needs a GPU is left out, so that the whole takes less than a minute; its times mean nothing.
"""

import argparse
import contextlib
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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import DeviceType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import meta_neural_network_architectures as networks  # noqa: E402
import qp_solvers  # noqa: E402
from benchmarks.iteration import machine  # noqa: E402
from classification_heads import HEADS  # noqa: E402
from data import Episodes, training_episodes  # noqa: E402
from experiment_builder import Experiment  # noqa: E402
from few_shot_learning_system import build_learner  # noqa: E402
from head_learning_system import HeadFewShotClassifier  # noqa: E402
from learner import FewShotLearner  # noqa: E402
from utils import distributed, entry  # noqa: E402
from utils.devices import choose_device  # noqa: E402
from utils.files import write_text  # noqa: E402
from utils.image_cache import Split  # noqa: E402
from utils.options import Options, is_option  # noqa: E402
from utils.synthetic import write_dataset  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
OK, FAILED, MEASURED, NOT_AVAILABLE, LEFT_OUT = "ok", "FAILED", "measured", "not available", "left out"

Figures = dict[str, float | str]


class Outcome(NamedTuple):
    """This is what a check found."""

    verdict: str
    figures: Figures
    note: str = ""


class NotAvailable(Exception):
    """This machine or this version cannot do what a check is about; the message says why."""


Checks = Iterator[tuple[str, Callable[[], Outcome]]]


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


# --- learners and data ---------------------------------------------------------------------------------------------

LSLR = "learnable_per_layer_per_step_inner_loop_learning_rate"
PER_STEP = {"per_step_bn_statistics": True, "batch_norm": "per_step"}
CXGRAD_84 = {"contextual_grad": True, "image_height": 84, "image_width": 84, "num_target_samples": 15,
             "number_of_training_steps_per_iter": 5}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "CxGrad": {"contextual_grad": True},
    "MAML": {},
    "MAML, first order": {"second_order": False},
    "MAML++": {LSLR: True, "use_multi_step_loss_optimization": True, **PER_STEP},
    "ALFA": {"alfa": True},
    "ALFA, random init": {"alfa": True, "random_init": True},
    "L2F": {"attenuate": True},
    "ANIL": {"inner_loop_part": "head"},
    "BOIL": {"inner_loop_part": "body"},
    "Meta-SGD": {"meta_sgd": True},
    "ResNet-12": {"backbone": "ResNet-12"},
}


def gradient_options(device: torch.device, **extra: Any) -> Options:
    """Return a gradient learner's options; a CPU gets a smaller network."""
    side, filters, steps = (32, 48, 3) if on_gpu(device) else (28, 4, 2)
    small = {} if on_gpu(device) or "backbone" not in extra else {"resnet_widths": "4-5-6-7"}
    names = ("number_of_training_steps_per_iter", "number_of_evaluation_steps_per_iter")
    usual = {"image_height": side, "image_width": side, "cnn_num_filters": filters, **dict.fromkeys(names, steps)}
    tasks = {"batch_size": 2, "num_target_samples": 3, "tasks_per_pass": 2}
    return Options.from_mapping(usual | small | tasks | extra)


def head_options(device: torch.device, head: str, backbone: str = "conv64", **extra: Any) -> Options:
    """Return a head learner's options, at 32x32; a CPU gets a smaller ResNet-12."""
    small = {} if on_gpu(device) or backbone != "ResNet-12" else {"resnet_widths": "4-5-6-8"}
    named = {"learner": "head", "head": head, "backbone": backbone, "image_height": 32, "image_width": 32}
    tasks = {"batch_size": 2, "num_classes_per_set": 5, "num_samples_per_class": 3, "num_target_samples": 3}
    return Options.from_mapping(named | small | tasks | {"val_shot": 3, "val_query": 3, "augment": False} | extra)


def all_learners(device: torch.device) -> Iterator[tuple[str, Callable[[], Options]]]:
    """Yield the name and the options of every method and of every head."""
    for name, extra in METHODS.items():
        yield name, partial(gradient_options, device, **extra)
    for head in HEADS:
        yield f"conv64, {head}", partial(head_options, device, head)
    yield "ResNet-12, Ridge", partial(head_options, device, "Ridge", "ResNet-12")


def require(available: bool, otherwise: str) -> None:
    if not available:
        raise NotAvailable(otherwise)


def require_option(name: str) -> None:
    require(is_option(name), f"this version has no option --{name}")


def made_batch(options: Options, device: torch.device, seed: int = 0) -> list[Tensor]:
    """Return a meta-batch of noise, float64: images (tasks, way, n, C, H, W), support and query, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    way, tasks = options.num_classes_per_set, options.batch_size
    counts = options.training_task[1:]
    draw = partial(torch.rand, generator=generator, dtype=torch.float64)
    images = [draw(tasks, way, n, *options.image_shape).to(device) for n in counts]
    return [*images, *(torch.arange(way, device=device).view(1, way, 1).repeat(tasks, 1, n) for n in counts)]


def without_chance(model: FewShotLearner) -> FewShotLearner:
    """Take dropout out of a ResNet-12, whose draws differ from device to device."""
    for module in model.modules():
        if isinstance(module, networks.ResidualBlock):
            module.drop = nn.Identity()
    return model


@contextlib.contextmanager
def torch_operations() -> Iterator[None]:
    """Run the networks of inner loops on PyTorch's own operations in place of `second_order_ops`."""

    def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple[int, int, int]) -> Tensor:
        stride, padding, groups = geometry
        return F.conv2d(x, weight, bias, stride, padding, groups=groups)

    def leaky_relu(x: Tensor, slope: float) -> Tensor:
        return x if slope == 1 else F.leaky_relu(x, slope)

    def conv_norm_activate(x: Tensor, *given: Any) -> Tensor:
        *conv, weight, bias, slope, pool, seen = given
        y = conv2d(x, *conv)
        if seen is not None:
            variance, mean = torch.var_mean(y.detach(), (0, 2, 3))
            seen.append((mean, variance))
        y = leaky_relu(F.batch_norm(y, None, None, weight, bias, training=True, eps=networks.EPS), slope)
        return F.max_pool2d(y, 2) if pool else y

    def max_pool_2x2(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2)

    with contextlib.ExitStack() as patches:
        for form in (conv2d, leaky_relu, conv_norm_activate, max_pool_2x2):
            patches.enter_context(mock.patch.object(networks, form.__name__, form))
        yield


# --- environment ---------------------------------------------------------------------------------------------------


def environment(device: torch.device) -> Checks:
    yield "versions", lambda: Outcome(MEASURED, dict(machine(str(device))))
    yield "GPU", partial(gpu_facts, device)


def gpu_facts(device: torch.device) -> Outcome:
    require(on_gpu(device), "the CPU is checked")
    facts = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    versions = {"driver": driver, "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    sizes: Figures = {"capability": f"{facts.major}.{facts.minor}", "GiB": facts.total_memory / 2**30}
    return Outcome(MEASURED, {**versions, **sizes, "GPUs": torch.cuda.device_count()})


# --- parity --------------------------------------------------------------------------------------------------------

# Of the outer gradient, relative to its norm, and of the loss, relative; the cosine of the two gradients.
FLOAT64_GRADIENT, FLOAT64_LOSS = 1e-6, 1e-9
FLOAT32_LOSS, FLOAT32_COSINE = 1e-3, 0.995


def parity(device: torch.device) -> Checks:
    for name, options in all_learners(device):
        yield name, partial(equals_cpu, device, options)
    if on_gpu(device):
        yield "CxGrad, 84x84", partial(equals_cpu, device, partial(gradient_options, device, **CXGRAD_84))


def outer_gradient(options: Options, device: torch.device, dtype: torch.dtype, before: int = 0) -> tuple[Tensor, float]:
    """Return the outer gradient of a meta-batch, float64 on the CPU, and the loss, after `before` other meta-batches.

    The iterations before it let a device capture its graph, which the last one then replays with another input.
    """
    model = without_chance(build_learner(device, options)).to(dtype)
    return gradient_and_loss(model, [made_batch(options, device, seed) for seed in range(before, -1, -1)])


def gradient_and_loss(model: FewShotLearner, batches: Sequence[Sequence[Tensor]]) -> tuple[Tensor, float]:
    """Return the outer gradient and the loss of the last meta-batch, all with the same weights."""
    with mock.patch.object(model.optimizer, "step"):  # some optimisers change the gradients too
        for batch in batches:
            losses, _ = model.run_train_iter(batch, 0)
    found = [p.grad.detach().flatten().double().cpu() for p in model.parameters() if p.grad is not None]
    return torch.cat(found), losses["loss"].item()


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a, b, dim=0).item()


def equals_cpu(device: torch.device, make_options: Callable[[], Options]) -> Outcome:
    """Compare with PyTorch's own operations on the CPU in float64."""
    options = make_options()
    with torch_operations():
        reference, loss = outer_gradient(options, torch.device("cpu"), torch.float64)
    double, double_loss = outer_gradient(options, device, torch.float64)
    single, single_loss = outer_gradient(options, device, torch.float32, before=WARM_UP)
    figures = {
        "float64 gradient": ((double - reference).norm() / reference.norm()).item(),
        "float64 loss": abs(double_loss / loss - 1),
        "float32 loss": abs(single_loss / loss - 1),
        "float32 cosine": cosine(single, reference),
    }
    right = (
        figures["float64 gradient"] <= FLOAT64_GRADIENT
        and figures["float64 loss"] <= FLOAT64_LOSS
        and figures["float32 loss"] <= FLOAT32_LOSS
        and figures["float32 cosine"] >= FLOAT32_COSINE
    )
    return Outcome(OK if right else FAILED, {**figures})


# --- waits ---------------------------------------------------------------------------------------------------------

ITERATIONS, WARM_UP = 3, 4  # the first ones set up libraries, choose algorithms and capture the graph
READS_OF_AN_SVM = 8  # per iteration at most


def waits(device: torch.device) -> Checks:
    if not on_gpu(device):
        reason = "needs a GPU; tests/test_stand_in_cuda.py checks it on stand-in tensors"
        yield "iterations", lambda: Outcome(NOT_AVAILABLE, {}, reason)
        return
    for name, options in all_learners(device):
        yield name, partial(never_waits, device, options)


def made_episodes(options: Options, device: torch.device) -> Episodes:
    """Return training tasks of made-up images."""
    images = np.random.default_rng(0).integers(0, 256, (200, *options.image_shape[1:], 3), dtype=np.uint8)
    classes = [f"class_{i}" for i in range(8)]
    split = Split(images, classes, np.arange(9, dtype=np.int64) * 25, "made", "train", (0.5,) * 3, (0.25,) * 3)
    return training_episodes(split, options, device, None)


def never_waits(device: torch.device, make_options: Callable[[], Options]) -> Outcome:
    """Run iterations, episodes included, where waiting of the host is an error; SVMs may read through `look`."""
    options, plain_look, reads = make_options(), qp_solvers.look, 0
    model, episodes = build_learner(device, options), made_episodes(options, device)

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
        for i in range(ITERATIONS):
            model.run_train_iter(episodes.batch(i * options.batch_size, options.batch_size), 0)
    reads_per_iteration = reads / ITERATIONS
    verdict = OK if reads_per_iteration <= READS_OF_AN_SVM else FAILED
    return Outcome(verdict, {"reads per iteration": reads_per_iteration})


# --- repeats -------------------------------------------------------------------------------------------------------


def repeats(device: torch.device) -> Checks:
    learners = {
        "CxGrad": partial(gradient_options, device, **METHODS["CxGrad"]),
        "MAML++": partial(gradient_options, device, **METHODS["MAML++"]),
        "ResNet-12, Ridge": partial(head_options, device, "Ridge", "ResNet-12"),
        "ResNet-12, SVM-CS": partial(head_options, device, "SVM-CS", "ResNet-12"),
    }
    for name, options in learners.items():
        yield name, partial(same_bits, device, options, deterministic=False)
    for name, options in learners.items():
        yield f"{name}, --deterministic true", partial(same_bits, device, options, deterministic=True)


def same_bits(device: torch.device, make_options: Callable[..., Options], deterministic: bool) -> Outcome:
    """Train twice, and once in two parts; on a GPU equal bits are promised with --deterministic only."""
    if deterministic:
        require_option("deterministic")
    with tempfile.TemporaryDirectory(prefix="check_gpu_") as folder:
        run = {"dataset_name": "made", "dataset_dir": folder, "total_iter_per_epoch": 3, "num_evaluation_tasks": 2}
        run |= {"deterministic": True} if deterministic else {}
        write_dataset(Path(folder) / "made", 6, 8)

        def trained(name: str, *epochs: int) -> dict[str, Tensor]:
            for total in epochs:
                options = make_options(**run, experiments_dir=f"{folder}/{name}", total_epochs=total)
                model = build_learner(device, options)
                Experiment(options, model).train()
            return {name: tensor.cpu() for name, tensor in model.state_dict().items()}

        once = trained("once", 2)
        others = {"again": trained("again", 2), "resumed": trained("resumed", 1, 2)}
    differing = {name: sum(not torch.equal(t, once[n]) for n, t in other.items()) for name, other in others.items()}
    equal, promised = not any(differing.values()), deterministic or not on_gpu(device)
    figures: Figures = {f"tensors that differ, {name}": count for name, count in differing.items()}
    return Outcome((OK if equal else FAILED) if promised else MEASURED, figures)


# --- processes -----------------------------------------------------------------------------------------------------


def processes(device: torch.device) -> Checks:
    yield "CxGrad, gradient of two processes", partial(two_equal_one, device)


def two_equal_one(device: torch.device) -> Outcome:
    """Compare the outer gradient of two processes, which torchrun starts, with that of one."""
    require(not on_gpu(device) or torch.cuda.device_count() > 1, "needs two GPUs")
    with tempfile.TemporaryDirectory(prefix="check_gpu_") as folder:
        file = Path(folder) / "gradient.pt"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command = [*launcher, __file__, "--gpu", "0,1" if on_gpu(device) else "cpu", "--minutes", "2"]
        threads = os.environ | ({} if on_gpu(device) else {"OMP_NUM_THREADS": "1"})
        done = subprocess.run([*command, "--rank-to", str(file)], env=threads, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"two processes ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        found = torch.load(file)
    options = gradient_options(device, contextual_grad=True)
    one, _ = outer_gradient(options, device, torch.float64)
    error = ((found["gradient"] - one).norm() / one.norm()).item()
    return Outcome(OK if error <= FLOAT64_GRADIENT else FAILED, {"float64 gradient": error})


def gradient_of_rank(device: torch.device, file: Path) -> None:
    """Do the share of one process of `two_equal_one`; the first one writes the mean gradient of all."""
    with distributed.processes(device):
        rank = distributed.rank()
        options = gradient_options(device, contextual_grad=True)
        share = [part[rank : rank + 1] for part in made_batch(options, device)]
        gradient, _ = gradient_and_loss(build_learner(device, options).double(), [share])
        if distributed.is_main():
            torch.save({"gradient": gradient}, file)


# --- precision -----------------------------------------------------------------------------------------------------


def precision(device: torch.device) -> Checks:
    yield "CxGrad, outer gradient", partial(cosines, device)


def cosines(device: torch.device) -> Outcome:
    """Compare the outer gradient in float32 and in TF32, which is off in gradient learners, with float64."""
    require(on_gpu(device), "TF32 needs a GPU")
    options = gradient_options(device, **CXGRAD_84)
    exact, _ = outer_gradient(options, device, torch.float64)
    single, _ = outer_gradient(options, device, torch.float32)
    model = build_learner(device, options)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    rounded, _ = gradient_and_loss(model, [made_batch(options, device)])
    figures = {"cosine of float32": cosine(single, exact), "cosine of TF32": cosine(rounded, exact)}
    return Outcome(MEASURED, {**figures})


# --- times and memory ----------------------------------------------------------------------------------------------

TIMED = 3  # iterations; the median counts


def times(device: torch.device) -> Checks:
    for shot, tasks in ((1, 4), (5, 2)) if on_gpu(device) else ((1, 2),):
        for captured, grouped, ours, benchmark in itertools.product((False, True), repeat=4):
            if on_gpu(device) or not (captured or benchmark):
                words = ["captured" if captured else "eager", "grouped" if grouped else "per task"]
                words += ["ours" if ours else "torch's", "benchmark" if benchmark else "no benchmark"]
                name = f"CxGrad {shot}-shot x{tasks}: {', '.join(words)}"
                yield name, partial(iteration_time, device, shot, tasks, captured, grouped, ours, benchmark)


def iteration_time(
    device: torch.device, shot: int, tasks: int, captured: bool, grouped: bool, ours: bool, benchmark: bool
) -> Outcome:
    size = CXGRAD_84 if on_gpu(device) else METHODS["CxGrad"]
    extra = {"batch_size": tasks, "num_samples_per_class": shot, "tasks_per_pass": tasks if grouped else 1}
    if captured:
        require_option("cuda_graph")
    if is_option("cuda_graph"):
        size = size | {"cuda_graph": "auto" if captured else "off"}
    options = gradient_options(device, **size | extra)
    with contextlib.nullcontext() if ours else torch_operations(), mock.patch.object(logging.Logger, "warning") as warn:
        model = build_learner(device, options)
        torch.backends.cudnn.benchmark = benchmark
        figures = milliseconds(device, model, made_batch(options, device))
    said = "; ".join(call.args[0] % call.args[1:] for call in warn.call_args_list)  # that no graph was captured, or why
    return Outcome(FAILED if captured and said else MEASURED, figures, said)


def milliseconds(device: torch.device, model: FewShotLearner, batch: Sequence[Tensor]) -> Figures:
    """Return the median time of a training iteration and, on a GPU, the most memory that it held."""
    batch = [part.to(next(model.parameters()).dtype) if part.is_floating_point() else part for part in batch]
    seconds = []
    if on_gpu(device):
        torch.cuda.reset_peak_memory_stats(device)
    try:
        for _ in range(WARM_UP + TIMED if on_gpu(device) else 1 + 2):
            start = time.perf_counter()
            model.run_train_iter(batch, 0)
            synchronise(device)
            seconds.append(time.perf_counter() - start)
    except torch.OutOfMemoryError as error:
        raise NotAvailable("the GPU's memory is too small for this variant") from error
    figures: Figures = {"ms": 1000 * statistics.median(seconds[WARM_UP if on_gpu(device) else 1 :])}
    if on_gpu(device):
        figures |= {
            "GiB": torch.cuda.max_memory_allocated() / 2**30,
            "GiB held": torch.cuda.max_memory_reserved() / 2**30,
        }
    return figures


def synchronise(device: torch.device) -> None:
    if on_gpu(device):
        torch.cuda.synchronize(device)


def head_times(device: torch.device) -> Checks:
    layouts = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
    for head, kind, layout in itertools.product(("Ridge", "SVM-CS"), ("float32", "tf32", "bf16"), layouts):
        if on_gpu(device) or kind != "tf32":
            yield f"ResNet-12, {head}: {kind}, {layout}", partial(head_time, device, head, kind, layouts[layout])


def head_time(device: torch.device, head: str, kind: str, layout: torch.memory_format) -> Outcome:
    size = {"batch_size": 8, "num_samples_per_class": 5, "num_target_samples": 6} if on_gpu(device) else {}
    options = head_options(device, head, "ResNet-12", precision=kind, **size)
    model = build_learner(device, options)
    assert isinstance(model, HeadFewShotClassifier)
    model.embedding.to(memory_format=layout)
    return Outcome(MEASURED, milliseconds(device, model, made_batch(options, device)))


# --- kernels -------------------------------------------------------------------------------------------------------


def kernels(device: torch.device) -> Checks:
    """Yield the 20 slowest kernels of a training iteration, on a CPU the 20 slowest operators."""
    slowest: list[tuple[str, Figures]] = []
    yield "all together", partial(profiled, device, slowest)
    for name, figures in slowest:
        yield name, partial(Outcome, MEASURED, figures)


def profiled(device: torch.device, slowest: list[tuple[str, Figures]]) -> Outcome:
    """Return the sum of all kernels, and add the slowest ones to the list."""
    options = gradient_options(device, **CXGRAD_84 if on_gpu(device) else METHODS["CxGrad"])
    model, batch = build_learner(device, options), made_batch(options, device)
    figures = milliseconds(device, model, batch)
    with torch.profiler.profile() as profile:
        model.run_train_iter(batch, 0)
        synchronise(device)
    found = [
        (
            event.key[:60],
            (event.self_device_time_total if on_gpu(device) else event.self_cpu_time_total) / 1000,
            event.count,
        )
        for event in profile.key_averages()
        if not on_gpu(device) or event.device_type == DeviceType.CUDA
    ]
    found.sort(key=lambda entry: -entry[1])
    slowest += [(name, {"ms": ms, "calls": count}) for name, ms, count in found[:20]]
    total: Figures = {"sum of ms": sum(entry[1] for entry in found), "calls": sum(entry[2] for entry in found)}
    return Outcome(MEASURED, {"ms of an iteration": figures["ms"], **total})


# --- running -------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[torch.device], Checks]] = {
    section.__name__: section
    for section in (environment, parity, waits, repeats, processes, precision, times, head_times, kernels)
}


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """Restore PyTorch's settings of the process, which learners and checks change."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32, matmul.allow_tf32 = before
        torch.use_deterministic_algorithms(deterministic)
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.empty_cache()


def outcome_of(work: Callable[[], Outcome], deadline: float) -> Outcome:
    """Return what a check found, whatever happens to it."""
    if time.monotonic() > deadline:
        return Outcome(LEFT_OUT, {}, "the time was over; --minutes gives more")
    try:
        with settings_kept():
            return work()
    except NotAvailable as reason:
        return Outcome(NOT_AVAILABLE, {}, str(reason))
    except Exception as error:
        return Outcome(FAILED, {}, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])


def shown(figures: Figures) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
    )


def check(device: torch.device, names: Sequence[str], minutes: float, file: Path) -> int:
    """Run the sections, print their lines, write `file` after each, and return the number of failures."""
    deadline, failures = time.monotonic() + 60 * minutes, 0
    record: dict[str, Any] = {"machine": machine(str(device)), "sections": {}}
    for name in names:
        lines = record["sections"][name] = []
        for check_name, work in SECTIONS[name](device):
            outcome = outcome_of(work, deadline)
            lines.append({"name": check_name, **outcome._asdict()})
            failures += outcome.verdict == FAILED
            text = "; ".join(filter(None, (shown(outcome.figures), outcome.note)))
            print(f"{name:11} {check_name:60} {outcome.verdict:13} {text}".rstrip(), flush=True)
        write_text(file, json.dumps(record | {"failures": failures}, indent=2) + "\n")
    return failures


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", help="GPU id or cpu [the first GPU if there is one, else cpu]")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run [all]")
    parser.add_argument("--minutes", type=float, default=10, help="after so many it ends, whatever is left [10]")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the record [benchmarks/results]")
    parser.add_argument("--rank-to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    device = choose_device(options.gpu)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for --deterministic; PyTorch reads it once only
    faulthandler.dump_traceback_later(60 * options.minutes, exit=True, file=2)  # a hang ends too
    try:
        if options.rank_to:
            gradient_of_rank(device, options.rank_to)
            return
        kind = machine(str(device))["device"].replace(" ", "_") if on_gpu(device) else "cpu"
        file = options.results / f"check_gpu_{kind}.json"
        failures = check(device, options.only, 0.9 * options.minutes, file)
    finally:
        faulthandler.cancel_dump_traceback_later()
    print(f"{failures} failed; written to {os.path.relpath(file)}")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(entry.run(main))
