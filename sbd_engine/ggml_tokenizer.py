"""A tokenizer from GGUF's own keys, `tokenizer.ggml.*`, for model files from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .errors import SbdValueError

# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS_AND_SPACE = (
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # symbols, line ends, spaces
)
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"

# tokenizer.ggml.pre: how text is cut before byte pairs are merged. None: GPT-2's own pattern.
_PRE_TOKENIZERS: dict[str, str | None] = {
    "default": None,
    "gpt-2": None,
    "llama-bpe": _CONTRACTIONS + _LETTERS + r"|\p{N}{1,3}" + _WORDS_AND_SPACE,
    "qwen2": _CONTRACTIONS + _LETTERS + r"|\p{N}" + _WORDS_AND_SPACE,
}


def tokenizer_from_ggml(metadata: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE ("gpt2") and SentencePiece ("llama"). Raises SbdValueError for anything else,
    naming the key."""
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        raise SbdValueError(
            "this model file has no tokenizer (tokenizer.huggingface.json or "
            "tokenizer.ggml.model): give the prompt as token ids"
        )
    build = {"gpt2": _byte_level_bpe, "llama": _sentencepiece}.get(str(kind))
    if build is None:
        raise SbdValueError(f"tokenizer.ggml.model: expected gpt2 or llama, got {kind!r}")
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise SbdValueError(
            f"tokenizer.ggml.token_type: expected {len(tokens)} types, one per token, "
            f"got {len(types) if isinstance(types, list) else types!r}"
        )
    tokenizer = build(metadata, tokens, types)
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_UNKNOWN, _CONTROL)
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=False, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _USER_DEFINED
        ]
    )
    return tokenizer


def _byte_level_bpe(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> Tokenizer:
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    if pre not in _PRE_TOKENIZERS:
        raise SbdValueError(
            f"tokenizer.ggml.pre: expected one of {', '.join(_PRE_TOKENIZERS)}, got {pre!r}: "
            "give the prompt as token ids"
        )
    pattern = _PRE_TOKENIZERS[pre]
    merges = [_merge(text) for text in _strings(metadata, "tokenizer.ggml.merges")]
    # Llama 3 takes a word that is one token as it is, whatever its merges would give.
    tokenizer = _bpe(tokens, merges, ignore_merges=pre == "llama-bpe")
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    if pattern is None:
        tokenizer.pre_tokenizer = byte_level
    else:
        cut = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise SbdValueError(
            f"tokenizer.ggml.scores: expected {len(tokens)} scores, one per token, "
            f"got {len(scores) if isinstance(scores, list) else scores!r}"
        )
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    tokenizer = _bpe(
        tokens,
        _merges_by_score(tokens, types, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    add_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "\u2581")]
    decoding: list[decoders.Decoder] = [
        decoders.Replace("\u2581", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if add_space:
        steps.insert(0, normalizers.Prepend("\u2581"))
        decoding.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _bpe(tokens: Sequence[str], merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    try:
        return Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    except Exception as error:  # the library raises a bare Exception
        raise SbdValueError(f"tokenizer.ggml.merges: {error}") from None


def _merges_by_score(
    tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union has the best score. As BPE merges: every cut
    of a piece into two pieces, best score first (ties: the piece that comes first)."""
    # These are never the result of a merge; an unused token may be a step towards a longer one.
    unmerged = (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    ordinary = {
        token: index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind not in unmerged
    }
    merges = []
    for token, index in ordinary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ordinary and right in ordinary:
                merges.append((-scores[index], index, ordinary[left], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def _merge(text: str) -> tuple[str, str]:
    left, space, right = text.partition(" ")
    if not (left and space and right):
        raise SbdValueError(f"tokenizer.ggml.merges: expected two tokens, got {text!r}")
    return left, right


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise SbdValueError(f"{key}: expected a list of strings, got {type(values).__name__}")
    return values
