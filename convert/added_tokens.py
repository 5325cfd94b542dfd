"""Tokens that other files name beside a tokenizer: transformers adds them as it loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken

from .checkpoint import Checkpoint
from .errors import ConvertError, listed

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
LISTS = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class Named:
    token: AddedToken
    id: int | None = None  # where a file says it
    flags: bool = False  # its flags go before those that the tokenizer has of it


def tokenizer_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """tokenizer_config.json and the older special_tokens_map.json: the newer form goes first."""
    config = checkpoint.json("tokenizer_config.json")
    older = checkpoint.json("special_tokens_map.json")
    return older | config if "added_tokens_decoder" in config else config | older


def named_tokens(checkpoint: Checkpoint, config: dict[str, Any], raw: bool) -> list[Named]:
    """Those with an id in its order, then the special ones: each text once.

    `raw`: they are looked for in the text as it is, whatever the files say.
    """
    special = {content(value): value for value in _special(config) if content(value)}
    newer = "added_tokens_decoder" in config
    if newer:
        entries = list(_checked(config, "added_tokens_decoder", dict).items())
    else:
        entries = [(i, token) for token, i in checkpoint.json("added_tokens.json").items()]
    numbered = [(_id(i, value), value) for i, value in entries]
    named: dict[str, Named] = {}
    for i, value in sorted(numbered, key=lambda pair: pair[0]):
        named[content(value)] = Named(_added_token(value, content(value) in special, raw), i, newer)
    for text, value in special.items():
        named.setdefault(text, Named(_added_token(value, True, raw)))
    return list(named.values())


def add_tokens(hf: Any, named: list[Named], vocab_size: int) -> tuple[bool, list[str]]:
    """Whether `named` changed the tokenizer, and those that are left out, as the model has no row
    for them."""
    known = {token.content: token for token in hf.get_added_tokens_decoder().values()}
    ids = hf.get_vocab()
    free = len(ids)
    new: list[Named] = []
    left_out: list[str] = []
    for entry in named:
        text = entry.token.content
        if text in known and not (entry.flags and repr(known[text]) != repr(entry.token)):
            continue
        if text not in ids:
            if free >= vocab_size:
                left_out.append(text)
                continue
            free += 1
        new.append(entry)
    hf.add_tokens([entry.token for entry in new])
    for entry in new:
        text, got = entry.token.content, hf.token_to_id(entry.token.content)
        if text not in ids and entry.id not in (None, got):
            raise ConvertError(
                f"added token {text!r}: expected the ids from {len(ids)} on without a gap, got "
                f"{entry.id}"
            )
    return bool(new), left_out


def left_out_warning(tokens: list[str], vocab_size: int) -> str:
    return (
        f"the model's vocabulary of {vocab_size} has no place for {len(tokens)} of the tokens that "
        f"the tokenizer's configuration names: {listed(tokens)}"
    )


def content(value: Any) -> str:
    """Of a token as the files write it: its text, or an object of that and its flags."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _special(config: dict[str, Any]) -> list[Any]:
    """Values of `bos_token`, `image_token`, ... and of the lists; some are names with values."""
    values = [value for key, value in config.items() if key.endswith("_token")]
    for key in LISTS:
        more = _checked(config, key, (dict, list))
        values += more.values() if isinstance(more, dict) else more
    return values


def _checked(config: dict[str, Any], key: str, kinds: Any) -> Any:
    value = config.get(key) or {}
    if not isinstance(value, kinds):
        raise ConvertError(
            f"tokenizer_config.json: {key}: expected several tokens, got {value!r:.60}"
        )
    return value


def _added_token(value: Any, special: bool, raw: bool) -> AddedToken:
    written = value if isinstance(value, dict) else {}
    flags = {flag: bool(written[flag]) for flag in FLAGS if flag in written}
    if special:
        flags["special"] = True
    if raw:
        flags["normalized"] = False
    return AddedToken(content(value), **flags)


def _id(id_: Any, value: Any) -> int:
    try:
        number = int(id_)
    except (TypeError, ValueError):
        number = -1
    if number < 0 or not content(value):
        raise ConvertError(
            f"added token {content(value)!r}: expected a text with an id of at least 0, got {id_!r}"
        )
    return number
