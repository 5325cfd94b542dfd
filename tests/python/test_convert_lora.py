"""A merged LoRA adapter, against PEFT's own merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .checkpoints import Array, convert_quietly, expected_tensors, read_model, refusal


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16},
        {"target_modules": ["k_proj", "o_proj", "lm_head"], "r": 9, "use_rslora": True},
        {
            "target_modules": ["gate_proj", "down_proj", "embed_tokens"],
            "alpha_pattern": {"layers.1.mlp.gate_proj": 2},
            "rank_pattern": {"down_proj": 3},
            "modules_to_save": ["lm_head"],
        },
    ],
)
def test_lora_equals_merge_and_unload(options: dict[str, Any], llama: Path, tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "adapter")
    convert_quietly(llama, tmp_path / "model.bin", type="f32", lora=tmp_path / "adapter")
    convert_quietly(llama, tmp_path / "base.bin", type="f32")

    merged = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama), tmp_path / "adapter"
    ).merge_and_unload()
    expected = expected_tensors(merged.state_dict(), interleaved=True)
    actual, base = read_model(tmp_path / "model.bin")[1], read_model(tmp_path / "base.bin")[1]
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(actual[name], values, rtol=0, atol=2e-6, err_msg=name)
    changed = {name for name in base if not np.array_equal(actual[name], base[name])}
    assert len(changed) == {4: 4, 9: 5}.get(options.get("r", 8), 6)


def test_lora_errors(llama: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    adapter, out = tmp_path / "adapter", tmp_path / "model.bin"
    adapter.mkdir()

    def attempt(tensors: dict[str, Array], **config: Any) -> str:
        save_file(tensors, adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, **config}))
        message = refusal(llama, out, lora=adapter)
        assert not out.exists()
        return message

    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    a, b = np.ones((2, 64), np.float32), np.ones((128, 2), np.float32)
    assert "adapter_config.json is missing" in refusal(llama, out, lora=tmp_path)
    extra = {"base_model.model.model.layers.9.x.lora_A.weight": a}
    assert "1 tensors of the adapter fit no weight" in attempt(extra)
    assert "expected lora_A and lora_B, got A" in attempt({f"{prefix}A.weight": a})
    assert "the weight is [128, 64]" in attempt({f"{prefix}A.weight": a, f"{prefix}B.weight": a})
    pair = {f"{prefix}A.weight": a, f"{prefix}B.weight": b}
    assert "DoRA" in attempt(pair, use_dora=True)
    assert "IA3" in attempt(pair, peft_type="IA3")
    assert "lora_alpha: expected a number, got None" in attempt(pair, lora_alpha=None)
    assert "pissa" in attempt(pair, init_lora_weights="pissa_niter_4")
