"""How every program of this project ends: what a user can mend is one line on stderr, not a traceback."""

import errno
import io
import os
import sys
from collections.abc import Callable

from utils.errors import UserError


def run(main: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Call `main` and return the exit status.

    It is 0, 2 after a UserError and where the system refuses a file or what is printed, 130 after Ctrl-C, which prints
    `interrupted`, and 141, without a word, where whatever reads the output has ended, as `| head` does.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files need not be Unicode
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    except BrokenPipeError:
        _forget_output()
        return 141
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if error.filename is None and not full:
            raise
        where = error.filename or "the file that takes what is printed"
        cure = ". Free some disk space and give the same command again" if full else ""
        print(f"error: {where}: {error.strerror}{cure}", file=sys.stderr)
        if full:
            _forget_output()
        return 2
    return 0


def _forget_output() -> None:
    """Have what is still to be printed go nowhere, or the last flush would fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
