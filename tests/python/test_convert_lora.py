"""LoRA adapters: merged, against PEFT's own merge and its live model; refused; their patterns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sbd_engine.convert import ConvertError
from sbd_engine.convert.adapter_config import (
    MEANINGS,
    READ,
    WITHOUT_EFFECT,
    read_adapter_config,
)
from sbd_engine.convert.patterns import Patterns

from .checkpoints import (
    Array,
    convert_quietly,
    expected_tensors,
    read_model,
    refusal,
    write_checkpoint,
)


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
        {
            "target_modules": ["q_proj", "k_proj"],
            "alpha_pattern": {r"^model\.layers\.(0|7)\..*q_(proj|x)$": 3, "k_proj": 1},
            "init_lora_weights": "mica",
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
    in_each_layer = {*options["target_modules"]} - {"lm_head", "embed_tokens"}
    assert len(changed) == 2 * len(in_each_layer) + ("lm_head" in str(options)) + (
        "embed_tokens" in str(options)
    )


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
    assert "says rank 4, its tensors have 2" in attempt(pair, r=4)
    assert "says rank 1, its tensors" in attempt(pair, r=2, rank_pattern={"0.*q_proj": 1})


TIED: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    {"target_modules": ["q_proj"]},
]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("options", TIED)
def test_one_side_of_tied_embeddings(options: dict[str, Any], tmp_path: Path) -> None:
    """The live model's logits: where PEFT changed one side, the other is as it was."""
    logits, engine = _live_and_converted(
        tmp_path, "llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-6}, options
    )
    one_side = "embed_tokens" in str(options) or "lm_head" in str(options)
    untied = one_side and not options.get("ensure_weight_tying")
    assert ("output.weight" in read_model(tmp_path / "model.bin")[1]) == untied
    np.testing.assert_allclose(engine, logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases(bias: str, tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "v_proj"], "bias": bias}
    logits, engine = _live_and_converted(tmp_path, "qwen2", {"head_dim": 16}, options)
    np.testing.assert_allclose(engine, logits, rtol=0, atol=1e-3)


def _live_and_converted(
    folder: Path, model_type: str, config: dict[str, Any], options: dict[str, Any]
) -> tuple[Array, Array]:
    """Logits of a model with a random adapter: PEFT's, and the engine's of the converted file."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from sbd_engine import Engine

    base = write_checkpoint(folder / "base", model_type, **config)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        peft.LoraConfig(task_type="CAUSAL_LM", r=4, **options),
    ).eval()
    ids = [3, 9, 27, 40, 5, 6, 7]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape))
        logits = model(torch.tensor([ids])).logits[0].numpy()
    model.save_pretrained(folder / "adapter")
    convert_quietly(base, folder / "model.bin", type="f32", lora=folder / "adapter")
    with Engine(folder / "model.bin", kv_dtype="f32") as engine:
        return logits, engine.forward(ids)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type: expected 'LORA', got 'IA3'"),
    ({"use_dora": True}, "'use_dora': expected null, got True: its tensors cannot be merged as"),
    ({"alora_invocation_tokens": [5, 6]}, "aLoRA acts only behind these tokens"),
    ({"arrow_config": {"top_k": 3}}, "Arrow mixes several adapters"),
    ({"kasa_config": {"beta": 1}}, "KaSA changes the base weights"),
    ({"layer_replication": [[0, 1], [0, 2]]}, "it repeats layers of the base"),
    ({"trainable_token_indices": [7]}, "it changes single rows of the embedding"),
    ({"use_qalora": True}, "QALoRA"),
    ({"lora_bias": True}, "biases of its own"),
    ({"new_in_peft": {"scale": 2}}, "'new_in_peft': expected null, got {'scale': 2}: its tensors"),
    ({"init_lora_weights": "pissa_niter_4"}, "(others change the base weights; PEFT's save_pre"),
    *(
        (
            {"init_lora_weights": name},
            "init_lora_weights: expected one of True, False, gaussian, eva",
        )
        for name in ("pissa", "olora", "corda", "loftq", "lora_ga", "tomorrow's", 3, ["gaussian"])
    ),
    ({"bias": "some"}, "bias: expected one of none, all, lora_only, got 'some'"),
    ({"lora_alpha": None}, "lora_alpha: expected a number, got None"),
    ({"lora_alpha": True}, "lora_alpha: expected a number, got True"),
    ({"lora_alpha": math.nan}, "lora_alpha: expected a number, got nan"),
    ({"lora_alpha": 10**400}, "lora_alpha: expected a number, got 1000"),
    ({"r": 0}, "r: expected a whole number above 0, got 0"),
    ({"r": "2"}, "r: expected a whole number above 0, got '2'"),
    ({"use_rslora": "yes"}, "use_rslora: expected true or false, got 'yes'"),
    ({"alpha_pattern": ["q_proj"]}, "alpha_pattern: expected an object of numbers by modules'"),
    ({"alpha_pattern": {"q_proj": None}}, "expected an object of numbers by modules' names, got"),
    ({"rank_pattern": {"q_proj": 1.5}}, "rank_pattern: expected an object of whole numbers above"),
    ({"alpha_pattern": {"*.q_proj": 2}}, "alpha_pattern: pattern '*.q_proj': not understood at 0"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_more_than_plain_lora_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvertError) as error:
        read_adapter_config({"lora_alpha": 8, "r": 2, **values})
    assert message in str(error.value)
    assert len(str(error.value)) < 400


def test_every_field_that_peft_writes_is_known() -> None:
    """A field that a later PEFT adds fails here, and is refused until it is understood."""
    peft = pytest.importorskip("peft")
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert fields <= WITHOUT_EFFECT | READ | MEANINGS.keys()
    read_adapter_config(peft.LoraConfig(target_modules=["q_proj"]).to_dict())
    null = dict.fromkeys(MEANINGS) | {"unknown": False, "empty": {}}
    plain = read_adapter_config({"lora_alpha": 8, **null, "loftq_config": {"loftq_bits": 4}})
    assert plain.scale("model.layers.0.mlp.up_proj", 16) == 0.5


def _peft_matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


PATTERNS = [
    *("q_proj", "proj", ".*", "", "layers.1", r"layers\.1\..*", "^model.layers.0.self_attn.q_proj"),
    *("^layers", "self_attn.(q|k)_proj", "(a|b|)proj", r"layers\.(\d|1\d)\.mlp\..+", "q_proj$"),
    *(r"layers.[0-3].*(up|down)_proj", r"layers.[^1].*", r"[\]a].*", "(?:.*k|.*v)_proj"),
    *(r"layers\.\d{2}\.\w+\.q_proj", r"\w{1,4}_proj", r"(\w+\.){3}mlp", r"(l|a|y|e|r|s)+\.0\D+"),
    *("(.|.)(.|.)(.|.)_proj", "((a*)*)*_proj", r"model.*?q_\S*", "o_?proj", "o?_proj", "(q_proj)?"),
]


def test_patterns_are_those_of_re() -> None:
    modules = [
        f"model.layers.{layer}.{module}"
        for layer in (0, 1, 2, 13, 21)
        for module in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp")
    ] + ["lm_head", "model.embed_tokens", ""]
    matched = 0
    for pattern in PATTERNS:
        patterns = Patterns({pattern: 1}, "x")
        for module in modules:
            expected = _peft_matches(pattern, module)
            assert patterns.get(module, 0) == expected, (pattern, module)
            matched += expected
    assert matched > len(PATTERNS)
    rng = random.Random(0)
    for _ in range(400):
        pattern = "".join(rng.choices(["a", "b", ".", "(a|b.)", "*", "(b", ")", "?", "{2}"], k=6))
        try:
            re.compile(pattern)
            patterns = Patterns({pattern: 1}, "x")
        except (re.error, ConvertError):
            continue
        for _ in range(8):
            text = "".join(rng.choices("ab.", k=rng.randrange(8)))
            assert patterns.get(text, 0) == _peft_matches(pattern, text), (pattern, text)


@pytest.mark.parametrize(
    "pattern",
    [
        *("([a-z_.0-9]+)+!", "(a|a)*" * 30 + "!", "(.*)*" * 20 + "!", "((((.*)+)+)+)+!"),
        *("(.|.)" * 80, ".*" * 2000 + "!", "((.{0,99}){0,99}){0,99}!", "(.?){9999}!"),
    ],
)
def test_patterns_never_go_back(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbd_engine.convert.patterns.MOST_STEPS", 1_000_000)
    start = time.process_time()
    with contextlib.suppress(ConvertError):
        patterns = Patterns({pattern: 1}, "x")
        for layer in range(32):
            assert patterns.get(f"model.layers.{layer}.self_attn.q_proj", 0) == 0
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(?!mlp).*", "not understood"),
        (r"(.)\1", "not understood"),
        ("(q_proj", "expected a ) for each ("),
        ("q_proj)", "expected no ')' at 6"),
        ("[z-a]", "bad character range"),
        ("q{2,1}", "the other way round"),
        ("(" * 60 + ")" * 60, "at most 50 groups within groups"),
    ],
)
def test_patterns_that_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ConvertError, match=re.escape(message)):
        Patterns({pattern: 1}, "alpha_pattern")
