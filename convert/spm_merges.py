"""Sentencepiece's rule as byte pair encoding's list of merges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

# Of the squares of the tokens' lengths: as many characters are cut, and at most that many kept.
MOST_CUT = 1 << 26


def check_nesting(pieces: Iterable[str]) -> None:
    """Raises ValueError for a vocabulary whose tokens are so long, or nest so deep (a, aa, aaa,
    ...), that finding them in each other, or in a text, would take all memory or time."""
    lengths = [len(piece) for piece in pieces]
    work = sum(length**2 for length in lengths)
    if work > MOST_CUT:
        raise ValueError(
            f"expected tokens whose squared lengths add up to at most {MOST_CUT}, got {work} "
            f"(the longest has {max(lengths)} characters)"
        )


def merges_by_score(pieces: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Sentencepiece joins the neighbours whose union has the best score: every cut of a piece into
    two, best score first; of equal scores the piece, then the left part, that comes first.

    Raises ValueError as check_nesting does.
    """
    check_nesting(pieces)
    merges = []
    for piece, index in pieces.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in pieces and right in pieces:
                merges.append((-scores[index], index, pieces[left], left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]
