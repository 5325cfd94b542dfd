"""What a PEFT adapter_config.json says of the weights beside it.

Only what is known to leave `W + scale * B A` as it is may be in it: a field that is not known, or
one that says something else, is refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NoReturn

from .errors import ConvertError
from .patterns import Patterns
from .values import is_finite

NAME = "adapter_config.json"
# Where it came from, which modules it was put on (the tensors say that too), how it was trained.
WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "peft_version", "revision", "task_type"),
    *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),
    *("modules_to_save", "inference_mode", "lora_dropout", "megatron_core", "merge_weights"),
    *("runtime_config", "qalora_group_size"),
    # Options of an init_lora_weights, without effect for another.
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
}
READ = {
    *("peft_type", "init_lora_weights", "bias", "ensure_weight_tying"),
    *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora"),
}
# Inits that leave the base weights alone. The others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) begin by
# changing them, so that their adapter fits no checkpoint as published.
PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
BIASES = (None, "none", "all", "lora_only")  # trained ones are in the adapter, whole
MEANINGS = {
    "alora_invocation_tokens": "aLoRA acts only behind these tokens",
    "arrow_config": "Arrow mixes several adapters token by token",
    "enable_lora": "it is LoRA on parts of a joint projection",
    "fan_in_fan_out": "it is of transposed weights",
    "kasa_config": "KaSA changes the base weights",
    "layer_replication": "it repeats layers of the base",
    "lora_bias": "it has biases of its own",
    "megatron_config": "it is of Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA draws its weights anew for each forward",
    "target_parameters": "it changes parameters of mixtures of experts",
    "trainable_token_indices": "it changes single rows of the embedding",
    "use_bdlora": "its matrices are diagonal blocks",
    "use_dora": "DoRA rescales the merged weights",
    "use_qalora": "QALoRA pools its inputs",
    "velora_config": "VeLoRA has tensors of its own",
}


@dataclass(frozen=True)
class AdapterConfig:
    rank: int | None  # None: as the tensors have it
    alpha: float
    ranks: Patterns
    alphas: Patterns
    rank_stabilised: bool
    ties_embeddings: bool  # one change of tied embeddings is meant for both sides

    def scale(self, module: str, rank: int) -> float:
        """What B A of this rank is multiplied by, as PEFT does."""
        if self.rank is not None:
            expected = self.ranks.get(module, self.rank)
            if expected != rank:
                raise ConvertError(
                    f"LoRA adapter: {module}: {NAME} says rank {expected:g}, its tensors have "
                    f"{rank}"
                )
        alpha = self.alphas.get(module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_adapter_config(config: dict[str, Any]) -> AdapterConfig:
    """Raises ConvertError where the adapter is more than LoRA, or where a value is not sound."""
    for field, value in config.items():
        if value and field not in WITHOUT_EFFECT | READ:
            meaning = MEANINGS.get(field, "the field is unknown and may change what they mean")
            raise ConvertError(
                f"LoRA adapter: {NAME}: {field!r:.60}: expected null, got {value!r:.60}: its "
                f"tensors cannot be merged as plain LoRA: {meaning}"
            )
    if config.get("peft_type") not in (None, "LORA"):
        _refuse(config, "peft_type", "'LORA'")
    init = config.get("init_lora_weights")
    if not isinstance(init, (bool, str, type(None))) or init not in PLAIN_INITS:
        _refuse(
            config,
            "init_lora_weights",
            f"one of {', '.join(map(str, PLAIN_INITS[1:]))} (others change the base weights; PEFT's"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...) makes it plain)",
        )
    if not isinstance(config.get("bias"), (str, type(None))) or config.get("bias") not in BIASES:
        _refuse(config, "bias", "one of none, all, lora_only")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if rank is not None and not _is_rank(rank):
        _refuse(config, "r", "a whole number above 0")
    if not is_finite(alpha):
        _refuse(config, "lora_alpha", "a number")
    return AdapterConfig(
        rank,
        alpha,
        _patterns(config, "rank_pattern", "whole numbers above 0"),
        _patterns(config, "alpha_pattern", "numbers"),
        _flag(config, "use_rslora"),
        _flag(config, "ensure_weight_tying"),
    )


def _patterns(config: dict[str, Any], field: str, expected: str) -> Patterns:
    sound = _is_rank if field == "rank_pattern" else is_finite
    values = config.get(field) or {}
    if not isinstance(values, dict) or not all(map(sound, values.values())):
        _refuse(config, field, f"an object of {expected} by modules' names")
    return Patterns(values, f"LoRA adapter: {NAME}: {field}")


def _flag(config: dict[str, Any], field: str) -> bool:
    if config.get(field) not in (None, True, False):
        _refuse(config, field, "true or false")
    return bool(config.get(field))


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _refuse(config: dict[str, Any], field: str, expected: str) -> NoReturn:
    raise ConvertError(
        f"LoRA adapter: {NAME}: {field}: expected {expected}, got {config.get(field)!r:.60}"
    )
