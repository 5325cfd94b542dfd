"""The checkpoint's tokenizer: kept as it is, and again in GGUF's keys for other programs."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as HfTokenizer

from .chat import chat_metadata, chat_templates
from .checkpoint import Checkpoint, read_text
from .errors import ConvertError, listed
from .sentencepiece_json import SPACE, tokenizer_json
from .values import Value

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# llama.cpp has the splitting of byte-level BPE in code, under these names.
PRE_TOKENIZERS = {WORDS + "{1,3}" + REST: "llama-bpe", WORDS + REST: "qwen2"}


@dataclass
class Tokenizer:
    json_text: str
    hf: HfTokenizer
    config: dict[str, Any]  # tokenizer_config.json
    chat_templates: dict[str, str]  # by name; "default" is the one
    ids: dict[str, int]

    def special_token(self, kind: str) -> str | None:
        """The token that tokenizer_config.json calls `kind`: bos, eos, mask, ..."""
        token = self.config.get(f"{kind}_token")
        content = token.get("content") if isinstance(token, dict) else token
        return content if isinstance(content, str) else None

    def special_id(self, kind: str) -> int | None:
        return self.ids.get(self.special_token(kind) or "")

    def near(self, name: str) -> str:
        """What a mistyped token may have meant, as the end of an error message."""
        added = [token.content for token in self.hf.get_added_tokens_decoder().values()]
        near = difflib.get_close_matches(name, added, n=3, cutoff=0.4)
        near += [t for t in self.ids if "mask" in t.lower() and t not in near]
        return f"; did you mean {listed(near)}?" if near else ""


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    config = checkpoint.json("special_tokens_map.json") | checkpoint.json("tokenizer_config.json")
    folder = checkpoint.folder
    if (folder / "tokenizer.json").is_file():
        text = read_text(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        built = tokenizer_json(
            folder / "tokenizer.model",
            _added_tokens(checkpoint, config),
            add_bos=config.get("add_bos_token") is not False,
            add_eos=config.get("add_eos_token") is True,
        )
        text = json.dumps(built, ensure_ascii=False)
    else:
        raise ConvertError(
            f"{folder}: no tokenizer: expected tokenizer.json or a sentencepiece tokenizer.model; "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes the first"
        )
    try:
        hf = HfTokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ConvertError(f"{folder / 'tokenizer.json'}: {error}") from None
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
    values["tokenizer.ggml.add_bos_token"] = add_bos = whole[:1] != plain[:1]
    values["tokenizer.ggml.add_eos_token"] = whole[-1:] != plain[-1:]
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
    steps = _steps(parsed.get("pre_tokenizer"))
    if model["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in steps):
        pre = _pre_tokenizer(steps)
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
        spaces = _steps(parsed.get("normalizer")) + steps
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


def _steps(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A tokenizer component's steps, taken out of its sequences."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    inner = component.get("pretokenizers") or component.get("normalizers") or []
    return [step for part in inner for step in _steps(part)]


def _pre_tokenizer(steps: list[dict[str, Any]]) -> str | None:
    if len(steps) == 2 and steps[0]["type"] == "Split":
        return PRE_TOKENIZERS.get(steps[0].get("pattern", {}).get("Regex"))
    if len(steps) == 1 and steps[0].get("use_regex", True) and not steps[0]["add_prefix_space"]:
        return "gpt-2"
    return None


def _added_tokens(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[int, tuple[str, bool]]:
    """Tokens beside the sentencepiece model's and whether they are special, by id.

    Transformers wrote them in two ways; only the newer one says what is special.
    """
    tokens = {i: (token, True) for token, i in checkpoint.json("added_tokens.json").items()}
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        tokens[int(i)] = token["content"], token.get("special", True)
    return tokens
