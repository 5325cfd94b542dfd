"""The decoders beyond NTP and SBD against their uncached references: tokens, NFE, how they end."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.d2f import d2f_decode
from reference.dmtd import dmtd_decode
from reference.drafting import MATRICES, DraftingModel
from reference.family import DREAM, FAST_DLLM_V2, LLADA, NEMOTRON, SDAR, Settings, family_decode
from reference.lossless import sbd_lossless_decode
from reference.model import Adapter
from reference.random_model import RandomModel, random_model, write_checkpoint
from reference.self_speculation import self_speculation_decode
from safetensors.numpy import save_file

from sbd_engine import Engine
from sbd_engine.convert import convert

from .decoded import check, check_next_tokens, untied

SEEDS = range(24)  # every combination of architecture, RoPE scaling and tying
INFINITY = float("inf")


def opened(
    model: RandomModel, folder: Path, settings: dict[str, Any], draft_lora: Path | None = None
) -> Engine:
    """The model with `settings` as its file's sbd.* keys; an adapter goes beside it."""
    path = folder / "model.bin"
    keys = [f"sbd.{key}={value}" for key, value in settings.items()]
    checkpoint = write_checkpoint(model, folder / "checkpoint")
    convert(
        [checkpoint],
        path,
        type="f32",
        settings=keys,
        draft_lora=draft_lora,
        warn=lambda _: None,
    )
    return Engine(path, kv_dtype="f32")


@pytest.mark.parametrize("seed", SEEDS)
def test_lossless(seed: int, tmp_path: Path) -> None:
    """Every gamma gives greedy next-token decoding's text."""
    model = random_model(seed, steady=True)
    reference = model.reference()
    random = np.random.default_rng(seed)
    accepted = []
    with opened(model, tmp_path, {}) as engine:
        for gamma in (0.0, 0.1, 0.35, 1.5, INFINITY):
            for block_size in (1, 4, 16):
                n = int(random.integers(1, 60))
                options: dict[str, Any] = {
                    "max_tokens": int(random.choice([1, 5, 17, 30])),
                    "ignore_eos": bool(random.integers(2)),
                }
                draw, (expected, lengths) = untied(
                    lambda draw, n=n, options=options, gamma=gamma, block_size=block_size: (
                        sbd_lossless_decode(
                            reference,
                            model.prompt(n, draw),
                            mask_id=model.mask_id,
                            eos_ids=model.eos_ids,
                            gamma=gamma,
                            block_size=block_size,
                            **options,
                        )
                    )
                )
                block = {"gamma": gamma, "block_size": block_size}
                prompt = model.prompt(n, draw)
                actual = engine.generate(prompt, decoder="sbd_lossless", **block, **options)
                what = (n, draw, block, options)
                check(actual, expected, what)
                ends = {"eos_ids": model.eos_ids, "mask_id": model.mask_id, **options}
                check_next_tokens(reference, prompt, actual, **ends)
                if lengths:
                    assert actual.stats.accepted_length == pytest.approx(np.mean(lengths)), what
                accepted += lengths
    assert seed > 0 or max(accepted) > 2  # some draft was worth its forward


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("prompt_rule", ["all_heads", "plain", "train"])
def test_dmtd(seed: int, prompt_rule: str, tmp_path: Path) -> None:
    split = [(0, 2, 1), (1, 1, 2), (0, 3, 2), (2, 1, 1)][seed % 4]
    model = random_model(seed, layers=sum(split))
    reference = model.reference()
    random = np.random.default_rng(seed)
    keys = {"dmtd.layers": ",".join(map(str, split)), "dmtd.prompt_rule": prompt_rule}
    with opened(model, tmp_path, keys) as engine:
        for horizon in range(1, 6):
            n = int(random.integers(1, 40))
            options: dict[str, Any] = {
                "max_tokens": int(random.choice([1, 9, 22])),
                "ignore_eos": bool(random.integers(2)),
            }
            draw, (expected, thinking, _) = untied(
                lambda draw, n=n, options=options, horizon=horizon: dmtd_decode(
                    reference,
                    model.prompt(n, draw),
                    split=split,
                    horizon=horizon,
                    prompt_rule=prompt_rule,
                    eos_ids=model.eos_ids,
                    mask_id=model.mask_id,
                    **options,
                )
            )
            actual = engine.generate(
                model.prompt(n, draw), decoder="dmtd", horizon=horizon, **options
            )
            check(actual, expected, (n, horizon, options))
            assert actual.stats.thinking_forwards == thinking


D2F_SETTINGS = [(0.1, 0.95, 0.9), (0.7, 0.95, 0.3), (0.0, 0.0, 0.1), (1.0, 1.0, 1.0)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("logit_shift", [0, 1])
def test_d2f(seed: int, logit_shift: int, tmp_path: Path) -> None:
    model = random_model(seed, grouped=seed % 2 == 0)
    reference = model.reference()
    random = np.random.default_rng(seed)
    with opened(model, tmp_path, {"logit_shift": logit_shift}) as engine:
        for add, decoded, skip in D2F_SETTINGS:
            block_size = int(random.choice([4, 8, 32]))
            n = int(random.integers(1, 50))
            options: dict[str, Any] = {
                "max_tokens": int(random.choice([3, 20, 33])),
                "ignore_eos": bool(random.integers(2)),
                "block_size": block_size,
                "block_add_threshold": add,
                "decoded_token_threshold": decoded,
                "skip_threshold": skip,
            }
            draw, (expected, *_) = untied(
                lambda draw, n=n, options=options: d2f_decode(
                    reference,
                    model.prompt(n, draw),
                    mask_id=model.mask_id,
                    eos_ids=model.eos_ids,
                    logit_shift=logit_shift,
                    **options,
                )
            )
            actual = engine.generate(model.prompt(n, draw), decoder="d2f", **options)
            check(actual, expected, (n, options))


# A family's settings, the file's keys that say the same, and what a call may change of both.
FAMILIES: dict[str, tuple[Settings, dict[str, Any]]] = {
    "nemotron": (
        NEMOTRON,
        {"seed_slot": 1, "unmask": "confidence", "confidence_threshold": 0.9},
    ),
    "sdar": (
        SDAR,
        {
            "prompt_attention": "block_causal",
            "block_origin": "absolute",
            "commit_attention": "block",
            "unmask": "confidence",
            "confidence_threshold": 0.85,
        },
    ),
    "fast_dllm_v2": (
        FAST_DLLM_V2,
        {
            "prompt_attention": "block_causal",
            "block_origin": "absolute",
            "commit_attention": "block",
            "logit_shift": 1,
            "seed_slot": 1,
            "sub_block_size": 8,
            "unmask": "confidence",
            "confidence_threshold": 1.0,
        },
    ),
    "llada": (
        LLADA,
        {"prompt_attention": "full", "commit_attention": "none", "unmask": "top_n", "top_n": 1},
    ),
    "dream": (
        replace(DREAM, unmask="schedule", order="entropy"),
        {
            "prompt_attention": "full",
            "commit_attention": "none",
            "logit_shift": 1,
            "unmask": "top_n",
            "proxy": "entropy",
            "schedule": "linear",
            "steps": 512,
        },
    ),
}
VARIANTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("nemotron", {"block_size": 32}, {}),
    ("nemotron", {"block_size": 8, "threshold": 0.4}, {"confidence_threshold": 0.4}),
    ("sdar", {"block_size": 4}, {}),
    ("sdar", {"block_size": 16, "steps": 3, "threshold": 0.4}, {"confidence_threshold": 0.4}),
    ("sdar", {"block_size": 8, "steps": 3, "unmask": "static"}, {"unmask": "top_n"}),
    (
        "sdar",
        {"block_size": 8, "steps": 5, "unmask": "sequential"},
        {"unmask": "top_n", "proxy": "position"},
    ),
    ("fast_dllm_v2", {"block_size": 32}, {}),
    ("fast_dllm_v2", {"block_size": 16, "threshold": 0.4}, {"confidence_threshold": 0.4}),
    ("llada", {"block_size": 128}, {}),
    ("llada", {"block_size": 8, "steps": 3}, {}),
    ("dream", {"steps": 512}, {}),
    ("dream", {"steps": 7}, {}),
    ("dream", {"steps": 7, "order": "margin"}, {"proxy": "margin"}),
    ("dream", {"steps": 7, "order": "confidence"}, {"proxy": "confidence"}),
]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", list(FAMILIES))
def test_families(seed: int, name: str, tmp_path: Path) -> None:
    model = random_model(seed, grouped=name != "llada")
    reference = model.reference()
    random = np.random.default_rng(seed)
    published, keys = FAMILIES[name]
    named = {"decoders": name} | ({} if name == "dream" else {"block_size": 32})
    with opened(model, tmp_path, keys | named) as engine:
        for family, changed, call in VARIANTS:
            if family != name:
                continue
            # Where a family goes on behind an EOS, its text does not change any more.
            settings = replace(published, end="eos", **changed)
            n = int(random.integers(1, 50))
            options: dict[str, Any] = {
                "max_tokens": int(random.choice([3, 20, 33])),
                "ignore_eos": bool(random.integers(2)),
            }
            draw, expected = untied(
                lambda draw, n=n, options=options, settings=settings: family_decode(
                    reference,
                    model.prompt(n, draw),
                    mask_id=model.mask_id,
                    eos_ids=model.eos_ids,
                    settings=settings,
                    **options,
                )
            )
            shape = {k: v for k, v in changed.items() if k in ("block_size", "steps")}
            actual = engine.generate(model.prompt(n, draw), **options, **shape, **call)
            check(actual, expected, (n, options, changed))


@pytest.mark.parametrize("seed", SEEDS)
def test_self_speculation(seed: int, tmp_path: Path) -> None:
    model = random_model(seed, steady=True)
    reference = model.reference()
    random = np.random.default_rng(seed)
    with opened(model, tmp_path, {"seed_slot": 1}) as engine:
        for block_size in (1, 2, 8, 32):
            n = int(random.integers(1, 50))
            options: dict[str, Any] = {
                "max_tokens": int(random.choice([1, 2, 20, 33])),
                "ignore_eos": bool(random.integers(2)),
                "block_size": block_size,
            }
            draw, (expected, _) = untied(
                lambda draw, n=n, options=options: self_speculation_decode(
                    reference,
                    model.prompt(n, draw),
                    mask_id=model.mask_id,
                    eos_ids=model.eos_ids,
                    **options,
                )
            )
            actual = engine.generate(model.prompt(n, draw), decoder="nemotron_spec", **options)
            check(actual, expected, (n, options))


@pytest.mark.parametrize("seed", range(8))
def test_self_speculation_with_an_adapter(seed: int, tmp_path: Path) -> None:
    """The draft alone has it: the text stays, and what is accepted of it does not."""
    model = random_model(seed, steady=True)
    random = np.random.default_rng(seed)
    rank, alpha = 4, 8.0
    modules = {"o": MATRICES["o"]} if seed % 2 else MATRICES
    tensors: dict[str, Any] = {}
    deltas: list[dict[str, Any]] = []
    for i in range(model.config["num_hidden_layers"]):
        deltas.append({})
        for name, (module, _) in modules.items():
            out, inner = model.tensors[f"model.layers.{i}.{module}.weight"].shape
            a = random.normal(size=(rank, inner), scale=0.2).astype(np.float32)
            b = random.normal(size=(out, rank), scale=0.2).astype(np.float32)
            prefix = f"base_model.model.model.layers.{i}.{module}"
            tensors |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
            deltas[i][name] = (alpha / rank * (b.astype(np.float64) @ a)).T
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"r": rank, "lora_alpha": alpha, "target_modules": ["all"], "peft_type": "LORA"}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))

    prompt, options = model.prompt(20), {"max_tokens": 40, "ignore_eos": True, "block_size": 8}
    settings = {"decoders": "nemotron_spec,ntp"}

    def drafts(engine: Engine) -> list[Any]:
        return [chunk.revealed for chunk in engine.stream(prompt, **options)]

    draft = tmp_path / "model.draft.bin"
    with opened(model, tmp_path, settings, draft_lora=tmp_path / "lora") as engine:
        plain, plain_drafts = engine.generate(prompt, **options), drafts(engine)
    with Engine(tmp_path / "model.bin", kv_dtype="f32", draft_lora=draft) as engine:
        adapted, adapted_drafts = engine.generate(prompt, **options), drafts(engine)
        other = {"prompt": prompt, **options, "decoder": "ntp", "block_size": None}
        batch = engine.generate_batch([{"prompt": prompt, **options}, other])
    decode = partial(self_speculation_decode, prompt=prompt, mask_id=model.mask_id, **options)
    drafting = DraftingModel(model.reference(), Adapter(deltas))
    for actual, (expected, lengths) in (
        (plain, decode(model.reference())),
        (adapted, decode(drafting)),
    ):
        if expected.margin > 1e-4:
            check(actual, expected, seed)
            assert actual.stats.accepted_length == pytest.approx(np.mean(lengths))
    assert adapted.tokens == plain.tokens == batch[0].tokens == batch[1].tokens
    assert batch[0].stats.nfe == adapted.stats.nfe
    assert plain_drafts != adapted_drafts
