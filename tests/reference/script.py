"""A model that answers by a script, for decoders worked by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

EOS, SCRIPT_MASK, VOCAB = 9, 7, 12


class Script:
    """Answers each forward with the next list of (token, certainty), one for each row wanted.

    Everywhere the mask token has the highest logit.
    """

    def __init__(self, *answers: list[tuple[int, float]]) -> None:
        self.answers = list(answers)
        self.seen: list[tuple[list[int], list[int]]] = []

    def forward(
        self, ids: Sequence[int], kv_end: NDArray[np.int64], last: int | None = None
    ) -> NDArray[np.float64]:
        answer = self.answers.pop(0)
        assert len(answer) == (len(ids) if last is None else last)
        self.seen.append((list(ids), kv_end.tolist()))
        logits = np.zeros((len(answer), VOCAB))
        logits[:, SCRIPT_MASK] = 100.0
        for row, (token, certainty) in enumerate(answer):
            logits[row, token] = certainty
        return logits
