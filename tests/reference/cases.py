"""Random cases for each method: a model, the settings of its file, a request, and its reference.

A test converts `model` with `settings`, asks the engine for `options`, and compares with what
`decode` makes of the same prompt. All are drawn by seed, so a failure can be run again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from .d2f import d2f_decode
from .decoders import Decoded
from .dmtd import PROMPT_RULES, dmtd_decode
from .family import DREAM, FAST_DLLM_V2, LLADA, NEMOTRON, SDAR, Settings, family_decode
from .lossless import sbd_lossless_decode
from .random_model import RandomModel, random_model
from .self_speculation import self_speculation_decode

SHAPES = ("qwen2", "qwen3", "llama", "llada")
FAMILIES = {
    "nemotron": NEMOTRON,
    "sdar": SDAR,
    "fast_dllm_v2": FAST_DLLM_V2,
    "llada": LLADA,
    "dream": DREAM,
}


@dataclass(frozen=True)
class Answer:
    decoded: Decoded
    # What else the engine's statistics say: accepted_length (mean), thinking_forwards.
    counts: dict[str, Any]


@dataclass(frozen=True)
class Case:
    model: RandomModel
    settings: dict[str, str]  # of the model file, without their "sbd."
    options: dict[str, Any]  # of the request
    prompt_length: int
    decode: Callable[[list[int]], Answer]  # the prompt's tokens -> what the reference decodes

    def set_arguments(self) -> list[str]:
        """As `convert` takes them."""
        return [f"sbd.{key}={value}" for key, value in self.settings.items()]


def shaped(seed: int, **options: Any) -> RandomModel:
    """Qwen2-, Qwen3-, Llama- and LLaDA-shaped models in turn; every third ends its texts soon."""
    shape = SHAPES[seed % len(SHAPES)]
    architecture = "llama" if shape == "llada" else shape
    model = random_model(seed, architecture, grouped=shape != "llada", **options)
    if seed % 3 == 2:
        others = sorted(
            {*range(model.config["vocab_size"])}
            - {model.mask_id, model.config["bos_token_id"], *model.eos_ids}
        )
        more = np.random.default_rng(seed).choice(others, len(others) // 12, replace=False)
        model.config["eos_token_id"] += [int(i) for i in more]
    return model


def lossless_case(seed: int) -> Case:
    """Models whose drafts are often, and not always, right."""
    rng = np.random.default_rng([seed, 0])
    model = shaped(seed, steady=bool(seed % 5))
    options: dict[str, Any] = {
        "max_tokens": int(rng.choice([1, 2, 17, 21, 40])),
        "block_size": int(rng.choice([1, 2, 4, 8, 16])),
        "gamma": float(rng.choice([0.0, 0.1, 0.35, 1.5, np.inf])),
        "ignore_eos": bool(rng.integers(2)) and seed % 3 != 2,
    }

    def decode(prompt: list[int]) -> Answer:
        decoded, accepted = sbd_lossless_decode(
            model.reference(), prompt, mask_id=model.mask_id, eos_ids=model.eos_ids, **options
        )
        return Answer(decoded, {"accepted_length": fmean(accepted) if accepted else None})

    decoder = {"decoder": "sbd_lossless"}
    return Case(model, {}, decoder | options, int(rng.integers(1, 120)), decode)


def speculation_case(seed: int) -> Case:
    rng = np.random.default_rng([seed, 1])
    model = shaped(seed, steady=bool(seed % 5))
    options: dict[str, Any] = {
        "max_tokens": int(rng.choice([1, 2, 17, 21, 40])),
        "block_size": int(rng.choice([2, 4, 8, 32])),
        "ignore_eos": bool(rng.integers(2)) and seed % 3 != 2,
    }

    def decode(prompt: list[int]) -> Answer:
        decoded, accepted = self_speculation_decode(
            model.reference(), prompt, mask_id=model.mask_id, eos_ids=model.eos_ids, **options
        )
        return Answer(decoded, {"accepted_length": fmean(accepted) if accepted else None})

    settings = {"decoders": "nemotron_spec,ntp", "block_size": "32"}
    decoder = {"decoder": "nemotron_spec"}
    return Case(model, settings, decoder | options, int(rng.integers(1, 120)), decode)


def dmtd_case(seed: int) -> Case:
    """Splits with and without encoding layers, horizons 1 to 5, every prompt rule."""
    rng = np.random.default_rng([seed, 2])
    split = ((0, 3, 1), (0, 2, 2), (1, 2, 1), (2, 1, 1), (1, 1, 2))[seed % 5]
    model = shaped(seed, layers=4)
    horizon, rule = 1 + seed // 2 % 5, PROMPT_RULES[seed % 3]
    options: dict[str, Any] = {
        "max_tokens": int(rng.choice([1, 9, 23, 40])),
        "ignore_eos": bool(rng.integers(2)) and seed % 3 != 2,
    }

    def decode(prompt: list[int]) -> Answer:
        decoded, thinking, _ = dmtd_decode(
            model.reference(), prompt, split=split, horizon=horizon, prompt_rule=rule,
            eos_ids=model.eos_ids, mask_id=model.mask_id, **options,
        )  # fmt: skip
        return Answer(decoded, {"thinking_forwards": thinking})

    settings = {
        "dmtd.layers": ",".join(str(n) for n in split),
        "dmtd.horizon": str(horizon),
        "dmtd.prompt_rule": rule,
    }
    decoder = {"decoder": "dmtd"}
    return Case(model, settings, decoder | options, int(rng.integers(1, 60)), decode)


def d2f_case(seed: int) -> Case:
    """Blocks of 4 to 32, prompts shorter and longer than one, both shifts, and early EOS."""
    rng = np.random.default_rng([seed, 3])
    model = shaped(seed)
    shift = int(seed // 4 % 2)
    options: dict[str, Any] = {
        "max_tokens": int(rng.choice([3, 17, 32, 50])),
        "block_size": int(rng.choice([4, 5, 8, 16, 32])),
        "block_add_threshold": float(rng.choice([0.1, 0.5, 0.7, 0.9, 1.0])),
        "decoded_token_threshold": float(rng.choice([0.5, 0.95, 1.0])),
        "skip_threshold": float(rng.choice([0.2, 0.4, 0.6, 0.9])),
        "ignore_eos": bool(rng.integers(2)) and seed % 3 != 2,
    }

    def decode(prompt: list[int]) -> Answer:
        result = d2f_decode(
            model.reference(), prompt, mask_id=model.mask_id, eos_ids=model.eos_ids,
            logit_shift=shift, **options,
        )  # fmt: skip
        return Answer(result.decoded, {})

    settings = {
        "decoders": "d2f",
        "prompt_attention": "full",
        "commit_attention": "none",
        "logit_shift": str(shift),
    }
    decoder = {"decoder": "d2f"}
    return Case(model, settings, decoder | options, int(rng.integers(1, 60)), decode)


def family_case(name: str, seed: int, **changes: Any) -> Case:
    """One family with small blocks and random thresholds; `changes` are of its `Settings`."""
    rng = np.random.default_rng([seed, 4, list(FAMILIES).index(name)])
    model = shaped(seed)
    block_size = int(rng.choice([4, 8, 16]))
    settings = replace(FAMILIES[name], **changes)
    if settings.block_size is not None:
        settings = replace(settings, block_size=block_size)
    if settings.sub_block_size is not None:
        settings = replace(settings, sub_block_size=int(rng.choice([2, 4])))
    if settings.unmask in ("confidence", "dynamic"):
        settings = replace(settings, threshold=float(rng.choice([0.2, 0.4, 0.6, 0.9])))
    if name == "sdar":
        unmask = ("dynamic", "static", "sequential")[seed % 3]
        settings = replace(settings, unmask=unmask, steps=int(rng.choice([2, 3, block_size])))
    if name == "llada":
        settings = replace(settings, steps=int(rng.choice([1, 3, block_size])))
    if name == "dream":
        order = ("confidence", "margin", "entropy")[seed % 3]
        steps = int(rng.choice([3, 10, 64]))
        settings = replace(settings, unmask="schedule", order=order, steps=steps)
    options = {
        "max_tokens": int(rng.choice([5, 16, 30])),
        "ignore_eos": bool(rng.integers(2)) and seed % 3 != 2,
    }

    def decode(prompt: list[int]) -> Answer:
        decoded = family_decode(
            model.reference(), prompt, options["max_tokens"], model.mask_id, model.eos_ids,
            settings, ignore_eos=bool(options["ignore_eos"]),
        )  # fmt: skip
        return Answer(decoded, {})

    request = {"decoder": name, **options}
    return Case(model, metadata(name, settings), request, int(rng.integers(1, 60)), decode)


def metadata(name: str, settings: Settings) -> dict[str, str]:
    """The model file's words for `settings`."""
    whole = settings.commit_attention == "none"
    keys: dict[str, Any] = {
        "decoders": name,
        "prompt_attention": "full" if whole else settings.prompt_attention,
        "commit_attention": settings.commit_attention,
        "block_origin": settings.block_origin,
        "logit_shift": settings.logit_shift,
        "seed_slot": int(settings.seed_slot),
        "block_size": settings.block_size,
        "sub_block_size": settings.sub_block_size,
        "steps": settings.steps,
        "unmask": "confidence" if settings.unmask in ("confidence", "dynamic") else "top_n",
        "threshold": settings.threshold,
        "proxy": {"static": "confidence", "sequential": "position", "schedule": settings.order}.get(
            settings.unmask
        ),
        "schedule": "linear" if settings.unmask == "schedule" else None,
    }
    if keys["unmask"] == "top_n":
        del keys["threshold"]
    return {key: str(value) for key, value in keys.items() if value is not None}
