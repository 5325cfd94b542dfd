"""Errors a caller can cause. Each says what is wrong, what was expected and how to mend it, and is
also the fitting built-in, so `except ValueError` works as anywhere in Python."""

from __future__ import annotations


class SbdError(Exception):
    """Base of every error of this package."""


class SbdValueError(SbdError, ValueError):
    """An argument, or a model file's content, is wrong."""


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
