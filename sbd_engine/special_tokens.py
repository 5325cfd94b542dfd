"""A tokenizer's special tokens, and where a text spells them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from tokenizers import AddedToken, Tokenizer, models

from .convert.guarded import GuardedTokenizer
from .errors import SbdValueError


class Spelled(NamedTuple):
    """text[begin:end] is how special token `id` is written."""

    id: int
    begin: int
    end: int


class SpecialTokens:
    """tokens: by id, as the tokenizers library has them. added: with those that are not special."""

    def __init__(self, backend: GuardedTokenizer) -> None:
        self.added = backend.get_added_tokens_decoder()
        self.tokens = {id_: token for id_, token in self.added.items() if token.special}
        self.contents: dict[int, str] = {id_: token.content for id_, token in self.tokens.items()}

    def find(self, text: str) -> Iterator[Spelled]:
        """The special tokens that `text` spells, as the tokenizer finds them."""
        found = self._finder.encode(text, add_special_tokens=False)
        for content, (begin, end) in zip(found.tokens, found.offsets, strict=True):
            if content in self._ids:
                yield Spelled(self._ids[content], begin, end)

    def symbols(self, text: str) -> list[str]:
        """The text as characters and whole special tokens."""
        symbols, at = [], 0
        for spelled in self.find(text):
            symbols += [*text[at : spelled.begin], self.contents[spelled.id]]
            at = spelled.end
        return [*symbols, *text[at:]]

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {content: id_ for id_, content in self.contents.items()}

    @cached_property
    def _finder(self) -> GuardedTokenizer:
        """A tokenizer that has added tokens alone: linear in the text, however many there are."""

        def build() -> Tokenizer:
            finder = Tokenizer(models.WordLevel({"": 0}, ""))
            finder.add_tokens(
                [
                    AddedToken(token.content, single_word=token.single_word, normalized=False)
                    for token in self.added.values()
                ]
            )
            return finder

        return GuardedTokenizer(build, "the model file's special tokens", SbdValueError)
