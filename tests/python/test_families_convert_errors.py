"""Checkpoints and options of the block-diffusion families that are refused, one line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from .checkpoints import convert_quietly, refusal
from .family_models import (
    DREAM,
    LLADA,
    MODELS,
    NEMOTRON,
    SDAR,
    FamilyModel,
    random_tensors,
    write_adapter,
    write_family,
)

pytest.importorskip("transformers")


def attempt(model: FamilyModel, tmp_path: Path, options: dict[str, Any], **config: Any) -> str:
    folder = write_family(tmp_path / "model", model, **config)
    message = refusal(folder, tmp_path / "model.bin", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    return message


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("sdar_moe", "a sdar_moe model is a mixture of experts, which the engine has no operation"),
        ("llada2_moe", "a llada2_moe model is a mixture of experts"),
        ("nemotron_labs_diffusion_vlm", "reads pictures"),
        ("diffusion_gemma", "denoises random tokens instead of masks"),
        ("bert", "model_type 'bert' is not supported: expected one of llama"),
        (["sdar"], "model_type ['sdar'] is not supported"),
    ],
)
def test_families_that_are_refused(model_type: Any, message: str, tmp_path: Path) -> None:
    assert message in attempt(SDAR, tmp_path, {}, model_type=model_type, architectures=None)


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (NEMOTRON, {"dlm_paradigm": "sbd_block_diff"}, "dlm_paradigm: expected 'bidirectional'"),
        (NEMOTRON, {"vision_config": {"depth": 2}}, "the engine reads text alone"),
        (NEMOTRON, {"block_size": "32x"}, "config.json: block_size: expected an integer from 1"),
        (LLADA, {"d_model": None}, "d_model: expected a positive integer, got None"),
        (LLADA, {"block_type": "sequential"}, "block_type: expected 'llama', got 'sequential'"),
        (LLADA, {"include_qkv_bias": True}, "include_qkv_bias: expected False, got True"),
        (LLADA, {"attention_layer_norm": True}, "attention_layer_norm: expected False, got True"),
        (
            LLADA,
            {"n_layers": 3},
            "9 tensors of a llada model are missing: model.transformer.blocks.2",
        ),
        (
            LLADA,
            {"max_sequence_length": 64},
            "block size: expected at most the context 64, got 128",
        ),
        (DREAM, {"architectures": ["DreamForCausalLM"]}, "architectures: expected ['DreamModel']"),
        (DREAM, {"mask_token_id": 151666}, "mask_token_id: expected an id from 0 to 319"),
        (DREAM, {"quantization": {"bits": 4}}, "the checkpoint is already quantised"),
        (
            MODELS["fast_dllm_v2"],
            {"bd_size": 12},
            "sub_block_size: expected a divisor of the block",
        ),
        (MODELS["dmtd"], {"num_decoding_layers": 2}, "with a sum of 2, at least one in each of"),
        (MODELS["dmtd"], {"num_decoding_layers": None}, "num_*_layers: expected 3 integers from 0"),
        (MODELS["dmtd"], {"mtp_horizon": 0}, "mtp_horizon: expected an integer from 1"),
        (
            MODELS["dmtd"],
            {"dmtd_block_attention": "causal"},
            "dmtd_block_attention: expected 'none'",
        ),
    ],
)
def test_configs_that_are_refused(
    model: FamilyModel, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    assert message in attempt(model, tmp_path, {}, **config)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"attention_factor": 0}, "attention_factor: expected a positive number, got 0"),
        ({"mscale": -1}, "mscale: expected a positive number, got -1"),
        ({"truncate": False}, "truncate: expected True, got False"),
        ({"beta_fast": 0.5}, "beta_fast: expected more than beta_slow 1.0, got 0.5"),
        (
            {"llama_4_scaling_beta": "x"},
            "llama_4_scaling_beta: expected a positive number, got 'x'",
        ),
        ({"original_max_position_embeddings": 64.5}, "expected a positive integer, got 64.5"),
    ],
)
def test_yarn_that_is_refused(rope: dict[str, Any], message: str, tmp_path: Path) -> None:
    changed = NEMOTRON.config["rope_parameters"] | rope
    assert message in attempt(NEMOTRON, tmp_path, {}, rope_parameters=changed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"settings": ["dmtd.layers=0,1,2"]}, "with a sum of 2, at least one in each of"),
        ({"settings": ["dmtd.layers=0,2,0"]}, "with a sum of 2, at least one in each of"),
        (
            {"settings": ["dmtd.layers=0,1,1", "dmtd.horizon=0"]},
            "dmtd.horizon: expected an integer",
        ),
        ({"settings": ["decoders=dmtd"]}, "dmtd needs a cut of the layers: give one with --set"),
        ({"draft_lora": "nowhere"}, "LoRA adapter: nowhere/adapter_config.json is missing"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in attempt(NEMOTRON, tmp_path, options)


@pytest.mark.parametrize(
    ("model", "layers", "message"),
    [
        (
            SDAR,
            True,
            "only the decoders nemotron_spec and sbd_lossless draft with an adapter: the file's "
            "are sdar",
        ),
        (NEMOTRON, False, "expected changes to the layers' matrices alone, got "),
    ],
)
def test_draft_adapters_that_are_refused(
    model: FamilyModel, layers: bool, message: str, tmp_path: Path
) -> None:
    folder = write_family(tmp_path / "model", model)
    write_adapter(tmp_path / "draft", model, ("o_proj",), r=4, alpha=4)
    if not layers:
        path = tmp_path / "draft" / "adapter_model.safetensors"
        rows, columns = random_tensors(model)[f"{model.head}.weight"].shape
        head = f"base_model.model.{model.head}"
        pair = {"A": np.ones((4, columns), np.float32), "B": np.ones((rows, 4), np.float32)}
        save_file({f"{head}.lora_{side}.weight": each for side, each in pair.items()}, path)
    assert message in refusal(folder, tmp_path / "model.bin", draft_lora=tmp_path / "draft")
    assert not (tmp_path / "model.bin").exists()


def test_a_draft_that_fails_leaves_both_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_family(tmp_path / "model", NEMOTRON)
    write_adapter(tmp_path / "draft", NEMOTRON, ("o_proj",), r=4, alpha=4)
    out, draft_out = tmp_path / "model.bin", tmp_path / "model.draft.bin"
    call: dict[str, Any] = {"draft_lora": tmp_path / "draft"}
    out.write_bytes(b"old")
    draft_out.mkdir()
    encoded: list[object] = []
    monkeypatch.setattr("sbd_engine.convert.conversion.encode", lambda *a: encoded.append(a))
    assert f"{draft_out}: is a folder: expected the model file" in refusal(folder, out, **call)
    assert not encoded  # told before any work
    monkeypatch.undo()

    draft_out.rmdir()
    draft_out.write_bytes(b"old draft")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sbd_engine.convert.draft.encode", full)
    with pytest.raises(OSError, match="No space left"):
        convert_quietly(folder, out, **call)
    assert (out.read_bytes(), draft_out.read_bytes()) == (b"old", b"old draft")
    assert {*tmp_path.iterdir()} == {folder, tmp_path / "draft", out, draft_out}
