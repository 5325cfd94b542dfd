"""Checkpoints of the public block-diffusion families: their file, and the engine's forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbd_engine.convert import convert

from .checkpoints import convert_quietly, edit_json, read_model, refusal, write_checkpoint
from .family_models import (
    DREAM,
    EOS_ID,
    LAYERS,
    LLADA,
    MASK_ID,
    MODELS,
    NEMOTRON,
    SDAR,
    FamilyModel,
    family_logits,
    random_tensors,
    visible,
    write_adapter,
    write_family,
)

pytest.importorskip("torch")
pytest.importorskip("transformers")


def relative_error(actual: Any, expected: Any) -> float:
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


def token_ids(n: int, seed: int = 3) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 300, n)]


# The forward


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_computes_the_family(name: str, tmp_path: Path) -> None:
    """Causal rows, the last 16 as one block, and all rows as one: fully bidirectional."""
    from sbd_engine import Engine

    model, n = MODELS[name], 100
    tensors = random_tensors(model)
    folder = write_family(tmp_path / "model", model, tensors)
    convert_quietly(folder, tmp_path / "model.bin", type="f32", mask_token=MASK_ID)
    ids = [*token_ids(n - 16), *[MASK_ID] * 16]
    with Engine(tmp_path / "model.bin", kv_dtype="f32") as engine:
        for block in (0, 16, n):
            expected = family_logits(model, tensors, ids, visible(n, block))
            assert relative_error(engine.forward(ids, block=block), expected) <= 1e-4, block


def test_the_growth_of_queries_shows() -> None:
    """What the test above would see if the engine left it out: from the original length on only."""
    tensors, ids = random_tensors(NEMOTRON), token_ids(100)
    seen = visible(100, 0)
    rope = NEMOTRON.config["rope_parameters"] | {"llama_4_scaling_beta": 0}
    flat = FamilyModel(NEMOTRON.config | {"rope_parameters": rope}, **_layout(NEMOTRON))
    grown, plain = (family_logits(m, tensors, ids, seen) for m in (NEMOTRON, flat))
    length = rope["original_max_position_embeddings"]
    np.testing.assert_array_equal(grown[:length], plain[:length])
    assert relative_error(plain[length:], grown[length:]) > 1e-3


def _layout(model: FamilyModel) -> dict[str, Any]:
    return {k: v for k, v in vars(model).items() if k != "config"}


# The metadata

SDAR_KEYS = {
    "block_size": 4,
    "prompt_attention": "block_causal",
    "block_origin": "absolute",
    "commit_attention": "block",
    "unmask": "confidence",
}
DMTD_KEYS = {"dmtd.layers": [0, 1, 1], "dmtd.horizon": 4, "dmtd.prompt_rule": "all_heads"}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron": (
        "mistral3",
        {
            "decoders": ["nemotron", "nemotron_spec", "sbd", "sbd_lossless", "ntp"],
            "mask_token_id": 100,
            "block_size": 32,
            "seed_slot": 1,
            "unmask": "confidence",
            "confidence_threshold": 0.9,
        },
    ),
    "sdar": ("qwen3", SDAR_KEYS | {"decoders": ["sdar"], "confidence_threshold": 0.85}),
    "fast_dllm_v2": (
        "qwen2",
        SDAR_KEYS
        | {"decoders": ["fast_dllm_v2"], "block_size": 32, "sub_block_size": 8, "logit_shift": 1}
        | {"seed_slot": 1, "confidence_threshold": 0.9},
    ),
    "llada": (
        "llada",
        {
            "decoders": ["llada"],
            "block_size": 128,
            "prompt_attention": "full",
            "commit_attention": "none",
            "unmask": "top_n",
            "proxy": "confidence",
            "top_n": 1,
        },
    ),
    "dream": (
        "dream",
        {
            "decoders": ["dream"],
            "logit_shift": 1,
            "prompt_attention": "full",
            "commit_attention": "none",
            "unmask": "top_n",
            "proxy": "entropy",
            "steps": 512,
            "schedule": "linear",
        },
    ),
    "stable_diffcoder": (
        "llama",
        SDAR_KEYS | {"decoders": ["sdar"], "mask_token_id": 5, "confidence_threshold": 0.95},
    ),
    "wedlm_7b": ("qwen2", {"decoders": ["ntp"]}),
    "wedlm_8b": ("qwen3", {"decoders": ["ntp"]}),
    "dmtd": ("qwen3", {"decoders": ["dmtd", "ntp"]} | DMTD_KEYS),
}


def as_stored(value: Any) -> Any:
    return float(np.float32(value)) if isinstance(value, float) else value


MASKLESS = ("wedlm_7b", "wedlm_8b", "dmtd")


@pytest.mark.parametrize("name", MODELS)
def test_metadata_is_what_is_published(name: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", MODELS[name])
    metadata = converted(folder, tmp_path)
    architecture, expected = PUBLISHED[name]
    assert metadata["general.architecture"] == architecture
    keys = {k.removeprefix("sbd."): v for k, v in metadata.items() if k.startswith("sbd.")}
    assert keys.pop("eos_token_ids") == [EOS_ID]
    if name not in MASKLESS:
        expected = {"mask_token_id": MASK_ID} | expected
    assert keys == {k: as_stored(v) for k, v in expected.items()}
    assert metadata.get("diffusion.shift_logits") == {"llada": False, "dream": True}.get(name)
    beta = metadata.get("mistral3.attention.temperature_scale")
    assert beta == (pytest.approx(0.1) if name == "nemotron" else None)
    scaling = metadata.get(f"{architecture}.rope.scaling.type")
    assert scaling == ("yarn" if name == "nemotron" else None)


def converted(folder: Path, tmp_path: Path, **options: Any) -> dict[str, Any]:
    convert_quietly(folder, tmp_path / "model.bin", **options)
    return read_model(tmp_path / "model.bin")[0]


def test_the_user_goes_before_the_published(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", NEMOTRON)
    settings = ["threshold=0.5", "sbd.seed_slot=0", "decoders=sbd,ntp"]
    metadata = converted(folder, tmp_path, block_size=16, mask_token=7, settings=settings)
    expected = {
        "decoders": ["sbd", "ntp"],
        "mask_token_id": 7,
        "block_size": 16,
        "seed_slot": 0,
        "confidence_threshold": 0.5,
        "unmask": "confidence",
    }
    assert {key: metadata[f"sbd.{key}"] for key in expected} == expected


@pytest.mark.parametrize(
    ("folder", "config", "size"),
    [
        ("SDAR-8B-Chat-b32", {}, 32),
        ("SDAR-8B-Chat", {"_name_or_path": "JetLM/SDAR-1.7B-Chat-b16"}, 16),
        ("SDAR-8B-Chat-b32", {"block_size": 8}, 8),
        ("TraDo-8B-Instruct", {}, 4),
        ("SDAR-b8x", {}, 4),
    ],
)
def test_block_size_in_a_name(
    folder: str, config: dict[str, Any], size: int, tmp_path: Path
) -> None:
    metadata = converted(write_family(tmp_path / folder, SDAR, **config), tmp_path)
    assert metadata["sbd.block_size"] == size


@pytest.mark.parametrize(
    ("name", "mask"),
    [("sdar", 151669), ("fast_dllm_v2", 151665), ("llada", 126336), ("dream", 151666)],
)
def test_mask_where_the_config_names_none(name: str, mask: int, tmp_path: Path) -> None:
    """The tokenizer's, else the published one, which this small vocabulary has not."""
    folder = write_family(tmp_path / "model", MODELS[name], mask_token_id=None)
    message = f"mask token: expected an id from 0 to 319, got {mask}"
    assert message in refusal(folder, tmp_path / "model.bin")
    edit_json(folder / "tokenizer_config.json", mask_token="<|mask|>")
    assert converted(folder, tmp_path)["sbd.mask_token_id"] == MASK_ID


def test_illada_is_llada_with_another_mask(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", LLADA, mask_token_id=5)
    assert converted(folder, tmp_path)["sbd.mask_token_id"] == 5


def test_end_of_turn_ends_the_text(tmp_path: Path) -> None:
    """LLaDA's and Dream's configs name only the end of the text: the chat template knows more."""
    for model, token in (LLADA, "<|eot_id|>"), (DREAM, "<|im_end|>"):
        folder = write_family(tmp_path / token, model)
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        for added in tokenizer["added_tokens"]:
            added["content"] = {"<|end|>": token}.get(added["content"], added["content"])
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        assert converted(folder, tmp_path)["sbd.eos_token_ids"] == [EOS_ID]
        (folder / "chat_template.jinja").write_text("{{ messages[0].content }}" + token)
        assert converted(folder, tmp_path)["sbd.eos_token_ids"] == [EOS_ID, 302]


def test_wedlm_says_what_it_cannot(tmp_path: Path) -> None:
    lines: list[str] = []
    folder = write_family(tmp_path / "model", MODELS["wedlm_8b"])
    convert(folder, tmp_path / "model.bin", warn=lines.append)
    assert "decodes as ntp" in " ".join(lines)


CONFIDENT = {"unmask": "confidence", "confidence_threshold": 0.9, "top_n": 1}
INSPECTED: dict[str, dict[str, Any]] = {
    "nemotron": {
        "nemotron": {"block_size": 32, **CONFIDENT},
        "nemotron_spec": {"block_size": 32},
        "sbd": {"block_size": 32, **CONFIDENT},
        "sbd_lossless": {"block_size": 32, **CONFIDENT},
        "ntp": {},
    },
    "sdar": {"sdar": {"block_size": 4, **CONFIDENT, "confidence_threshold": 0.85}},
    "fast_dllm_v2": {"fast_dllm_v2": {"block_size": 32, **CONFIDENT}},
    "llada": {
        "llada": {"block_size": 128, "unmask": "top_n", "top_n": 1, "proxy": "confidence"},
    },
    "dream": {"dream": {"steps": 512, "unmask": "top_n", "proxy": "entropy"}},
    "wedlm_7b": {"ntp": {}},
    "dmtd": {"dmtd": {"horizon": 4}, "ntp": {}},
}


@pytest.mark.parametrize("name", INSPECTED)
def test_inspect_shows_what_a_file_can_run(name: str, tmp_path: Path) -> None:
    """The default first, each with the defaults that it reads."""
    from sbd_engine import Engine, _core
    from sbd_engine.cli.inspect import summarise

    folder = write_family(tmp_path / "model", MODELS[name])
    convert_quietly(folder, tmp_path / "model.bin")
    contents = _core.read_gguf(tmp_path / "model.bin")
    summary = summarise("model.bin", 1, contents, list_tensors=False)
    assert summary["problem"] is None
    expected = INSPECTED[name]
    assert summary["decoders"] == expected
    assert [*summary["decoders"]] == [*expected]
    with Engine(tmp_path / "model.bin") as engine:
        for decoder, values in expected.items():
            resolved = engine.resolve(decoder=decoder)
            assert {name: resolved[name] for name in values} == values
            done = engine.generate(token_ids(5), decoder=decoder, max_tokens=2, ignore_eos=True)
            assert len(done.tokens) == 2


def test_inspect_lists_no_decoder_that_cannot_start(tmp_path: Path) -> None:
    from sbd_engine import _core
    from sbd_engine.cli.inspect import summarise

    def inspected(*settings: str) -> tuple[list[str], str | None]:
        convert_quietly(folder, tmp_path / "model.bin", settings=settings)
        contents = _core.read_gguf(tmp_path / "model.bin")
        summary = summarise("model.bin", 1, contents, list_tensors=False)
        return [*summary["decoders"]], summary["problem"]

    folder = write_checkpoint(tmp_path / "model", "qwen3")
    usual = ["block_size=8"]
    assert inspected(*usual) == (["sbd_lossless", "sbd", "ntp"], None)
    assert inspected(*usual, "commit_attention=block") == (["sbd", "ntp"], None)
    decoders, problem = inspected(*usual, "logit_shift=1")
    assert decoders == ["ntp"]
    assert problem and problem.startswith('decoder "sbd" fuses') and problem.endswith("use ntp")


# Adapters


@pytest.mark.parametrize(
    ("model", "modules", "decoders"),
    [
        (DREAM, ("q_proj", "k_proj", "v_proj", "o_proj"), ["d2f", "dream"]),
        (LLADA, ("q_proj", "k_proj", "v_proj", "attn_out"), ["d2f", "llada"]),
    ],
    ids=["dream", "llada"],
)
def test_d2f_adapter_is_merged(
    model: FamilyModel, modules: tuple[str, ...], decoders: list[str], tmp_path: Path
) -> None:
    """r = alpha = 32, on the modules of SJTU-Deng-Lab/D2F_Dream_Base_7B_Lora and its LLaDA's."""
    from sbd_engine import Engine

    tensors = random_tensors(model)
    folder = write_family(tmp_path / "model", model, tensors)
    changes = write_adapter(tmp_path / "adapter", model, modules, r=32, alpha=32)
    lines: list[str] = []
    convert(
        folder, tmp_path / "model.bin", type="f32", lora=tmp_path / "adapter", warn=lines.append
    )
    metadata = read_model(tmp_path / "model.bin")[0]
    assert metadata["sbd.decoders"] == decoders
    assert metadata["sbd.block_size"] == 32
    thresholds = {"block_add": 0.1, "decoded_token": 0.95, "skip": 0.9}
    for name, value in thresholds.items():
        assert metadata[f"sbd.d2f.{name}_threshold"] == pytest.approx(value)
    assert "taken for one of D2F" in lines[-1]

    merged = {name: w + changes.get(name, np.float32(0)) for name, w in tensors.items()}
    ids = token_ids(60)
    expected = family_logits(model, merged, ids, visible(60, 60))
    base = family_logits(model, tensors, ids, visible(60, 60))
    with Engine(tmp_path / "model.bin", kv_dtype="f32") as engine:
        assert relative_error(engine.forward(ids, block=60), expected) <= 1e-4
    assert relative_error(base, expected) > 0.1


def test_draft_adapter_is_a_file_of_its_own(tmp_path: Path) -> None:
    """Nemotron's `linear_spec_lora`: o_proj, scale 4; the model's file is as it is without."""
    from sbd_engine import Engine

    folder = write_family(tmp_path / "model", NEMOTRON)
    changes = write_adapter(tmp_path / "draft", NEMOTRON, ("o_proj",), r=8, alpha=32)
    convert_quietly(folder, tmp_path / "plain.bin", type="f32")
    convert_quietly(folder, tmp_path / "model.bin", type="f32", draft_lora=tmp_path / "draft")
    plain, model = (tmp_path / f"{name}.bin" for name in ("plain", "model"))
    assert model.read_bytes() == plain.read_bytes()
    metadata, drafts = read_model(tmp_path / "model.draft.bin")
    assert metadata["general.type"] == "adapter" and metadata["adapter.type"] == "lora"
    assert metadata["general.architecture"] == "mistral3"
    assert len(drafts) == 2 * LAYERS
    scale = metadata["adapter.lora.alpha"] / 8
    for i in range(LAYERS):
        a, b = (drafts[f"blk.{i}.attn_output.weight.lora_{side}"] for side in "ab")
        expected = changes[f"encoder.layers.{i}.self_attn.o_proj.weight"]
        np.testing.assert_allclose(scale * b @ a, expected, rtol=1e-5, atol=1e-6)

    with Engine(model, draft_lora=tmp_path / "model.draft.bin", kv_dtype="f32") as engine:
        options: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}
        drafted = engine.generate(token_ids(9), decoder="nemotron_spec", **options)
        assert drafted.tokens == engine.generate(token_ids(9), decoder="ntp", **options).tokens


# Direct Multi-Token Decoding


@pytest.mark.parametrize("model_type", ["qwen3", "llama"])
def test_a_cut_given_at_conversion(model_type: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", model_type, mask_token=None, num_hidden_layers=3)
    settings = ["sbd.dmtd.layers=1,1,1", "sbd.dmtd.horizon=3", "dmtd.prompt_rule=train"]
    metadata = converted(folder, tmp_path, settings=settings)
    assert metadata["sbd.decoders"] == ["dmtd", "ntp"]
    assert metadata["sbd.dmtd.layers"] == [1, 1, 1]
    assert (metadata["sbd.dmtd.horizon"], metadata["sbd.dmtd.prompt_rule"]) == (3, "train")
    metadata = converted(folder, tmp_path, settings=["dmtd.layers=0,2,1"])
    assert (metadata["sbd.dmtd.horizon"], metadata["sbd.dmtd.prompt_rule"]) == (4, "all_heads")
