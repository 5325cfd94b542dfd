"""A model's tokenizer for texts that go on, and are nothing but text: nothing is put around or in
front of them, no character becomes another, and none of them spells a special token."""

from __future__ import annotations

import json
from typing import Any

from .convert.guarded import GuardedTokenizer, steps

_NO_CHARACTER = "\U0010ffff"


def continuing(backend: GuardedTokenizer) -> dict[str, Any]:
    """As tokenizer.json has it."""
    described = _plain(json.loads(backend.to_str()))
    _hide_special(described)
    return described


def stands_apart(content: str, special: bool) -> bool:
    """Whether an added token is one that no text spells: a grammar has it by its id alone. To
    llguidance all in angle brackets are."""
    return special or (content.startswith("<") and content.endswith(">"))


def _hide_special(tokenizer: dict[str, Any]) -> None:
    """Gives tokens that stand apart names that no text spells, or one that does would be split into
    them."""
    names = {
        token["content"]: f"{_NO_CHARACTER}{token['id']}"
        for token in tokenizer.get("added_tokens") or ()
        if stands_apart(token["content"], token["special"])
    }
    for token in tokenizer.get("added_tokens") or ():
        if token["content"] in names:
            token |= {"content": names[token["content"]], "special": True}
    vocabulary = tokenizer["model"].get("vocab")
    if isinstance(vocabulary, dict):
        for content, name in names.items():
            if content in vocabulary:
                vocabulary[name] = vocabulary.pop(content)
    elif isinstance(vocabulary, list):
        for piece in vocabulary:
            piece[0] = names.get(piece[0], piece[0])


def _plain(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Nothing is put around or in front of a text, and no character becomes another."""
    kept = [step for step in steps(tokenizer.get("normalizer")) if step.get("type") == "Replace"]
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    tokenizer["post_processor"] = tokenizer["truncation"] = tokenizer["padding"] = None
    for step in steps(tokenizer.get("pre_tokenizer")):
        if "add_prefix_space" in step:
            step["add_prefix_space"] = False
        if "prepend_scheme" in step:
            step["prepend_scheme"] = "never"
    return tokenizer
