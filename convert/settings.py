"""The `sbd.*` keys: how a model file wants to be decoded. `--set` takes any of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .checkpoint import Checkpoint
from .comma_list import parsed
from .decoders import D2F_THRESHOLDS, DECODERS, PROMPT_RULES, PROXIES, RULES, SCHEDULES
from .errors import ConvertError
from .families import named_block_size
from .tokenizer import Tokenizer
from .values import Value


@dataclass(frozen=True)
class Setting:
    expected: str  # in words, for the error
    parse: Callable[[str], Value]  # raises ValueError


def _integer(low: int, high: int = 2**31 - 1) -> Setting:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return Setting(f"an integer from {low} to {high}", parse)


def _float32(text: str) -> float:
    """As the file will hold it: what is too small for it is 0, what is too large infinite."""
    with np.errstate(over="ignore"):
        return float(np.float32(float(text)))


def _number(low: float, high: float) -> Setting:
    def parse(text: str) -> float:
        value = _float32(text)
        if not low <= value <= high:  # NaN too
            raise ValueError
        return value

    return Setting(f"a number from {low:g} to {high:g}", parse)


def _positive_number() -> Setting:
    def parse(text: str) -> float:
        value = _float32(text)
        if not value > 0:
            raise ValueError
        return value

    return Setting("a number above 0", parse)


def _choice(*names: str) -> Setting:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError
        return text

    return Setting(f"one of {', '.join(names)}", parse)


def _flag() -> Setting:
    def parse(text: str) -> int:
        if text not in ("0", "1"):
            raise ValueError
        return int(text)

    return Setting("0 or 1", parse)


def _integers(low: int, count: int | None = None) -> Setting:
    def parse(text: str) -> list[int]:
        values = parsed(text, int)
        if min(values) < low or max(values) >= 2**31 or count not in (None, len(values)):
            raise ValueError
        return values

    amount = "integers" if count is None else f"{count} integers"
    return Setting(f"{amount} from {low}, with commas between", parse)


def _choices(*names: str) -> Setting:
    def parse(text: str) -> list[str]:
        values = parsed(text, str)
        if len({*values} & {*names}) != len(values):  # each known, and none twice
            raise ValueError
        return values

    return Setting(f"some of {','.join(names)} with commas between", parse)


SETTINGS = {
    "sbd.mask_token_id": _integer(0),
    "sbd.eos_token_ids": _integers(0),
    "sbd.decoders": _choices(*DECODERS),
    "sbd.block_size": _integer(1, 1024),
    "sbd.sub_block_size": _integer(1, 1024),
    "sbd.steps": _integer(1, 1 << 16),
    "sbd.schedule": _choice(*SCHEDULES),
    "sbd.gamma": _number(0, math.inf),
    "sbd.unmask": _choice(*RULES),
    "sbd.proxy": _choice(*PROXIES),
    "sbd.factor": _positive_number(),
    "sbd.confidence_threshold": _number(0, 1),
    "sbd.top_n": _integer(1),
    "sbd.logit_shift": _flag(),
    "sbd.seed_slot": _flag(),
    "sbd.prompt_attention": _choice("causal", "bidirectional", "block_causal", "full"),
    "sbd.block_origin": _choice("prompt", "absolute"),
    "sbd.commit_attention": _choice("causal", "block", "none"),
    "sbd.dmtd.layers": _integers(0, count=3),
    "sbd.dmtd.horizon": _integer(1),
    "sbd.dmtd.prompt_rule": _choice(*PROMPT_RULES),
    **{f"sbd.{key}": _number(0, 1) for key in D2F_THRESHOLDS},
}


# Names that keys had before; files may still have them.
OLDER_KEYS = {"sbd.confidence_threshold": "sbd.threshold"}

# How to give what a decoder needs.
WAYS = {
    "mask_token_id": "a mask token: name one with --mask-token",
    "dmtd.layers": "a cut of the layers: give one with --set dmtd.layers=E,T,D",
}


def parse_setting(key: str, text: str, option: str) -> Value:
    """The typed value of an `sbd.*` key; `option` is how the user gave it, for the error."""
    try:
        return SETTINGS[key].parse(text)
    except ValueError:
        raise ConvertError(
            f"{option}: expected {SETTINGS[key].expected}, got {text!r:.60}"
        ) from None


def full_key(name: str) -> str:
    """A key's name, which may be given without its "sbd.", or be an older one."""
    key = f"sbd.{name.removeprefix('sbd.')}"
    return next((today for today, older in OLDER_KEYS.items() if older == key), key)


def parse_settings(pairs: Sequence[str], option: str = "--set ") -> dict[str, Value]:
    """KEY=VALUE each, as `option` takes them; "": as bare arguments."""
    values: dict[str, Value] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConvertError(f"{option.strip() or 'set'}: expected KEY=VALUE, got {pair!r:.60}")
        key = full_key(name)
        if key not in SETTINGS:
            raise ConvertError(
                f"{option.strip() or 'set'}: unknown key {name!r:.60}: expected one of "
                f"{', '.join(SETTINGS)}"
            )
        values[key] = parse_setting(key, text, f"{option}{name}")
    return values


def end_tokens(
    checkpoint: Checkpoint, tokenizer: Tokenizer, warn: Callable[[str], None]
) -> dict[str, Value]:
    """BOS and all EOS ids: those that the generation config names, the model's and the tokenizer's,
    and what ends a turn in the chat template. Any one of these files may lack it."""
    config = checkpoint.config
    ids: list[Any] = []
    for file in checkpoint.json("generation_config.json"), config:
        named = file.get("eos_token_id")
        ids += named if isinstance(named, list) else [] if named is None else [named]
    for token in ids:
        _checked_token(token, config, "eos_token_id")
    ends = [tokenizer.special_id("eos"), *tokenizer.turn_ends()]
    ids += [token for token in ends if token is not None and token < config["vocab_size"]]
    ids = [*dict.fromkeys(ids)]
    values: dict[str, Value] = {}
    if ids:
        values = {"tokenizer.ggml.eos_token_id": ids[0], "sbd.eos_token_ids": ids}
    else:
        warn("the checkpoint names no EOS token: text will end only at its length")
    bos = config.get("bos_token_id")
    if tokenizer.special_id("bos") is None and bos is not None:
        _checked_token(bos, config, "bos_token_id")
        values["tokenizer.ggml.bos_token_id"] = bos
    return values


def decoding_settings(
    checkpoint: Checkpoint,
    published: Mapping[str, Value],
    tokenizer: Tokenizer,
    mask_token: str | int | None,
    block_size: int | None,
    gamma: float | None,
    settings: Sequence[str],
) -> dict[str, Value]:
    """The `sbd.*` keys: `--set` goes before the other options, these before the checkpoint, and it
    before what is `published` of its family (keys without "sbd.")."""
    config = checkpoint.config
    values = {f"sbd.{key}": value for key, value in published.items()}
    mask = _mask_id(config, tokenizer, mask_token)
    if mask is not None:
        values["sbd.mask_token_id"] = mask
    if "sbd.mask_token_id" in values:
        values |= _config_block_size(checkpoint, values)
    values |= _config_layers(config)
    for key, option, value in (
        ("sbd.block_size", "--block-size", block_size),
        ("sbd.gamma", "--gamma", gamma),
    ):
        if value is not None:
            values[key] = parse_setting(key, str(value), option)
    values |= parse_settings(settings)
    for key in "sbd.block_size", "sbd.gamma":
        if key in values and "sbd.mask_token_id" not in values:
            raise ConvertError(f"{key} needs a mask token: name one with --mask-token")
    if "sbd.dmtd.layers" in values:
        values.setdefault("sbd.dmtd.horizon", 4)
        values.setdefault("sbd.dmtd.prompt_rule", "all_heads")
    if "decoders" not in {pair.partition("=")[0].removeprefix("sbd.") for pair in settings}:
        values["sbd.decoders"] = _decoders(values)
    return values


def _config_block_size(checkpoint: Checkpoint, values: dict[str, Value]) -> dict[str, Value]:
    """From the checkpoint's config; SDAR's may have it in its name alone."""
    config = checkpoint.config
    size = config.get("block_size")
    if size is None and values.get("sbd.decoders") == ["sdar"]:
        name = checkpoint.folder.resolve().name
        size = named_block_size(name, config.get("_name_or_path"))
    if size is None:
        return {}
    key = "sbd.block_size"
    return {key: parse_setting(key, str(size), "config.json: block_size")}


def _config_layers(config: dict[str, Any]) -> dict[str, Value]:
    """Direct Multi-Token Decoding's cut, as a checkpoint that was trained for it has it."""
    if config.get("num_thinking_layers") is None:
        return {}
    sections = [
        config.get(f"num_{section}_layers", missing)
        for section, missing in (("encoding", 0), ("thinking", None), ("decoding", None))
    ]
    text = ",".join(map(str, sections))
    source = "config.json: num_*_layers"
    values = {"sbd.dmtd.layers": parse_setting("sbd.dmtd.layers", text, source)}
    if config.get("mtp_horizon") is not None:
        key, horizon = "sbd.dmtd.horizon", str(config["mtp_horizon"])
        values[key] = parse_setting(key, horizon, "config.json: mtp_horizon")
    return values


def _decoders(values: dict[str, Value]) -> list[str]:
    """What the file can run, the default first, where neither the user nor the family says."""
    known = values.get("sbd.decoders")
    if isinstance(known, list):
        decoders = [str(name) for name in known]
    elif "sbd.mask_token_id" not in values:
        decoders = ["ntp"]
    # Without a block size nothing says that the model was trained for it: SBD only by name.
    elif "sbd.block_size" not in values:
        decoders = ["ntp", "sbd"]
    # Where next-token decoding can be verified, its own text comes first.
    else:
        decoders = ["sbd_lossless", "sbd", "ntp"] if _is_causal(values) else ["sbd", "ntp"]
    return ["dmtd", *decoders] if "sbd.dmtd.layers" in values else decoders


def _is_causal(values: dict[str, Value]) -> bool:
    """Whether the cache holds what next-token decoding would have put there."""
    attention = {values.get(f"sbd.{part}_attention", "causal") for part in ("prompt", "commit")}
    return attention == {"causal"} and not values.get("sbd.logit_shift", 0)


def _mask_id(
    config: dict[str, Any],
    tokenizer: Tokenizer,
    mask_token: str | int | None,
) -> int | None:
    if mask_token is not None:
        name = str(mask_token)
        if name.isdecimal():
            return int(name)
        if name not in tokenizer.ids:
            raise ConvertError(
                f"--mask-token: the tokenizer has no token {name!r}{tokenizer.near(name)}"
            )
        return tokenizer.ids[name]
    if config.get("mask_token_id") is not None:
        return _checked_token(config["mask_token_id"], config, "config.json: mask_token_id")
    return tokenizer.special_id("mask")


def check_decoding(metadata: dict[str, Value], config: dict[str, Any]) -> None:
    """That the settings fit the model and each other; adds GGUF's own key of the mask token."""
    if "sbd.mask_token_id" in metadata:
        _checked_token(metadata["sbd.mask_token_id"], config, "mask token")
        metadata["tokenizer.ggml.mask_token_id"] = metadata["sbd.mask_token_id"]
    ends = metadata.get("sbd.eos_token_ids", [])
    assert isinstance(ends, list)
    for token in ends:
        _checked_token(token, config, "sbd.eos_token_ids")
        if metadata.get("sbd.mask_token_id") == token:
            raise ConvertError(
                f"mask token: id {token} is an EOS token too: expected one that does not end the "
                "text; name another with --mask-token"
            )
    context, block = config["max_position_embeddings"], metadata.get("sbd.block_size", 1)
    assert isinstance(block, int)
    if block > context:
        raise ConvertError(f"block size: expected at most the context {context}, got {block}")
    sub_block = metadata.get("sbd.sub_block_size", block)
    assert isinstance(sub_block, int)
    if block % sub_block:
        raise ConvertError(
            f"--set sub_block_size: expected a divisor of the block size {block}, got {sub_block}"
        )
    sections = metadata.get("sbd.dmtd.layers")
    if isinstance(sections, list):
        layers = config["num_hidden_layers"]
        if sum(map(int, sections)) != layers or 0 in sections[1:]:
            raise ConvertError(
                f"--set dmtd.layers: expected encoding, thinking and decoding layers with a sum of "
                f"{layers}, at least one in each of the latter two, got {sections}"
            )
    decoders = metadata["sbd.decoders"]
    assert isinstance(decoders, list)
    for decoder in decoders:
        for key in DECODERS[str(decoder)].needs:
            if f"sbd.{key}" not in metadata:
                raise ConvertError(f"--set decoders: {decoder} needs {WAYS[key]}")


def _checked_token(token: Any, config: dict[str, Any], what: str) -> int:
    size = config["vocab_size"]
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < size:
        raise ConvertError(f"{what}: expected an id from 0 to {size - 1}, got {token!r}")
    return token
