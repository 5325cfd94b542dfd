"""Options of a generation as texts, as `/set` of a chat and its saved files have them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, get_args, get_type_hints

from .. import _core
from ..errors import SbdValueError
from ..parameters import OPTION_NAMES, Options, named, unknown
from .generation import biases
from .options import TYPES

_NO_EFFECT = ("logprobs", "sample_index")  # nothing shows the one, and /regenerate has the other


def check_names(names: Iterable[str]) -> None:
    """Raises SbdValueError for one that a chat has no use for."""
    known = [name for name in OPTION_NAMES if name not in _NO_EFFECT]
    for name in names:
        if name in _NO_EFFECT:
            raise SbdValueError(f"{named(name)} has no effect in a chat: leave it out")
        if name not in known:
            raise SbdValueError(unknown("option", name, known))


def option_value(name: str, text: str) -> Any:
    """What the text means for this option; where it means nothing, the text, which the option's own
    check refuses."""
    check_names([name])
    if name == "logit_bias":
        return biases(text.split(","))
    if name in ("stop", "choices"):
        texts = _parsed(json.loads, text)
        return texts if isinstance(texts, list) else [texts if isinstance(texts, str) else text]
    kinds = {option.name: TYPES[option.type] for option in _core.OPTIONS}
    kind = kinds.get(name) or get_args(get_type_hints(Options)[name])[0]
    return _parsed(_boolean if kind is bool else kind, text)


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except (ValueError, KeyError, RecursionError):
        return text
