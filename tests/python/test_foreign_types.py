"""Files with types that others write: those that this engine only reads, and those that it cannot
run.

Any bytes with finite scales are a block. Their values are those of the gguf library's dequantizer,
and logits those of the float64 reference on these values. Files of llama.cpp's own quantiser are in
test_foreign_types_llama_cpp.py, a real model's in test_real_model.py.
"""

from __future__ import annotations

import json
import re
import struct
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGUFReader, GGUFValueType, GGUFWriter
from gguf import GGMLQuantizationType as WeightType
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from reference.model import ReferenceModel, causal, with_block

from sbd_engine import Engine
from sbd_engine.cli import main
from sbd_engine.errors import SbdValueError

from .checkpoints import Array, read_model, state_of
from .isas import ISAS

Q4_1, Q4_K, Q6_K, Q8_0 = WeightType.Q4_1, WeightType.Q4_K, WeightType.Q6_K, WeightType.Q8_0
Q5_0, Q5_1, IQ4_NL = WeightType.Q5_0, WeightType.Q5_1, WeightType.IQ4_NL
Q2_K, Q3_K, Q5_K, IQ4_XS = WeightType.Q2_K, WeightType.Q3_K, WeightType.Q5_K, WeightType.IQ4_XS
# Only read. The minimum of one, where there is one, as a multiple of the scale that puts random
# blocks' values around 0; it is added or subtracted, and follows the scale.
FOREIGN: dict[WeightType, float | None] = {
    Q4_1: -7.5,
    Q5_0: None,
    Q5_1: -15.5,
    IQ4_NL: None,
    Q2_K: 1.5,
    Q3_K: None,
    Q4_K: 7.5,
    Q5_K: 15.5,
    Q6_K: None,
    IQ4_XS: None,
}
SCALE_AT = {Q2_K: 80, Q3_K: 108, Q6_K: 208}  # else a block's first bytes
MIXES = {kind.name.lower(): [kind] for kind in FOREIGN}
MIXES["mixed"] = [Q6_K, Q4_K, Q8_0, Q4_1, WeightType.F32]
MIXES["fallbacks"] = [Q5_0, Q3_K, IQ4_NL, IQ4_XS, Q5_1, Q2_K, Q5_K]
CONFIG: dict[str, Any] = {
    "vocab_size": 71,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}


def with_scales(
    rng: np.random.Generator, kind: WeightType, n: int, scales: Array
) -> NDArray[np.uint8]:
    """Blocks of random bytes, [n, bytes], but for the half precision scales."""
    blocks = rng.integers(0, 256, (n, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    at = SCALE_AT.get(kind, 0)
    blocks[:, at : at + 2] = scales.astype(np.float16).view(np.uint8)
    minimum = FOREIGN[kind]
    if minimum is not None:
        blocks[:, at + 2 : at + 4] = (minimum * scales).astype(np.float16).view(np.uint8)
    return blocks


@cache
def rms_of_unit_blocks(kind: WeightType) -> float:
    blocks = with_scales(np.random.default_rng(2), kind, 200, np.ones((200, 1)))
    return float(np.sqrt(np.mean(np.square(dequantize(blocks, kind)))))


def random_blocks(
    rng: np.random.Generator, kind: WeightType, rows: int, cols: int, rms: float
) -> NDArray[np.uint8]:
    """A matrix of random bytes as a file holds it, its half precision scales apart."""
    n = rows * cols // GGML_QUANT_SIZES[kind][0]
    scales = rms / rms_of_unit_blocks(kind) * rng.uniform(0.5, 1.5, (n, 1))
    scales *= rng.choice([-1, 1], scales.shape)
    return with_scales(rng, kind, n, scales).reshape(rows, -1)


def write_model(path: Path, architecture: str, kinds: list[WeightType], tied: bool = False) -> Path:
    """A model without a tokenizer in CONFIG's shape; its matrices take `kinds` in turn."""
    rng = np.random.default_rng(1)
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(CONFIG["num_hidden_layers"])
    writer.add_context_length(512)
    writer.add_embedding_length(CONFIG["hidden_size"])
    writer.add_feed_forward_length(CONFIG["intermediate_size"])
    writer.add_head_count(CONFIG["num_attention_heads"])
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_key_length(CONFIG["head_dim"])
    writer.add_value_length(CONFIG["head_dim"])
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_vocab_size(CONFIG["vocab_size"])
    n_matrices = 0

    def matrix(name: str, rows: int, cols: int, gain: float = 1.0) -> None:
        nonlocal n_matrices
        kind = kinds[n_matrices % len(kinds)]
        n_matrices += 1
        rms = gain / np.sqrt(cols)
        if kind in FOREIGN:
            data: NDArray[Any] = random_blocks(rng, kind, rows, cols, rms)
        else:
            values = rng.standard_normal((rows, cols)) * rms
            data = quantize(values.astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)

    def norm(name: str, size: int) -> None:
        writer.add_tensor(f"{name}.weight", rng.uniform(0.4, 1.8, size).astype(np.float32))

    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    q_rows = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    kv_rows = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    matrix("token_embd", CONFIG["vocab_size"], hidden)
    for i in range(CONFIG["num_hidden_layers"]):
        norm(f"blk.{i}.attn_norm", hidden)
        matrix(f"blk.{i}.attn_q", q_rows, hidden, 1.5)
        matrix(f"blk.{i}.attn_k", kv_rows, hidden, 1.5)
        matrix(f"blk.{i}.attn_v", kv_rows, hidden)
        matrix(f"blk.{i}.attn_output", hidden, q_rows, 1.5)
        if architecture == "qwen3":
            norm(f"blk.{i}.attn_q_norm", CONFIG["head_dim"])
            norm(f"blk.{i}.attn_k_norm", CONFIG["head_dim"])
        norm(f"blk.{i}.ffn_norm", hidden)
        matrix(f"blk.{i}.ffn_gate", inner, hidden)
        matrix(f"blk.{i}.ffn_up", inner, hidden)
        matrix(f"blk.{i}.ffn_down", hidden, inner)
    norm("output_norm", hidden)
    if not tied:
        matrix("output", CONFIG["vocab_size"], hidden)
    write(writer)
    return path


def copy_model(
    source: Path,
    target: Path,
    *,
    keys: dict[str, Any] | None = None,  # beside the source's; None leaves one out
    tensors: dict[str, Array] | None = None,  # as float32, beside or instead of the source's
    reverse: bool = False,
    alignment: int | None = None,
) -> Path:
    """The model of a file as another program could have written it."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    fields = {n: f.contents() for n, f in reader.fields.items() if n.startswith("llama.")}
    for name, value in (fields | (keys or {})).items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            writer.add_key_value(name, value, GGUFValueType.get_type(value))
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    data = {t.name: (t.data, t.tensor_type) for t in reader.tensors}
    data |= {name: (values, WeightType.F32) for name, values in (tensors or {}).items()}
    for name in sorted(data, reverse=reverse):
        writer.add_tensor(name, data[name][0], raw_dtype=data[name][1])
    write(writer)
    return target


def write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def reference_of(path: Path, config: dict[str, Any]) -> ReferenceModel:
    """The float64 forward on a file's dequantised weights."""
    metadata, stored = read_model(path)
    architecture = metadata["general.architecture"]
    tensors = state_of(stored, architecture == "llama", config["head_dim"])
    tied = "output.weight" not in stored
    return ReferenceModel(
        {**config, "model_type": architecture, "tie_word_embeddings": tied}, tensors
    )


def relative_error(actual: Array, expected: Array) -> float:
    """NaN where anything is NaN, which no bound accepts."""
    return float(np.sqrt(np.mean((actual - expected) ** 2) / np.mean(expected**2)))


def open_engine(path: Path) -> Engine:
    try:
        return Engine(path, kv_dtype="f32")
    except SbdValueError as error:
        if "does not support" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize(("architecture", "tied"), [("qwen3", True), ("llama", False)])
def test_logits(
    architecture: str,
    tied: bool,
    mix: str,
    isa: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SBD_ISA", isa)
    path = write_model(tmp_path / "model.bin", architecture, MIXES[mix], tied)
    reference = reference_of(path, CONFIG)
    ids = np.random.default_rng(3).integers(0, CONFIG["vocab_size"], 70).tolist()
    with open_engine(path) as engine:
        for n, block in ((1, 0), (7, 7), (70, 0), (70, 16)):
            kv_end = with_block(n, block) if block else causal(n)
            expected = reference.forward(ids[:n], kv_end)
            actual = engine.forward(ids[:n], block)
            # Activations rounded to 8 bits of their group's largest cost 0.005 to 0.02.
            assert relative_error(actual, expected) < 0.05, (n, block)
            assert relative_error(-actual, expected) > 1


UNLIKE: dict[str, dict[str, Any]] = {
    "the other order": {"reverse": True},
    "aligned to 8": {"alignment": 8},
    "aligned to 4096": {"alignment": 4096},
    "more keys": {
        "keys": {
            "general.type": "model",
            "general.tags": ["text-generation"],
            "general.file_type": 3,
            "quantize.imatrix.file": "imatrix.dat",
            "llama.expert_count": 0,
            "llama.rope.dimension_count": 32,
            "split.count": 0,
        }
    },
    "RoPE not scaled": {"tensors": {"rope_freqs.weight": np.ones(16, np.float32)}},
    "no size of the vocabulary": {"keys": {"llama.vocab_size": None}},
}


@pytest.mark.parametrize("name", UNLIKE)
def test_however_a_file_is_written(name: str, tmp_path: Path) -> None:
    source = write_model(tmp_path / "source.bin", "llama", [Q4_1, WeightType.F32], tied=True)
    target = copy_model(source, tmp_path / "target.bin", **UNLIKE[name])
    with open_engine(source) as one, open_engine(target) as other:
        assert np.array_equal(one.forward([5, 6, 7]), other.forward([5, 6, 7]))


def test_a_head_that_is_the_embedding_and_padding(tmp_path: Path) -> None:
    """Written twice, and with more rows than there are tokens."""
    source = write_model(tmp_path / "source.bin", "llama", [WeightType.F32], tied=True)
    embedding = next(t for t in GGUFReader(source).tensors if t.name == "token_embd.weight").data
    padded = np.pad(embedding, ((0, 9), (0, 0)))
    tokens = [str(i) for i in range(CONFIG["vocab_size"])]
    copy_model(
        source,
        tmp_path / "target.bin",
        keys={"llama.vocab_size": None, "tokenizer.ggml.tokens": tokens},
        tensors={"token_embd.weight": padded, "output.weight": padded},
    )
    with open_engine(source) as one, open_engine(tmp_path / "target.bin") as other:
        logits = other.forward([5, 6, 7])
        assert np.array_equal(one.forward([5, 6, 7]), logits[:, : len(tokens)])
        assert not logits[:, len(tokens) :].any()


def test_a_row_of_no_whole_blocks_is_one_line(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.bin", "llama")
    writer.add_tensor_info("token_embd.weight", (8, 320), np.dtype(np.float32), 1440, Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    expected = "tensor 'token_embd.weight': rows of 320 values, expected a multiple of 256 for Q4_K"
    with pytest.raises(SbdValueError, match=expected) as error:
        Engine(tmp_path / "model.bin")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [Q8_0, WeightType.Q4_0, *FOREIGN])
def test_values_have_the_bits_of_the_library(kind: WeightType, tmp_path: Path) -> None:
    """An embedding that is not the head: each logit depends on every bit of its row."""
    quantised = write_model(tmp_path / "quantised.bin", "llama", [kind, WeightType.F32])
    tensors = {tensor.name: tensor for tensor in GGUFReader(quantised).tensors}
    embedding = tensors["token_embd.weight"]
    assert embedding.tensor_type == kind
    widened = {embedding.name: dequantize(embedding.data, kind)}
    copy_model(quantised, tmp_path / "values.bin", tensors=widened)
    ids = list(range(CONFIG["vocab_size"]))
    with open_engine(quantised) as one, open_engine(tmp_path / "values.bin") as other:
        assert np.array_equal(one.forward(ids), other.forward(ids))


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_damaged_scale_is_one_line(kind: WeightType, tmp_path: Path) -> None:
    """Of the last row's last block: its scale, or its minimum where there is one."""
    path = write_model(tmp_path / "model.bin", "qwen3", [kind], tied=True)
    tensor = next(t for t in GGUFReader(path).tensors if t.name == "blk.1.attn_k.weight")
    at = tensor.data_offset + tensor.n_bytes - GGML_QUANT_SIZES[kind][1] + SCALE_AT.get(kind, 0)
    image = path.read_bytes()
    expected = r"tensor blk\.1\.attn_k\.weight: row 63 holds NaN or infinity: the file is damaged"
    for place in (at,) if FOREIGN[kind] is None else (at, at + 2):
        for bad in (np.nan, -np.inf):
            path.write_bytes(image[:place] + np.float16(bad).tobytes() + image[place + 2 :])
            with pytest.raises(SbdValueError, match=expected) as error:
                Engine(path)
            assert "\n" not in str(error.value)


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model(tmp_path / "model.bin", "qwen3", list(FOREIGN))
    assert main.run(["inspect", str(path), "--json"]) == 0
    assert {kind.name.lower() for kind in FOREIGN} < set(
        json.loads(capsys.readouterr().out)["bytes_by_type"]
    )


@pytest.mark.parametrize("name", [kind.name.lower() for kind in FOREIGN])
def test_bench(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {**CONFIG, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config |= {"num_hidden_layers": 1, "max_position_embeddings": 64, "tie_word_embeddings": True}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    arguments = ["--rows", "1", "--context", "16", "--repeats", "1", "--json"]
    assert main.run(["bench", "--config", str(path), "--type", name, *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["ms_per_forward"] > 0
    assert main.run(["bench", "--config", str(path), "--type", "iq2_xs"]) == 2
    assert "expected --type as one of f32" in capsys.readouterr().err


def write_types(path: Path, ids: list[int]) -> Path:
    """A file without a model, of a tensor of two rows of 256 values for each of the types, which
    may be ones that do not exist yet."""
    writer = GGUFWriter(path, "llama")
    for i, number in enumerate(ids):
        known = number in list(WeightType)
        kind = WeightType(number) if known else WeightType.F32
        values, size = GGML_QUANT_SIZES[kind]
        writer.add_tensor(f"tensor {i}", np.zeros((2, 256 // values * size), np.uint8), None, kind)
    write(writer)
    image = bytearray(path.read_bytes())
    for i, number in enumerate(ids):  # behind the name: rank and two dimensions
        at = image.index(f"tensor {i}".encode()) + len(f"tensor {i}") + 4 + 2 * 8
        image[at : at + 4] = struct.pack("<I", number)
    path.write_bytes(image)
    return path


def inspected(path: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main.run(["inspect", str(path), *flags]) == 0
    return capsys.readouterr().out


def test_inspect_lists_every_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = list(WeightType)
    path = write_types(tmp_path / "types.bin", [*map(int, kinds), 77])
    summary = json.loads(inspected(path, capsys, "--json", "--tensors"))
    listed = {tensor["type"]: tensor for tensor in summary["tensors"]}
    assert list(listed) == [*(kind.name.lower() for kind in kinds), "77"]
    for kind in kinds:
        values, size = GGML_QUANT_SIZES[kind]
        assert listed[kind.name.lower()]["shape"] == [2, 256]
        assert listed[kind.name.lower()]["bytes"] == 2 * 256 // values * size
    assert listed["77"]["bytes"] == 2048  # up to where the next would start
    assert {t: tensor["bytes"] for t, tensor in listed.items()} == summary["bytes_by_type"]


@pytest.mark.parametrize("number", [16, 21, 29, 34, 39, 77, 2**32 - 1])
def test_a_type_that_cannot_run(
    number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here in a whole model: all that can be said of it is said, and what is missing."""
    path = write_model(tmp_path / "model.bin", "qwen3", [Q4_1, Q8_0])
    image = bytearray(path.read_bytes())
    name = b"blk.1.attn_k.weight"
    at = image.index(name) + len(name) + 4 + 2 * 8
    image[at : at + 4] = struct.pack("<I", number)
    path.write_bytes(image)
    kind = WeightType(number).name if number in list(WeightType) else str(number)
    why = (
        f"tensor 'blk.1.attn_k.weight': type {kind} cannot run here, expected F32, F16, BF16, "
        "Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_XS; convert the "
        "original checkpoint with: sbd-engine convert DIR --type q8_0"
    )
    summary = json.loads(inspected(path, capsys, "--json", "--tensors"))
    assert summary["problem"] == why
    assert summary["model_config"]["num_hidden_layers"] == CONFIG["num_hidden_layers"]
    tensor = next(t for t in summary["tensors"] if t["name"] == name.decode())
    assert tensor["type"] == kind.lower()
    text = inspected(path, capsys, "--tensors")
    assert f"cannot run     {why}\n" in text
    assert re.search(rf"^{name.decode()} +{kind.lower()} +64 x 256 ", text, flags=re.MULTILINE)
    assert main.run(["run", str(path), "-p", "x"]) == 2
    assert capsys.readouterr().err == f"error: {path}: {why}\n"


def test_inspect_says_all_that_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_types(tmp_path / "types.bin", [16, 77, 16])
    problem = json.loads(inspected(path, capsys, "--json"))["problem"]
    assert problem.startswith("tensor 'tensor 0': type IQ2_XXS, 77 cannot run here")
    assert f"; {path}: key 'llama.block_count' is missing, expected an integer" in problem
