"""Training examples, and how several of them share one sequence of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Example(NamedTuple):
    """One document. The model is taught `tokens[prompt_length:]`, where decoding would happen."""

    tokens: list[int] | NDArray[np.int32]
    prompt_length: int = 0  # 0: plain text, taught from its first token on
    ends: bool = True  # its last token is EOS; False: it was cut

    @property
    def labels(self) -> int:
        """Its next-token labels: answer tokens with a token before them."""
        return len(self.tokens) - max(self.prompt_length, 1)


Sequence = list[Example]  # of a batch: documents side by side, together at most its length


class Data(Protocol):
    """Where a run's batches come from: a pure function of the step, so that a run can resume."""

    fingerprint: str  # names the data: a run resumes only on its own

    def step(self, step: int) -> list[Sequence]: ...


def pack(examples: Iterable[Example], length: int, open_sequences: int = 32) -> Iterator[Sequence]:
    """Put each example into the fullest of a few open sequences that still has room for it."""
    bins: list[tuple[int, Sequence]] = []  # tokens so far, examples
    for example in examples:
        size = len(example.tokens)
        if size > length:
            raise ValueError(f"an example of {size} tokens, expected at most {length}: cut it")
        fitting = [i for i, (used, _) in enumerate(bins) if used + size <= length]
        if fitting:
            best = max(fitting, key=lambda i: bins[i][0])
            used, sequence = bins[best]
            sequence.append(example)
            bins[best] = (used + size, sequence)
        else:
            bins.append((size, [example]))
        if len(bins) > open_sequences:
            yield bins.pop(max(range(len(bins)), key=lambda i: bins[i][0]))[1]
    yield from (sequence for _, sequence in bins)
