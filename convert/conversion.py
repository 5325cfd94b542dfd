"""A checkpoint to a model file: opens the parts, checks that they agree, and writes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_VERSION
from gguf import GGMLQuantizationType as WeightType
from numpy.typing import NDArray

from .architectures import (
    TensorSpec,
    interleave_rotary,
    model_metadata,
    rope_freqs,
    tensor_specs,
)
from .checkpoint import Checkpoint, StoredTensor, open_checkpoint
from .draft import draft_metadata, draft_path, draft_tensors
from .errors import ConvertError, listed
from .families import family_of, hf_config
from .importance import load_importance
from .lora import LoraAdapter, LowRank, load_lora
from .mixes import mix_of, types_of
from .quantize import encode, row_ranges
from .settings import check_decoding, decoding_settings, end_tokens
from .tokenizer import load_tokenizer, tokenizer_metadata
from .values import Config
from .writer import OutputFile, OutputTensor, check_output, write_files

StrPath = str | PathLike[str]
# Architectures of which llama.cpp's diffusion tool asks whether their logits are shifted.
SHIFT_LOGITS = ("llada", "dream")
# Architectures in which llama.cpp knows divisors of RoPE's frequencies.
ROPE_DIVISORS = ("llama", "mistral3")
# Buffers that old checkpoints store though they follow from the configuration.
IGNORED = (".rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Conversion:
    """What was written, for the user to read."""

    output: Path
    n_bytes: int
    n_tensors: int
    type: str
    decoders: list[str]
    draft: Path | None = None  # the draft adapter's file


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def convert(
    sources: StrPath | Sequence[StrPath],
    output: StrPath,
    *,
    type: str = "q8_0",
    mask_token: str | int | None = None,
    block_size: int | None = None,
    gamma: float | None = None,
    lora: StrPath | None = None,
    draft_lora: StrPath | None = None,
    importance: StrPath | None = None,
    settings: Sequence[str] = (),
    warn: Callable[[str], None] = _warn,
    on_start: Callable[[int], None] = lambda _: None,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Conversion:
    """Convert a Hugging Face checkpoint into one model file; the options are those of the CLI.

    `on_start` hears the number of bytes of all tensors, `on_bytes` of each piece written.
    Raises ConvertError, or OSError where a file cannot be written; then neither `output` nor the
    draft adapter's file beside it is touched.
    """
    mix = mix_of(type)
    output = Path(output)
    if isinstance(sources, (str, PathLike)):
        sources = [sources]
    checkpoint = open_checkpoint([Path(source) for source in sources])
    family, config = family_of(checkpoint.config), hf_config(checkpoint.config)
    checkpoint = replace(checkpoint, config=config)
    metadata = model_metadata(config)
    specs, stored = _match(checkpoint, warn)
    shapes = {spec.source: spec.shape for spec in specs}
    head, embedding = _head_and_embedding(config)
    shapes.setdefault(head, shapes[embedding])
    adapter = LoraAdapter({}, {}) if lora is None else load_lora(Path(lora), shapes)
    specs, stored = _adapted(config, specs, stored, adapter, warn)
    _check_shapes(specs, stored)
    draft_output = None if draft_lora is None else draft_path(output)
    for path in filter(None, (output, draft_output)):
        _check_output(path, checkpoint, [Path(folder) for folder in (lora, draft_lora) if folder])

    metadata["general.type"] = "model"
    metadata["general.name"] = checkpoint.folder.resolve().name
    metadata["general.file_type"] = int(mix.file_type)
    metadata["general.quantization_version"] = GGML_QUANT_VERSION
    tokenizer = load_tokenizer(checkpoint, warn)
    vocab_size = config["vocab_size"]
    metadata |= tokenizer_metadata(tokenizer, vocab_size, warn)
    metadata |= end_tokens(checkpoint, tokenizer, warn)
    published = family.decoding | (family.lora_decoding if lora is not None else {})
    metadata |= decoding_settings(
        checkpoint, published, tokenizer, mask_token, block_size, gamma, settings
    )
    check_decoding(metadata, config)
    if family.architecture in SHIFT_LOGITS:
        metadata["diffusion.shift_logits"] = bool(metadata.get("sbd.logit_shift", 0))
    for note in filter(None, (family.note, family.lora_note if lora is not None else "")):
        warn(note)

    by_name = {spec.name: spec.shape for spec in specs}
    types = types_of(by_name, mix, warn)
    file = None if importance is None else Path(importance)
    counts = load_importance(file, by_name, mix, type)
    metadata.update(counts.keys)
    tensors = [
        _output_tensor(
            spec,
            stored[spec.source],
            adapter.changes.get(spec.source),
            types[spec.name],
            counts.columns.get(spec.name),
        )
        for spec in specs
    ]
    divisors = rope_freqs(config)
    if divisors is not None:
        if family.architecture not in ROPE_DIVISORS:
            warn(f"llama.cpp will not open the file: it scales no {family.architecture} as llama3")
        piece = partial(encode, divisors, WeightType.F32, "rope_freqs.weight")
        tensors.append(OutputTensor("rope_freqs.weight", divisors.shape, WeightType.F32, [piece]))
    names = metadata["sbd.decoders"]
    assert isinstance(names, list)
    decoders = [str(name) for name in names]
    files = [OutputFile(output, metadata, tensors)]
    if draft_lora is not None and draft_output is not None:
        draft = load_lora(Path(draft_lora), shapes)
        values = draft_metadata(draft, family.architecture, decoders)
        files.append(OutputFile(draft_output, values, [*draft_tensors(draft, specs, mix.usual)]))
    on_start(sum(file.nbytes for file in files))
    write_files(files, on_bytes)
    return Conversion(
        output,
        output.stat().st_size,
        len(tensors),
        type,
        decoders,
        draft_output,
    )


def _match(
    checkpoint: Checkpoint, warn: Callable[[str], None]
) -> tuple[list[TensorSpec], dict[str, StoredTensor]]:
    """The tensors to write, and the checkpoint's: each side must have all of the other."""
    stored = {
        name: tensor for name, tensor in checkpoint.tensors.items() if not name.endswith(IGNORED)
    }
    tied = bool(checkpoint.config.get("tie_word_embeddings", False))
    head, embedding = _head_and_embedding(checkpoint.config)
    if tied and head in stored and embedding in stored:
        if _equal(stored[head], stored[embedding]):
            del stored[head]
        else:
            tied = False
            warn(f"tie_word_embeddings is true, but {head} differs from {embedding}: both are kept")
    specs = tensor_specs(checkpoint.config, tied=tied)
    sources = [spec.source for spec in specs]
    missing = [name for name in sources if name not in stored]
    if missing:
        raise ConvertError(
            f"{checkpoint.folder}: {len(missing)} tensors of a {checkpoint.config['model_type']} "
            f"model are missing: {listed(missing)}"
        )
    unmapped = sorted(stored.keys() - set(sources))
    if unmapped:
        raise ConvertError(
            f"{checkpoint.folder}: {len(unmapped)} tensors are none of a "
            f"{checkpoint.config['model_type']} model: {listed(unmapped)}"
        )
    return specs, stored


def _head_and_embedding(config: Config) -> tuple[str, str]:
    """Their names in the checkpoint; of tied ones the second alone is there."""
    names = family_of(config).names
    return f"{names.head}.weight", f"{names.embedding}.weight"


def _adapted(
    config: Config,
    specs: list[TensorSpec],
    stored: dict[str, StoredTensor],
    adapter: LoraAdapter,
    warn: Callable[[str], None],
) -> tuple[list[TensorSpec], dict[str, StoredTensor]]:
    """The tensors to write and the stored ones under them, with an adapter's whole weights.

    What PEFT does to one side of tied embeddings leaves the other as it was, unless the adapter
    ties them itself: the file then has both.
    """
    head, embedding = _head_and_embedding(config)
    touched = {*adapter.changes, *adapter.replacements}
    tied = head not in stored
    if not tied or not touched & {head, embedding}:
        return specs, stored | adapter.replacements
    if adapter.ties_embeddings and head not in touched:
        return specs, stored | adapter.replacements
    stored = stored | {head: stored[embedding]} | adapter.replacements
    changes = adapter.changes
    if _equal(stored[head], stored[embedding], changes.get(head), changes.get(embedding)):
        return specs, stored
    warn(f"the adapter unties the embeddings: {head} and {embedding} differ, and both are kept")
    return tensor_specs(config, tied=False), stored


def _equal(
    a: StoredTensor, b: StoredTensor, to_a: LowRank | None = None, to_b: LowRank | None = None
) -> bool:
    """Whether two weights are the same, each with its change."""
    return a.shape == b.shape and all(
        np.array_equal(_rows(a, to_a, start, stop), _rows(b, to_b, start, stop))
        for start, stop in row_ranges(a.shape)
    )


def _rows(
    stored: StoredTensor, change: LowRank | None, start: int, stop: int
) -> NDArray[np.float32]:
    rows = stored.rows(start, stop)
    return rows if change is None else rows + change.rows(start, stop)


def _check_shapes(specs: list[TensorSpec], stored: dict[str, StoredTensor]) -> None:
    wrong = [
        f"{spec.source}: expected {list(spec.shape)}, got {list(stored[spec.source].shape)}"
        for spec in specs
        if stored[spec.source].shape != spec.shape
    ]
    if wrong:
        raise ConvertError(
            f"{len(wrong)} tensors have not the shape that config.json says: {listed(wrong, 2)}"
        )


def _check_output(output: Path, checkpoint: Checkpoint, adapters: Sequence[Path]) -> None:
    what = "a file of the checkpoint itself"
    check_output(output, checkpoint.files, what)
    folders = (checkpoint.folder, *adapters)
    if output.exists() and any(output.parent.samefile(folder) for folder in folders):
        with output.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise ConvertError(f"{output}: is {what}")


def _output_tensor(
    spec: TensorSpec,
    stored: StoredTensor,
    change: LowRank | None,
    dtype: WeightType,
    columns: NDArray[np.float32] | None,
) -> OutputTensor:
    def piece(start: int, stop: int) -> NDArray[np.generic]:
        rows = _rows(stored, change, start, stop)
        if spec.rotary_head_dim:
            rows = interleave_rotary(rows, spec.rotary_head_dim)
        return encode(rows, dtype, spec.source, columns)

    ranges = row_ranges(spec.shape, spec.rotary_head_dim or 1)
    pieces = [partial(piece, start, stop) for start, stop in ranges]
    return OutputTensor(spec.name, spec.shape, dtype, pieces)
