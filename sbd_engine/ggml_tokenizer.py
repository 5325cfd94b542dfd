"""A tokenizer from GGUF's own keys, `tokenizer.ggml.*`, for model files from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .convert.guarded import check_added
from .convert.spm_merges import merges_by_score
from .errors import SbdValueError, brief

# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6

_GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"  # words, numbers, symbols
    r"|\s+(?!\S)|\s+"  # the last space goes to the word behind it
)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS, _SPACE = r"| ?[^\s\p{L}\p{N}]+[\r\n]*", r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + _LETTERS + r"|\p{N}{1,3}" + _SYMBOLS + _SPACE
_QWEN2 = _CONTRACTIONS + _LETTERS + r"|\p{N}" + _SYMBOLS + _SPACE
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACE
)


@dataclass(frozen=True)
class _Cut:
    """How text is cut before byte pairs are merged: each pattern cuts the pieces of the one before
    it."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a word that is one token is taken, whatever its merges would give
    bos: bool = False  # in front of a text where the file does not say
    nfc: bool = False


_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
# tokenizer.ggml.pre: llama.cpp's names, and what it does for each.
_PRE_TOKENIZERS = {
    "default": _Cut((_PUNCTUATION, _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "gigachat", "mellum"),
        _Cut((_GPT2,)),
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        _Cut((r"\p{N}", _GPT2)),
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        _Cut((_LLAMA3,), whole_words=True, bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _Cut((_LLAMA3,))),
    "qwen2": _Cut((_QWEN2,), nfc=True),
    **dict.fromkeys(
        ("deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "kormo", "f2llmv2"), _Cut((_QWEN2,))
    ),
    "tekken": _Cut((_TEKKEN,), whole_words=True, bos=True),
}


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether BOS stands in front of a text where `tokenizer.ggml.add_bos_token` is absent."""
    if metadata.get("tokenizer.ggml.model") == "llama":
        return True
    cut = _PRE_TOKENIZERS.get(str(metadata.get("tokenizer.ggml.pre")))
    return cut is not None and cut.bos


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
        raise SbdValueError(f"tokenizer.ggml.model: expected gpt2 or llama, got {brief(kind)}")
    tokens = _strings(metadata, "tokenizer.ggml.tokens")
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise SbdValueError(
            f"tokenizer.ggml.token_type: expected {len(tokens)} types, one per token, "
            f"got {len(types) if isinstance(types, list) else brief(types)}"
        )
    added = [
        AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
        for token, kind in zip(tokens, types, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
    try:
        check_added(token.content for token in added)
    except ValueError as error:
        raise SbdValueError(f"tokenizer.ggml.token_type: {error}") from None
    tokenizer = build(metadata, tokens, types)
    tokenizer.add_tokens(added)
    return tokenizer


def _byte_level_bpe(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> Tokenizer:
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    if pre not in _PRE_TOKENIZERS:
        raise SbdValueError(
            f"tokenizer.ggml.pre: expected one of {', '.join(_PRE_TOKENIZERS)}, got {brief(pre)}: "
            "give the prompt as token ids"
        )
    cut = _PRE_TOKENIZERS[pre]
    merges = [_merge(text) for text in _strings(metadata, "tokenizer.ggml.merges")]
    tokenizer = _bpe(tokens, merges, ignore_merges=cut.whole_words)
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(p), behavior="isolated") for p in cut.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(
    metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise SbdValueError(
            f"tokenizer.ggml.scores: expected {len(tokens)} scores, one per token, "
            f"got {len(scores) if isinstance(scores, list) else brief(scores)}"
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
    # These are never the result of a merge; an unused token may be a step towards a longer one.
    unmerged = (_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE)
    kinds = enumerate(zip(tokens, types, strict=True))
    ordinary = {token: index for index, (token, kind) in kinds if kind not in unmerged}
    try:
        return merges_by_score(ordinary, scores)
    except ValueError as error:
        raise SbdValueError(f"tokenizer.ggml.tokens: {error}") from None


def _merge(text: str) -> tuple[str, str]:
    left, space, right = text.partition(" ")
    if not (left and space and right):
        raise SbdValueError(f"tokenizer.ggml.merges: expected two tokens, got {brief(text)}")
    return left, right


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise SbdValueError(f"{key}: expected a list of strings, got {type(values).__name__}")
    return values
