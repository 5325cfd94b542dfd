"""Sampled texts of next-token decoding stay what they were, to the token."""

from __future__ import annotations

from typing import Any

import pytest

from sbd_engine import Engine
from sbd_engine.errors import SbdValueError

from .isas import ISAS

PINNED: list[tuple[str, dict[str, Any], list[int]]] = [
    (
        "def fibonacci(n):",
        {"temperature": 0.7, "seed": 3},
        [292, 504, 305, 1129, 342, 27, 325, 340, 305, 292, 340, 1829]
        + [9, 79, 600, 288, 10, 287, 1829, 9, 79, 600, 342, 10],
    ),
    (
        "Add 478 + 256\n",
        {"temperature": 1.2, "seed": 11},
        [25, 287, 350, 287, 297, 286, 288, 21, 13, 360, 288, 200]
        + [24, 287, 332, 287, 288, 286, 288, 20, 13, 360, 288, 200],
    ),
    (
        "class Stack:",
        {"temperature": 1.2, "seed": 4, "top_k": 20, "top_p": 0.9},
        [442, 437, 617, 960, 588, 299, 312, 325, 345, 15, 1195, 286]
        + [1199, 442, 437, 268, 1602, 9, 299, 13, 731, 312, 325, 345],
    ),
    (
        "import os\n",
        {"temperature": 0.7, "seed": 9, "sample_index": 2},
        [1190, 647, 352, 1220, 15, 1289, 1337, 740, 15, 1495, 292, 1110]
        + [9, 518, 10, 0, 0, 359, 617, 0, 0, 0, 0, 0],
    ),
]


@pytest.mark.parametrize("isa", ISAS)
def test_ntp(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBD_ISA", isa)
    try:
        engine = Engine(device="cpu")
    except SbdValueError as error:
        assert "does not support" in str(error)
        pytest.skip(str(error))
    with engine:
        for prompt, sampling, tokens in PINNED:
            call = {"decoder": "ntp", "max_tokens": 24, "ignore_eos": True, **sampling}
            assert engine.generate(prompt, **call).tokens == tokens, sampling
