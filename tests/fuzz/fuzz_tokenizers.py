"""Tokenizers that a model file may hold: loading one, and all that is done with it."""

from __future__ import annotations

import base64
import json
import struct
import sys
from random import Random
from typing import Any

from json_mutations import copied, mutated
from rounds import fuzz

from sbd_engine import SbdError
from sbd_engine.detokenizer import Detokenizer
from sbd_engine.session import _stop_strings
from sbd_engine.tokenizer import Tokenizer

LETTERS = [*"abcdefgh", "Ġ", "Ċ", "▁", "é", "<", "|", ">"]
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def added(id_: int, content: str, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id_, "content": content, "special": special, **flags}


def sequence(kind: str, *parts: Any) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(parts)}


def replace(text: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": by}


VOCABULARY = {letter: i for i, letter in enumerate(LETTERS)} | {"ab": 15, "abc": 16}
BPE = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
    "vocab": VOCABULARY,
    "merges": [["a", "b"], ["ab", "c"]],
}
SPLIT = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": False,
}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
    "pair": [],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [17], "tokens": ["<s>"]}},
}
TEMPLATE["single"][1]["Sequence"]["type_id"] = 0  # type: ignore[index]
UNITS = [0] * 256  # of a map's trie: "a" has a leaf, which is unit 200
UNITS[97], UNITS[200] = ord("a") | 0x100 | (97 ^ 200) << 10, 1 << 31
CHARSMAP = base64.b64encode(struct.pack("<257I", 1024, *UNITS) + b"ab\0").decode()

TOKENIZERS: list[dict[str, Any]] = [
    {
        "version": "1.0",
        "added_tokens": [added(17, "<s>"), added(18, "<|end|>", False)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": sequence("pretokenizers", SPLIT),
        "post_processor": TEMPLATE,
        "decoder": BYTE_LEVEL,
        "model": BPE,
    },
    {
        "version": "1.0",
        "added_tokens": [added(0, "<unk>")],
        "normalizer": sequence(
            "normalizers", {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁")
        ),
        "decoder": sequence(
            "decoders",
            replace("▁", " "),
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ),
        "model": BPE | {"byte_fallback": True, "fuse_unk": True, "unk_token": "a"},
    },
    {
        "version": "1.0",
        "added_tokens": [added(3, "<s>")],
        "pre_tokenizer": METASPACE,
        "normalizer": sequence(
            "normalizers", {"type": "NFKC"}, {"type": "Strip", "strip_left": True}
        ),
        "decoder": METASPACE,
        "model": {
            "type": "Unigram",
            "unk_id": 0,
            "byte_fallback": False,
            "vocab": [["<unk>", 0.0], ["a", -1.0], ["ab", -1.5], ["▁", -2.0]],
        },
    },
    {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "BertNormalizer"},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece"},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"[UNK]": 0, "a": 1, "##b": 2},
        },
    },
    {
        "version": "1.0",
        "added_tokens": [added(1, "b")],
        "pre_tokenizer": SPLIT,
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP},
        "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
    },
]
# Steps to put in: the library knows these too.
STEPS: list[dict[str, Any]] = [
    *({"type": kind} for kind in ("NFD", "NFKD", "Nmt", "Lowercase", "StripAccents", "Replace")),
    *({"type": kind} for kind in ("Whitespace", "WhitespaceSplit", "Fuse", "ByteFallback", "BPE")),
    {"type": "Digits", "individual_digits": True},
    {"type": "Punctuation", "behavior": "Contiguous"},
    {"type": "CharDelimiterSplit", "delimiter": "a"},
    {"type": "UnicodeScripts"},
    {"type": "FixedLength", "length": 2},
    {"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": True},
    {"type": "RobertaProcessing", "sep": ["a", 0], "cls": ["b", 1], "trim_offsets": True},
    {"type": "BertProcessing", "sep": ["a", 0], "cls": ["b", 1]},
    replace("a", "aaaaaaaaaa"),
    {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "bb"},
]
GGML: list[dict[str, Any]] = [
    {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*VOCABULARY, "<s>"],
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.ggml.token_type": [1] * 17 + [3],
        "tokenizer.ggml.bos_token_id": 17,
        "tokenizer.ggml.add_bos_token": True,
    },
    {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "<0x0A>", "▁", "a", "b", "ab", "▁ab"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0],
        "tokenizer.ggml.token_type": [2, 3, 6, 1, 1, 1, 1, 1],
        "tokenizer.ggml.add_space_prefix": True,
    },
]
TEXTS = (
    *("", "a", "abc ab", "  a  b\n\n", "é🙂\u0301\ufb03 ①", "<s>a<|end|>", "<unk>\0\x1b[2J"),
    *(" " * 3000, "a" * 3000, "ab\n" * 500, "\u202e\u2028\ud7ff", "d'll 123 don't"),
)


def metadata(random: Random) -> dict[str, Any]:
    times = random.choice((1, 1, 2, 3, 6))
    if random.random() < 0.2:
        changed: dict[str, Any] = mutated(random, random.choice(GGML), GGML, times)
        return changed
    whole = copied(random.choice(TOKENIZERS))
    if random.random() < 0.4:
        part = random.choice(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
        whole[part] = copied(random.choice(STEPS))
        if random.random() < 0.3:
            kind = {"pre_tokenizer": "pretokenizers", "post_processor": "processors"}
            steps = [copied(random.choice(STEPS)) for _ in range(random.randrange(12))]
            whole[part] = sequence(kind.get(part, f"{part}s"), *steps)
    whole = mutated(random, whole, [*TOKENIZERS, *STEPS], times)
    text = json.dumps(whole)
    if random.random() < 0.05:
        at = random.randrange(len(text))
        text = text[:at] + random.choice(("", "[" * 5000, "9" * 5000, "\\ud800", "{")) + text[at:]
    return {
        "tokenizer.huggingface.json": text,
        "tokenizer.ggml.bos_token_id": random.choice((0, 17, 99)),
    }


def one(random: Random) -> None:
    tokenizer = Tokenizer(metadata(random), [1])
    for text in random.sample(TEXTS, 3):
        ids = tokenizer.encode(text, fits=random.choice((None, 10, 4000)))
        if len(ids) > 300 * (len(text) + 1):
            raise AssertionError(f"{len(ids)} tokens of {len(text)} characters")
        tokenizer.decode(ids[:50])
    ids = [random.randrange(20) for _ in range(12)] + [random.choice((0, 2**31 - 1))]
    tokenizer.decode(ids, skip_special_tokens=False)
    tokenizer.piece(random.randrange(20))
    stops = _stop_strings(["ab", "<s>"], tokenizer)
    detokenizer = Detokenizer(tokenizer, ids[:4])
    text = "".join(stops.feed(detokenizer.feed(id_)) for id_ in ids)
    if len(text + detokenizer.flush()) > 100_000:
        raise AssertionError(f"{len(text)} characters of {len(ids)} tokens")


if __name__ == "__main__":
    sys.exit(fuzz(one, (SbdError,)))
