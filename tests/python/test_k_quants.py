"""Files with Q4_K and Q6_K weights, which others write and this engine only reads.

Any bytes with finite scales are a block. Their values are those of the gguf library's dequantizer,
and logits those of the float64 reference on these values. Files of llama.cpp's own quantiser are in
test_k_quants_llama_cpp.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as WeightType
from gguf import GGUFWriter
from numpy.typing import NDArray
from reference.model import ReferenceModel, causal, with_block

from sbd_engine import Engine
from sbd_engine.cli import main
from sbd_engine.errors import SbdValueError

from .checkpoints import NAMES, Array, read_model
from .isas import ISAS

Q4_K, Q6_K, Q8_0 = WeightType.Q4_K, WeightType.Q6_K, WeightType.Q8_0
MIXES = {"q4_k": [Q4_K], "q6_k": [Q6_K], "mixed": [Q6_K, Q4_K, Q8_0, Q4_K, WeightType.F32]}
BLOCK_BYTES = {Q4_K: 144, Q6_K: 210}
# Root mean square of random blocks' values where the half precision scale is 1. A Q4_K block's
# minima have one of their own: 7.5 times the other puts the values around 0.
RMS = {Q4_K: 258.0, Q6_K: 1366.0}
MIN = 7.5
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


def random_blocks(
    rng: np.random.Generator, kind: WeightType, rows: int, cols: int, rms: float
) -> NDArray[np.uint8]:
    """A matrix of random bytes as a file holds it, its half precision scales apart."""
    blocks = rng.integers(0, 256, (rows * cols // 256, BLOCK_BYTES[kind]), dtype=np.uint8)
    scales = rms / RMS[kind] * rng.uniform(0.5, 1.5, (len(blocks), 1))
    scales *= rng.choice([-1, 1], scales.shape)
    if kind == Q4_K:
        blocks[:, 0:2] = scales.astype(np.float16).view(np.uint8)
        blocks[:, 2:4] = (MIN * scales).astype(np.float16).view(np.uint8)
    else:
        blocks[:, 208:210] = scales.astype(np.float16).view(np.uint8)
    return blocks.reshape(rows, -1)


def write_model(path: Path, architecture: str, kinds: list[WeightType], tied: bool = False) -> Path:
    """A model without a tokenizer in CONFIG's shape; its matrices take `kinds` in turn."""
    from gguf.quants import quantize

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
        if kind in RMS:
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
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reference_of(path: Path, config: dict[str, Any]) -> ReferenceModel:
    """The float64 forward on a file's dequantised weights."""
    metadata, stored = read_model(path)
    architecture = metadata["general.architecture"]
    names = {theirs: f"model.layers.{{}}.{ours}" for ours, theirs in NAMES.items()}
    tensors = {}
    for name, values in stored.items():
        if name.startswith("blk."):
            _, layer, inner, kind = name.split(".")
            if architecture == "llama" and inner in ("attn_q", "attn_k"):
                # A head's rows are pairs (j, j + head_dim / 2), one after another.
                pairs = values.reshape(-1, config["head_dim"] // 2, 2, values.shape[-1])
                stored[name] = pairs.swapaxes(1, 2).reshape(values.shape)
            tensors[f"{names[inner].format(layer)}.{kind}"] = stored[name]
        else:
            inner, kind = name.split(".")
            tensors[f"{names[inner].removeprefix('model.layers.{}.')}.{kind}"] = values
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


def test_a_row_of_no_whole_blocks_is_one_line(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "model.bin", "llama")
    writer.add_tensor_info("token_embd.weight", (8, 320), np.dtype(np.float32), 1440, Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    expected = "tensor 'token_embd.weight': rows of 320 values, expected a multiple of 256 for q4_k"
    with pytest.raises(SbdValueError, match=expected) as error:
        Engine(tmp_path / "model.bin")
    assert "\n" not in str(error.value)


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_model(tmp_path / "model.bin", "qwen3", [Q6_K, Q4_K])
    assert main.run(["inspect", str(path), "--json"]) == 0
    assert {"q4_k", "q6_k"} < set(json.loads(capsys.readouterr().out)["bytes_by_type"])


@pytest.mark.parametrize("name", ["q4_k", "q6_k"])
def test_bench(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {**CONFIG, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    config |= {"num_hidden_layers": 1, "max_position_embeddings": 64, "tie_word_embeddings": True}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    arguments = ["--rows", "1", "--context", "16", "--repeats", "1", "--json"]
    assert main.run(["bench", "--config", str(path), "--type", name, *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["results"][0]["ms_per_forward"] > 0
    assert main.run(["bench", "--config", str(path), "--type", "q5_k"]) == 2
    assert "expected --type as one of f32" in capsys.readouterr().err
