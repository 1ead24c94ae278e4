"""What a run shows while it goes on, and how it is asked to stop."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from utils import distributed


def progress_bar(total: int, initial: int, title: str) -> "tqdm[Any]":
    """A bar on a terminal, nothing elsewhere and nothing in processes that do not print."""
    hidden = None if distributed.is_main() else True
    return tqdm(total=total, initial=initial, desc=title, leave=False, disable=hidden)


def tell(line: str) -> None:
    """Print one line above the progress bar, in the main process, at once."""
    if distributed.is_main():
        tqdm.write(line)
        sys.stdout.flush()


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """While inside, Ctrl-C and SIGTERM put an exit status into the list; a second signal acts as it usually does."""
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: object) -> None:
        asked.append(128 + number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
