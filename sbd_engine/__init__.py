"""Set Block Decoding: several tokens per forward of an ordinary transformer, on a C++ engine.

    from sbd_engine import Engine

    with Engine() as engine:  # the embedded demo model; or Engine("model.bin")
        print(engine.generate("def add(a, b):").text)

Names are loaded on first use, so `import sbd_engine.convert` loads no compiled engine.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .completion import Chunk, Completion, Reveal, Scores, Stats, TokenLogprob, Usage
    from .engine import Engine
    from .errors import (
        SbdDeviceError,
        SbdError,
        SbdFileError,
        SbdFileNotFoundError,
        SbdGrammarError,
        SbdLengthError,
        SbdMemoryError,
        SbdTypeError,
        SbdValueError,
    )
    from .streams import AsyncStream, Stream
    from .tokenizer import Tokenizer

__all__ = [
    "AsyncStream",
    "Chunk",
    "Completion",
    "Engine",
    "Reveal",
    "SbdDeviceError",
    "SbdError",
    "SbdFileError",
    "SbdFileNotFoundError",
    "SbdGrammarError",
    "SbdLengthError",
    "SbdMemoryError",
    "SbdTypeError",
    "SbdValueError",
    "Scores",
    "Stats",
    "Stream",
    "TokenLogprob",
    "Tokenizer",
    "Usage",
]

_HOMES = {
    "completion": ("Chunk", "Completion", "Reveal", "Scores", "Stats", "TokenLogprob", "Usage"),
    "engine": ("Engine",),
    "streams": ("AsyncStream", "Stream"),
    "tokenizer": ("Tokenizer",),
}  # the rest: errors


def _hand_over() -> None:
    """Puts the installed package in this one's place, whole: two versions never mix."""
    for folder in sys.path:
        spec = PathFinder.find_spec(__name__, [folder])
        parts = spec.submodule_search_locations if spec else None
        if spec and spec.loader and parts and PathFinder.find_spec(f"{__name__}._core", parts):
            sys.modules[__name__] = installed = module_from_spec(spec)
            spec.loader.exec_module(installed)
            return
    raise ImportError(
        f"sbd_engine is not installed in {sys.prefix}, and {__path__[0]} is a clone's source "
        "without the compiled engine: start the Python it is installed in (.venv/bin/python by the "
        "README), or pip install ."
    )


# Python looks into the folder it was started in first, so in a clone's root it finds this source,
# which has no compiled engine, before the installed package.
if find_spec(f"{__name__}._core") is None:
    _hand_over()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sbd-engine")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "errors")
    return getattr(import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
