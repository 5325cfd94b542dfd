"""Special tokens that a conversation spells out: text, where a chat template's own are tokens.

The template runs twice, the second time with two marks around each special token in what the caller
gave. Where both texts agree but for the marks, these say which special tokens came from there. The
template's own are then put in other words, which a copy of the tokenizer knows in place of them, so
that all is encoded in one piece, as the tokenizer does it.
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from functools import cached_property

from tokenizers import AddedToken, Tokenizer

from .chat import Conversation
from .convert.guarded import GuardedTokenizer
from .errors import SbdValueError
from .special_tokens import SpecialTokens


class SpelledTokens:
    """Encodes conversations."""

    def __init__(self, backend: GuardedTokenizer, special: SpecialTokens) -> None:
        self._backend, self._special = backend, special
        word = secrets.token_hex(8)  # nobody who writes a conversation knows it
        self._marks = f"b{word}", f"e{word}"
        self._stand_ins = {id_: f"<|{word}-{id_}|>" for id_ in special.tokens}

    def encode(self, conversation: Conversation, check: Callable[[str], None]) -> list[int]:
        """Token ids of a conversation, whose text `check` may refuse. Raises SbdValueError where it
        cannot be told what the caller spelled, or the tokenizer has no other way to write it."""
        spelled: set[int] = set()
        begin, end = self._marks

        def mark(text: str) -> str:
            pieces, at = [], 0
            for token, first, last in self._special.find(text):
                spelled.add(token)
                pieces += [text[at:first], begin, text[first:last], end]
                at = last
            return "".join([*pieces, text[at:]])

        text = conversation.text()
        check(text)
        marked = conversation.changed(mark)
        if not spelled:
            return list(self._backend.encode(text, add_special_tokens=False).ids)
        pieces = re.split(f"({begin}|{end})", marked.text())
        if "".join(pieces[::2]) != text:
            raise self._refusal(spelled, "the chat template does something else with")
        ids = self._with_stand_ins.encode(self._own_replaced(pieces), add_special_tokens=False).ids
        if not spelled.isdisjoint(ids):
            raise self._refusal(spelled, "this tokenizer has no other tokens for")
        return [self._by_stand_in.get(id_, id_) for id_ in ids]

    def _own_replaced(self, pieces: list[str]) -> str:
        """The text of pieces, every other one a mark, with stand-ins for the special tokens that
        the template wrote: those that no mark cuts and no pair of marks encloses."""
        cuts: list[int] = []  # where marks stand in the text
        enclosed = set()
        for index, piece in enumerate(pieces[::2]):
            first = cuts[-1] if cuts else 0
            if tuple(pieces[max(0, 2 * index - 1) : 2 * index + 2 : 2]) == self._marks:
                enclosed.add((first, first + len(piece)))
            cuts.append(first + len(piece))
        text = "".join(pieces[::2])
        replaced, at = [], 0
        for token, first, last in self._special.find(text):
            is_cut = bisect_right(cuts, first) < bisect_left(cuts, last)
            if not is_cut and (first, last) not in enclosed:
                replaced += [text[at:first], self._stand_ins[token]]
                at = last
        return "".join([*replaced, text[at:]])

    @cached_property
    def _with_stand_ins(self) -> GuardedTokenizer:
        def build() -> Tokenizer:
            copy = Tokenizer.from_str(self._backend.to_str())
            copy.encode_special_tokens = True  # special tokens are text to it
            copy.add_tokens(
                [
                    AddedToken(
                        self._stand_ins[id_],
                        single_word=token.single_word,
                        lstrip=token.lstrip,
                        rstrip=token.rstrip,
                        normalized=token.normalized,
                        special=False,
                    )
                    for id_, token in self._special.tokens.items()
                ]
            )
            return copy

        return GuardedTokenizer(build, "the model file's tokenizer", SbdValueError)

    @cached_property
    def _by_stand_in(self) -> dict[int, int]:
        ids = self._with_stand_ins.get_vocab()
        return {ids[word]: id_ for id_, word in self._stand_ins.items()}

    def _refusal(self, spelled: set[int], what: str) -> SbdValueError:
        names = ", ".join(self._special.contents[id_] for id_ in sorted(spelled)[:3])
        return SbdValueError(
            f"{what} the special token {names} that the conversation spells out: take it out, or "
            "have it encoded as the token with sanitize_control_tokens=False"
        )
