"""Replicas of the demo's training leave a backward pass with the mean of their gradients."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from training.demo.replicas import share_gradients  # noqa: E402

from .checkpoints import random_model  # noqa: E402


def test_replicas_share_their_gradients(tmp_path: Path) -> None:
    tokens = torch.randint(0, 32, (2, 1, 9), generator=torch.Generator().manual_seed(0))

    def gradients(model: Any, rank: int, world: int = 1) -> list[Any]:
        if world > 1:
            share_gradients(model, rank, world, str(tmp_path / "meeting"))
        model(input_ids=tokens[rank], labels=tokens[rank]).loss.backward()
        return [p.grad for p in model.parameters()]

    alone = [gradients(random_model("qwen3", tie_word_embeddings=True), rank) for rank in range(2)]
    models = [random_model("qwen3", tie_word_embeddings=True) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(gradients, models, range(2), [2, 2]))
    for first, second, a, b in zip(*alone, *together, strict=True):
        assert not torch.allclose(first, second)
        torch.testing.assert_close(a, (first + second) / 2)
        torch.testing.assert_close(b, a)
