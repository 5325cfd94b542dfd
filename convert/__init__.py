"""Checkpoints of Hugging Face into the engine's model file. Pure Python; needs no engine."""

from .architectures import model_metadata, rope_freqs
from .conversion import Conversion, convert
from .errors import ConvertError

__all__ = ["Conversion", "ConvertError", "convert", "model_metadata", "rope_freqs"]
