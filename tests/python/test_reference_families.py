"""The references of the block-diffusion families: worked by hand, and against each other."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import pytest
from reference.decoders import sbd_decode
from reference.drafting import DraftingModel
from reference.family import (
    DREAM,
    FAST_DLLM_V2,
    LLADA,
    NEMOTRON,
    SDAR,
    Settings,
    choose_for,
    family_decode,
    time_share,
    visible,
)
from reference.model import Adapter
from reference.random_model import random_model
from reference.script import EOS, SCRIPT_MASK, Script
from reference.self_speculation import self_speculation_decode
from reference.stats import RowStats
from reference.unmask import Rule

M = SCRIPT_MASK
SURE, UNSURE = 9.0, 1.0  # probabilities .999 and .21


def test_visibility() -> None:
    def ends(settings: Settings, n: int, first: int, start: int) -> list[int]:
        return visible(settings, n, first, start).tolist()

    # a prompt of 3, a finished block of 2, a block of 2
    assert ends(Settings(2), 7, 3, 5) == [1, 2, 3, 4, 5, 7, 7]
    bidirectional = Settings(2, prompt_attention="bidirectional", commit_attention="block")
    assert ends(bidirectional, 7, 3, 5) == [3, 3, 3, 5, 5, 7, 7]
    assert ends(SDAR, 12, 4, 8) == [4] * 4 + [8] * 4 + [12] * 4
    assert ends(SDAR, 3, 0, 0) == [3, 3, 3]  # a context that ends inside the block
    assert ends(Settings(2, prompt_attention="block_causal"), 6, 3, 4) == [2, 2, 3, 4, 6, 6]
    assert ends(LLADA, 5, 2, 2) == [5] * 5


def candidates(top_prob: list[float]) -> RowStats:
    c = np.array(top_prob)
    return RowStats(np.zeros(len(c), dtype=np.int64), c, c, c, -c, c)


@pytest.mark.parametrize(
    ("unmask", "n", "chosen"),
    [
        ("dynamic", 1, [0, 2]),  # two above .85
        ("dynamic", 3, [0, 2, 3]),  # not three: the best three
        ("static", 1, [2]),
        ("static", 2, [0, 2]),
        ("sequential", 3, [0, 1, 2]),
        ("confidence", 4, [0, 2]),
    ],
)
def test_rules_by_hand(unmask: str, n: int, chosen: list[int]) -> None:
    settings = replace(SDAR, unmask=unmask)
    assert choose_for(settings, candidates([0.875, 0.25, 0.9, 0.5]), n)[0] == chosen
    none = candidates([0.5, 0.5, 0.25, 0.5])
    assert choose_for(replace(settings, unmask="dynamic"), none, 2)[0] == [0, 1]  # lower positions
    assert choose_for(replace(settings, unmask="confidence"), none, 2)[0] == [0]


def test_nemotron_by_hand() -> None:
    script = Script(
        [(1, SURE)],  # the prompt seeds
        [(0, 0), (2, SURE), (3, UNSURE), (4, 2.0)],  # one above .9
        [(0, 0), (0, 0), (3, UNSURE), (4, 2.0)],  # none: the best
        [(0, 0), (0, 0), (3, UNSURE), (4, 2.0)],
        [(5, UNSURE)],  # the block seeds the next
        [(0, 0), (2, UNSURE), (EOS, SURE), (4, SURE)],
        [(0, 0), (6, UNSURE), (4, SURE), (4, SURE)],
    )
    # the rows that are no masks are not read, so a script's answers there say nothing
    for answer, rows in zip(script.answers[1:], (3, 2, 2, 1, 3, 3), strict=True):
        del answer[: len(answer) - rows]
    decoded = family_decode(script, [8], 12, M, {EOS}, replace(NEMOTRON, block_size=4))
    assert decoded[:3] == ([1, 2, 3, 4, 5, 6, EOS], 7, "stop")
    assert script.seen == [
        ([8], [1]),
        ([8, 1, M, M, M], [1, 5, 5, 5, 5]),
        ([8, 1, 2, M, M], [1, 5, 5, 5, 5]),
        ([8, 1, 2, M, 4], [1, 5, 5, 5, 5]),
        ([8, 1, 2, 3, 4], [1, 2, 3, 4, 5]),
        ([8, 1, 2, 3, 4, 5, M, M, M], [1, 2, 3, 4, 5, 9, 9, 9, 9]),
        ([8, 1, 2, 3, 4, 5, M, EOS, 4], [1, 2, 3, 4, 5, 9, 9, 9, 9]),
    ]


def test_what_lies_behind_an_eos() -> None:
    """It is decided as any mask; cut as set-block decoding does, it is not."""

    def decode(end: str) -> tuple[list[int], int, str]:
        first = [(1, UNSURE), (EOS, SURE), (2, 2.0)]
        script = Script(first, [(3, UNSURE), (0, 0), (2, 2.0)], [(4, UNSURE)] * 3)
        settings = Settings(3, end=end)
        return family_decode(script, [8], 3, M, {EOS}, settings)[:3]

    assert decode("eos") == ([4, EOS], 3, "stop")  # the second forward decides the last position
    assert decode("block") == ([4, EOS], 3, "stop")
    assert decode("none") == ([4, EOS], 3, "stop")
    assert decode("cut") == ([3, EOS], 2, "stop")


def test_sdar_by_hand() -> None:
    script = Script(
        [(0, 0), (1, UNSURE)],  # the prompt's tail opens the block; position 3
        [(2, SURE), (EOS, SURE), (3, UNSURE), (4, UNSURE)],  # two above .85
        [(3, 2.0), (4, UNSURE)],
        [(4, UNSURE)],
    )
    script.answers[0].pop(0)
    decoded = family_decode(script, [5, 6, 8], 20, M, {EOS}, SDAR)
    # the block with an EOS is decided to its end
    assert decoded[:3] == ([1, 2, EOS], 4, "stop")
    assert script.seen == [
        ([5, 6, 8, M], [4, 4, 4, 4]),
        ([5, 6, 8, 1, M, M, M, M], [4, 4, 4, 4, 8, 8, 8, 8]),
        ([5, 6, 8, 1, 2, EOS, M, M], [4, 4, 4, 4, 8, 8, 8, 8]),
        ([5, 6, 8, 1, 2, EOS, 3, M], [4, 4, 4, 4, 8, 8, 8, 8]),
    ]


def test_fast_dllm_v2_by_hand() -> None:
    settings = replace(FAST_DLLM_V2, block_size=4, sub_block_size=2)
    script = Script(
        [(1, 1)],  # the prompt is one block, whose last row seeds position 4
        [(2, 1), (0, 0), (0, 0), (0, 0)],  # 5 reads row 4: the first sub-block
        [(3, 1), (4, 2), (0, 0)],  # 6 and 7 read rows 5 and 6
        [(3, 1), (0, 0), (0, 0)],
        [(8, 1)],  # the block runs once more, and seeds position 8
    )
    decoded = family_decode(script, [5, 6, 5, 6], 5, M, {EOS}, settings)
    assert decoded[:3] == ([1, 2, 3, 4, 8], 5, "length")
    assert [seen[0][4:] for seen in script.seen] == [
        [],
        [1, M, M, M],
        [1, 2, M, M],
        [1, 2, M, 4],
        [1, 2, 3, 4],
    ]
    assert script.seen[-1][1] == [4, 4, 4, 4, 8, 8, 8, 8]


def test_fast_dllm_v2_needs_no_seed_inside_the_prompt() -> None:
    settings = replace(FAST_DLLM_V2, block_size=4, sub_block_size=2)
    script = Script([(1, 1), (2, 2), (0, 0)], [(1, 1), (0, 0), (0, 0)])
    decoded = family_decode(script, [5, 6], 2, M, {EOS}, settings)
    assert decoded[:3] == ([1, 2], 2, "length")
    assert script.seen[0] == ([5, 6, M, M], [4, 4, 4, 4])  # 2 and 3 read rows 1 and 2


def test_llada_by_hand() -> None:
    settings = replace(LLADA, block_size=2, steps=1)
    script = Script(
        [(EOS, 1), (2, 1), (0, 0), (0, 0), (0, 0)],  # the first block at once
        [(3, 1), (4, 1), (0, 0)],
        [(6, 1)],  # what is left of the last block
    )
    decoded = family_decode(script, [8], 5, M, {EOS}, settings)
    assert decoded[:3] == ([EOS], 3, "stop")  # cut only
    assert [seen[0] for seen in script.seen] == [
        [8, M, M, M, M, M],
        [8, EOS, 2, M, M, M],
        [8, EOS, 2, 3, 4, M],
    ]
    assert all(seen[1] == [6] * 6 for seen in script.seen)


def test_dream_times() -> None:
    # t = 1, .75025, .5005, .25075, .001
    shares = [time_share(step, 4) for step in range(4)]
    assert shares == pytest.approx([0.24975, 1 - 0.5005 / 0.75025, 1 - 0.25075 / 0.5005, 1.0])


@pytest.mark.parametrize(
    ("order", "positions"), [("confidence", [[3], [1], [2, 4]]), ("entropy", [[3], [1], [2, 4]])]
)
def test_dream_by_hand(order: str, positions: list[list[int]]) -> None:
    settings = replace(DREAM, unmask="schedule", order=order, steps=4)
    answer = [(1, 2.0), (2, 1.0), (3, 3.0), (4, 0.5), (0, 0)]  # of positions 1 to 4, by row 0 to 3
    # 4 * .2497 = 0.999: the first step decides nothing and is not run; 4 * .33, 3 * .5, the rest
    script = Script(answer, answer, answer[1:])
    decoded = family_decode(script, [8], 4, M, {EOS}, settings)
    assert decoded[:3] == ([1, 2, 3, 4], 3, "length")
    assert [d.positions for d in decoded.trace] == positions


def test_dream_origin_follows_the_draws() -> None:
    settings = replace(DREAM, steps=2)  # shares .4995 and 1
    script = Script([(1, 1)] * 4, [(2, 1)] * 2)
    draws = {1: 0.6, 2: 0.4, 3: 0.7}
    script.answers[0].pop()  # rows 1 to 3
    script.answers[1] = [(2, 1)] * 4
    decoded = family_decode(
        script, [8], 3, M, {EOS}, settings, draw=lambda step, i: draws[i] if step == 0 else 0.99
    )
    assert [d.positions for d in decoded.trace] == [[2], [1, 3]]
    with pytest.raises(ValueError, match="draw"):
        family_decode(Script(), [8], 3, M, {EOS}, settings)


@pytest.mark.parametrize("seed", range(6))
def test_set_block_decoding_is_one_of_the_settings(seed: int) -> None:
    model = random_model(seed)
    reference, prompt = model.reference(), model.prompt(11, seed)
    for k, gamma in ((1, 0.0), (5, 0.35), (8, 1.5), (8, inf)):
        for n_ctx in (None, 24):
            settings = Settings(k, unmask="rule", rule=Rule(gamma=gamma), end="cut")
            ours = family_decode(
                reference, prompt, 17, model.mask_id, model.eos_ids, settings, n_ctx=n_ctx
            )
            sbd = sbd_decode(
                reference, prompt, 17, k, model.mask_id, model.eos_ids, gamma=gamma, n_ctx=n_ctx
            )
            assert ours[:3] == sbd[:3]
            assert [d[:2] for d in ours.trace] == [d[:2] for d in sbd.trace]


def test_speculation_by_hand() -> None:
    script = Script(
        [(1, 1)],
        [(0, 0), (2, 1), (3, 1), (4, 1)],  # [1 m m m], block: a draft 2 3 4
        [(2, 1), (3, 1), (5, 1), (6, 1)],  # its rows 1 2 3 4 choose 2 3 5: 4 is wrong
        [(0, 0), (2, 1), (EOS, 1), (4, 1)],
        [(2, 1), (EOS, 1), (5, 1), (6, 1)],
    )
    decoded, accepted = self_speculation_decode(script, [8], 12, 4, M, {EOS})
    assert decoded[:3] == ([1, 2, 3, 5, 2, EOS], 5, "stop")
    assert accepted == [3, 3]
    assert script.seen == [
        ([8], [1]),
        ([8, 1, M, M, M], [1, 5, 5, 5, 5]),
        ([8, 1, 2, 3, 4], [1, 2, 3, 4, 5]),
        ([8, 1, 2, 3, 5, M, M, M], [1, 2, 3, 4, 8, 8, 8, 8]),
        ([8, 1, 2, 3, 5, 2, EOS, 4], [1, 2, 3, 4, 5, 6, 7, 8]),
    ]


def test_a_draft_adapter_changes_the_drafts_alone() -> None:
    model = random_model(0, steady=True)
    reference, prompt = model.reference(), model.prompt(50)
    rng = np.random.default_rng(0)
    adapter = Adapter(
        [{"o": rng.standard_normal(layer.o.shape) / 10} for layer in reference.layers]
    )
    plain, with_plain = self_speculation_decode(reference, prompt, 30, 8, model.mask_id)
    adapted, with_adapter = self_speculation_decode(
        DraftingModel(reference, adapter), prompt, 30, 8, model.mask_id
    )
    assert adapted.tokens == plain.tokens
    assert with_adapter != with_plain

    # Rows before the last ones do not know of it: a model of one layer has it in these rows alone.
    model = random_model(0, layers=1)
    reference = model.reference()
    ids, kv_end = model.prompt(9), np.arange(1, 10)
    delta = rng.standard_normal(reference.layers[0].o.shape)
    merged = replace(reference.layers[0], o=reference.layers[0].o + delta)
    expected = reference.forward(ids, kv_end, 3, Adapter([{"o": delta}]), 3)
    reference.layers = [merged]
    assert np.allclose(reference.forward(ids, kv_end, last=3), expected, rtol=0, atol=1e-12)
