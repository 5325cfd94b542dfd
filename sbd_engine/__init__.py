"""Set Block Decoding: several tokens per forward of an ordinary transformer, on a C++ engine.

    from sbd_engine import Engine

    with Engine() as engine:  # the embedded demo model; or Engine("model.bin")
        print(engine.generate("def add(a, b):").text)

Names are loaded on first use, so `import sbd_engine.convert` needs no compiled engine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .completion import Chunk, Completion, Stats
    from .engine import Engine, Stream
    from .errors import SbdError
    from .tokenizer import Tokenizer

_HOME = {
    "Chunk": "completion",
    "Completion": "completion",
    "Engine": "engine",
    "SbdError": "errors",
    "Stats": "completion",
    "Stream": "engine",
    "Tokenizer": "tokenizer",
}

__all__ = ["Chunk", "Completion", "Engine", "SbdError", "Stats", "Stream", "Tokenizer"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sbd-engine")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
