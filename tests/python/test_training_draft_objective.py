"""The draft adapter's objective: by hand, and against two plain models that share no code."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from torch.nn import functional as F  # noqa: E402
from torch.nn.attention.flex_attention import create_mask  # noqa: E402

from training.checkpoint import add_lora, lora_layers, merge_lora  # noqa: E402
from training.draft_objective import (  # noqa: E402
    MASK_EMBEDDING,
    MASKED,
    DraftObjective,
    FrozenHead,
    Masking,
    double,
)
from training.draft_trainer import figures  # noqa: E402
from training.examples import Example  # noqa: E402
from training.objective import IGNORED, dense_mask, mask_mod  # noqa: E402

from .checkpoints import random_model  # noqa: E402

K, DECAY = 3, 0.5
pytestmark = pytest.mark.usefixtures("one_torch_thread")


def generators(n: int, seed: int = 0) -> list[Any]:
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def adapted(model_type: str = "llama", mask: int | None = None) -> DraftObjective:
    """A random model with a random adapter, none of it 0."""
    model = random_model(model_type).requires_grad_(False)
    add_lora(model, rank=4, alpha=6.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in lora_layers(model):
            for part in (layer.lora_A, layer.lora_B):
                weight = part["default"].weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return DraftObjective(model, K, DECAY, mask)


def test_a_batch_by_hand() -> None:
    """Two blocks of three behind a prompt of two tokens; the answer ends in the second block."""
    example = Example([10, 11, 20, 21, 22, 23, 24], prompt_length=2)
    one_shot = Masking(one_shot=True, fused=0.0, offsets=False)
    batch = double([[example]], K, one_shot, generators(1))
    assert batch.clean == 7
    clean, noisy = slice(0, 7), slice(7, None)
    assert batch.tokens[0, clean].tolist() == list(example.tokens)
    m, none = MASKED, IGNORED
    assert batch.tokens[0, noisy].tolist() == [20, m, m, 23, m, m]
    assert batch.positions[0, noisy].tolist() == [2, 3, 4, 5, 6, 7]
    assert batch.labels[0, noisy].tolist() == [none, 21, 22, none, 24, none]
    # Each sees the clean tokens before its block, and its block.
    expected = [[1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0]] * 3
    expected += [[1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1]] * 3
    assert dense_mask(batch, first=7)[0, 0].int().tolist() == expected
    flex = create_mask(mask_mod(batch, first=7), 1, 1, 6, 13, device="cpu")
    assert torch.equal(flex, dense_mask(batch, first=7))

    fused = double([[example]], K, one_shot._replace(fused=1.0), generators(1))
    assert fused.tokens[0, noisy].tolist() == [m] * 6
    assert torch.equal(fused.labels, batch.labels)


def test_what_is_drawn() -> None:
    """Half of all slots 0 are masked; others all, or at a rate of each document's own; blocks begin
    anywhere in the first."""
    examples = [[Example(list(range(100, 149)), prompt_length=1)] for _ in range(200)]
    for one_shot in (True, False):
        batch = double(examples, 4, Masking(one_shot), generators(200))
        noisy = slice(batch.clean, None)
        there = batch.document[:, noisy] == 0
        tokens, slots = batch.tokens[:, noisy], (batch.positions - batch.past)[:, noisy]
        masked = tokens == MASKED
        first, others = there & (slots == 0), there & (slots > 0)
        assert masked[first].float().mean() == pytest.approx(0.5, abs=0.05)
        within = others & (batch.positions[:, noisy] < 49)
        rates = [masked[i][within[i]].float().mean().item() for i in range(200)]
        if one_shot:
            assert min(rates) == 1
        else:
            assert sum(rates) / 200 == pytest.approx(0.5, abs=0.08)
            assert min(rates) < 0.1 and max(rates) > 0.9
        assert ((batch.labels[:, noisy] != IGNORED) == (masked & within)).all()
        starts = batch.positions[:, noisy][:, 0]
        assert set(starts.tolist()) == {1, 2, 3, 4}
        where = batch.labels[:, noisy] != IGNORED
        assert torch.equal(batch.labels[:, noisy][where], batch.positions[:, noisy][where] + 100)
    again = double(examples[:3], 4, Masking(False), generators(3))
    width = again.tokens.shape[1]
    assert torch.equal(again.tokens, batch.tokens[:3, :width])  # whatever else is in the batch


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("mask", [None, 5])
def test_the_loss_is_that_of_blocks_behind_a_plain_model(model_type: str, mask: int | None) -> None:
    """Per block: the plain model reads what stands before it, and a second model, whose weights are
    merged with the adapter, the block, in that cache."""
    objective = adapted(model_type, mask)
    model = objective.model
    merged = random_model(model_type)
    scale = model.model.layers[0].self_attn.q_proj.scaling["default"]
    assert scale == 1.5
    state = {n: w for n, w in model.state_dict().items() if n != MASK_EMBEDDING}
    merged.load_state_dict(merge_lora(state, scale))
    plain = random_model(model_type)
    embedding = plain.get_input_embeddings().weight
    vector = embedding.mean(0) if mask is None else embedding[mask]

    rng = torch.Generator().manual_seed(3)
    sizes = [(23, 4), (19, 1), (6, 3)]
    sequences = [
        [Example(torch.randint(8, 300, (n,), generator=rng).tolist(), given)] for n, given in sizes
    ]
    batch = double(sequences, K, Masking(one_shot=False), generators(3, seed=7))
    sums = objective(batch)

    expected = torch.zeros(2, K)
    right, labels = torch.zeros(2, K), torch.zeros(2, K)
    for i, ((example,), row) in enumerate(
        zip(sequences, batch.tokens[:, batch.clean :], strict=True)
    ):
        columns = [c[i, batch.clean :] for c in (batch.positions, batch.document, batch.labels)]
        for first in range(0, len(row), K):
            tokens = row[first : first + K]
            positions, documents, wanted = (c[first : first + K] for c in columns)
            if documents[0] != 0:
                continue
            start = int(positions[0])
            with torch.no_grad():
                past = transformers.DynamicCache()
                plain.model(
                    torch.tensor([example.tokens[:start]]), None, None, past, use_cache=True
                )
                inputs = embedding[tokens.clamp(min=0)]
                inputs = torch.where((tokens == MASKED)[:, None], vector, inputs)
                seen = torch.ones(1, 1, K, start + K, dtype=torch.bool)
                hidden = merged.model(
                    None, seen, positions[None], past, inputs[None], use_cache=True
                )
                logits = plain.lm_head(hidden.last_hidden_state[0])
            fused = int(tokens[0] == MASKED)
            for slot, label in enumerate(wanted.tolist()):
                if label != IGNORED:
                    expected[fused, slot] += F.cross_entropy(logits[slot], torch.tensor(label))
                    right[fused, slot] += float(logits[slot].argmax() == label)
                    labels[fused, slot] += 1
    assert labels.sum() > 6 and (labels[:, 0] == 0).all()
    assert torch.equal(sums.labels, labels) and torch.equal(sums.right, right)
    torch.testing.assert_close(sums.entropies, expected, rtol=1e-4, atol=1e-4)
    weights = torch.tensor([0.0, 1.0, DECAY])
    torch.testing.assert_close(sums.loss, (expected * weights).sum(), rtol=1e-4, atol=1e-4)


def test_the_frozen_half_is_the_plain_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, whatever the adapter; and nothing but the adapter and the mask learns."""
    caches: list[Any] = []

    class Kept(transformers.DynamicCache):
        def __init__(self) -> None:
            super().__init__()
            caches.append(self)

    monkeypatch.setattr("training.draft_objective.DynamicCache", Kept)
    objective = adapted()
    tokens = torch.randint(8, 300, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = double([[Example(tokens, 4)]], K, Masking(True), generators(1))
    objective(batch).loss.backward()
    plain, alone = random_model("llama"), transformers.DynamicCache()
    with torch.no_grad():
        expected = plain(torch.tensor([tokens]), use_cache=True, past_key_values=alone).logits
    for ours, theirs in zip(caches[0].layers, alone.layers, strict=True):
        assert torch.equal(ours.keys[:, :, :20], theirs.keys)
        assert torch.equal(ours.values[:, :, :20], theirs.values)
        assert not torch.equal(ours.keys[:, :, 20:40], theirs.keys[:, :, :20])
    learnt = {n for n, p in objective.model.named_parameters() if p.grad is not None}
    every = {n for n, _ in objective.model.named_parameters() if "lora_" in n}
    assert learnt == every | {MASK_EMBEDDING} and len(every) == 2 * 7 * 2
    # Behind it the model still is what it was, where nobody asks it to draft.
    from training.checkpoint import without_lora

    with torch.no_grad(), without_lora(objective.model):
        assert torch.equal(objective.model(torch.tensor([tokens])).logits, expected)
    with torch.no_grad():
        assert not torch.equal(objective.model(torch.tensor([tokens])).logits, expected)


@pytest.mark.parametrize("rows", [1, 5, 2500])
def test_the_heads_gradient(rows: int) -> None:
    """Against autograd of the plain formula; in more than one part."""
    rng = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 8, generator=rng, requires_grad=True)
    head = torch.randn(40, 8, generator=rng)
    labels = torch.randint(40, (rows,), generator=rng)
    weights = torch.rand(rows, generator=rng)
    loss, entropies, right = FrozenHead.apply(hidden, head, labels, weights)
    (ours,) = torch.autograd.grad(3 * loss, hidden)
    logits = hidden @ head.T
    each = F.cross_entropy(logits, labels, reduction="none")
    (theirs,) = torch.autograd.grad(3 * (each * weights).sum(), hidden)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(entropies, each)
    torch.testing.assert_close(loss, (each * weights).sum())
    assert torch.equal(right, (logits.argmax(1) == labels).float())


def test_how_far_drafts_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three full blocks and one of two tokens; the head is right where the test says so."""
    objective = adapted()
    example = Example(list(range(8, 8 + 2 + 11)), prompt_length=2)
    masking = Masking(one_shot=True, fused=0.0, offsets=False)
    batch = double([[example]], K, masking, generators(1))
    says = torch.tensor([1.0, 1, 1, 0, 0, 1, 1])  # slots 1 and 2 of blocks 1 to 3, 1 of block 4
    monkeypatch.setattr(FrozenHead, "apply", lambda *_: (torch.zeros(()), says, says))
    with torch.no_grad():
        agreement = objective(batch, judged=True)
    assert agreement.offered[1:].tolist() == [4, 2]
    assert agreement.kept[1:].tolist() == [3, 1]
    assert figures(*agreement) == {
        "prefix": 0.75 + 0.75 * 0.5,
        "acceptance": [1.0, 3.5 / 5, 1.5 / 3],
    }
