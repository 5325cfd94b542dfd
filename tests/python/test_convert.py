"""Converted weights, settings and adapters, against transformers and PEFT themselves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbd_engine.convert import convert, model_metadata, rope_freqs

from . import checkpoints
from .checkpoints import (
    LINEAR_ROPE,
    LLAMA3_ROPE,
    Array,
    convert_quietly,
    edit_json,
    expected_tensors,
    read_model,
    write_checkpoint,
)

# Weights

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": LLAMA3_ROPE}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    ("llama", {"rope_parameters": LINEAR_ROPE, "num_key_value_heads": 4}),
    ("mistral", {}),
    ("ministral3", {}),
    ("qwen2", {"tie_word_embeddings": True, "head_dim": 16}),
    ("qwen2", {"head_dim": 16, "dtype": "bfloat16"}),
    ("qwen3", {"dtype": "float16"}),
    ("qwen3", {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("model_type", "config"), CASES)
def test_every_tensor(model_type: str, config: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path / "model", model_type, **config)
    convert_quietly(folder, tmp_path / "model.bin", type="f32")
    metadata, tensors = read_model(tmp_path / "model.bin")

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    state = model.state_dict()
    if config.get("tie_word_embeddings"):
        del state["lm_head.weight"]
    architecture = {"mistral": "llama", "ministral3": "mistral3"}.get(model_type, model_type)
    expected = expected_tensors(state, interleaved=architecture in ("llama", "mistral3"))
    assert metadata["general.architecture"] == architecture
    divisors = tensors.pop("rope_freqs.weight", None)
    assert (divisors is not None) == (config.get("rope_parameters") is LLAMA3_ROPE)
    assert tensors.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(tensors[name], values, err_msg=name)


@pytest.mark.parametrize("type_", ["f16", "bf16", "q8_0", "q4_0"])
def test_weight_types(type_: str, llama: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    convert_quietly(llama, tmp_path / "exact.bin", type="f32")
    convert_quietly(llama, tmp_path / "model.bin", type=type_)
    types = {t.name: t.tensor_type.name.lower() for t in GGUFReader(tmp_path / "model.bin").tensors}
    exact, actual = read_model(tmp_path / "exact.bin")[1], read_model(tmp_path / "model.bin")[1]
    for name, values in exact.items():
        if values.ndim == 1:
            assert types[name] == "f32"
            np.testing.assert_array_equal(actual[name], values)
            continue
        assert types[name] == type_
        groups = np.abs(values).reshape(-1, 32).max(1).repeat(32).reshape(values.shape)
        # Half a step, and what rounding the group's scale to F16 adds.
        bound = {
            "f16": np.abs(values) * 2.0**-11 + 2.0**-25,
            "bf16": np.abs(values) * 2.0**-8,
            "q8_0": groups * (0.5 / 127 + 2.0**-11),
            "q4_0": groups * (1 / 8 + 2.0**-11),
        }[type_]
        assert (np.abs(actual[name] - values) <= bound).all(), name


def test_interleaved_order_keeps_attention_scores() -> None:
    """HF rotates pairs (j, j + d/2), GGUF's llama (2j, 2j + 1): scores must not change."""
    from sbd_engine.convert.architectures import interleave_rotary

    heads, d, rng = 3, 8, np.random.default_rng(0)
    q, k = rng.standard_normal((2, heads * d, 1)).astype(np.float32)
    angles = 7 * 10000.0 ** -(np.arange(0, d, 2) / d)  # position 7
    cos, sin = np.cos(angles), np.sin(angles)

    def rotate(x: Array, first: slice, second: slice) -> Array:
        x = x.reshape(heads, d)
        out = np.empty((heads, d))
        out[:, first] = x[:, first] * cos - x[:, second] * sin
        out[:, second] = x[:, second] * cos + x[:, first] * sin
        return out

    halves = slice(0, d // 2), slice(d // 2, d)
    pairs = slice(0, d, 2), slice(1, d, 2)
    expected = (rotate(q, *halves) * k.reshape(heads, d)).sum(1)
    permuted = interleave_rotary(k, d).reshape(heads, d)
    actual = (rotate(interleave_rotary(q, d), *pairs) * permuted).sum(1)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_rows_that_groups_do_not_fill_stay_f16(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from gguf import GGUFReader

    folder = write_checkpoint(tmp_path / "model", hidden_size=48)
    warnings: list[str] = []
    convert(folder, tmp_path / "model.bin", type="q4_0", warn=warnings.append)
    types = {t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "model.bin").tensors}
    assert types["token_embd.weight"] == types["blk.0.ffn_up.weight"] == "F16"
    assert types["blk.0.ffn_down.weight"] == "Q4_0"
    assert "become F16, not " in warnings[0] and "token_embd.weight" in warnings[0]


def test_tied_but_different_head_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    folder = write_checkpoint(tmp_path / "model", "qwen3")
    edit_json(folder / "config.json", tie_word_embeddings=True)
    warnings: list[str] = []
    convert(folder, tmp_path / "model.bin", warn=warnings.append)
    assert "output.weight" in read_model(tmp_path / "model.bin")[1]
    assert "differs" in warnings[0]


def test_sharded_equals_single(llama: Path, tmp_path: Path) -> None:
    sharded = write_checkpoint(tmp_path / "sharded" / "model", max_shard_size="100KB")
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 2
    convert_quietly(llama, tmp_path / "single.bin")
    convert_quietly(sharded, tmp_path / "sharded.bin")
    convert_quietly(shards, tmp_path / "files.bin")
    (sharded / "model.safetensors.index.json").unlink()
    convert_quietly(sharded, tmp_path / "no_index.bin")
    expected = (tmp_path / "single.bin").read_bytes()
    for name in ("sharded.bin", "files.bin", "no_index.bin"):
        assert (tmp_path / name).read_bytes() == expected, name


def test_file_length_is_exact(llama: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    convert_quietly(llama, tmp_path / "model.bin", type="q4_0")
    reader = GGUFReader(tmp_path / "model.bin")
    assert (
        "general.alignment" not in reader.fields
    )  # llama.cpp's quantiser keeps none but GGUF's own
    assert all(tensor.data_offset % 32 == 0 for tensor in reader.tensors)
    last = reader.tensors[-1]
    end = last.data_offset + last.n_bytes
    assert (tmp_path / "model.bin").stat().st_size == math.ceil(end / 32) * 32


# Configuration


def test_rope_forms_are_the_same(llama_copy: Path, tmp_path: Path) -> None:
    for scaling in (LLAMA3_ROPE, LINEAR_ROPE):
        parameters = scaling | {"rope_theta": 5e5}
        edit_json(llama_copy / "config.json", rope_parameters=parameters, rope_scaling=None)
        convert_quietly(llama_copy, tmp_path / "new.bin")
        old = {k: v for k, v in scaling.items() if k not in ("rope_theta", "rope_type")}
        old["type"] = scaling["rope_type"]
        edit_json(
            llama_copy / "config.json", rope_parameters=None, rope_theta=5e5, rope_scaling=old
        )
        convert_quietly(llama_copy, tmp_path / "old.bin")
        assert (tmp_path / "new.bin").read_bytes() == (tmp_path / "old.bin").read_bytes()
        assert read_model(tmp_path / "new.bin")[0]["llama.rope.freq_base"] == 5e5


def test_llama3_divisors_match_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    values = {**checkpoints.SHAPE, "head_dim": 128, "rope_parameters": LLAMA3_ROPE}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**values), "cpu")
    plain = 10000.0 ** -(np.arange(0, 128, 2) / 128)
    divisors = rope_freqs({"model_type": "llama", **values})
    assert divisors is not None and divisors.dtype == np.float32
    np.testing.assert_allclose(plain / divisors, scaled.numpy(), rtol=1e-6)
    # Each of the three ranges is met.
    assert {1.0, 8.0} < {float(d) for d in divisors}


CONFIG: dict[str, Any] = {"model_type": "llama", **checkpoints.SHAPE}


def test_metadata_of_a_config() -> None:
    assert model_metadata({**CONFIG, "rope_parameters": LINEAR_ROPE}) == {
        "general.architecture": "llama",
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.vocab_size": 320,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 4.0,
    }


def test_metadata_of_yarn() -> None:
    """GGUF's attention factor is beside the one that YaRN's factor gives: 1 + 0.1 ln 4."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128.0}
    for more, factor in (({}, 1.0), ({"attention_factor": 1.0}, 1 / (1 + 0.1 * math.log(4)))):
        metadata = model_metadata({**CONFIG, "rope_theta": 1e6, "rope_scaling": yarn | more})
        keys = "llama.rope."
        assert {k.removeprefix(keys): v for k, v in metadata.items() if k.startswith(keys)} == {
            "dimension_count": 32,
            "freq_base": 1e6,
            "scaling.type": "yarn",
            "scaling.factor": 4.0,
            "scaling.original_context_length": 128,
            "scaling.yarn_beta_fast": 32.0,
            "scaling.yarn_beta_slow": 1.0,
            "scaling.attn_factor": pytest.approx(factor),
        }
        assert rope_freqs({**CONFIG, "rope_scaling": yarn}) is None


def test_defaults_are_those_of_transformers() -> None:
    without = {k: v for k, v in CONFIG.items() if k not in ("head_dim", "num_key_value_heads")}
    assert model_metadata(without)["llama.attention.key_length"] == 16
    assert model_metadata(without)["llama.attention.head_count_kv"] == 4
    qwen3 = model_metadata({**without, "model_type": "qwen3"})
    assert qwen3["qwen3.attention.key_length"] == 128
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Ministral3Config().rope_parameters
    ministral = {"model_type": "ministral3"}
    named = {**CONFIG, **ministral, "rope_parameters": {**theirs, "rope_type": "yarn"}}
    assert model_metadata({**CONFIG, **ministral}) == model_metadata(named)


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"model_type": "mistral", "sliding_window": 64}, 64),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "llama", "sliding_window": 64}, None),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": False}, None),
        ({"model_type": "qwen2", "sliding_window": 64, "use_sliding_window": True}, None),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 64,
                "use_sliding_window": True,
                "max_window_layers": 1,
            },
            64,
        ),
        (
            {
                "model_type": "qwen2",
                "sliding_window": 64,
                "use_sliding_window": True,
                "layer_types": ["full_attention", "sliding_attention"],
            },
            64,
        ),
    ],
)
def test_sliding_window_only_where_it_is_used(config: dict[str, Any], window: int | None) -> None:
    metadata = model_metadata({**CONFIG, **config})
    architecture = metadata["general.architecture"]
    assert metadata.get(f"{architecture}.attention.sliding_window") == window


# Decoding


def test_decoding_keys(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.bin"
    convert_quietly(llama, out)
    metadata = read_model(out)[0]
    assert metadata["sbd.mask_token_id"] == metadata["tokenizer.ggml.mask_token_id"] == 303
    assert metadata["sbd.eos_token_ids"] == [302, 301]
    assert metadata["tokenizer.ggml.eos_token_id"] == 302
    assert metadata["tokenizer.ggml.bos_token_id"] == 300
    assert metadata["sbd.decoders"] == ["ntp", "sbd"]
    assert "sbd.block_size" not in metadata and "sbd.gamma" not in metadata

    convert_quietly(llama, out, block_size=8, gamma=0.25, mask_token="<|bos|>")
    metadata = read_model(out)[0]
    assert metadata["sbd.decoders"] == ["sbd_lossless", "sbd", "ntp"]
    assert (metadata["sbd.block_size"], metadata["sbd.gamma"]) == (8, 0.25)
    assert metadata["sbd.mask_token_id"] == 300


def test_mask_and_block_size_of_the_config(llama_copy: Path, tmp_path: Path) -> None:
    edit_json(llama_copy / "config.json", mask_token_id=310, block_size=4)
    convert_quietly(llama_copy, tmp_path / "model.bin")
    metadata = read_model(tmp_path / "model.bin")[0]
    assert (metadata["sbd.mask_token_id"], metadata["sbd.block_size"]) == (310, 4)
    convert_quietly(llama_copy, tmp_path / "model.bin", mask_token=311)
    assert read_model(tmp_path / "model.bin")[0]["sbd.mask_token_id"] == 311


def test_without_a_mask_token_only_ntp(llama_copy: Path, tmp_path: Path) -> None:
    edit_json(llama_copy / "tokenizer_config.json", mask_token=None)
    edit_json(llama_copy / "config.json", block_size=4)
    convert_quietly(llama_copy, tmp_path / "model.bin")
    metadata = read_model(tmp_path / "model.bin")[0]
    assert metadata["sbd.decoders"] == ["ntp"]
    assert not {"sbd.mask_token_id", "sbd.block_size"} & metadata.keys()


def test_set_takes_every_key(llama: Path, tmp_path: Path) -> None:
    settings = {
        "unmask": "confidence",
        "confidence_threshold": 0.75,
        "proxy": "margin",
        "factor": 1.5,
        "top_n": 3,
        "gamma": math.inf,
        "logit_shift": 1,
        "seed_slot": 0,
        "prompt_attention": "block_causal",
        "block_origin": "absolute",
        "commit_attention": "block",
        "sub_block_size": 8,
        "steps": 32,
        "schedule": "linear",
        "dmtd.layers": [0, 1, 1],
        "dmtd.horizon": 4,
        "dmtd.prompt_rule": "plain",
        "d2f.block_add_threshold": 0.125,
        "d2f.decoded_token_threshold": 0.5,
        "d2f.skip_threshold": 0.25,
        "eos_token_ids": [5, 6],
        "mask_token_id": 7,
        "block_size": 32,
        "decoders": ["d2f", "ntp"],
    }
    pairs = [
        f"{key}={','.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in settings.items()
    ]
    convert_quietly(llama, tmp_path / "model.bin", settings=["sbd." + pairs[0], *pairs[1:]])
    metadata = read_model(tmp_path / "model.bin")[0]
    assert {key: metadata[f"sbd.{key}"] for key in settings} == settings
