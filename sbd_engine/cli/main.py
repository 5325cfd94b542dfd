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
    _stand_in_for_closed()
    for stream in (sys.stdout, sys.stderr):  # a character the terminal lacks is no reason to die
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    # As Ctrl-C, so that what is kept is kept and nothing half-written stays.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(run(sys.argv[1:]))


def _stand_in_for_closed() -> None:
    """Where a caller closed a standard stream, the next file that is opened would become it. In its
    place comes one with nothing to read, one that swallows errors, or one that nothing can be
    written to: who closes standard output of a command that writes there is told so."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if number == 2 else os.O_RDONLY)  # the lowest is taken
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


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
        _let_go()
        return 0
    except SystemExit as end:
        if not isinstance(end.__context__, BrokenPipeError):  # of which the parser makes an exit
            raise
        _let_go()
        return 0
    except Exception as error:
        from ..convert.errors import ConvertError
        from ..errors import SbdError
        from . import options

        if options.debug:
            raise
        if isinstance(error, OSError) and (problem := _let_go()):
            return _fail(f"standard output cannot be written: {problem}", 2)
        if isinstance(error, (SbdError, ConvertError, OSError)):
            return _fail(options.in_flags(_text(error)), 2)
        return _fail(f"unexpected {type(error).__name__}: {error}; --debug shows where", 1)


def _text(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # the system's own, without its number
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    return str(error)


def _let_go() -> str | None:
    """Drops what the standard streams cannot write, which would fail again at exit. Returns why
    standard output cannot."""
    problem = None
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
            os.write(number, b"")
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            problem = error.strerror if number == 1 else problem
    return problem


def _fail(message: str, code: int) -> int:
    from .options import one_line

    print("error:", one_line(message), file=sys.stderr)
    return code
