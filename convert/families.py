"""The model families: what each calls its tensors and settings, and how its file is decoded.

A family is data only: what is beyond Llama's graph with biases, norms of the query and key heads
and a scaled RoPE is refused. The defaults are those of the publishers: their `generate`, or the
example on the model's card where that differs from it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .errors import ConvertError
from .values import Config, Value

Decoding = dict[str, Value]  # keys without their "sbd."


@dataclass(frozen=True)
class Names:
    """A checkpoint's modules; a layer's follow `layers`.N. in their names."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    attention_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    ffn_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    norm: str = "model.norm"
    head: str = "lm_head"


@dataclass(frozen=True)
class Family:
    """How a checkpoint differs from Llama's."""

    architecture: str  # GGUF's name
    interleaved: bool = False  # GGUF wants Q and K rows in interleaved-rotary order
    qkv_bias: bool = False  # biases on q, k, v always; else `attention_bias` says, and o has one
    qk_norm: bool = False
    head_dim: int | None = None  # where the config has none; else hidden_size / heads
    names: Names = Names()
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of config.json's keys
    missing: Mapping[str, Any] = field(default_factory=dict)  # values of keys the config lacks
    fixed: Mapping[str, Any] = field(default_factory=dict)  # keys that must have this value, if any
    decoding: Decoding = field(default_factory=dict)  # as published
    lora_decoding: Decoding = field(default_factory=dict)  # beside it, with an adapter merged
    note: str = ""  # what the user should know
    lora_note: str = ""


NEMOTRON_NAMES = Names(
    embedding="encoder.embed_tokens",
    layers="encoder.layers",
    norm="encoder.norm",
    head="diffusion_head",
)
LLADA_NAMES = Names(
    embedding="model.transformer.wte",
    layers="model.transformer.blocks",
    attention_norm="attn_norm",
    q="q_proj",
    k="k_proj",
    v="v_proj",
    o="attn_out",
    ffn_norm="ff_norm",
    gate="ff_proj",
    up="up_proj",
    down="ff_out",
    norm="model.transformer.ln_f",
    head="model.transformer.ff_out",
)
LLADA_ALIASES = {
    "hidden_size": ("d_model",),
    "intermediate_size": ("mlp_hidden_size",),
    "num_hidden_layers": ("n_layers",),
    "num_attention_heads": ("n_heads",),
    "num_key_value_heads": ("n_kv_heads",),
    "max_position_embeddings": ("max_sequence_length",),
    "vocab_size": ("embedding_size", "vocab_size"),
    "tie_word_embeddings": ("weight_tying",),
}
LLADA_FIXED = {
    "activation_type": "silu",
    "alibi": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "multi_query_attention": False,
    "rope": True,
    "scale_logits": False,
}

# What transformers takes where the config has none.
MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
# Exactly Set Block Decoding's attention, so `sbd` runs it too; first is the loop of its `generate`,
# as the card calls it.
NEMOTRON: Decoding = {
    "decoders": ["nemotron", "nemotron_spec", "sbd", "sbd_lossless", "ntp"],
    "mask_token_id": 100,
    "block_size": 32,
    "seed_slot": 1,
    "unmask": "confidence",
    "confidence_threshold": 0.9,
}
# Its dynamic rule with as many steps as the block has tokens: all that are sure, at least one.
SDAR: Decoding = {
    "decoders": ["sdar"],
    "mask_token_id": 151669,
    "block_size": 4,
    "prompt_attention": "block_causal",
    "block_origin": "absolute",
    "commit_attention": "block",
    "unmask": "confidence",
    "confidence_threshold": 0.85,
}
FAST_DLLM_V2: Decoding = SDAR | {
    "decoders": ["fast_dllm_v2"],
    "mask_token_id": 151665,
    "block_size": 32,
    "sub_block_size": 8,
    "logit_shift": 1,
    "seed_slot": 1,
    "confidence_threshold": 0.9,
}
# 128 steps for a block of 128: one token a step, the surest.
LLADA: Decoding = {
    "decoders": ["llada"],
    "mask_token_id": 126336,
    "block_size": 128,
    "prompt_attention": "full",
    "commit_attention": "none",
    "unmask": "top_n",
    "proxy": "confidence",
    "top_n": 1,
}
# The card's `alg="entropy"`; without it `generate` picks its positions at random.
DREAM: Decoding = {
    "decoders": ["dream"],
    "mask_token_id": 151666,
    "logit_shift": 1,
    "prompt_attention": "full",
    "commit_attention": "none",
    "unmask": "top_n",
    "proxy": "entropy",
    "steps": 512,
    "schedule": "linear",
}
D2F: Decoding = {
    "block_size": 32,
    "d2f.block_add_threshold": 0.1,
    "d2f.decoded_token_threshold": 0.95,
    "d2f.skip_threshold": 0.9,
}
D2F_NOTE = "the adapter is taken for one of D2F, which decodes as d2f; else --set decoders={}"

QWEN3 = Family("qwen3", qk_norm=True, head_dim=128)
FAMILIES = {
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True),
    "ministral3": Family(
        "mistral3", interleaved=True, missing={"rope_parameters": MINISTRAL3_ROPE}
    ),
    "qwen2": Family("qwen2", qkv_bias=True),
    "qwen3": QWEN3,
    "nemotron_labs_diffusion": Family(
        "mistral3",
        interleaved=True,
        names=NEMOTRON_NAMES,
        missing={"rms_norm_eps": 1e-5},
        fixed={"dlm_paradigm": "bidirectional"},
        decoding=NEMOTRON,
    ),
    "sdar": replace(QWEN3, decoding=SDAR),
    "Fast_dLLM_Qwen": Family(
        "qwen2", qkv_bias=True, aliases={"block_size": ("bd_size",)}, decoding=FAST_DLLM_V2
    ),
    "llada": Family(
        "llada",
        interleaved=True,
        names=LLADA_NAMES,
        aliases=LLADA_ALIASES,
        missing={"rms_norm_eps": 1e-5},
        fixed=LLADA_FIXED,
        decoding=LLADA,
        lora_decoding=D2F | {"decoders": ["d2f", "llada"]},
        lora_note=D2F_NOTE.format("llada"),
    ),
    "Dream": Family(
        "dream",
        qkv_bias=True,
        # Dream-Reasoner has this model_type too, and Qwen3's graph.
        fixed={"architectures": ["DreamModel"], "use_mrope": False},
        decoding=DREAM,
        lora_decoding=D2F | {"decoders": ["d2f", "dream"]},
        lora_note=D2F_NOTE.format("dream"),
    ),
    "wedlm": Family(
        "qwen2",
        qkv_bias=True,
        decoding={"decoders": ["ntp"]},
        note="WeDLM's sliding window is no decoder of this engine: the file decodes as ntp",
    ),
    "dmtdqwen3": replace(
        QWEN3,
        # Its parallel variants have masks in the thinking layers.
        fixed={"dmtd_block_attention": "none", "dmtd_history_mode": "real"},
    ),
}
# Families that have another's model_type.
ARCHITECTURES = {
    "StableDiffcoderForCausalLM": replace(
        FAMILIES["llama"], decoding=SDAR | {"mask_token_id": 5, "confidence_threshold": 0.95}
    ),
}
REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "vocab_size",
)
EXPERTS = "is a mixture of experts, which the engine has no operation for"
REFUSED = {
    "nemotron_labs_diffusion_vlm": "reads pictures, which the engine cannot: give the text model",
    "sdar_moe": EXPERTS,
    "llada2_moe": EXPERTS,
    "llada_moe": EXPERTS,
    "lladamoe": EXPERTS,
    "diffusion_gemma": "denoises random tokens instead of masks, which no decoder here does",
}


def family_of(config: Config) -> Family:
    """The family of a config.json; a ConvertError says what the engine lacks for others."""
    model_type = config.get("model_type")
    for name, family in ARCHITECTURES.items():
        if config.get("architectures") == [name]:
            return family
    known = isinstance(model_type, str)
    if known and model_type in REFUSED:
        raise ConvertError(f"config.json: a {model_type} model {REFUSED[model_type]}")
    if not known or model_type not in FAMILIES:
        raise ConvertError(
            f"config.json: model_type {model_type!r} is not supported: expected one of "
            f"{', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    if model_type == "wedlm" and config.get("qk_norm"):
        family = replace(family, architecture="qwen3", qkv_bias=False, qk_norm=True, head_dim=128)
    return family


def hf_config(config: Config) -> Config:
    """The config under Hugging Face's names, with what it leaves to its family filled in.

    A ConvertError where the checkpoint has an operation that the engine lacks.
    """
    family = family_of(config)
    quantization = config.get("quantization_config") or config.get("quantization")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ConvertError(
            f"config.json: the checkpoint is already quantised ({method or 'quantization_config'}):"
            " give the original, in BF16, F16 or F32"
        )
    fixed = {"hidden_act": "silu", "mlp_bias": False, "partial_rotary_factor": 1.0}
    for key, expected in (fixed | dict(family.fixed)).items():
        value = config.get(key)
        if value is not None and value != expected:
            raise ConvertError(f"config.json: {key}: expected {expected!r}, got {value!r}")
    if config.get("vision_config"):
        raise ConvertError("config.json: vision_config: the engine reads text alone")

    result = dict(config)
    for key, names in family.aliases.items():
        present = [config[name] for name in names if config.get(name) is not None]
        if present:
            result[key] = present[0]
        elif key in REQUIRED:
            raise ConvertError(f"config.json: {names[0]}: expected a positive integer, got None")
    return result | {k: v for k, v in family.missing.items() if result.get(k) is None}


def named_block_size(*names: object) -> int | None:
    """The N of a name such as SDAR-8B-Chat-b32, which its config.json may lack."""
    for name in names:
        match = re.search(r"-b(\d+)(?=$|[-/])", name) if isinstance(name, str) else None
        if match:
            return int(match[1])
    return None
