"""How every program of this project ends: what a user can mend is one line on stderr, not a traceback."""

import sys
from collections.abc import Callable

from utils.errors import UserError


def run(main: Callable[[], object], interrupted: str = "interrupted") -> int:
    """Call `main` and return the exit status: 0, 2 after a UserError, 130 after Ctrl-C, which prints `interrupted`."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0
