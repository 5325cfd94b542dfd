"""Checkpoints as they are downloaded: whatever their JSON files and weights say, the converter
writes a whole file that the engine's reader takes, or none and one line."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from fuzz_tokenizers import TOKENIZERS
from json_mutations import copied, mutated
from rounds import fuzz
from safetensors.numpy import save

from sbd_engine import _core
from sbd_engine.convert import ConvertError, convert

VOCABULARY, HIDDEN, FFN = 24, 8, 8
CONFIGS: list[dict[str, Any]] = [
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": kind,
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 0,
        "tie_word_embeddings": True,
        "rope_theta": 10000.0,
        "head_dim": 4,
        "mask_token_id": 5,
    }
    for kind in ("llama", "mistral", "qwen2", "qwen3")
]
CONFIGS[0]["rope_scaling"] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CONFIGS[2]["rope_scaling"] = {"type": "linear", "factor": 2.0}
CONFIGS[3]["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
TOKENIZER_CONFIG: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": {"content": "<|end|>"},
    "add_bos_token": False,
    "added_tokens_decoder": {"17": {"content": "<s>", "special": True}},
    "extra_special_tokens": {"image_token": "<i>"},
    "chat_template": "{{ messages }}",
}
ADAPTER: dict[str, Any] = {
    "peft_type": "LORA",
    "lora_alpha": 2,
    "r": 2,
    "bias": "none",
    "use_rslora": False,
    "alpha_pattern": {"q_proj": 4},
    "rank_pattern": {},
    "target_modules": ["q_proj"],
}
LAYER = "model.layers.0."
# In memory where there is such a folder: on a disk most of a round is waiting for it.
MEMORY = "/dev/shm"
FOLDER = Path(
    tempfile.mkdtemp(prefix="sbd-fuzz-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None)
)


def tensors(config: dict[str, Any]) -> dict[str, Any]:
    def full(*shape: int) -> Any:
        return np.full(shape, 0.1, np.float32)

    kind = config["model_type"]
    made = {
        "model.embed_tokens.weight": full(VOCABULARY, HIDDEN),
        "model.norm.weight": full(HIDDEN),
        **{f"{LAYER}{n}_layernorm.weight": full(HIDDEN) for n in ("input", "post_attention")},
        **{f"{LAYER}mlp.{n}_proj.weight": full(FFN, HIDDEN) for n in ("gate", "up")},
        f"{LAYER}mlp.down_proj.weight": full(HIDDEN, FFN),
    }
    for name, rows in ("q", 8), ("k", 4), ("v", 4):
        made[f"{LAYER}self_attn.{name}_proj.weight"] = full(rows, HIDDEN)
        if kind == "qwen2":
            made[f"{LAYER}self_attn.{name}_proj.bias"] = full(rows)
        if kind == "qwen3" and name != "v":
            made[f"{LAYER}self_attn.{name}_norm.weight"] = full(4)
    return made | {f"{LAYER}self_attn.o_proj.weight": full(HIDDEN, 8)}


def damaged(random: Random, weights: bytes) -> bytes:
    """A safetensors file with another header, or cut short."""
    if random.random() < 0.3:
        return weights[: random.randrange(len(weights))]
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    text = json.dumps(mutated(random, header, [header], random.choice((1, 2, 4)))).encode()
    return struct.pack("<Q", len(text)) + text + weights[8 + size :]


def write(random: Random, folder: Path) -> None:
    config = copied(random.choice(CONFIGS))
    weights = save(tensors(config))
    files: dict[str, Any] = {
        "config.json": config,
        "tokenizer.json": copied(random.choice(TOKENIZERS)),
        "tokenizer_config.json": copied(TOKENIZER_CONFIG),
    }
    if random.random() < 0.3:
        files["special_tokens_map.json"] = {"bos_token": "<s>", "unk_token": {"content": "a"}}
        files["added_tokens.json"] = {"<new>": 19}
    if random.random() < 0.3:
        names = dict.fromkeys(tensors(config), "model.safetensors")
        files["model.safetensors.index.json"] = {"metadata": {}, "weight_map": names}
    for name in random.sample([*files], random.choice((1, 1, 2))):
        parts = [*files.values()]
        files[name] = mutated(random, files[name], parts, random.choice((0, 0, 1, 1, 2, 4)))
    if random.random() < 0.15:
        weights = damaged(random, weights)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    for name, value in files.items():
        text = json.dumps(value)
        if random.random() < 0.03:
            text = text[: random.randrange(len(text))]
        (folder / name).write_text(text)
    if random.random() < 0.05:
        (folder / "chat_template.jinja").symlink_to("/etc/hostname")


def write_adapter(random: Random, folder: Path) -> None:
    module = f"base_model.model.{LAYER}self_attn.q_proj"
    pair = {
        f"{module}.lora_A.weight": np.ones((2, HIDDEN), np.float32),
        f"{module}.lora_B.weight": np.ones((8, 2), np.float32),
    }
    folder.mkdir()
    weights = save(pair)
    if random.random() < 0.3:
        weights = damaged(random, weights)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    config = mutated(random, ADAPTER, [ADAPTER, *CONFIGS], random.choice((0, 1, 2)))
    (folder / "adapter_config.json").write_text(json.dumps(config))


def one(random: Random) -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    checkpoint, output = FOLDER / "checkpoint", FOLDER / "model.bin"
    write(random, checkpoint)
    options: dict[str, Any] = {"type": random.choice(("f32", "bf16", "q8_0"))}
    if random.random() < 0.2:
        write_adapter(random, FOLDER / "adapter")
        options["lora"] = FOLDER / "adapter"
    warnings: list[str] = []
    try:
        convert(checkpoint, output, warn=warnings.append, **options)
        problem = _core.read_gguf(output)["problem"]
        if problem is not None:
            raise AssertionError(f"written, but: {problem}")
    except ConvertError:
        if output.exists():
            raise AssertionError("a file in spite of an error") from None
        raise
    finally:
        left = [name for name in os.listdir(FOLDER) if name.endswith(".part")]
        if left:
            raise AssertionError(f"left behind: {left}")


if __name__ == "__main__":
    try:
        code = fuzz(one, (ConvertError,))
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)
    sys.exit(code)
