"""How the `sbd-engine` command ends, whatever happens in it.

Exit codes: 0 done, 1 a fault of this program, 2 bad input (one line on standard error), 130
interrupted. Only main imports the rest, so that even an early Ctrl-C ends here.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """The console script: runs a command and exits with its code."""
    for stream in (sys.stdout, sys.stderr):  # a character the terminal lacks is no reason to die
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    # As Ctrl-C, so that what is kept is kept and nothing half-written stays.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    try:
        from .app import invoke

        code = invoke(arguments or ["--help"])
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        from ..errors import SbdError
        from . import options

        if options.debug:
            raise
        if isinstance(error, (SbdError, OSError)):
            return _fail(str(error), 2)
        return _fail(f"unexpected {type(error).__name__}: {error}; --debug shows where", 1)


def _fail(message: str, code: int) -> int:
    from .options import one_line

    print("error:", one_line(message), file=sys.stderr)
    return code
