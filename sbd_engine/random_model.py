"""Models of random weights: any shape can be timed without a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .errors import SbdValueError
from .roofline import Work, work

if TYPE_CHECKING:
    from ._core import Engine


class ShapeError(SbdValueError):
    """A config.json that is no model's."""


def random_model(
    config: Mapping[str, Any],
    dtype: str,
    settings: Mapping[str, Any],
    metadata: Mapping[str, Any] | None = None,
) -> tuple[Engine, Work]:
    """The engine of a model in the shape of a Hugging Face config.json, every matrix in `dtype`,
    made on its device, and what its forwards have to do. settings: `engine_options`; metadata: keys
    beside those of the shape. Raises ShapeError, and what an Engine raises."""
    from gguf import GGMLQuantizationType

    from . import _core
    from .convert.architectures import model_metadata, tensor_specs
    from .convert.errors import ConvertError
    from .convert.mixes import stored_type
    from .convert.quantize import stored_bytes

    wanted = GGMLQuantizationType[dtype.upper()]
    tied = bool(config.get("tie_word_embeddings", False))
    try:
        keys = dict(model_metadata(dict(config))) | dict(metadata or {})
        tensors = []
        for spec in tensor_specs(dict(config), tied=tied):
            stored = stored_type(spec.shape, wanted)
            size = stored_bytes(spec.shape, stored)
            tensors.append((spec.name, stored.name.lower(), spec.shape, size))
    except ConvertError as error:
        raise ShapeError(str(error)) from None
    core = _core.Engine.random(keys, dtype, tied, **settings)
    return core, work(tensors, core.model_config(), settings["kv_dtype"])
