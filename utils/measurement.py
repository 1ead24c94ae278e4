"""The choice among several ways to compute the same, by measuring them."""

import logging
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from utils import distributed

log = logging.getLogger(__name__)
T = TypeVar("T")

CALLS = 2  # that are timed; the fastest counts
FASTER = 0.9  # of the first candidate's time: so much noise must not decide, since runs should be repeatable
WORTH_IT = 100_000  # µs; where the first candidate takes less on a CPU there is little to win, and noise is large
TOO_LONG = 10_000_000  # µs; where it takes more on a CPU, measuring the others would take many minutes
FAILED = 2**62  # µs


def fastest(candidates: Iterable[tuple[T, Callable[[], object]]], device: torch.device, warm_up: int) -> T | None:
    """Return the candidate whose calls take least time: the first, unless another takes 10 % less.

    A candidate whose calls raise RuntimeError, as where memory is short, is discarded. All processes have to call this
    and get the same answer: the slowest process counts. None says that the first one is too fast to be worth it, or so
    slow that measuring would take too long.
    """
    times: dict[T, int] = {}
    for candidate, run in candidates:
        times[candidate] = took = distributed.largest(microseconds(candidate, run, device, warm_up))
        if device.type == "cpu" and len(times) == 1 and (took < WORTH_IT or TOO_LONG <= took < FAILED):
            return None
    first, best = next(iter(times)), min(times, key=times.__getitem__)
    chosen = best if times[best] < FASTER * times[first] else first
    found = (f"{c} {'failed' if us == FAILED else f'{us / 1e6:.3f} s'}" for c, us in times.items())
    log.info("an iteration takes, by measurement: %s; going on with %s", ", ".join(found), chosen)
    return chosen


def microseconds(candidate: object, run: Callable[[], object], device: torch.device, warm_up: int) -> int:
    """Return how long a call takes after `warm_up` calls, or the first of these that is `TOO_LONG` on a CPU.

    It is `FAILED`, with a message, where a call raises RuntimeError.
    """
    try:
        for _ in range(warm_up):
            if (took := _timed(run, device)) >= TOO_LONG and device.type == "cpu":
                return took
        return min(_timed(run, device) for _ in range(CALLS))
    except RuntimeError as error:
        log.info("%s is not possible: %s", candidate, str(error).partition("\n")[0])
        return FAILED


def _timed(run: Callable[[], object], device: torch.device) -> int:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return round(1e6 * (time.perf_counter() - start))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
