"""Tiny random models of each architecture, drawn by seed and written as HF checkpoints.

They are drawn so that a missing operation shows: norms away from 1, biases away from 0, a head_dim
that is not hidden_size / heads, and logits scaled until some rows are sure and others are not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .model import ARCHITECTURES, ReferenceModel, with_block
from .stats import row_stats

Tensors = dict[str, NDArray[np.float32]]
ROPES = ("default", "linear", "llama3")  # and yarn, with scaled queries, where asked for
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
LOWEST_NATS = (0.02, 0.3)  # peaked rows, but not so peaked that float32 sees no entropy at all


@dataclass(frozen=True)
class RandomModel:
    config: dict[str, Any]  # as in config.json
    tensors: Tensors  # HF names, float32

    @property
    def mask_id(self) -> int:
        return int(self.config["mask_token_id"])

    @property
    def eos_ids(self) -> list[int]:
        return list(self.config["eos_token_id"])

    def reference(self) -> ReferenceModel:
        return ReferenceModel(self.config, self.tensors)

    def rounded(self, dtype: str) -> RandomModel:
        """The same model as a file of this type holds it: matrices rounded, vectors as they are."""
        return RandomModel(self.config, round_weights(self.tensors, dtype))

    def prompt(self, n: int, seed: int = 0) -> list[int]:
        """n random tokens, none of them the mask or an EOS."""
        special = {self.mask_id, *self.eos_ids}
        usual = [i for i in range(self.config["vocab_size"]) if i not in special]
        return [int(i) for i in np.random.default_rng([seed, n]).choice(usual, n)]


def random_model(
    seed: int,
    architecture: str | None = None,
    *,
    rope: str | None = None,
    tied: bool | None = None,
    multiple_of_32: bool = False,
    layers: int | None = None,
    grouped: bool = True,
    steady: bool = False,
) -> RandomModel:
    """A model of 2 or 3 layers, or of `layers`.

    Left open, architecture, RoPE and tying go through all their combinations in 24 seeds.

    `multiple_of_32` makes every matrix row that long, as the types q8_0 and q4_0 need it. Without
    `grouped` each query head has a key head of its own, as in LLaDA's Llama graph. A `steady` one
    heeds what it has read more than the token at hand, so that a mask often gets the very token
    that next-token prediction would choose.
    """
    architecture = architecture or list(ARCHITECTURES)[seed % 4]
    rope = rope or ROPES[seed // 4 % 3]
    tied = bool((seed // 4 + seed) % 2) if tied is None else tied
    # The architecture seeds too, so that equal seeds do not mean equal shapes.
    rng = np.random.default_rng([seed, list(ARCHITECTURES).index(architecture)])
    config = _random_config(rng, architecture, rope, tied, multiple_of_32, grouped)
    config["num_hidden_layers"] = layers or config["num_hidden_layers"]
    model = RandomModel(config, _random_tensors(rng, config))
    if steady:
        query = "q_norm.weight" if config["model_type"] == "qwen3" else "q_proj.weight"
        for name in [name for name in model.tensors if name.endswith(query)]:
            model.tensors[name] *= np.float32(0.2)
        model.tensors["model.embed_tokens.weight"] *= np.float32(0.03)
    _scale_logits(rng, model)
    return model


def _random_config(
    rng: np.random.Generator,
    architecture: str,
    rope: str,
    tied: bool,
    multiple_of_32: bool,
    grouped: bool,
) -> dict[str, Any]:
    step = 32 if multiple_of_32 else 1
    while True:
        kv_heads, group = int(rng.integers(1, 4)), int(rng.integers(1, 5))
        if not grouped:
            kv_heads, group = kv_heads * group, 1
        head_dim = 2 * int(rng.integers(4, 17))
        hidden = step * int(rng.integers(33, 97) // step)
        heads = kv_heads * group
        fits = heads * head_dim % step == 0 and (hidden % 32 == 0) == multiple_of_32
        # transformers refuses a Llama whose heads do not divide hidden_size, head_dim or not
        if fits and heads <= 9 and hidden % heads == 0 and hidden != heads * head_dim:
            break
    vocab = int(rng.integers(50, 301))
    vocab += vocab % 16 == 0
    special = rng.choice(vocab, 2 + int(rng.integers(1, 3 + vocab // 40)), replace=False)
    config: dict[str, Any] = {
        "architectures": [f"{CLASSES[architecture]}ForCausalLM"],
        "model_type": architecture,
        "hidden_act": "silu",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": step * int(rng.integers(40, 161) // step),
        "num_hidden_layers": int(rng.integers(2, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 1024,
        "rms_norm_eps": float(rng.choice([1e-5, 1e-6, 1e-3])),
        "tie_word_embeddings": tied,
        "bos_token_id": int(special[0]),
        "mask_token_id": int(special[1]),
        "eos_token_id": [int(i) for i in special[2:]],
        "dtype": "float32",
    }
    if architecture in ("llama", "qwen3"):
        config["attention_bias"] = False
    if architecture == "mistral":
        config["sliding_window"] = None
    if architecture == "qwen2":
        config |= {"use_sliding_window": False, "sliding_window": 131072}  # a window not in use
    theta = float(rng.choice([1e3, 1e4, 1e6]))
    scaling: dict[str, Any] = {"rope_type": rope}
    if rope != "default":
        scaling["factor"] = float(rng.choice([2.0, 3.5, 8.0]))
    if rope == "llama3":
        # An original length this short puts wavelengths on both sides of, and inside, the ramp.
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling["original_max_position_embeddings"] = int(rng.integers(40, 200))
    if rope == "yarn":
        # As in Nemotron-Labs-Diffusion: cosines and sines unscaled, queries scaled in steps.
        scaling |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
        scaling |= {"llama_4_scaling_beta": 0.1}
        scaling["original_max_position_embeddings"] = int(rng.integers(10, 40))
    if rng.integers(2):
        config["rope_parameters"] = {"rope_theta": theta, **scaling}
    else:
        config["rope_theta"] = theta
        config["rope_scaling"] = None if rope == "default" else scaling
    return config


def _random_tensors(rng: np.random.Generator, config: dict[str, Any]) -> Tensors:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q_rows = config["num_attention_heads"] * config["head_dim"]
    kv_rows = config["num_key_value_heads"] * config["head_dim"]
    bias, qk_norm = ARCHITECTURES[config["model_type"]]
    tensors: Tensors = {}

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        weights = rng.standard_normal((rows, columns)) * gain / np.sqrt(columns)
        tensors[name] = weights.astype(np.float32)

    def norm(name: str, size: int) -> None:
        tensors[name] = rng.uniform(0.4, 1.8, size).astype(np.float32)

    matrix("model.embed_tokens.weight", config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        norm(f"{prefix}input_layernorm.weight", hidden)
        # Sharp attention: only what they attend to sets the masks of a block apart.
        matrix(f"{prefix}self_attn.q_proj.weight", q_rows, hidden, gain=1.5)
        matrix(f"{prefix}self_attn.k_proj.weight", kv_rows, hidden, gain=1.5)
        matrix(f"{prefix}self_attn.v_proj.weight", kv_rows, hidden)
        matrix(f"{prefix}self_attn.o_proj.weight", hidden, q_rows, gain=1.5)
        if bias:
            for part, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
                values = rng.standard_normal(rows) * 0.5
                tensors[f"{prefix}self_attn.{part}_proj.bias"] = values.astype(np.float32)
        if qk_norm:
            norm(f"{prefix}self_attn.q_norm.weight", config["head_dim"])
            norm(f"{prefix}self_attn.k_norm.weight", config["head_dim"])
        norm(f"{prefix}post_attention_layernorm.weight", hidden)
        matrix(f"{prefix}mlp.gate_proj.weight", inner, hidden)
        matrix(f"{prefix}mlp.up_proj.weight", inner, hidden)
        matrix(f"{prefix}mlp.down_proj.weight", hidden, inner)
    norm("model.norm.weight", hidden)
    if not config["tie_word_embeddings"]:
        matrix("lm_head.weight", config["vocab_size"], hidden)
    return tensors


def _scale_logits(rng: np.random.Generator, model: RandomModel) -> None:
    """Scale the final norm until a tenth of the rows falls below an entropy drawn of LOWEST_NATS.

    The rows are causal ones and those of blocks after a short and a long prompt. The logits are
    linear in that norm, and unlike the head's it is no other tensor when tied.
    """
    reference = model.reference()
    prompts = [model.prompt(n) for n in (2, 30, 120)]
    inputs = [([*p, *[model.mask_id] * 16], with_block(len(p) + 16, 16)) for p in prompts]
    logits = np.concatenate([reference.forward(*ids_kv_end, last=18) for ids_kv_end in inputs])
    target = np.exp(rng.uniform(*np.log(LOWEST_NATS)))
    low, high = 0.0, 1000.0
    for _ in range(30):
        scale = (low + high) / 2
        if np.quantile(row_stats(scale * logits, model.mask_id).entropy, 0.1) > target:
            low = scale
        else:
            high = scale
    model.tensors["model.norm.weight"] *= np.float32(high)


def round_weights(tensors: Tensors, dtype: str) -> Tensors:
    """`tensors` through `dtype` (f32, f16, bf16, q8_0, q4_0) and back; vectors stay as they are."""
    if dtype == "f32":
        return dict(tensors)
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    kind = GGMLQuantizationType[dtype.upper()]

    def through(tensor: NDArray[np.float32]) -> NDArray[np.float32]:
        return dequantize(quantize(tensor, kind), kind).reshape(tensor.shape).astype(np.float32)

    return {k: through(t) if t.ndim > 1 else t.copy() for k, t in tensors.items()}


def write_checkpoint(model: RandomModel, folder: Path) -> Path:
    """Write `model` as an HF checkpoint into `folder`, made if need be, and return it.

    Its tokenizer splits at white space and knows t0, t1, ..., <bos>, <mask>, and <eos>, <eos1>, ...
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config
    names = [f"t{i}" for i in range(config["vocab_size"])]
    special = {config["bos_token_id"]: "<bos>", model.mask_id: "<mask>"}
    special |= {id_: f"<eos{i or ''}>" for i, id_ in enumerate(model.eos_ids)}
    for id_, name in special.items():
        names[id_] = name
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id_, "content": name, "special": True, **added}
            for id_, name in sorted(special.items())
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {name: i for i, name in enumerate(names)},
            "unk_token": next(name for name in names if name.startswith("t")),
        },
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "mask_token": "<mask>",
        "add_bos_token": False,
        "model_max_length": config["max_position_embeddings"],
    }
    generation_config = {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": model.eos_ids,
    }
    for name, value in {
        "config.json": config,
        "generation_config.json": generation_config,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config,
    }.items():
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return folder
