"""The checkpoint's tokenizer: kept as it is, and again in GGUF's keys for other programs."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from .added_tokens import add_tokens, content, left_out_warning, named_tokens, tokenizer_config
from .byte_level import (
    MERGES,
    REST,
    SPECIAL_TOKENS,
    VOCABULARY,
    WORDS,
    byte_level_tokenizer,
    pipeline_of,
    surrounding,
)
from .chat import chat_metadata, chat_templates
from .checkpoint import Checkpoint, read_text
from .errors import ConvertError, listed
from .families import family_of
from .guarded import GuardedTokenizer, steps
from .sentencepiece_json import SPACE, tokenizer_json
from .values import Value

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# llama.cpp has the splitting of byte-level BPE in code, under these names.
PRE_TOKENIZERS = {WORDS + "{1,3}" + REST: "llama-bpe", WORDS + REST: "qwen2"}
# Who trains a model to take turns names their end so.
TURN_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<turn|>"),
    *("<end_of_utterance>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "[EOT]", "</s>"),
)


@dataclass
class Tokenizer:
    json_text: str
    hf: GuardedTokenizer
    config: dict[str, Any]  # tokenizer_config.json
    chat_templates: dict[str, str]  # by name; "default" is the one
    ids: dict[str, int]

    def special_token(self, kind: str) -> str | None:
        """The token that tokenizer_config.json calls `kind`: bos, eos, mask, ..."""
        return content(self.config.get(f"{kind}_token")) or None

    def special_id(self, kind: str) -> int | None:
        return self.ids.get(self.special_token(kind) or "")

    def turn_ends(self) -> list[int]:
        """Tokens that end a turn, as the chat templates write it."""
        written = [
            name
            for name in TURN_ENDS
            if any(name in template for template in self.chat_templates.values())
        ]
        return [self.ids[name] for name in written if name in self.ids]

    def near(self, name: str) -> str:
        """What a mistyped token may have meant, as the end of an error message."""
        added = [token.content for token in self.hf.get_added_tokens_decoder().values()]
        near = difflib.get_close_matches(name, added, n=3, cutoff=0.4)
        near += [t for t in self.ids if "mask" in t.lower() and t not in near]
        return f"; did you mean {listed(near)}?" if near else ""


def load_tokenizer(checkpoint: Checkpoint, warn: Callable[[str], None]) -> Tokenizer:
    """The folder's tokenizer.json, or what means the same of an older form, and with it the tokens
    that the other files name."""
    folder, config = checkpoint.folder, tokenizer_config(checkpoint)
    text: str | None = None
    pipeline: str | None = None
    sentencepiece = False
    if (folder / "tokenizer.json").is_file():
        text = read_text(folder / "tokenizer.json")
        hf = GuardedTokenizer.from_json(text, str(folder / "tokenizer.json"), ConvertError)
    elif (folder / "tokenizer.model").is_file():
        sentencepiece = True
        built = tokenizer_json(
            folder / "tokenizer.model",
            add_bos=config.get("add_bos_token") is not False,
            add_eos=config.get("add_eos_token") is True,
        )
        text = json.dumps(built, ensure_ascii=False)
        hf = GuardedTokenizer.from_json(text, str(folder / "tokenizer.model"), ConvertError)
    elif (folder / VOCABULARY).is_file() and (folder / MERGES).is_file():
        pipeline = pipeline_of(folder, config, family_of(checkpoint.config).architecture)
        config = SPECIAL_TOKENS[pipeline] | config
        hf = GuardedTokenizer(
            partial(byte_level_tokenizer, folder, config, pipeline),
            f"{folder}: {VOCABULARY} and {MERGES}",
            ConvertError,
        )
    else:
        raise ConvertError(
            f"{folder}: no tokenizer: expected tokenizer.json, a sentencepiece tokenizer.model, or "
            f"{VOCABULARY} with {MERGES}"
        )
    vocab_size = checkpoint.config["vocab_size"]
    named = named_tokens(checkpoint, config, raw=sentencepiece)
    changed, left_out = add_tokens(hf, named, vocab_size)
    if left_out:
        warn(left_out_warning(left_out, vocab_size))
    if pipeline is not None:
        hf.set_post_processor(surrounding(hf, config))
    if changed or text is None:
        text = str(hf.to_str())
    return Tokenizer(text, hf, config, chat_templates(checkpoint), hf.get_vocab())


def tokenizer_metadata(
    tokenizer: Tokenizer, vocab_size: int, warn: Callable[[str], None]
) -> dict[str, Value]:
    """All `tokenizer.*` keys that do not depend on the model's configuration."""
    parsed = json.loads(tokenizer.json_text)
    model = parsed["model"]
    types = dict.fromkeys(tokenizer.ids.values(), NORMAL)
    unknown = tokenizer.ids.get(model.get("unk_token") or "", model.get("unk_id"))
    if unknown is not None:
        types[unknown] = UNKNOWN
    if model.get("byte_fallback"):
        types |= {i: BYTE for token, i in tokenizer.ids.items() if BYTE_TOKEN.fullmatch(token)}
    for i, token in tokenizer.hf.get_added_tokens_decoder().items():
        if types.get(i) != UNKNOWN:
            types[i] = CONTROL if token.special else USER_DEFINED

    beyond = sorted(i for i in types if i >= vocab_size)
    if beyond:
        warn(
            f"the tokenizer has {len(beyond)} tokens beyond the model's vocabulary of {vocab_size}"
            f" (ids {beyond[0]} to {beyond[-1]}): they cannot be used"
        )
    names = {i: token for token, i in tokenizer.ids.items()}
    values: dict[str, Value] = {
        "tokenizer.huggingface.json": tokenizer.json_text,
        "tokenizer.ggml.tokens": [names.get(i, f"[PAD{i}]") for i in range(vocab_size)],
        "tokenizer.ggml.token_type": [types.get(i, UNUSED) for i in range(vocab_size)],
    }
    values |= _ggml_model(parsed, tokenizer, vocab_size, warn)

    # What the tokenizer does counts, not what its configuration says of it.
    plain = tokenizer.hf.encode("a", add_special_tokens=False).ids
    whole = tokenizer.hf.encode("a").ids
    add_bos, add_eos = whole[:1] != plain[:1], whole[-1:] != plain[-1:]
    for key, does in ("add_bos_token", add_bos), ("add_eos_token", add_eos):
        values[f"tokenizer.ggml.{key}"] = does
        if tokenizer.config.get(key) not in (None, does):
            warn(
                f"tokenizer_config.json says {key} {str(not does).lower()}, but the tokenizer adds "
                f"{'one' if does else 'none'}: what it does counts"
            )
    bos = whole[0] if add_bos else tokenizer.special_id("bos")
    special = {"bos": bos, "unknown": tokenizer.special_id("unk")}
    special["padding"] = tokenizer.special_id("pad")
    for key, id_ in special.items():
        if id_ is not None and id_ < vocab_size:
            values[f"tokenizer.ggml.{key}_token_id"] = id_
    return values | chat_metadata(tokenizer.chat_templates, tokenizer.config)


def _ggml_model(
    parsed: dict[str, Any], tokenizer: Tokenizer, vocab_size: int, warn: Callable[[str], None]
) -> dict[str, Value]:
    model = parsed["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []]
    cuts = [*steps(parsed.get("pre_tokenizer"))]
    if model["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in cuts):
        pre = _pre_tokenizer(cuts)
        if pre is None:
            warn(
                "llama.cpp may split text in other tokens: it has no name for this tokenizer's "
                "pre_tokenizer (this engine uses tokenizer.json itself)"
            )
        values: dict[str, Value] = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre or "default",
        }
        return values | ({"tokenizer.ggml.merges": merges} if merges else {})
    if model["type"] == "BPE" and model.get("byte_fallback"):
        # Sentencepiece's rule joins the pair whose union scores best: minus the merge's rank.
        rank: dict[str, int] = {}
        for i, merge in enumerate(merges):
            rank.setdefault(merge.replace(" ", ""), i)
        names = {i: token for token, i in tokenizer.ids.items()}
        spaces = [*steps(parsed.get("normalizer")), *cuts]
        return {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.scores": [
                -float(rank.get(names.get(i, ""), len(rank))) for i in range(vocab_size)
            ],
            "tokenizer.ggml.add_space_prefix": any(
                step.get("prepend") == SPACE
                or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
                for step in spaces
            ),
        }
    warn(
        f"llama.cpp will open the file without a tokenizer: GGUF has no keys for this "
        f"{model['type']} one (this engine uses tokenizer.json itself)"
    )
    return {"tokenizer.ggml.model": "none"}


def _pre_tokenizer(cuts: list[dict[str, Any]]) -> str | None:
    if len(cuts) == 2 and cuts[0]["type"] == "Split":
        return PRE_TOKENIZERS.get(cuts[0].get("pattern", {}).get("Regex"))
    name = "gpt-2"
    if cuts[0] == {"type": "Digits", "individual_digits": True}:
        name, cuts = "smollm", cuts[1:]
    if len(cuts) == 1 and cuts[0].get("use_regex", True) and not cuts[0]["add_prefix_space"]:
        return name
    return None
