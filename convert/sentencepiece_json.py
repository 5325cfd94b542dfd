"""A sentencepiece model as the `tokenizer.json` that means the same.

Of the protobuf only a handful of settings are read; the pieces come from the library.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from .errors import ConvertError
from .spm_merges import merges_by_score

SPACE = "▁"
UNIGRAM, BPE = 1, 2
# Field numbers of sentencepiece_model.proto.
TRAINER_SPEC, NORMALIZER_SPEC = 2, 3
MODEL_TYPE = 3
CHARSMAP, ADD_DUMMY_PREFIX, REMOVE_EXTRA_WHITESPACES, ESCAPE_WHITESPACES = 2, 3, 4, 5
PIECES, PIECE_TYPE, USER_DEFINED = 1, 3, 4

Json = dict[str, Any]
Field = int | bytes


def tokenizer_json(path: Path, add_bos: bool, add_eos: bool) -> Json:
    try:
        processor = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise ConvertError(f"{path}: not a sentencepiece model: {error}") from None
    proto = _fields(processor.serialized_model_proto())
    trainer = _messages(proto, TRAINER_SPEC)[0]
    normalizer = _messages(proto, NORMALIZER_SPEC)[0]
    count = processor.get_piece_size()
    pieces = [processor.id_to_piece(i) for i in range(count)]
    types = [piece.get(PIECE_TYPE) for piece in _messages(proto, PIECES)]

    special = [i for i in range(count) if processor.is_control(i) or processor.is_unknown(i)]
    own = [i for i in range(count) if types[i] == USER_DEFINED]
    added_tokens = [_added_token(i, pieces[i], i in special) for i in sorted(special + own)]
    try:
        model = _model(processor, pieces, int(trainer.get(MODEL_TYPE, UNIGRAM)), special + own)
    except ValueError as error:
        raise ConvertError(f"{path}: {error}") from None
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": _normalizer(normalizer),
        "pre_tokenizer": None,
        "post_processor": _post_processor(processor, add_bos, add_eos),
        "decoder": _decoder(bool(normalizer.get(ADD_DUMMY_PREFIX, 1))),
        "model": model,
    }


def _model(
    processor: SentencePieceProcessor, pieces: list[str], model_type: int, whole: list[int]
) -> Json:
    scores = [processor.get_score(i) for i in range(len(pieces))]
    bytes_ = [i for i in range(len(pieces)) if processor.is_byte(i)]
    unknown = processor.unk_id()
    if model_type == UNIGRAM:
        return {
            "type": "Unigram",
            "unk_id": unknown,
            "vocab": [list(pair) for pair in zip(pieces, scores, strict=True)],
            "byte_fallback": bool(bytes_),
        }
    if model_type != BPE:
        raise ValueError(f"expected a model of type BPE or unigram, got type {model_type}")
    skipped = {*whole, *bytes_}
    plain = {piece: i for i, piece in enumerate(pieces) if i not in skipped}
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[unknown],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bool(bytes_),
        "ignore_merges": False,
        "vocab": {piece: i for i, piece in enumerate(pieces)},
        "merges": merges_by_score(plain, scores),
    }


def _normalizer(spec: dict[int, Field]) -> Json:
    steps: list[Json] = []
    charsmap = spec.get(CHARSMAP, b"")
    if isinstance(charsmap, bytes) and charsmap:
        encoded = base64.b64encode(charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if spec.get(REMOVE_EXTRA_WHITESPACES, 1):
        steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if spec.get(ADD_DUMMY_PREFIX, 1):
        steps.append({"type": "Prepend", "prepend": SPACE})
    if spec.get(ESCAPE_WHITESPACES, 1):
        steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(strip_prefix: bool) -> Json:
    steps: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if strip_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _post_processor(processor: SentencePieceProcessor, add_bos: bool, add_eos: bool) -> Json | None:
    bos = [processor.bos_id()] if add_bos and processor.bos_id() >= 0 else []
    eos = [processor.eos_id()] if add_eos and processor.eos_id() >= 0 else []
    if not bos + eos:
        return None

    def template(sequences: str) -> list[Json]:
        parts: list[Json] = []
        for type_id, sequence in enumerate(sequences):
            parts += [_special(processor, i, type_id) for i in bos]
            parts += [{"Sequence": {"id": sequence, "type_id": type_id}}]
            parts += [_special(processor, i, type_id) for i in eos]
        return parts

    names = {processor.id_to_piece(i): i for i in bos + eos}
    return {
        "type": "TemplateProcessing",
        "single": template("A"),
        "pair": template("AB"),
        "special_tokens": {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in names.items()},
    }


def _special(processor: SentencePieceProcessor, token: int, type_id: int) -> Json:
    return {"SpecialToken": {"id": processor.id_to_piece(token), "type_id": type_id}}


def _added_token(token: int, content: str, special: bool) -> Json:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": token, "content": content, "special": special, **flags}


def _messages(fields: list[tuple[int, Field]], number: int) -> list[dict[int, Field]]:
    """The sub-messages `number`; an empty one where there is none."""
    found = [dict(_fields(v)) for k, v in fields if k == number and isinstance(v, bytes)]
    return found or [{}]


def _fields(data: bytes) -> list[tuple[int, Field]]:
    """Protobuf's wire format: (field number, value). Fixed-width values stay bytes."""
    fields: list[tuple[int, Field]] = []
    at = 0

    def varint() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        wire = key & 7
        if wire == 0:
            fields.append((key >> 3, varint()))
        else:
            size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
            fields.append((key >> 3, data[at : at + size]))
            at += size
    return fields
