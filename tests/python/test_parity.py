"""The engine's logits against transformers' own models: one checkpoint, both in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.random_model import RandomModel, random_model, write_checkpoint

from sbd_engine import Engine
from sbd_engine.convert import convert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def relative_error(actual: Any, expected: Any) -> float:
    return float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("rope", ["default", "linear", "llama3"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_logits(architecture: str, rope: str, tied: bool, tmp_path: Path) -> None:
    check_logits(random_model(5, architecture, rope=rope, tied=tied), tmp_path)


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32.0}  # cards' float
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
ROPES: dict[str, dict[str, Any]] = {
    "a card's yarn": {"rope_theta": 1e6, "rope_scaling": YARN},
    "yarn's attention factor": {
        "rope_parameters": YARN | {"rope_theta": 1e3, "beta_fast": 8, "attention_factor": 0.8}
    },
    "yarn's mscale": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}},
    "yarn that shrinks": {"rope_scaling": YARN | {"factor": 0.5}},
    "yarn of the context": {"rope_scaling": {"type": "yarn", "factor": 2.0, "rope_theta": 1e3}},
    "its original length outside": {"original_max_position_embeddings": 64, "rope_scaling": YARN},
    "yarn beside rope_parameters": {"rope_theta": 5e5, "rope_parameters": PLAIN}
    | {"rope_scaling": YARN},
    "its theta inside": {"rope_parameters": PLAIN, "rope_scaling": YARN | {"rope_theta": 2e3}},
    "two thetas": {"rope_theta": 2e3, "rope_parameters": PLAIN},
    "theta outside": {"rope_theta": 2e3, "rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "two types": {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}},
    "dynamic": {"rope_theta": 2e3, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "llama3 of the context": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0}
        | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e3},
    },
}


@pytest.mark.parametrize(
    ("architecture", "rope"),
    [("qwen3", "a card's yarn"), *(("qwen2", name) for name in ROPES), ("llama", "a card's yarn")],
)
def test_logits_with_rope_as_configs_write_it(architecture: str, rope: str, tmp_path: Path) -> None:
    model = random_model(5, architecture, rope="default", tied=True)
    config = {k: v for k, v in model.config.items() if not k.startswith("rope_")} | ROPES[rope]
    check_logits(RandomModel(config, model.tensors), tmp_path)


def check_logits(model: RandomModel, tmp_path: Path) -> None:
    """Causal rows, and the last 16 rows as one block: there with a dense 4-D mask."""
    checkpoint = write_checkpoint(model, tmp_path / "checkpoint")
    convert([checkpoint], tmp_path / "model.bin", type="f32", warn=lambda _: None)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    )
    n, block = 120, 16
    ids = [*model.prompt(n - block), *[model.mask_id] * block]
    seen = np.tril(np.ones((n, n), dtype=bool))
    with Engine(tmp_path / "model.bin", kv_dtype="f32") as engine:
        for rows in (0, block):
            if rows:
                seen[-rows:] = True
            mask = torch.where(torch.tensor(seen), 0.0, torch.finfo(torch.float32).min)
            with torch.no_grad():
                expected = theirs(
                    input_ids=torch.tensor([ids]),
                    attention_mask=mask[None, None],
                    position_ids=torch.arange(n)[None],
                ).logits[0]
            error = relative_error(engine.forward(ids, block=rows), expected.numpy())
            assert error <= 1e-4  # False for NaN too
