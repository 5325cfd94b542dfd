"""How `sbd-engine sweep` comes to its recommendation: what is tried, what counts, what it says."""

from __future__ import annotations

from typing import Any

import pytest

from sbd_engine.cli.sweep_report import print_report
from sbd_engine.evaluation.recommending import evidence, recommend
from sbd_engine.evaluation.sweeping import GAMMAS, RULES, grid, settings, with_files_own


def row(gamma: float, quality: float, tokens_per_forward: float, **changes: Any) -> dict[str, Any]:
    speed = changes.pop("speed", tokens_per_forward / 2)
    return {
        "decoder": "sbd",
        "unmask": "entropy_bounded",
        "gamma": gamma,
        "quality": {"value": quality},
        "loss": {"value": 0.9 - quality},
        "tokens_per_forward": {"value": tokens_per_forward},
        "speedup": {"value": speed, "low": speed - 0.1, "high": speed + 0.1},
        **changes,
    }


NTP = row(-1, 0.9, 1.0, decoder="ntp", speed=1.0)
LOSSLESS = row(-2, 0.9, 2.8, decoder="sbd_lossless")


def gamma(rows: list[dict[str, Any]], max_loss: float, questions: int = 10**6) -> float | None:
    best = recommend([NTP, *rows], evidence(questions, questions, max_loss)).best
    return None if best is None else float(best["gamma"])


def test_recommended_is_the_fastest_within_the_loss() -> None:
    rows = [
        row(0.0, 0.9, 0.96),
        row(0.1, 0.885, 2.0),  # a dip does not bar what lies behind it
        row(0.2, 0.89, 3.0),
        row(0.4, 0.87, 4.0),
        row(0.3, 0.88, 3.5, unmask="factor"),
    ]
    assert gamma(rows, 0.005) is None  # gamma 0 is slower than NTP
    assert gamma(rows, 0.01) == 0.2  # 0.9 - 0.89 is not quite 0.01 in binary
    assert gamma(rows, 0.02) == 0.3  # any rule
    assert gamma(rows, 0.03) == 0.4
    assert gamma(rows, 1.0) == 0.4
    assert gamma([*rows, row(0.5, 0.9, 8.0, speed=0.99)], 1.0) == 0.4  # in time, too
    assert gamma([*rows, row(0.5, 0.9, 8.0, speed=1.79)], 1.0) == 0.4  # shown to be slower
    assert gamma([*rows, row(0.5, 0.9, 8.0, speed=1.81)], 1.0) == 0.5  # may be as fast
    assert gamma([row(0.0, 0.9, 0.96, speed=3.0)], 1.0) is None


def test_why_nothing_is_recommended() -> None:
    plenty, few = evidence(10**6, 10**6, 0.01), evidence(100, 100, 0.01)
    slow, bold = row(0.0, 0.9, 0.96), row(1.5, 0.5, 6.0)
    found = recommend([NTP, slow, row(0.1, 0.9, 1.5)], plenty)
    assert (found.best, found.reason, found.nearest) == (None, "slower", row(0.1, 0.9, 1.5))
    found = recommend([NTP, slow, bold], plenty)
    assert (found.best, found.reason, found.nearest) == (None, "loss", bold)
    careful = row(0.2, 0.9, 3.0)
    found = recommend([NTP, slow, bold, careful], few)
    assert (found.best, found.reason, found.nearest) == (None, "evidence", careful)
    # What is lossless by its making needs no evidence.
    found = recommend([NTP, careful, LOSSLESS], few)
    assert (found.best, found.reason, found.nearest) == (LOSSLESS, "evidence", careful)
    assert recommend([NTP, careful, LOSSLESS], plenty).best == careful
    assert recommend([NTP, LOSSLESS], evidence(2, 2, 0.0)).best == LOSSLESS
    nothing = {**NTP, "quality": {"value": 0.0}}
    found = recommend([nothing, row(1.5, 0.0, 6.0, loss={"value": 0.0})], plenty)
    assert (found.best, found.reason) == (None, "ntp is never right")


def test_how_many_questions_it_takes() -> None:
    # Wilson's upper end of 0 of n is z^2 / (n + z^2), z^2 = 3.8415.
    assert evidence(2, 2, 0.01).hidden_loss == pytest.approx(3.8415 / 5.8415, abs=1e-4)
    assert evidence(2, 2, 0.01).needed == 381  # 3.8415 * 0.99 / 0.01
    assert not evidence(380, 380, 0.01).enough
    assert evidence(381, 381, 0.01).enough
    # Of prompts the tokens count, yet few prompts say nothing of others.
    assert evidence(10, 1000, 0.01).needed == 20
    assert evidence(10, 100, 0.01).needed == 39
    assert evidence(10**9, 10**9, 0.0).needed is None


def test_grid() -> None:
    careful = [p.options["gamma"] for p in grid([16], ["entropy_bounded"], GAMMAS)]
    assert careful == [*GAMMAS]
    points = grid([4, 8], RULES, [0.5])
    assert {p.options["block_size"] for p in points} == {4, 8}
    names = [setting.name for setting in settings(points)]
    assert len({*names}) == len(points) + 1 and names[0] == "ntp"
    assert points[0].options == {
        "decoder": "sbd",
        "block_size": 4,
        "unmask": "entropy_bounded",
        "gamma": 0.5,
    }
    whole = [
        p.options["top_n"]
        for p in points
        if p.options["block_size"] == 4 and p.options["unmask"] == "top_n"
    ]
    assert whole == [1, 2, 3, 4]


def test_the_files_own_settings_are_swept_once() -> None:
    points = grid([8], ["factor"], GAMMAS)
    says = {"block_size": 8, "unmask": "factor", "factor": 0.5}

    def default(auto: str, able: list[str], defaults: dict[str, Any]) -> list[Any]:
        swept = with_files_own(points, auto, able, defaults)
        return [len(swept) - len(points), *(dict(p.options) for p in swept if p.default)]

    factor = {"decoder": "sbd", **says}
    assert default("sbd", ["sbd"], says) == [0, factor]
    assert default("sbd", ["sbd", "sbd_lossless"], says) == [1, factor]
    other = {"block_size": 8, "unmask": "entropy_bounded", "gamma": 0.35}
    assert default("sbd", ["sbd"], other) == [1, {"decoder": "sbd", **other}]
    assert default("d2f", ["sbd", "d2f"], says) == [1, {"decoder": "d2f"}]
    lossless = {"decoder": "sbd_lossless"}
    assert default("sbd_lossless", ["sbd_lossless"], says) == [1, lossless]
    assert default("ntp", ["ntp", "sbd"], says) == [0]


@pytest.mark.parametrize("reason", ["", "evidence", "loss", "slower", "ntp is never right"])
def test_advice_for_people(reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    spread = {"low": 0.0, "high": 0.5}
    figures = {
        name: {"value": value, **spread}
        for name, value in (("quality", 0.9), ("loss", 0.005), ("tokens_per_forward", 3.0))
    }
    ntp = {"decoder": "ntp", "speedup": {"value": 1.0, **spread}, **figures}
    careful = {"decoder": "sbd", "block_size": 8, "unmask": "factor", "factor": 0.1}
    row = {**ntp, **careful, "default": False}
    best = {**row, "command": "sbd-engine run", "set": "sbd-engine set"}
    print_report(
        {
            "model": "[b]m.bin",
            "device": "cpu",
            "n_threads": 1,
            "answered": 6,
            "batch": 1,
            "quality": "right answers",
            "results": [ntp, row],
            "max_loss": 1.0,
            "recommended": None if reason else best,
            "reason": reason,
            "nearest": row if reason else None,
            "evidence": {"questions": 6, "hidden_loss": 0.39, "needed": 381},
        }
    )
    out = capsys.readouterr().out
    assert out.startswith("[b]m.bin on cpu, 1 threads, 6 questions one at a time\n")
    words = " ".join(out.split())
    said = {
        "": "recommended: factor 0.1 in blocks of 8: 3.00 tokens per forward, 1.00x ntp's speed "
        "(0.00 to 0.50), 0.5 points lost (0.0 to 50.0), 1 allowed now: sbd-engine run in the file: "
        "sbd-engine set",
        "evidence": "too little data to recommend a setting: 6 questions can hide a loss of 39.0 "
        "points, it takes about 381 to show one of at most 1 point; --max-loss allows more "
        "foremost so far: factor 0.1 in blocks of 8: 3.00",
        "loss": "nothing is recommended: what is as fast as ntp loses more than 1 point, the least "
        "factor 0.1 in blocks of 8",
        "slower": "nothing is recommended: no setting is faster than ntp here: the fastest is "
        "factor 0.1",
        "ntp is never right": "nothing can be recommended: ntp has none of these right",
    }
    assert said[reason] in words
    assert ("recommended: factor" in words) == (reason == "")
