"""How many positions each forward of a block reveals, so that a given average comes out.

Random weights cannot decide when to be sure. With the rule `top_n` the engine decodes with its real
scheduler, KV cache and sampler, and reveals exactly n positions per forward: a block of k positions
takes ceil(k / n) forwards. Two neighbouring n, each for a share of the blocks, give any average.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Phase(NamedTuple):
    """Consecutive blocks decoded with the same `top_n`."""

    blocks: int
    top_n: int
    forwards: int  # of each block


def phases(block_size: int, blocks: int, reduction: float) -> list[Phase]:
    """As near to `reduction` tokens per forward as whole blocks come."""
    ways: dict[int, int] = {}  # forwards per block to the least top_n that needs so many
    for top_n in range(block_size, 0, -1):
        ways[-(-block_size // top_n)] = top_n
    wanted = blocks * block_size / reduction  # forwards
    fewer = max((f for f in ways if f * blocks <= wanted), default=min(ways))
    more = min((f for f in ways if f > fewer), default=fewer)
    share = 0 if more == fewer else round((wanted - fewer * blocks) / (more - fewer))
    share = min(max(share, 0), blocks)
    both = [Phase(blocks - share, ways[fewer], fewer), Phase(share, ways[more], more)]
    return [phase for phase in both if phase.blocks]


def tokens_per_forward(block_size: int, plan: list[Phase]) -> float:
    tokens = block_size * sum(phase.blocks for phase in plan)
    return tokens / sum(phase.blocks * phase.forwards for phase in plan)


def seconds_of_phase(generated: dict[str, Any], block_size: int, phase: Phase) -> float:
    """From the end of the first block, which shares a forward with the prompt and is not counted,
    to the end of the last. Raises ValueError where the engine did not follow the pattern."""
    decided, seconds = generated["decided"], generated["seconds"]
    expected = (phase.blocks + 1) * phase.forwards
    first = sum(decided[: phase.forwards])
    if len(decided) != expected or first != block_size:
        raise ValueError(
            f"expected {expected} forwards, the first {phase.forwards} deciding {block_size} "
            f"positions, got {len(decided)} deciding {first}"
        )
    return float(seconds[-1] - seconds[phase.forwards - 1])
