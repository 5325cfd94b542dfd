"""What a text must be: one of some strings, JSON, a regular expression, or a grammar.

The core walks strings by their tokens. llguidance compiles all else, and says at every place which
tokens may follow. Its Python package is what is documented and comes as a wheel for every platform;
its C functions have no library of their own to link to. The core calls it in the thread that runs
the forwards; masks come without the GIL.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from . import _core
from .continuing import continuing
from .convert.guarded import GuardedTokenizer
from .endless_rules import LITERAL
from .errors import SbdValueError, brief
from .parameters import Constraint, named
from .schema_checks import check_constants, check_ends, check_rules_end

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from .tokenizer import Tokenizer

_KEPT = 16  # compiled ones: some 0.3 MB each, a hostile one up to 30
_MOST_CHARACTERS = 1 << 19
_MOST_FORCED = 1 << 14  # bytes before there is a choice
_IDS = re.compile(r"<\[(.*?)\]>")
_ID = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
# Of llguidance: half a second to compile at most, some 20 ms for a mask, 100 MB for all of
# a grammar's texts.
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "precompute_large_lexemes": False,
    "verbose_errors": False,
}
_FATAL = "-9223372036854775"  # one of three digits more in a grammar's %json ends the process
# Blanks are nowhere but in strings, or a model that likes them would write nothing else.
_COMPACT: Any = {"whitespace_flexible": False}


class _Vocabulary(NamedTuple):
    tokenizer: LLTokenizer
    end: int  # its end of sequence, which is none of the model's tokens


class _Compiled:
    """One constraint's grammar, compiled by who needs it first; others wait for that one alone."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._grammar: _core.Grammar | None = None
        self._matcher: LLMatcher | None = None

    def get(self, compile_: Callable[[], tuple[_core.Grammar, LLMatcher | None]]) -> _core.Grammar:
        with self._lock:
            if self._grammar is None or self._is_spent():
                self._grammar, self._matcher = compile_()
            return self._grammar

    def _is_spent(self) -> bool:
        """All texts of a matcher share its states, of which the limit may have been met."""
        if self._matcher is None:
            return False
        first = self._matcher.deep_copy()
        first.compute_bitmask()
        return first.is_error()


class Grammars:
    """Compiles for one model, and keeps what it has compiled lately."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Constraint, _Compiled] = OrderedDict()

    def get(self, constraint: Constraint) -> _core.Grammar:
        """Raises SbdValueError where it cannot be compiled, or needs llguidance, which is not
        installed."""
        with self._lock:
            compiled = self._compiled.setdefault(constraint, _Compiled())
            self._compiled.move_to_end(constraint)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        try:
            return compiled.get(lambda: self._compile(constraint))
        except SbdValueError:
            with self._lock:
                self._compiled.pop(constraint, None)
            raise

    def _compile(self, constraint: Constraint) -> tuple[_core.Grammar, LLMatcher | None]:
        size = len(constraint.source)
        if size > _MOST_CHARACTERS:
            raise SbdValueError(
                f"expected {named(constraint.kind)} of at most {_MOST_CHARACTERS} characters, "
                f"got {size}"
            )
        if constraint.kind == "choices":
            ids = list(map(self._spelt, json.loads(constraint.source)))
            return _core.Choices(ids, self._vocab_size, self._tokenizer.eos_token_ids), None
        return self._compiled_by_llguidance(constraint)

    def _spelt(self, choice: str) -> list[int]:
        """Its tokens behind any text."""
        ids: list[int] = self._continuing.encode(choice, add_special_tokens=False).ids
        once, twice = map(self._tokenizer.decode, (ids, [*ids, *ids]))
        if twice[len(once) :] != choice:
            raise SbdValueError(
                f"{named('choices')}: this model's tokens cannot spell {brief(choice)}"
            )
        return ids

    @cached_property
    def _continuing(self) -> GuardedTokenizer:
        described = json.dumps(continuing(self._tokenizer.backend))
        return GuardedTokenizer.from_json(described, "this model's tokenizer", SbdValueError)

    def _compiled_by_llguidance(self, constraint: Constraint) -> tuple[_core.Grammar, LLMatcher]:
        _imported(constraint)
        schema = json.loads(constraint.source) if constraint.kind == "json_schema" else None
        if schema is not None:
            check_constants(named(constraint.kind), schema)
        elif _FATAL in constraint.source:
            raise SbdValueError(
                f"{named(constraint.kind)}: expected integers above {_FATAL}000, got one below"
            )
        if constraint.kind == "grammar":
            self._check_ids(constraint)
        described = _as_llguidance_has_it(constraint)
        matcher = self._matcher(described)
        _check(matcher, constraint)
        if schema is not None:
            check_ends(named(constraint.kind), schema)
        if constraint.kind == "grammar":
            check_rules_end(named(constraint.kind), constraint.source)
        if self._forces_too_much(described):
            raise SbdValueError(
                f"{named(constraint.kind)} forces a text of more than {_MOST_FORCED} bytes, if it "
                "ends at all"
            )
        first = matcher.deep_copy()
        forced = first.compute_ff_tokens()
        first.consume_tokens(forced)
        bits = b"" if first.is_stopped() else first.compute_bitmask()
        _check(first, constraint)
        if not forced and first.is_accepting() and sum(map(int.bit_count, bits)) <= 1:
            raise SbdValueError(f"{named(constraint.kind)} allows the empty text alone")
        grammar = _core.LlguidanceGrammar(
            matcher,
            constraint.kind,
            self._vocab_size,
            self._vocabulary.end,
            self._tokenizer.eos_token_ids,
        )
        return grammar, matcher

    def _check_ids(self, constraint: Constraint) -> None:
        """A grammar may name tokens by their ids, <[5]> or <[5-9,12]>: but none that is no text."""
        barred = {*self._tokenizer.eos_token_ids, self._tokenizer.mask_token_id}
        for ids in _IDS.findall(LITERAL.sub("", constraint.source)):
            for one in ids.split(","):
                found = _ID.fullmatch(one)
                if not found:
                    raise SbdValueError(
                        f"{named(constraint.kind)}: expected ids of tokens as <[5]> or <[5-9,12]>, "
                        f"got {brief(f'<[{ids}]>')}"
                    )
                named_ids = range(int(found[1]), int(found[2] or found[1]) + 1)
                if any(token in named_ids for token in barred):
                    raise SbdValueError(
                        f"{named(constraint.kind)}: {brief(f'<[{ids}]>')} has an end of sequence "
                        "or the mask token, which are no text"
                    )

    def _forces_too_much(self, described: Mapping[str, Any]) -> bool:
        """Whether it does before there is a choice. llguidance keeps to its limits only behind one,
        so this looks at the same grammar with a choice in front of it."""
        matcher = self._matcher(
            {"lark_grammar": "start: /[01]/ @rest"}, {**described, "name": "rest"}
        )
        matcher.compute_bitmask()
        matcher.try_consume_tokens(self._vocabulary.tokenizer.tokenize_str("0"))
        return len(matcher.compute_ff_bytes()) > _MOST_FORCED

    def _matcher(self, *grammars: Mapping[str, Any]) -> LLMatcher:
        import llguidance

        matcher: LLMatcher = llguidance.LLMatcher(
            self._vocabulary.tokenizer,
            json.dumps({"grammars": grammars}),
            log_level=0,
            limits=llguidance.LLParserLimits(**_LIMITS),
        )
        return matcher

    @cached_property
    def _vocabulary(self) -> _Vocabulary:
        import llguidance

        backend = self._tokenizer.backend
        end, name = backend.get_vocab_size(), "<|end|>"
        while backend.token_to_id(name) is not None:
            name += "|>"
        described = continuing(backend)
        described["added_tokens"] = [*(described.get("added_tokens") or ()), _special(end, name)]
        size = max(self._vocab_size, end + 1)
        try:
            return _Vocabulary(
                llguidance.LLTokenizer(json.dumps(described), n_vocab=size, eos_token=end), end
            )
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise SbdValueError(f"llguidance cannot read this model's tokenizer: {error}") from None


def _imported(constraint: Constraint) -> None:
    try:
        import llguidance  # noqa: F401
    except ImportError:
        raise SbdValueError(
            f"{named(constraint.kind)} needs llguidance: pip install 'llguidance>=1.9'"
        ) from None


def _as_llguidance_has_it(constraint: Constraint) -> dict[str, Any]:
    """Without a name."""
    from llguidance import LLMatcher

    kind, source = constraint
    if kind == "grammar":
        return {"lark_grammar": source}
    if kind == "json_schema" and "x-guidance" in json.loads(source):
        raise SbdValueError(
            f"{named(kind)} has an x-guidance, with which texts need not be JSON: leave it out"
        )
    if kind == "regex" and (len(source) - len(source.rstrip("\\"))) % 2:
        raise SbdValueError(f"{named(kind)} ends with a \\ that has nothing behind it")
    try:
        if kind == "regex":
            described = LLMatcher.grammar_from_regex(source)
        else:
            described = LLMatcher.grammar_from_json_schema(source, defaults=_COMPACT)
    except ValueError as error:  # brackets nested too deeply, for one
        raise SbdValueError(f"{named(kind)}: {_line(str(error))}") from None
    (grammar,) = json.loads(described)["grammars"]
    return {key: value for key, value in grammar.items() if value is not None}


def _check(matcher: LLMatcher, constraint: Constraint) -> None:
    if matcher.get_error().startswith("NoExtensionBias"):
        raise SbdValueError(f"{named(constraint.kind)} allows no text at all")
    if matcher.is_error():
        raise SbdValueError(f"{named(constraint.kind)}: {_line(matcher.get_error())}")


def _line(error: str) -> str:
    return " ".join(error.removesuffix("<non-verbose/>").split())


def _special(token: int, name: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": name, "special": True, **flags}
