"""The fastest candidate is chosen where the difference is clear, by all processes alike."""

import itertools
import logging
from collections.abc import Callable, Iterator

import pytest
import torch

from utils import distributed, measurement
from utils.measurement import fastest

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Callable[[], None]]:
    """Return a maker of functions that take so many seconds, by a clock that stands still otherwise."""
    now = [0.0]
    monkeypatch.setattr(measurement.time, "perf_counter", lambda: now[0])

    def takes(seconds: float) -> Callable[[], None]:
        def run() -> None:
            now[0] += seconds

        return run

    return takes


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [((1.0, 0.95, 0.91), 0), ((1.0, 0.85, 0.89), 1), ((1.0, 2.0, 0.5), 2), ((0.099, 0.01, 0.01), None)],
)
def test_the_first_stays_unless_another_is_clearly_faster(
    clock: Callable[[float], Callable[[], None]], seconds: tuple[float, ...], chosen: int | None
) -> None:
    assert fastest([(i, clock(s)) for i, s in enumerate(seconds)], CPU, warm_up=1) == chosen


def test_where_one_call_takes_long_nothing_more_is_measured(clock: Callable[[float], Callable[[], None]]) -> None:
    calls: list[str] = []

    def noted(name: str, seconds: float) -> Callable[[], None]:
        takes = clock(seconds)

        def run() -> None:
            calls.append(name)
            takes()

        return run

    candidates = [("usual", noted("usual", 11.0)), ("other", noted("other", 0.1))]
    assert fastest(candidates, CPU, warm_up=3) is None
    assert calls == ["usual"]


def test_a_candidate_that_does_not_fit_in_memory_is_discarded(
    clock: Callable[[float], Callable[[], None]], caplog: pytest.LogCaptureFixture
) -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    with caplog.at_level(logging.INFO):
        assert fastest([("all", too_large), ("one", clock(3.0)), ("two", clock(1.0))], CPU, warm_up=1) == "two"
    reason, line = [record.getMessage() for record in caplog.records]
    assert reason == "all is not possible: CUDA out of memory"
    assert line == "an iteration takes, by measurement: all failed, one 3.000 s, two 1.000 s; going on with two"


def test_warm_up_calls_and_a_disturbed_one_do_not_count(clock: Callable[[float], Callable[[], None]]) -> None:
    def series(*seconds: float) -> Callable[[], None]:
        runs: Iterator[float] = itertools.chain(seconds, itertools.repeat(100.0))
        return lambda: clock(next(runs))()

    assert fastest([("usual", series(9, 9, 1, 1)), ("other", series(9, 9, 7, 0.5))], CPU, warm_up=2) == "other"


def test_the_slowest_process_decides(
    clock: Callable[[float], Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = iter([1_000_000, 950_000])  # µs; here the second candidate would win
    monkeypatch.setattr(distributed, "largest", lambda number: max(number, next(elsewhere)))
    assert fastest([("usual", clock(1.0)), ("other", clock(0.1))], CPU, warm_up=1) == "usual"
