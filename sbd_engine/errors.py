"""Errors a caller can cause. Each says what is wrong, what was expected and how to mend it, and is
also the fitting built-in, so `except ValueError` works as anywhere in Python."""

from __future__ import annotations

import reprlib

from .convert.errors import error_line


class SbdError(Exception):
    """Base of every error of this package: one line, in which nothing stands that a terminal would
    obey."""

    def __init__(self, message: object = "") -> None:
        super().__init__(error_line(str(message)))


class SbdValueError(SbdError, ValueError):
    """An argument, or a model file's content, is wrong."""


class SbdLengthError(SbdValueError):
    """A text is far longer than what it must fit."""


class SbdGrammarError(SbdValueError):
    """A text cannot go on under what it must be: a limit of time or memory is met."""


class SbdTypeError(SbdError, TypeError):
    """An unknown argument, or one of the wrong type."""


class SbdFileError(SbdError, OSError):
    """The operating system refused a file."""


class SbdFileNotFoundError(SbdFileError, FileNotFoundError):
    """A file is not there."""


class SbdMemoryError(SbdError, MemoryError):
    """The machine has not enough memory."""


class SbdDeviceError(SbdError, RuntimeError):
    """The device failed, and all it held is lost: no engine of this process can use it again."""


def brief(value: object) -> str:
    """A value's repr, as far as a line has room for it."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    try:
        return short.repr(value)
    except Exception:  # thousands of digits, or nothing that it can show
        return f"a {type(value).__name__}"
