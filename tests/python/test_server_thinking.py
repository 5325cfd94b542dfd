"""What a model thinks and what it answers, told apart however the text is cut."""

from __future__ import annotations

import random

import pytest

from sbd_engine.server.thinking import Said, ThinkingSplitter


def split(text: str, begun: bool, cuts: list[int]) -> Said:
    splitter = ThinkingSplitter(begun)
    ends = [*cuts, len(text)]
    said = [
        splitter.feed(text[begin:end], last=end == len(text))
        for begin, end in zip([0, *cuts], ends, strict=True)
    ]
    return Said("".join(s.thought for s in said), "".join(s.answer for s in said))


CASES = [
    ("<think>\nWell, a < b.\n</think>\n\nYes.", False, Said("Well, a < b.", "Yes.")),
    ("Well.\n</think>\nYes </think>.", True, Said("Well.", "Yes </think>.")),
    ("<think>\n\n</think>\n\nYes.", False, Said("", "Yes.")),
    ("  Yes, <think> is a tag.", False, Said("", "  Yes, <think> is a tag.")),
    ("<think>never closed </thin", False, Said("never closed </thin", "")),
    ("<thin", False, Said("", "<thin")),
    ("<thinker>", False, Said("", "<thinker>")),
    ("", False, Said("", "")),
    ("", True, Said("", "")),
    ("a  b\n c</think>", True, Said("a  b\n c", "")),
]


@pytest.mark.parametrize(("text", "begun", "said"), CASES)
def test_whole_and_in_pieces(text: str, begun: bool, said: Said) -> None:
    draw = random.Random(text)
    assert split(text, begun, []) == said
    assert split(text, begun, list(range(1, len(text)))) == said
    for _ in range(50):
        cuts = sorted(draw.sample(range(len(text) + 1), min(3, len(text))))
        assert split(text, begun, cuts) == said


def test_what_is_certain_is_told_at_once() -> None:
    splitter = ThinkingSplitter(begun=True)
    assert splitter.feed("One two") == Said("One two", "")
    assert splitter.feed(" </thi") == Said("", "")
    assert splitter.feed("s") == Said(" </this", "")
