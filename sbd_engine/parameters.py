"""The arguments of one generation, checked before any work starts."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypedDict

from . import _core
from .errors import SbdTypeError, SbdValueError, brief
from .json_values import parse_strict_json

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

TokenIds: TypeAlias = "Sequence[int] | npt.NDArray[np.integer[Any]]"
Prompt: TypeAlias = "str | TokenIds"

_INT32_MAX = 2**31 - 1
_MAX_STOPS, _MAX_STOP_CHARACTERS = 1024, 1 << 14  # each is memory while its text is written
_MAX_CHOICES = 1 << 12
_MAX_FLOAT32 = 3.4e38
_LONGEST_NAME = 64  # that is compared with others
MAX_BEST = 20  # tokens whose log-probabilities come with each one's


class Options(TypedDict, total=False):
    """The keyword arguments of Engine.generate and its like, for type checkers and editors. None is
    the default of each."""

    max_tokens: int | None
    decoder: str | None
    block_size: int | None
    unmask: str | None
    proxy: str | None
    gamma: float | None
    factor: float | None
    confidence_threshold: float | None
    top_n: int | None
    steps: int | None
    horizon: int | None
    block_add_threshold: float | None
    decoded_token_threshold: float | None
    skip_threshold: float | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    logit_bias: Mapping[int, float] | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logprobs: int | None
    seed: int | None
    sample_index: int | None
    stop: str | Sequence[str] | None
    ignore_eos: bool | None
    skip_special_tokens: bool | None
    json_schema: str | Mapping[str, Any] | bool | None
    regex: str | None
    grammar: str | None
    choices: Sequence[str] | None


class Constraint(NamedTuple):
    """What a text must be: the argument that says so, and what it says."""

    kind: str
    source: str


@dataclass(frozen=True)
class Parameters:
    """One request. None: the model file's default. What depends on the model the engine checks."""

    prompt: Prompt
    max_tokens: int = 256
    decoder: str = "auto"
    options: Mapping[str, int | float | str] = field(default_factory=dict)  # of OPTIONS, as given
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logprobs: int | None = None  # none at all
    seed: int = 0
    sample_index: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    constraint: Constraint | None = None


def named(name: str) -> str:
    """An argument's name in an error: the command line puts its flag in the place of it."""
    return f"`{name}`"


def without_other_constraint(options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The options, for who has these too: a constraint takes the place of another."""
    has_own = not CONSTRAINTS.keys().isdisjoint(own)
    return {k: v for k, v in options.items() if not (has_own and k in CONSTRAINTS)}


def parse(arguments: Mapping[str, Any]) -> Parameters:
    """Checks names, types and ranges; errors name the argument and what was expected."""
    for name in arguments:
        if name not in CHECKS:
            raise SbdTypeError(unknown("argument", str(name), [*CHECKS]))
    if "prompt" not in arguments:
        raise SbdTypeError("expected a prompt: a string or a sequence of token ids, got none")
    checked: dict[str, Any] = {
        name: CHECKS[name](named(name), value)
        for name, value in arguments.items()
        if value is not None or name == "prompt"
    }
    asked = {name: checked.pop(name) for name in _OPTIONS & checked.keys()}
    constraints = [Constraint(n, checked.pop(n)) for n in CONSTRAINTS if n in checked]
    if len(constraints) > 1:
        raise SbdValueError(
            f"expected one of {', '.join(map(named, CONSTRAINTS))}, got "
            f"{' and '.join(named(kind) for kind, _ in constraints)}"
        )
    return Parameters(**checked, options=asked, constraint=next(iter(constraints), None))


def unknown(what: str, name: str, known: Sequence[str]) -> str:
    """The one line for a name that is not there: near matches, else all names."""
    near = get_close_matches(name[:_LONGEST_NAME], known, n=3, cutoff=0.6)
    if near:
        return f"unknown {what} {brief(name)}: did you mean {' or '.join(near)}?"
    return f"unknown {what} {brief(name)}: expected one of {', '.join(known)}"


def integer(name: str, value: Any, low: int, high: int = _INT32_MAX) -> int:
    """`value` as an int in [low, high]; numpy's integers are welcome, True and 1.0 are not."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise SbdTypeError(f"expected an integer {name}, got {brief(value)}")
    if number < low:
        raise SbdValueError(f"expected {name} >= {low}, got {_digits(number)}")
    if number > high:
        raise SbdValueError(f"expected {name} <= {high}, got {_digits(number)}")
    return number


def _digits(number: int) -> str:
    """Python writes no integer of thousands of digits."""
    return str(number) if number.bit_length() <= 128 else f"one of {number.bit_length()} bits"


def one_of(name: str, value: Any, names: Sequence[str]) -> str:
    if not isinstance(value, str):
        raise SbdTypeError(f"expected {name} as a string, got {brief(value)}")
    if value not in names:
        raise SbdValueError(unknown(name, value, names))
    return value


def token_ids(prompt: Iterable[Any], vocab_size: int) -> list[int]:
    """A prompt given as ids, each in [0, vocab_size)."""
    ids = []
    for position, item in enumerate(prompt):
        try:
            token = operator.index(item)
        except TypeError:
            raise SbdTypeError(
                f"expected the prompt as a string or integer token ids, got {brief(item)} "
                f"at position {position}"
            ) from None
        if not 0 <= token < vocab_size:
            raise SbdValueError(
                f"expected token ids from 0 to {vocab_size - 1}, got {_digits(token)} at position "
                f"{position}"
            )
        ids.append(token)
    if not ids:
        raise SbdValueError("expected a prompt of at least one token, got an empty one")
    return ids


def _prompt(_: str, value: Any) -> Prompt:
    if isinstance(value, str):
        if not value:
            raise SbdValueError("expected a prompt of at least one character, got an empty one")
        check_utf8("the prompt", value)
        return value
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise SbdTypeError(
            "expected the prompt as a string or a sequence of token ids, "
            f"got {type(value).__name__}"
        )
    return list(value)


def check_utf8(name: str, text: str) -> None:
    """A string from the command line or a careless decoder may hold bytes that are not text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SbdValueError(
            f"expected {name} as UTF-8 text, got an invalid character at position {error.start}"
        ) from None


def _stop(name: str, value: Any) -> tuple[str, ...]:
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, Iterable) or isinstance(stops, (bytes, Mapping)):
        raise SbdTypeError(f"expected {name} as a string or several, got {brief(value)}")
    stops = tuple(islice(stops, _MAX_STOPS + 1))
    if len(stops) > _MAX_STOPS:
        raise SbdValueError(f"expected at most {_MAX_STOPS} {name} strings, got more")
    for stop in stops:
        if not isinstance(stop, str):
            raise SbdTypeError(f"expected {name} as a string or several, got {brief(stop)}")
        if not stop:
            raise SbdValueError(
                f"expected {name} strings of at least one character, got an empty one"
            )
        check_utf8(name, stop)
    length = sum(map(len, stops))
    if length > _MAX_STOP_CHARACTERS:
        raise SbdValueError(
            f"expected {name} strings of {_MAX_STOP_CHARACTERS} characters together, got {length}"
        )
    return stops


def _json_schema(name: str, value: Any) -> str:
    if isinstance(value, str):
        check_utf8(name, value)
        try:
            value = parse_strict_json(value)
        except ValueError as error:
            raise SbdValueError(f"expected {name} as JSON: {error}") from None
    if value is True:
        value = {}
    if not isinstance(value, Mapping):
        raise SbdTypeError(f"expected {name} as a JSON Schema, an object, got {brief(value)}")
    try:
        schema = json.dumps(dict(value), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SbdValueError(f"expected {name} of what JSON can hold: {error}") from None
    check_utf8(name, schema)
    return schema


def _source(name: str, value: Any) -> str:
    if not _text(name, value):
        raise SbdValueError(f"expected {name} of at least one character, got an empty one")
    return str(value)


def _choices(name: str, value: Any) -> str:
    """As a list in JSON."""
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise SbdTypeError(f"expected {name} as a list of strings, got {brief(value)}")
    choices = list(islice(value, _MAX_CHOICES + 1))
    if not choices or len(choices) > _MAX_CHOICES:
        count = "more" if choices else "none"
        raise SbdValueError(f"expected 1 to {_MAX_CHOICES} {name}, got {count}")
    for choice in choices:
        if not isinstance(choice, str):
            raise SbdTypeError(f"expected {name} as a list of strings, got {brief(choice)} in it")
        _source(f"each of {name}", choice)
    return json.dumps(choices, ensure_ascii=False)


def _logit_bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, Mapping):
        raise SbdTypeError(
            f"expected {name} as a mapping of token ids to numbers, got {type(value).__name__}"
        )
    biases = []
    for key, bias in value.items():  # of a whole vocabulary, names would take the most time
        plain = type(key) is int and 0 <= key <= _INT32_MAX
        token = key if plain else integer(f"token id in {name}", key, 0)
        plain = type(bias) is float and abs(bias) <= _MAX_FLOAT32
        biases.append((token, bias if plain else _BIAS(f"{name} of token {token}", bias)))
    return tuple(biases)


def _number(name: str, value: Any, expected: str, holds: Callable[[float], bool]) -> float:
    if isinstance(value, (str, bytes, bool)):
        raise SbdTypeError(f"expected {name} as a number, got {brief(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf if value > 0 else -math.inf
    except (TypeError, ValueError):
        raise SbdTypeError(f"expected {name} as a number, got {brief(value)}") from None
    if not holds(number):  # written so that NaN fails
        raise SbdValueError(f"expected {name} {expected}, got {number:g}")
    return number


def _boolean(name: str, value: Any) -> bool:
    if value is True or value is False:
        return bool(value)
    raise SbdTypeError(f"expected {name} as True or False, got {brief(value)}")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise SbdTypeError(f"expected {name} as a string, got {brief(value)}")
    check_utf8(name, value)
    return value


def _at_least(low: int, high: int = _INT32_MAX) -> Callable[[str, Any], int]:
    return lambda name, value: integer(name, value, low, high)


def _where(expected: str, holds: Callable[[float], bool]) -> Callable[[str, Any], float]:
    return lambda name, value: _number(name, value, expected, holds)


def _of(option: _core.Option) -> Callable[[str, Any], Any]:
    """A check by the engine's table. The engine knows the names that are strings."""
    if option.type == "int":
        return _at_least(int(option.low), int(option.high))
    return _text if option.type == "str" else _where(option.expected, option.holds)


_OPTIONS = {option.name for option in _core.OPTIONS}
_BIAS = _where("as a finite number", lambda x: abs(x) <= _MAX_FLOAT32)
_PENALTY = _where("from -2 to 2", lambda x: -2 <= x <= 2)
CONSTRAINTS: dict[str, Callable[[str, Any], str]] = {
    "json_schema": _json_schema,
    "regex": _source,
    "grammar": _source,
    "choices": _choices,
}
CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "prompt": _prompt,
    "max_tokens": _at_least(1),
    "decoder": _text,
    "temperature": _where(">= 0 and finite", lambda x: 0 <= x < math.inf),
    "top_p": _where("above 0 and at most 1", lambda x: 0 < x <= 1),
    "top_k": _at_least(0),
    "min_p": _where("from 0 to 1", lambda x: 0 <= x <= 1),
    "logit_bias": _logit_bias,
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": _where("above 0 and finite", lambda x: 0 < x < math.inf),
    "logprobs": _at_least(0, MAX_BEST),
    "seed": _at_least(0, 2**64 - 1),
    "sample_index": _at_least(0, 2**64 - 1),
    "stop": _stop,
    "ignore_eos": _boolean,
    "skip_special_tokens": _boolean,
    **CONSTRAINTS,
    **{option.name: _of(option) for option in _core.OPTIONS},
}
OPTION_NAMES = tuple(name for name in CHECKS if name != "prompt")
