"""From a checkpoint on disk to a model ready to train: checked, with a mask token, with LoRA."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from training.errors import TrainingError

ARCHITECTURES = ("llama", "qwen2", "qwen3")
MASK_TOKEN = "<|mask|>"
ROWS_MULTIPLE = 8  # of an embedding that grows: GPUs are slow on odd row counts
MODELS: Any = AutoModelForCausalLM  # which has no types
LOGGING: Any = transformers_logging
LOGGING.disable_progress_bar()  # one per file read and written
LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTER = "default"


@dataclass(frozen=True)
class Base:
    """What is known of a checkpoint before its weights are read."""

    folder: Path
    config: Any
    tokenizer: Any
    dtype: torch.dtype  # of its weights, and of those that training will write


def open_base(folder: Path) -> Base:
    path = folder / "config.json"
    if not folder.is_dir():
        raise TrainingError(f"{folder}: no such folder: expected a checkpoint on this machine")
    if not path.is_file():
        raise TrainingError(f"{folder}: no config.json: expected a Hugging Face checkpoint")
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError):
        raise TrainingError(f"{path}: not a JSON object") from None
    if model_type not in ARCHITECTURES:
        raise TrainingError(
            f"{path}: model_type is {model_type!r}, expected one of {', '.join(ARCHITECTURES)}"
        )
    config = AutoConfig.from_pretrained(folder)
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        raise TrainingError(f"{path}: some layers have a sliding window, expected full attention")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise TrainingError(f"{folder}: no tokenizer that transformers can open: {error}") from None
    if tokenizer.eos_token_id is None:
        raise TrainingError(f"{folder}: the tokenizer has no EOS token, so no text could end")
    return Base(folder, config, tokenizer, config.dtype or torch.float32)


def checkpoint_fingerprint(folder: Path) -> str:
    """Of what a run begins with: the configuration, the weights' files and their sizes."""
    path = folder / "config.json"
    if not path.is_file():
        raise TrainingError(f"{folder}: no config.json: expected a Hugging Face checkpoint")
    digest = hashlib.sha256(path.read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()


def choose_mask_token(base: Base, wanted: str | None) -> int:
    """The mask token's id: the one asked for, the checkpoint's own, or a new one.

    The tokenizer then knows it as its mask token, and the configuration too.
    """
    tokenizer, config = base.tokenizer, base.config
    known = getattr(config, "mask_token_id", None)
    if wanted is None and known is not None:
        if not 0 <= known < config.vocab_size:
            raise TrainingError(
                f"{base.folder}: mask_token_id is {known}, expected less than the vocabulary's "
                f"{config.vocab_size}"
            )
        if tokenizer.mask_token_id not in (None, known):
            raise TrainingError(
                f"{base.folder}: config.json's mask_token_id is {known}, the tokenizer's "
                f"{tokenizer.mask_token_id}: say which with --mask-token"
            )
        wanted = tokenizer.convert_ids_to_tokens(known)
        if wanted is None:
            raise TrainingError(f"{base.folder}: the tokenizer has no token {known}, the mask's")
    token = wanted or tokenizer.mask_token or MASK_TOKEN
    tokenizer.add_special_tokens({"mask_token": token})
    mask = int(tokenizer.mask_token_id)
    if mask in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        raise TrainingError(
            f"the mask token {token!r} is the tokenizer's EOS or BOS token: choose another"
        )
    config.mask_token_id = mask
    return mask


def load_model(base: Base, attention: str, dtype: torch.dtype, old_tokens: int) -> Any:
    """The model, its embedding grown to hold the mask token where it did not.

    `old_tokens`: the tokenizer's length before the mask token. Where the token is new, its row, in
    the embedding and in an untied head, begins as the mean of the others.
    """
    try:
        model = MODELS.from_pretrained(
            base.folder, config=base.config, dtype=dtype, attn_implementation=attention
        )
    except (OSError, ValueError, RuntimeError) as error:
        line = " ".join(str(error).split())
        raise TrainingError(f"{base.folder}: weights not to be loaded: {line}") from None
    mask, rows = base.config.mask_token_id, model.config.vocab_size
    _grow(model, mask)
    if mask >= old_tokens:
        fresh = slice(rows, None) if mask >= rows else slice(mask, mask + 1)
        for layer in model.get_input_embeddings(), model.get_output_embeddings():
            with torch.no_grad():
                mean = layer.weight[: min(old_tokens, rows)].double().mean(dim=0)
                layer.weight[fresh] = mean.to(dtype)
    return model


def empty_model(base: Base, attention: str, dtype: torch.dtype) -> Any:
    """`load_model` without the weights: the shapes alone."""
    with torch.device("meta"):
        model = MODELS.from_config(base.config, dtype=dtype, attn_implementation=attention)
    _grow(model, base.config.mask_token_id)
    renew_rotary(model)
    return model


def renew_rotary(model: Any) -> None:
    """Of a model that was made without weights: its frequencies are none of them."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


def _grow(model: Any, mask_token_id: int) -> None:
    if mask_token_id >= model.config.vocab_size:
        rows = -(-(mask_token_id + 1) // ROWS_MULTIPLE) * ROWS_MULTIPLE
        model.resize_token_embeddings(rows, mean_resizing=False)


def add_lora(model: Any, rank: int, alpha: float | None = None) -> None:
    """Freeze the model and put an adapter of `rank`, times `alpha` / `rank`, beside each of its
    linear layers. `alpha`: None is twice the rank.

    The mask token's embedding row is frozen like the rest: as the mean of all, it is a vector
    like no token's, and that is all that the layers need to know a mask.
    """
    from peft import LoraConfig, inject_adapter_in_model

    scale: Any = 2 * rank if alpha is None else alpha
    config = LoraConfig(r=rank, lora_alpha=scale, target_modules=LORA_LAYERS)
    inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def lora_layers(model: Any) -> list[Any]:
    """Those that `add_lora` has put an adapter beside."""
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def lora_scale(model: Any) -> float:
    """The factor of all of `add_lora`'s adapters; 0 where there is none."""
    scales = {layer.scaling[ADAPTER] for layer in lora_layers(model)}
    return scales.pop() if scales else 0.0


@contextmanager
def without_lora(model: Any) -> Iterator[None]:
    """Inside `with`, the model is the frozen one."""
    layers = lora_layers(model)
    # peft's own way, enable_adapters, takes requires_grad from the adapters as well.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def lora_pairs(state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A state dict's adapters: B and A by the name of the weight that they stand beside."""
    pairs = {}
    for name, a in state.items():
        layer, is_a, _ = name.partition(f".lora_A.{ADAPTER}.weight")
        if is_a:
            pairs[f"{layer}.weight"] = state[f"{layer}.lora_B.{ADAPTER}.weight"], a
    return pairs


def merge_lora(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """A state dict with adapters to the plain model's: `W + scale B A`."""
    merged = {n.replace(".base_layer.", "."): w for n, w in state.items() if ".lora_" not in n}
    for name, (b, a) in lora_pairs(state).items():
        weight = merged[name]
        change = scale * (b.float() @ a.float())
        merged[name] = (weight.float() + change).to(weight.dtype)
    return merged


def write_model(model: Any, state: dict[str, Tensor], dtype: torch.dtype, folder: Path) -> None:
    """config.json, generation_config.json and one model.safetensors, of the plain model."""
    with torch.device("meta"):
        plain = MODELS.from_config(model.config, dtype=dtype)
    plain.generation_config = model.generation_config
    state = {name: w.to(dtype) for name, w in merge_lora(state, lora_scale(model)).items()}
    plain.save_pretrained(folder, state_dict=state, max_shard_size="1TB")
