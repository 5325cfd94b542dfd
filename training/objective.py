"""The Set Block Decoding objective (Gat et al., arXiv 2509.04185, eq. 14).

One forward over the doubled sequence `[x ; x_hat]` trains both jobs of the network. `x`, the clean
copy, is read causally and gives the next-token loss. `x_hat`, the noisy copy, is the text in blocks
of `block_size`, some of its tokens replaced by the mask token; its block b reads the clean tokens
before the block and all of itself, and gives the loss of its masked positions, each *at that same
position*.

For one document without a prompt, its length a multiple of the block size, this is eq. 14 to the
letter. Beyond that, training sees what decoding will see:
- Several documents share a sequence. None sees another, and each has its own positions and its own
  masking rate eta ~ U(0, 1).
- Decoding begins behind the prompt, so blocks are counted from there, prompt tokens carry no label
  and have no noisy twin.
- A decoder does not know where the text will end, and its blocks are always whole. So the last
  block is not left out or cut short where the document ends: behind its EOS more EOS follow, masked
  and taught like any token. Rows past the end that were never taught answer something, and what
  they answer with confidence is unmasked first and misleads the rest. Where a document was cut and
  not ended, nothing is known of those rows: they hold the mask token and carry no label.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint

from training.examples import Example, Sequence

IGNORED = -100  # the label of a row without one
PADDING = -1  # the document of a row without one
CLEAN = -1  # the block of a clean row


class Batch(NamedTuple):
    """Rows of `[x ; x_hat]`, int64 [B, S]; the first `clean` columns are x.

    What a row sees follows from three numbers: its `document`, how many clean tokens of it are its
    `past`, and its noisy `block`.
    """

    clean: int
    tokens: Tensor
    positions: Tensor  # in the document
    document: Tensor
    past: Tensor
    block: Tensor  # of the document; CLEAN for a row of x
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.clean, *(column.to(device) for column in self[1:]))


class LossSums(NamedTuple):
    """Cross-entropies summed over their labels, float32 [], and how many labels those were."""

    ntp: Tensor
    matp: Tensor
    ntp_labels: Tensor
    matp_labels: Tensor

    @property
    def loss(self) -> Tensor:
        """Eq. 14 adds the two copies' losses."""
        return self.ntp + self.matp


def double(
    sequences: list[Sequence],
    length: int,
    block_size: int | None,
    mask_token_id: int,
    generators: list[torch.Generator],
    multiple: int = 1,
) -> Batch:
    """The batch of eq. 14: `length` clean columns, then noisy ones, padded to a `multiple`.

    Each sequence draws its masks from its own generator, so a draw does not depend on the batch
    around it. `block_size` None leaves the noisy copy out: next-token training.
    """
    clean = [stack([clean_rows(e, d) for d, e in enumerate(s)], length) for s in sequences]
    if block_size is None:
        return Batch(length, *torch.stack(clean).unbind(1))
    noisy = [
        [_noisy_rows(e, d, block_size, mask_token_id, generator) for d, e in enumerate(sequence)]
        for sequence, generator in zip(sequences, generators, strict=True)
    ]
    longest = max(sum(part.shape[1] for part in parts) for parts in noisy)
    width = -(-longest // multiple) * multiple
    rows = [torch.cat([x, stack(parts, width)], 1) for x, parts in zip(clean, noisy, strict=True)]
    return Batch(length, *torch.stack(rows).unbind(1))


def clean_rows(example: Example, document: int) -> Tensor:
    """A document's rows of x, int64 [6, n]: the columns of Batch."""
    tokens = torch.as_tensor(example.tokens, dtype=torch.int64)
    positions = torch.arange(len(tokens))
    labels = tokens.roll(-1)
    labels[: max(example.prompt_length - 1, 0)] = IGNORED
    labels[-1] = IGNORED
    same = torch.full_like(tokens, document)
    clean = torch.full_like(tokens, CLEAN)
    return torch.stack([tokens, positions, same, positions + 1, clean, labels])


def _noisy_rows(
    example: Example,
    document: int,
    block_size: int,
    mask_token_id: int,
    generator: torch.Generator,
) -> Tensor:
    """A document's rows of x_hat, int64 [6, n], n a multiple of `block_size`."""
    start = example.prompt_length
    answer = torch.as_tensor(example.tokens[start:], dtype=torch.int64)
    n = -(-len(answer) // block_size) * block_size
    past_end = n - len(answer)
    eta = torch.rand((), generator=generator)
    masked = torch.rand(n, generator=generator) < eta
    if example.ends:
        truth = torch.cat([answer, answer[-1:].expand(past_end)])
    else:
        truth = torch.cat([answer, answer.new_full((past_end,), IGNORED)])
        masked[len(answer) :] = True
    block = torch.arange(n) // block_size
    return torch.stack(
        [
            truth.masked_fill(masked, mask_token_id),
            start + torch.arange(n),
            torch.full((n,), document),
            start + block * block_size,
            block,
            truth.masked_fill(~masked, IGNORED),
        ]
    )


def stack(parts: list[Tensor], width: int) -> Tensor:
    """Documents side by side, filled up to `width` with rows that see each other and no other."""
    missing = width - sum(part.shape[1] for part in parts)
    padding = torch.tensor([0, 0, PADDING, 1, CLEAN, IGNORED])[:, None].expand(6, missing)
    return torch.cat([*parts, padding], dim=1)


def sees(batch: Batch, b: Any, row: Any, key: Any) -> Tensor:
    """Whether `row` sees `key` in sequence `b`: index tensors of any shapes that broadcast.

    A row sees of its own document the clean keys of its past and the noisy keys of its block. This
    is the only statement of it: every kind of mask is made from here.
    """
    same_document = batch.document[b, row] == batch.document[b, key]
    in_the_past = batch.positions[b, key] < batch.past[b, row]
    own_block = batch.block[b, row] == batch.block[b, key]
    return same_document & torch.where(batch.block[b, key] == CLEAN, in_the_past, own_block)


def dense_mask(batch: Batch, first: int = 0) -> Tensor:
    """Bool [B, 1, S - first, S]: of the rows from `first` on."""
    b, s = batch.tokens.shape
    keys = torch.arange(s, device=batch.tokens.device)
    sequences = torch.arange(b, device=batch.tokens.device)[:, None, None]
    return sees(batch, sequences, keys[first:, None], keys[None, :])[:, None]


def mask_mod(batch: Batch, first: int = 0) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The same in the form that flex_attention asks for."""
    return lambda b, head, row, key: sees(batch, b, row + first, key)


def attention_mask(
    batch: Batch, implementation: str, dtype: torch.dtype, first: int = 0
) -> Tensor | BlockMask:
    """The mask of the rows from `first` on as transformers' attention of that name takes it."""
    if implementation == "flex_attention":
        b, s = batch.tokens.shape
        device = batch.tokens.device
        make = compiled_block_mask() if device.type == "cuda" else create_block_mask
        return make(mask_mod(batch, first), b, None, s - first, s, device=device)
    mask = dense_mask(batch, first)
    if implementation == "sdpa":
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


@cache
def compiled_block_mask() -> Any:
    """It never holds S x S."""
    return torch.compile(create_block_mask)


class Objective(nn.Module):
    """A transformers causal LM under its training loss; the module that FSDP shards as a whole."""

    sums = 4  # numbers in what a forward gives

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> LossSums:
        model = self.model
        hidden = model.model(
            input_ids=batch.tokens,
            attention_mask=attention_mask(batch, model.config._attn_implementation, model.dtype),
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        sums = []
        for copy in slice(0, batch.clean), slice(batch.clean, None):
            labels = batch.labels[:, copy]
            labelled = labels != IGNORED
            loss = cross_entropy_sum(model.lm_head, hidden[:, copy][labelled], labels[labelled])
            sums.append((loss, labelled.sum()))
        (ntp, ntp_labels), (matp, matp_labels) = sums
        return LossSums(ntp, matp, ntp_labels, matp_labels)


def cross_entropy_sum(head: nn.Module, hidden: Tensor, labels: Tensor, rows: int = 2048) -> Tensor:
    """Only rows with a label meet the head, and their logits never exist all at once."""

    def chunk(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, labels, reduction="sum")

    if len(labels) <= rows:
        return chunk(hidden, labels)
    parts = zip(torch.split(hidden, rows), torch.split(labels, rows), strict=True)
    return torch.stack([checkpoint(chunk, *part, use_reentrant=False) for part in parts]).sum()
