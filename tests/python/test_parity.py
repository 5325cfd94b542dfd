"""The engine's logits against transformers' own models: one checkpoint, both in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.random_model import random_model, write_checkpoint

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
    """Causal rows, and the last 16 rows as one block: there with a dense 4-D mask."""
    model = random_model(5, architecture, rope=rope, tied=tied)
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
