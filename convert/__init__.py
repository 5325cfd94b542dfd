"""Checkpoints of Hugging Face into the engine's model file. Pure Python; needs no engine."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .architectures import model_metadata, rope_freqs
    from .conversion import Conversion, convert
    from .errors import ConvertError

__all__ = ["Conversion", "ConvertError", "convert", "model_metadata", "rope_freqs"]

_HOME = {
    "Conversion": "conversion",
    "ConvertError": "errors",
    "convert": "conversion",
    "model_metadata": "architectures",
    "rope_freqs": "architectures",
}


def __getattr__(name: str) -> Any:
    """Loads what is asked for: who reads the names in `decoders` pays for no library."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
