"""Tiny checkpoints in the layouts of the public block-diffusion families, and their forward.

Configs and tensor names are those of the published checkpoints, cut to tiny size; the forward is
torch in float64, written from each family's definition. Where the facts are from (project:path):

- Nemotron-Labs-Diffusion: Blaizzy/mlx-vlm:mlx_vlm/models/nemotron_labs_diffusion/config.py and
  language.py; vllm-project/vllm:vllm/model_executor/models/nemotron_dllm.py; the growing queries as
  transformers' models/ministral3/modeling_ministral3.py has them.
- SDAR: JetLM/SDAR-4B-Chat:config.json; its graph is Qwen3's, says
  vllm-project/vllm-ascend (the config of UNO's verifier).
- Fast-dLLM v2: Efficient-Large-Model/Fast_dLLM_v2_7B:config.json; sgl-project/sglang:
  python/sglang/srt/models (a Qwen2ForCausalLM).
- LLaDA: GSAI-ML/LLaDA-8B-Instruct:config.json, modeling_llada.py: `rotate_half` splits a head in
  halves, `view(..., 2, hs // 2)`, so a checkpoint holds Q and K in halves, not in pairs.
- Dream: Dream-org/Dream-v0-Instruct-7B:config.json, modeling_dream.py: Qwen2's, not causal.
- Stable-DiffCoder: ByteDance-Seed/Stable-DiffCoder-8B-Base:config.json: model_type llama.
- WeDLM: tencent/WeDLM-8B-Base:config.json: Qwen3's names and shapes, `qk_norm` true.
- DMTD: xuan-luo/DMTD-Qwen3-4B: model_type dmtdqwen3, `num_thinking_layers`, `mtp_horizon`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checkpoints import MASK, byte_level_tokenizer

Array = NDArray[Any]

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS, VOCAB = 48, 80, 4, 2, 16, 2, 320
MASK_ID, EOS_ID = 303, 301
QWEN = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 512,
    "vocab_size": VOCAB,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "max_window_layers": 36,
    "tie_word_embeddings": False,
    "bos_token_id": EOS_ID,
    "eos_token_id": EOS_ID,
    "torch_dtype": "bfloat16",
}
NO_HEAD_DIM = {"hidden_size": HEADS * HEAD_DIM}  # which then is hidden / heads


@dataclass(frozen=True)
class FamilyModel:
    """A family's config.json, and what its modeling file calls the tensors."""

    config: dict[str, Any]
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    attention: str = "self_attn."
    mlp: str = "mlp."
    names: dict[str, str] = field(default_factory=dict)  # that differ from Llama's
    bias: bool = False  # on q, k and v
    qk_norm: bool = False


NEMOTRON = FamilyModel(
    {
        "architectures": ["NemotronLabsDiffusionModel"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attn_implementation": "sdpa",
        "ar_loss_weight": 1.0,
        "block_size": 32,
        "bos_token_id": 300,
        "dlm_loss_weight": None,
        "dlm_paradigm": "bidirectional",
        "dp_varying_mask_ratio": False,
        "eos_token_id": EOS_ID,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "mask_token_id": 100,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "model_type": "nemotron_labs_diffusion",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            # Published: 16384. So short, the scale of the queries and the whole ramp are met.
            "original_max_position_embeddings": 24,
            "rope_theta": 10000.0,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
    },
    layers="encoder.layers",
    embedding="encoder.embed_tokens",
    norm="encoder.norm",
    head="diffusion_head",
)
SDAR = FamilyModel(
    QWEN
    | {"architectures": ["SDARForCausalLM"], "model_type": "sdar", "attention_bias": False}
    | {"head_dim": HEAD_DIM, "mask_token_id": MASK_ID, "eos_token_id": [EOS_ID]},
    qk_norm=True,
)
FAST_DLLM_V2 = FamilyModel(
    QWEN
    | {"architectures": ["Fast_dLLM_QwenForCausalLM"], "model_type": "Fast_dLLM_Qwen"}
    | {"bd_size": 32, "mask_token_id": MASK_ID, "layer_types": ["full_attention"] * LAYERS}
    | NO_HEAD_DIM,
    bias=True,
)
LLADA = FamilyModel(
    {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": HEADS * HEAD_DIM,
        "embedding_size": VOCAB,
        "eos_token_id": EOS_ID,
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": MASK_ID,
        "max_sequence_length": 512,
        "mlp_hidden_size": INNER,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": HEADS,
        "n_kv_heads": HEADS,
        "n_layers": LAYERS,
        "pad_token_id": EOS_ID,
        "rms_norm_eps": 1e-5,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "vocab_size": VOCAB,
        "weight_tying": False,
    },
    layers="model.transformer.blocks",
    embedding="model.transformer.wte",
    norm="model.transformer.ln_f",
    head="model.transformer.ff_out",
    attention="",
    mlp="",
    names={
        "o_proj": "attn_out",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ff_norm",
        "gate_proj": "ff_proj",
        "down_proj": "ff_out",
    },
)
DREAM = FamilyModel(
    QWEN
    | {"architectures": ["DreamModel"], "model_type": "Dream", "mask_token_id": MASK_ID}
    | {"pad_token_id": EOS_ID, "use_mrope": False, "use_cache": False}
    | NO_HEAD_DIM,
    bias=True,
)
STABLE_DIFFCODER = FamilyModel(
    {k: v for k, v in QWEN.items() if "window" not in k}
    | {"architectures": ["StableDiffcoderForCausalLM"], "model_type": "llama", "bos_token_id": 0}
    | {"attention_bias": False, "mlp_bias": False, "layer_norm_eps": None, "rope_theta": 500000.0}
    | NO_HEAD_DIM,
)
WEDLM_7B = FamilyModel(
    QWEN
    | {"architectures": ["WeDLMForCausalLM"], "model_type": "wedlm", "qk_norm": False}
    | {"mask_token_id": None}
    | NO_HEAD_DIM,
    bias=True,
)
WEDLM_8B = FamilyModel(
    WEDLM_7B.config | {"hidden_size": HIDDEN, "head_dim": HEAD_DIM, "qk_norm": True}, qk_norm=True
)
DMTD = FamilyModel(
    QWEN
    | {"architectures": ["DMTDQwen3ForCausalLM"], "model_type": "dmtdqwen3", "head_dim": HEAD_DIM}
    | {"num_encoding_layers": 0, "num_thinking_layers": 1, "num_decoding_layers": 1}
    | {"mtp_horizon": 4, "tie_word_embeddings": True},
    qk_norm=True,
)
MODELS = {
    "nemotron": NEMOTRON,
    "sdar": SDAR,
    "fast_dllm_v2": FAST_DLLM_V2,
    "llada": LLADA,
    "dream": DREAM,
    "stable_diffcoder": STABLE_DIFFCODER,
    "wedlm_7b": WEDLM_7B,
    "wedlm_8b": WEDLM_8B,
    "dmtd": DMTD,
}


def _sizes(config: dict[str, Any]) -> tuple[int, int, int, int, int]:
    """hidden, inner, heads, key-value heads, head_dim."""
    hidden = config.get("hidden_size") or config["d_model"]
    inner = config.get("intermediate_size") or config["mlp_hidden_size"]
    heads = config.get("num_attention_heads") or config["n_heads"]
    kv_heads = config.get("num_key_value_heads") or config["n_kv_heads"]
    return hidden, inner, heads, kv_heads, config.get("head_dim") or hidden // heads


def random_tensors(model: FamilyModel, seed: int = 0) -> dict[str, Array]:
    """Every tensor of the checkpoint, float32: norms away from 1, biases away from 0."""
    rng = np.random.default_rng(seed)
    hidden, inner, heads, kv_heads, head_dim = _sizes(model.config)
    tensors: dict[str, Array] = {}

    def add(name: str, *shape: int) -> None:
        values = rng.standard_normal(shape)
        if len(shape) == 2:
            values *= 1.5 / math.sqrt(shape[1])
        else:
            values = 0.5 * values if name.endswith("bias") else 1 + 0.3 * values
        tensors[name] = values.astype(np.float32)

    add(f"{model.embedding}.weight", VOCAB, hidden)
    for i in range(LAYERS):

        def part(name: str, i: int = i) -> str:
            group = model.attention if name[0] in "qkvo" else model.mlp if "proj" in name else ""
            return f"{model.layers}.{i}.{group}{model.names.get(name, name)}"

        for name, rows, columns in (
            ("q_proj", heads * head_dim, hidden),
            ("k_proj", kv_heads * head_dim, hidden),
            ("v_proj", kv_heads * head_dim, hidden),
            ("o_proj", hidden, heads * head_dim),
            ("gate_proj", inner, hidden),
            ("up_proj", inner, hidden),
            ("down_proj", hidden, inner),
        ):
            add(f"{part(name)}.weight", rows, columns)
            if model.bias and name[0] in "qkv":
                add(f"{part(name)}.bias", rows)
        add(f"{part('input_layernorm')}.weight", hidden)
        add(f"{part('post_attention_layernorm')}.weight", hidden)
        if model.qk_norm:
            add(f"{part('q_norm')}.weight", head_dim)
            add(f"{part('k_norm')}.weight", head_dim)
    add(f"{model.norm}.weight", hidden)
    if not model.config.get("tie_word_embeddings"):
        add(f"{model.head}.weight", VOCAB, hidden)
    return tensors


def write_family(
    folder: Path, model: FamilyModel, tensors: dict[str, Array] | None = None, **config: Any
) -> Path:
    """Write the checkpoint into `folder` and return it; a None in `config` removes the key."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    written = {k: v for k, v in (model.config | config).items() if k not in config or v is not None}
    (folder / "config.json").write_text(json.dumps(written))
    save_file(tensors or random_tensors(model), folder / "model.safetensors")
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(MASK) == MASK_ID
    return folder


def write_adapter(
    folder: Path, model: FamilyModel, modules: tuple[str, ...], r: int, alpha: int
) -> dict[str, Array]:
    """A PEFT adapter on `modules` of every layer; returns what it adds to each weight."""
    from safetensors.numpy import save_file

    rng, pairs, changes = np.random.default_rng(1), {}, {}
    for name, weight in random_tensors(model).items():
        module = name.removesuffix(".weight")
        if weight.ndim == 2 and name.startswith(model.layers) and module.endswith(modules):
            a = rng.standard_normal((r, weight.shape[1])).astype(np.float32) * 0.2
            b = rng.standard_normal((weight.shape[0], r)).astype(np.float32) * 0.2
            pairs[f"base_model.model.{module}.lora_A.weight"] = a
            pairs[f"base_model.model.{module}.lora_B.weight"] = b
            changes[name] = np.float32(alpha / r) * b @ a
    assert len(changes) == LAYERS * len(modules)
    folder.mkdir()
    save_file(pairs, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": [*modules]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return changes


def _inverse_frequencies(config: dict[str, Any], head_dim: int) -> Array:
    rope = config.get("rope_parameters") or {"rope_theta": config["rope_theta"]}
    theta = rope["rope_theta"]
    plain = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if rope.get("rope_type") != "yarn":
        return np.array(plain)

    def dimension(turns: float) -> float:
        length = rope["original_max_position_embeddings"] / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(theta))

    low = max(math.floor(dimension(rope["beta_fast"])), 0)
    high = min(math.ceil(dimension(rope["beta_slow"])), head_dim - 1)
    ramp = [min(max((i - low) / (high - low), 0), 1) for i in range(head_dim // 2)]
    assert 0 in ramp and 1 in ramp and any(0 < r < 1 for r in ramp)  # the test meets all of it
    divided = np.array(plain) / rope["factor"]
    return divided * np.array(ramp) + np.array(plain) * (1 - np.array(ramp))


def family_logits(
    model: FamilyModel, tensors: dict[str, Array], ids: list[int], seen: Array
) -> Array:
    """Logits [n, vocab] in float64; row i attends to the positions of seen[i]."""
    import torch

    config = model.config
    w = {name: torch.from_numpy(values).double() for name, values in tensors.items()}
    _, _, heads, kv_heads, head_dim = _sizes(config)
    n = len(ids)
    positions = torch.arange(n, dtype=torch.float64)
    angles = torch.outer(positions, torch.from_numpy(_inverse_frequencies(config, head_dim)))
    cos, sin = torch.cat([angles, angles], -1).cos(), torch.cat([angles, angles], -1).sin()
    rope = config.get("rope_parameters") or {}
    beta, length = rope.get("llama_4_scaling_beta", 0), rope.get("original_max_position_embeddings")
    scale = 1 + beta * torch.log(1 + torch.floor(positions / length)) if beta else torch.ones(n)

    def norm(x: Any, name: str) -> Any:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]) * w[name]

    def rotate(x: Any) -> Any:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], -1) * sin

    x = w[f"{model.embedding}.weight"][torch.tensor(ids)]
    for i in range(LAYERS):
        layer = f"{model.layers}.{i}."

        def linear(x: Any, group: str, name: str, layer: str = layer) -> Any:
            key = f"{layer}{group}{model.names.get(name, name)}"
            out = x @ w[f"{key}.weight"].T
            return out + w[f"{key}.bias"] if f"{key}.bias" in w else out

        def layer_norm(x: Any, name: str, layer: str = layer) -> Any:
            return norm(x, f"{layer}{model.names.get(name, name)}.weight")

        a = layer_norm(x, "input_layernorm")
        q, k, v = (
            linear(a, model.attention, f"{part}_proj").view(n, -1, head_dim).transpose(0, 1)
            for part in "qkv"
        )
        if model.qk_norm:
            q = norm(q, f"{layer}{model.attention}q_norm.weight")
            k = norm(k, f"{layer}{model.attention}k_norm.weight")
        q, k = rotate(q) * scale[:, None], rotate(k)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=0) for t in (k, v))
        scores = (q @ k.transpose(1, 2) / math.sqrt(head_dim)).masked_fill(
            ~torch.from_numpy(seen), -math.inf
        )
        attended = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, -1)
        x = x + linear(attended, model.attention, "o_proj")
        a = layer_norm(x, "post_attention_layernorm")
        inner = torch.nn.functional.silu(linear(a, model.mlp, "gate_proj"))
        x = x + linear(inner * linear(a, model.mlp, "up_proj"), model.mlp, "down_proj")
    tied = config.get("tie_word_embeddings")
    head = w[f"{model.embedding if tied else model.head}.weight"]
    return (norm(x, f"{model.norm}.weight") @ head.T).numpy()


def visible(n: int, block: int) -> Array:
    """Which positions each row sees: the last `block` rows all of them, the others no later one."""
    seen = np.tril(np.ones((n, n), dtype=bool))
    seen[n - block :] = True
    return seen
