"""The references of lossless SBD, DMTD and D2F: worked by hand, and against each other."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf

import numpy as np
import pytest
from numpy.typing import NDArray
from reference.d2f import D2f, d2f_decode
from reference.decoders import ntp_decode
from reference.dmtd import PROMPT_RULES, coefficients, dmtd_decode
from reference.family import Settings, family_decode
from reference.lossless import sbd_lossless_decode
from reference.model import ReferenceModel, causal, rotate
from reference.random_model import random_model
from reference.script import EOS, SCRIPT_MASK, Script
from reference.self_speculation import self_speculation_decode
from reference.stats import row_stats

Array = NDArray[np.float64]
M = SCRIPT_MASK

# Lossless set-block decoding


def test_lossless_by_hand() -> None:
    script = Script(
        # the prompt's row chooses 1, which goes to slot 0; the masks are decided at once: 1 2 3
        [(1, 1), (8, 9), (2, 1), (3, 1)],
        # rows 5, 1, 2, 3 choose 1, 2, 8: 3 is wrong, 8 is in its place, the new block is dropped
        [(1, 1), (2, 1), (8, 1), (4, 1), (6, 1), (6, 1), (6, 1)],
        # row 8 chooses 4; 4 2 1
        [(4, 1), (6, 1), (2, 1), (1, 1)],
        # all right, and row 1 chooses 3; the block's 3 2 9 ends with the last token wanted
        [(4, 1), (2, 1), (1, 1), (3, 1), (6, 1), (2, 1), (6, 1)],
        # verified alone: rows 1 and 3 choose 3 and 2
        [(3, 1), (2, 1)],
    )
    decoded, accepted = sbd_lossless_decode(script, [5], 8, 3, M, {EOS}, gamma=inf)
    assert decoded[:3] == ([1, 2, 8, 4, 2, 1, 3, 2], 5, "length")
    assert accepted == [2, 3, 2]
    assert script.seen == [
        ([5, M, M, M], [1, 4, 4, 4]),
        ([5, 1, 2, 3, M, M, M], [1, 2, 3, 4, 7, 7, 7]),
        ([5, 1, 2, 8, M, M, M], [1, 2, 3, 4, 7, 7, 7]),
        ([5, 1, 2, 8, 4, 2, 1, M, M, M], [1, 2, 3, 4, 5, 6, 7, 10, 10, 10]),
        ([5, 1, 2, 8, 4, 2, 1, 3], [1, 2, 3, 4, 5, 6, 7, 8]),
    ]


def test_lossless_later_forwards_see_slot_0() -> None:
    script = Script(
        [(1, 1), (8, 9), (2, 3), (3, 1)],
        [(8, 9), (2, 3), (EOS, 1)],  # the block alone: 1 and 2 are there
        [(1, 1), (4, 1), (3, 1)],  # an EOS ends the text, so verified alone; row 1 chooses 4
        [(EOS, 1), (2, 1), (2, 1), (2, 1)],  # row 4 chooses an EOS: no one needs the block
    )
    decoded, accepted = sbd_lossless_decode(script, [5], 9, 3, M, {EOS}, gamma=0.0)
    assert decoded[:3] == ([1, 4, EOS], 4, "stop")
    assert accepted == [1]
    assert [seen[0] for seen in script.seen] == [
        [5, M, M, M],
        [5, 1, 2, M],
        [5, 1, 2],
        [5, 1, 4, M, M, M],
    ]


@pytest.mark.parametrize("seed", range(6))
def test_lossless_and_speculative_texts_are_those_of_ntp(seed: int) -> None:
    model = random_model(seed, steady=True)
    reference, prompt, mask = model.reference(), model.prompt(50, seed), model.mask_id
    kept = []
    for eos_ids, n_ctx in ((model.eos_ids, None), ([], None), ([], 64)):
        ntp = ntp_decode(reference, prompt, 20, eos_ids, n_ctx=n_ctx, mask_id=mask)
        for k in (1, 4, 16):
            for gamma in (0.0, 0.35, inf):
                decoded, accepted = sbd_lossless_decode(
                    reference, prompt, 20, k, mask, eos_ids, n_ctx=n_ctx, gamma=gamma
                )
                assert (decoded.tokens, decoded.finish_reason) == (ntp.tokens, ntp.finish_reason)
                assert all(1 <= n <= k for n in accepted)
                if k == 1:
                    assert decoded.nfe == len(ntp.tokens)
                kept += [(n, k) for n in accepted if k > 1]
            decoded, accepted = self_speculation_decode(
                reference, prompt, 20, k, mask, eos_ids, n_ctx=n_ctx
            )
            assert (decoded.tokens, decoded.finish_reason) == (ntp.tokens, ntp.finish_reason)
            assert decoded.nfe == 1 + len(accepted) * (2 if k > 1 else 1)
    assert any(n == k for n, k in kept) or any(1 < n < k for n, k in kept)


# Direct Multi-Token Decoding


@pytest.mark.parametrize(
    ("rule", "a", "b"),
    [  # a prompt of 3 rows, horizon 2
        ("all_heads", [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1, 0]),
        ("plain", [0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 1, 0]),
        ("train", [1, 1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0, 1]),
    ],
)
def test_dmtd_coefficients(rule: str, a: list[int], b: list[int]) -> None:
    assert [list(part) for part in coefficients(7, 3, 2, rule)] == [a, b]


class CachedRuns:
    """DMTD as the paper runs it: keys and values of each layer kept, T refilled at each head."""

    def __init__(self, model: ReferenceModel, split: Sequence[int]) -> None:
        self.model = model
        ends = np.cumsum(split)
        self.encoding, self.thinking, self.decoding = (
            range(end - n, end) for end, n in zip(ends, split, strict=True)
        )
        self.keys: list[list[Array]] = [[] for _ in model.layers]
        self.values: list[list[Array]] = [[] for _ in model.layers]
        self.thinking_rows: list[int] = []  # rows of each pass of T

    def run(self, layers: range, x: Array) -> Array:
        """`x` [rows, hidden] at the positions behind those these layers have."""
        model = self.model
        for i in layers:
            layer, past = model.layers[i], len(self.keys[i])
            angles = np.arange(past, past + len(x))[:, None] * model.frequencies
            a = model._rms_norm(x, layer.attention_norm)
            q = model._heads(a @ layer.q + layer.q_bias, layer.q_norm)
            k = model._heads(a @ layer.k + layer.k_bias, layer.k_norm)
            v = model._heads(a @ layer.v + layer.v_bias, None)
            q, k = (rotate(part, np.cos(angles), np.sin(angles)) for part in (q, k))
            self.keys[i] += list(k.transpose(1, 0, 2))
            self.values[i] += list(v.transpose(1, 0, 2))
            n = past + len(x)
            mask = np.where(np.arange(n) <= np.arange(past, n)[:, None], 0.0, -np.inf)
            k, v = (np.array(kept[i]).transpose(1, 0, 2) for kept in (self.keys, self.values))
            x = x + model._attention(q, k, v, mask) @ layer.o
            a = model._rms_norm(x, layer.mlp_norm)
            gate = a @ layer.gate
            x = x + (gate / (1 + np.exp(-gate)) * (a @ layer.up)) @ layer.down
        return x

    def decode(self, prompt: list[int], n: int, horizon: int, rule: str, mask_id: int) -> list[int]:
        text, skipped = list(prompt), np.zeros((0, self.model.hidden_size))
        for position in [None, *range(len(prompt), len(prompt) + n - 1)]:
            new = prompt if position is None else [text[position]]
            e = self.run(self.encoding, self.model.embedding[new])
            if position is None:
                z = self.run(self.thinking, e)
                self.thinking_rows.append(len(e))
                if rule == "all_heads":
                    z = z + e
                elif rule == "train":
                    z = z * (np.arange(len(e)) % horizon == 0)[:, None] + e
            elif (position - (0 if rule == "train" else len(prompt))) % horizon == 0:
                missing = np.concatenate([skipped, e])
                z = e + self.run(self.thinking, missing)[-1:]
                self.thinking_rows.append(len(missing))
                skipped = skipped[:0]
            else:
                z, skipped = e, np.concatenate([skipped, e])
            logits = self.model._logits(self.run(self.decoding, z)[-1:])
            text.append(int(row_stats(logits, mask_id).argmax[0]))
        return text[len(prompt) :]


@pytest.mark.parametrize("rule", PROMPT_RULES)
@pytest.mark.parametrize("split", [(0, 3, 2), (1, 3, 1), (2, 1, 2)])
def test_dmtd_is_cyclical_refilling(rule: str, split: tuple[int, int, int]) -> None:
    for seed in range(4):
        model = random_model(seed, layers=sum(split), rope="default")
        reference = model.reference()
        for horizon in (1, 2, 3, 5):
            prompt = model.prompt(3 + seed + horizon, seed)
            n_ctx = len(prompt) + 11
            result = dmtd_decode(
                reference, prompt, 20, split, horizon, rule, n_ctx=n_ctx, mask_id=model.mask_id
            )
            cached = CachedRuns(reference, split)
            assert cached.decode(prompt, 11, horizon, rule, model.mask_id) == result.decoded.tokens
            assert len(cached.thinking_rows) == result.thinking_forwards
            assert max(cached.thinking_rows[1:]) <= horizon
            assert result.decoding_forwards == result.decoded.nfe == 11
            if rule != "train":
                assert result.thinking_forwards == 1 + ceil(10 / horizon)


def test_dmtd_with_coefficients_of_the_plain_stack_is_ntp() -> None:
    model = random_model(3, layers=4)
    reference, ids = model.reference(), model.prompt(20)
    plain = reference.forward_split(ids, (1, 2, 1), np.zeros(20), np.ones(20))
    assert np.allclose(plain, reference.forward(ids, causal(20)), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="three runs of 4 layers"):
        reference.forward_split(ids, (1, 2, 2), np.zeros(20), np.ones(20))


# Discrete Diffusion Forcing


def test_d2f_by_hand() -> None:
    sure, unsure = 9.0, 1.0  # probabilities .999 and .21
    a, b = (1, sure), (2, unsure)
    prompt = [(0, 0)] * 2
    script = Script(
        [*prompt, a, b, b],  # block 1 is activated; one passes
        # a third decided: block 2 is added but not activated, and nothing passes there
        [*prompt, b, a, b, b, b, b],
        # still the lower half of thresholds: block 1's last, and of block 2 the sure one
        [*prompt, b, b, b, b, a, b],
        # block 1 is cached, block 3 added; block 2 is activated, and its best is forced
        [*prompt, b, b, b, (3, 2.0), b, b, b, b, b],
        # block 2's last; block 3, not activated, is decided at once
        [*prompt, b, b, b, b, b, (EOS, unsure), a, a, a],
    )
    result = d2f_decode(
        script, [5, 6], 8, 3, M, {EOS},
        block_add_threshold=0.3, decoded_token_threshold=1.0, skip_threshold=0.9,
    )  # fmt: skip
    assert result.decoded[:3] == ([1, 1, 2, 3, 1, EOS], 5, "stop")
    assert [d.positions for d in result.decoded.trace] == [
        [2],
        [3],
        [4, 6],
        [5],
        [7, 8, 9, 10],
    ]
    assert result.rows == [(2, 3), (0, 6), (0, 6), (3, 6), (0, 6)]
    assert script.seen[0] == ([5, 6, M, M, M], [2, 2, 5, 5, 5])
    assert script.seen[3] == (
        [5, 6, 1, 1, 2, M, 1, M, M, M, M],
        [2, 2, 5, 5, 5, 8, 8, 8, 11, 11, 11],
    )


def test_d2f_a_finished_block_waits_for_the_one_before() -> None:
    sure, unsure = (1, 9.0), (2, 1.0)
    script = Script(
        [(0, 0), unsure, unsure],
        [(0, 0), unsure, unsure, sure, sure],  # block 2 is done before block 1
        [(0, 0), *[sure] * 6],
    )
    result = d2f_decode(script, [5], 6, 2, M, block_add_threshold=0.5, decoded_token_threshold=1.0)
    # the prompt's forward, one with both blocks in flight, one that caches both
    assert result.rows == [(1, 2), (0, 4), (4, 2)]
    assert result.decoded[:2] == ([2, 2, 1, 1, 1, 1], 3)


def test_d2f_shifted_logits_come_from_the_row_before() -> None:
    script = Script(
        [(1, 9.0), (2, 9.0), (3, 9.0)], [(8, 9.0), (8, 9.0), (4, 9.0), (5, 9.0), (6, 9.0)]
    )
    result = d2f_decode(script, [5], 4, 2, M, logit_shift=1)
    assert result.decoded.tokens == [1, 2, 4, 5]


def test_d2f_runs_out_only_when_told() -> None:
    def decode(run_out: bool) -> D2f:
        script = Script(
            [(0, 0), (EOS, 9.0), (2, 1.0)],
            *[[(0, 0), (2, 1.0), (2, 1.0)]] * 1,
        )
        return d2f_decode(script, [5], 4, 2, M, {EOS}, run_out=run_out)

    assert decode(False).decoded[:3] == ([EOS], 1, "stop")
    assert decode(True).decoded[:3] == ([EOS], 2, "stop")


@pytest.mark.parametrize("seed", range(8))
def test_d2f_one_block_at_a_time_is_the_block_decoder(seed: int) -> None:
    """Where a block is added only behind a decided one, as a family with a block commit."""
    model = random_model(seed)
    rng = np.random.default_rng(seed)
    reference, prompt = model.reference(), model.prompt(int(rng.integers(1, 40)), seed)
    skip, k, shift = float(rng.choice([0.2, 0.5, 0.9])), int(rng.choice([4, 8])), seed % 2
    settings = Settings(
        block_size=k,
        logit_shift=shift,
        prompt_attention="bidirectional",
        commit_attention="block",
        threshold=skip,
        end="block",
    )
    expected = family_decode(reference, prompt, 3 * k, model.mask_id, model.eos_ids, settings)
    result = d2f_decode(
        reference, prompt, 3 * k, k, model.mask_id, model.eos_ids,
        block_add_threshold=1.0, skip_threshold=skip, logit_shift=shift, run_out=True,
    )  # fmt: skip
    assert result.decoded[:3] == expected[:3]
    assert all(rows[1] == k for rows in result.rows)


@pytest.mark.parametrize("seed", range(4))
def test_d2f_properties(seed: int) -> None:
    model = random_model(seed, grouped=False)
    reference, prompt = model.reference(), model.prompt(7)
    for k, add, decoded, skip in ((4, 0.1, 0.95, 0.9), (5, 0.5, 0.5, 0.3), (32, 0.9, 0.95, 0.2)):
        thresholds = {
            "block_add_threshold": add,
            "decoded_token_threshold": decoded,
            "skip_threshold": skip,
        }
        short = d2f_decode(reference, prompt, 13, k, model.mask_id, **thresholds)
        long = d2f_decode(reference, prompt, 13, k, model.mask_id, run_out=True, **thresholds)
        assert len(short.decoded.tokens) == 13 and model.mask_id not in short.decoded.tokens
        assert short.decoded.tokens == long.decoded.tokens
        assert short.decoded.nfe <= long.decoded.nfe
        positions = sorted(p for d in long.decoded.trace for p in d.positions)
        assert positions == list(range(7, 7 + k * ceil(13 / k)))
        within = d2f_decode(reference, prompt, 99, k, model.mask_id, n_ctx=22, **thresholds)
        assert len(within.decoded.tokens) == 15
