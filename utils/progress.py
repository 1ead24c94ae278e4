"""What a run shows while it goes on (one progress bar, messages above it), and requests to stop it."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


def _is_main() -> bool:
    """Return whether this is the first or only process, by torchrun's word: importing torch would take seconds."""
    return os.environ.get("RANK", "0") == "0"


class AboveBar(logging.Handler):
    """This handler writes a message above the progress bar, to the present stdout, in the main process only."""

    def emit(self, record: logging.LogRecord) -> None:
        if _is_main():
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            tqdm.write(prefix + self.format(record))
            sys.stdout.flush()


def set_up_logging() -> None:
    """Have all messages of level INFO and above shown by `AboveBar`; a second call changes nothing."""
    root = logging.getLogger()
    if not any(isinstance(handler, AboveBar) for handler in root.handlers):
        root.addHandler(AboveBar())
    root.setLevel(logging.INFO)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it reports its search for fonts


def progress_bar(total: int | None, initial: int, title: str, unit: str = "it") -> "tqdm[Any]":
    """Return a bar that shows itself on a terminal only, and in the main process only; bytes ("B") as kB, MB, GB."""
    hidden = None if _is_main() else True
    return tqdm(
        total=total, initial=initial, desc=title, leave=False, disable=hidden, unit=unit, unit_scale=unit == "B"
    )


@contextmanager
def stop_requests(*signals: signal.Signals) -> Iterator[list[int]]:
    """While inside, these signals put an exit status into the list; a second one acts as it usually does.

    Without arguments they are Ctrl-C's and SIGTERM. Only the main thread of a process may call this.

    Under torchrun a second one adds to the list only: Slurm signals the processes, and torchrun, which passes it on.
    """
    requests: list[int] = []
    before = {number: signal.getsignal(number) for number in signals or (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: object) -> None:
        requests.append(128 + number)
        if "WORLD_SIZE" not in os.environ:
            signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, note)
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
