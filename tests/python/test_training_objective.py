"""The doubled sequence against the slow way, one document and one block at a time, after eq. 14."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch.nn.attention.flex_attention import create_mask  # noqa: E402

from training.examples import Example, pack  # noqa: E402
from training.objective import (  # noqa: E402
    IGNORED,
    Objective,
    attention_mask,
    cross_entropy_sum,
    dense_mask,
    double,
    mask_mod,
)

MASK_ID = 1
pytestmark = pytest.mark.usefixtures("one_torch_thread")


def tiny_model(attention: str = "eager") -> Any:
    """A random Qwen3, its norms drawn away from 1 so that none can be missing unseen."""
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        initializer_range=0.3,
        mask_token_id=MASK_ID,
        attn_implementation=attention,
    )
    model = transformers.Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.double()  # but transformers keeps norms, RoPE and softmax in float32


def generators(n: int, seed: int = 0) -> list[Any]:
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def random_examples(sizes: list[tuple[int, int]]) -> list[Example]:
    generator = torch.Generator().manual_seed(len(sizes))
    return [
        Example(torch.randint(2, 48, (size,), generator=generator).tolist(), prompt)
        for size, prompt in sizes
    ]


def masked_positions(batch: Any, row: int, document: int) -> dict[int, int]:
    """The positions of a document that the batch masks, with the labels it gives them."""
    noisy = slice(batch.clean, None)
    mine = batch.document[row, noisy] == document
    labels, positions = batch.labels[row, noisy][mine], batch.positions[row, noisy][mine]
    return {
        int(p): int(label) for p, label in zip(positions, labels, strict=True) if label != IGNORED
    }


def slow_losses(model: Any, example: Example, masked: set[int], k: int) -> tuple[Any, Any]:
    """Sums of eq. 14's two parts for one document, as a decoder would see it: a causal forward of
    the clean text, and per block one uncached forward of [clean past, causal][block of k rows,
    bidirectional]. Past its end the text goes on with its last token; where cut, with masks."""
    clean, start = torch.tensor(example.tokens), example.prompt_length
    ntp = matp = torch.zeros((), dtype=torch.float64)
    logits = model(input_ids=clean[None]).logits[0]
    for t in range(max(start, 1), len(clean)):
        ntp = ntp - logits[t - 1].log_softmax(-1)[clean[t]]
    for first in range(start, len(clean), k):
        end = first + k
        truth = [*example.tokens, *[example.tokens[-1] if example.ends else MASK_ID] * k]
        row = [MASK_ID if t >= first and t in masked else truth[t] for t in range(end)]
        seen = torch.ones(end, end, dtype=torch.bool).tril()
        seen[first:, first:] = True
        additive = torch.zeros(end, end, dtype=torch.float64).masked_fill(~seen, -torch.inf)
        logits = model(input_ids=torch.tensor([row]), attention_mask=additive[None, None]).logits[0]
        for t in range(first, end):
            if t in masked:
                matp = matp - logits[t].log_softmax(-1)[truth[t]]
    return ntp, matp


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("block_size", [1, 4, 5])
def test_doubled_sequence_is_every_block_of_every_document(attention: str, block_size: int) -> None:
    """Loss and gradient; prompts, answers that end or are cut inside a block, packing, padding."""
    sequences = [random_examples([(12, 0), (7, 3), (2, 1)]), random_examples([(9, 0), (5, 4)])]
    sequences[0][1] = sequences[0][1]._replace(ends=False)
    batch = double(sequences, 24, block_size, MASK_ID, generators(2), multiple=7)
    model = tiny_model(attention)
    losses = Objective(model)(batch)
    ntp = matp = torch.zeros((), dtype=torch.float64)
    labels = 0
    for row, sequence in enumerate(sequences):
        for document, example in enumerate(sequence):
            masked = masked_positions(batch, row, document)
            assert all(t >= example.prompt_length for t in masked)
            if not example.ends:
                assert all(t < len(example.tokens) for t in masked)
            sums = slow_losses(model, example, set(masked), block_size)
            ntp, matp = ntp + sums[0], matp + sums[1]
            labels += len(masked)
    assert losses.matp_labels == labels > 0
    assert losses.ntp_labels == sum(e.labels for s in sequences for e in s)
    torch.testing.assert_close(losses.ntp, ntp, rtol=1e-6, atol=0)
    torch.testing.assert_close(losses.matp, matp, rtol=1e-6, atol=0)

    slow = torch.autograd.grad(ntp + matp, list(model.parameters()))
    fast = torch.autograd.grad(losses.ntp + losses.matp, list(model.parameters()))
    for expected, actual in zip(slow, fast, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def picture(text: str) -> list[list[bool]]:
    return [[cell == "x" for cell in row if cell != "|"] for row in text.split()]


def test_attention_by_hand() -> None:
    """Blocks of two. A document of three tokens: its second block has a row past the end. One of
    a prompt of two and an answer of one. Padding: a column of the clean copy, two of the noisy."""
    sequence = [Example([5, 6, 7]), Example([8, 9, 10], prompt_length=2, ends=False)]
    batch = double([sequence], 7, 2, MASK_ID, generators(1), multiple=8)
    expected = picture("""
        x.....|.|......|..
        xx....|.|......|..
        xxx...|.|......|..
        ...x..|.|......|..
        ...xx.|.|......|..
        ...xxx|.|......|..
        ......|x|......|xx
        ......|.|xx....|..
        ......|.|xx....|..
        xx....|.|..xx..|..
        xx....|.|..xx..|..
        ...xx.|.|....xx|..
        ...xx.|.|....xx|..
        ......|x|......|xx
        ......|x|......|xx
    """)
    assert dense_mask(batch)[0, 0].tolist() == expected
    assert batch.positions[0].tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 1, 2, 3, 2, 3, 0, 0]
    assert batch.labels[0, :7].tolist() == [6, 7, IGNORED, IGNORED, 10, IGNORED, IGNORED]
    assert (batch.tokens[0, 12], batch.labels[0, 12]) == (MASK_ID, IGNORED)  # past a cut
    assert batch.labels[0, 13:].tolist() == [IGNORED] * 2


def test_past_its_end_a_document_goes_on_with_eos() -> None:
    """Masked at the document's rate and taught; past a cut, masks without a label."""
    for ends, tokens, labels in ((True, {0, MASK_ID}, {0, IGNORED}), (False, {MASK_ID}, {IGNORED})):
        sequence = [Example([5, 6, 0], ends=ends)] * 50
        batch = double([sequence], 150, 8, MASK_ID, generators(1))
        past = batch.positions[0] >= 3
        assert past.sum() == 50 * 5
        assert set(batch.tokens[0, past].tolist()) == tokens
        assert set(batch.labels[0, past].tolist()) == labels


def test_one_document_of_whole_blocks_is_the_paper() -> None:
    """Eq. 14's own attention, written from its indices: blocks counted from 0, all of them full."""
    n, k = 12, 4
    batch = double([random_examples([(n, 0)])], n, k, MASK_ID, generators(1))
    expected = torch.zeros(2 * n, 2 * n, dtype=torch.bool)
    for t in range(n):
        expected[t, : t + 1] = True
        expected[n + t, : t // k * k] = True
        expected[n + t, n + t // k * k : n + (t // k + 1) * k] = True
    assert torch.equal(dense_mask(batch)[0, 0], expected)
    assert batch.positions[0].tolist() == [*range(n), *range(n)]


def test_every_form_of_the_mask_is_the_same() -> None:
    sequences = [random_examples([(100, 0), (70, 30)]), random_examples([(150, 11), (9, 4)])]
    batch = double(sequences, 256, 7, MASK_ID, generators(2), multiple=128)
    b, s = batch.tokens.shape
    dense = dense_mask(batch)
    assert torch.equal(create_mask(mask_mod(batch), b, 1, s, s, device="cpu"), dense)
    additive = attention_mask(batch, "eager", torch.float32)
    assert torch.equal(additive == 0, dense)
    assert torch.equal(additive == -torch.inf, ~dense)

    # flex_attention's: tiles of 128 x 128, whole ones and ones to look into.
    blocks = attention_mask(batch, "flex_attention", torch.float32)
    tiles = dense.reshape(b, 1, s // 128, 128, s // 128, 128)
    assert torch.equal(blocks.to_dense().bool(), tiles.any(dim=5).any(dim=3))
    assert torch.equal(create_mask(blocks.mask_mod, b, 1, s, s, device="cpu"), dense)


def test_each_document_draws_its_own_masking_rate() -> None:
    """eta ~ U(0, 1) per document: their mean is 1/2, their deviation 1/sqrt(12)."""
    sequence = random_examples([(400, 0)] * 1500)
    batch = double([sequence], 400 * 1500, 16, MASK_ID, generators(1))
    rates = (batch.tokens[0, batch.clean :] == MASK_ID).double().reshape(1500, 400).mean(dim=1)
    assert rates.mean().item() == pytest.approx(0.5, abs=0.03)
    assert rates.std().item() == pytest.approx(12**-0.5, abs=0.02)


def test_a_draw_does_not_depend_on_the_batch_around_it() -> None:
    sequences = [random_examples([(20, 0)]), random_examples([(9, 2), (8, 1)])]
    together = double(sequences, 20, 4, MASK_ID, generators(2))
    alone = double(sequences[1:], 20, 4, MASK_ID, generators(2)[1:])
    width = alone.tokens.shape[1]
    assert torch.equal(together.tokens[1, :width], alone.tokens[0])


def test_next_token_training_has_no_noisy_copy() -> None:
    sequences = [random_examples([(12, 0), (7, 3)])]
    batch = double(sequences, 24, None, MASK_ID, generators(1))
    assert batch.tokens.shape == (1, 24)
    model = tiny_model()
    losses = Objective(model)(batch)
    expected = sum(slow_losses(model, example, set(), 4)[0] for example in sequences[0])
    torch.testing.assert_close(losses.ntp, expected, rtol=1e-6, atol=0)
    assert (losses.matp.item(), losses.matp_labels.item()) == (0, 0)
    assert losses.ntp_labels == 11 + 4


def test_a_head_in_pieces_is_the_head() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50).double()
    hidden = torch.randn(23, 8, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(50, (23,))
    whole = cross_entropy_sum(head, hidden, labels)
    pieces = cross_entropy_sum(head, hidden, labels, rows=5)
    torch.testing.assert_close(pieces, whole)
    for a, b in zip(
        torch.autograd.grad(pieces, [hidden, head.weight]),
        torch.autograd.grad(whole, [hidden, head.weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_packing_keeps_every_example_and_wastes_little() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(5, 90, (500,), generator=generator).tolist()
    examples = [Example([i] * size) for i, size in enumerate(sizes)]
    sequences = list(pack(examples, 128))
    packed = [example for sequence in sequences for example in sequence]
    assert sorted(packed) == sorted(examples)
    assert all(sum(len(e.tokens) for e in sequence) <= 128 for sequence in sequences)
    assert sum(sizes) / (128 * len(sequences)) > 0.95
    with pytest.raises(ValueError, match="an example of 129 tokens, expected at most 128"):
        list(pack([Example([0] * 129)], 128))
