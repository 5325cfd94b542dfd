"""`sbd-engine generate` and `Engine.generate_each`: many prompts, each its own answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from python.command import call_here, check_refused
from python.evaluating import write

from sbd_engine import Completion, Engine

PROMPTS = ["Hello the world", "the", "A line\nand another", "Größe 🙂", "x" * 40]
SHORT = ["--max-tokens", 12]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    write(path, [{"prompt": prompt, "family": f"kind {len(prompt) % 2}"} for prompt in PROMPTS])
    return path


def lines(text: str) -> list[dict[str, Any]]:
    """The answers, in their prompts' order, without the journal's own lines and marks."""
    found = [json.loads(line) for line in text.splitlines()]
    answers = [line for line in found if "settings" not in line]
    for line in answers:
        line.pop("run", None)
    return sorted(answers, key=lambda line: line["number"])


def test_each_prompt_gets_what_it_would_get_alone(
    model: Path, engine: Engine, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.jsonl"
    call = ["generate", model, "--prompts", prompts, *SHORT]
    code, printed, err = call_here(capsys, *call, "--batch", 2, "--out", out)
    assert (code, printed) == (0, "")
    assert err.startswith(f"note: {len(PROMPTS)} answers, ")
    answers = lines(out.read_text())
    for number, (line, prompt) in enumerate(zip(answers, PROMPTS, strict=True)):
        alone = engine.generate(prompt, max_tokens=12)
        assert line == {
            "number": number,
            "prompt": prompt,
            "family": f"kind {len(prompt) % 2}",
            "prompt_ids": engine.tokenizer.encode(prompt),
            "text": alone.text,
            "tokens": alone.tokens,
            "finish_reason": alone.finish_reason,
            "nfe": alone.stats.nfe,
            "options": json.loads(json.dumps(engine.resolve(max_tokens=12))),
        }
    # Without --out the same lines come on standard output.
    code, printed, _ = call_here(capsys, *call)
    assert code == 0 and lines(printed) == answers


def test_sampled_texts_differ_by_their_number(
    model: Path, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = tmp_path / "same.txt"
    same.write_text("the\nthe\n\nthe\n")
    options = {"temperature": 1.0, "seed": 5, "max_tokens": 12, "decoder": "ntp"}
    flags = [text for k, v in options.items() for text in (f"--{k.replace('_', '-')}", v)]
    code, printed, _ = call_here(capsys, "generate", model, "--prompts", same, *flags)
    answers = lines(printed)
    assert code == 0 and [line["prompt"] for line in answers] == ["the"] * 3
    assert len({line["text"] for line in answers}) == 3
    for number, line in enumerate(answers):
        alone = engine.generate("the", sample_index=number, **options)  # type: ignore[arg-type]
        assert line["tokens"] == alone.tokens
        assert (line["options"]["seed"], line["options"]["sample_index"]) == (5, number)


def test_in_the_chat_template(
    model: Path, engine: Engine, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, printed, _ = call_here(capsys, "generate", model, "--prompts", prompts, *SHORT, "--chat")
    assert code == 0
    for line, prompt in zip(lines(printed), PROMPTS, strict=True):
        chat = engine.tokenizer.encode_chat([{"role": "user", "content": prompt}])
        assert line["prompt_ids"] == chat
        assert line["tokens"] == engine.generate(chat, max_tokens=12).tokens


def test_an_interrupted_run_goes_on(
    model: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "answers.jsonl"
    call = ["generate", model, "--prompts", prompts, *SHORT]
    whole = lines(call_here(capsys, *call)[1])
    asked: list[int] = []
    generate_each = Engine.generate_each

    def stopped(self: Engine, calls: Any, **options: Any) -> Iterator[tuple[int, Completion]]:
        asked.append(len(calls))
        for count, answer in enumerate(generate_each(self, calls, **options)):
            if count == 2 and len(asked) == 1:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(Engine, "generate_each", stopped)
    code, printed, err = call_here(capsys, *call, "--out", out)
    assert (code, printed) == (130, "")
    assert f"interrupted after 2 of 5 prompts; kept in {out}: the same command goes on" in err
    with out.open("a") as file:
        file.write('{"number": 4, "pro')  # cut off in the middle
    code, _, err = call_here(capsys, *call, "--out", out, "--batch", 1)
    assert code == 0 and "1 line left out" in err
    assert asked == [5, 3]
    assert lines(out.read_text()) == whole
    assert call_here(capsys, *call, "--out", out)[0] == 0  # nothing is left to do
    assert asked == [5, 3, 0]
    assert lines(out.read_text()) == whole


def test_other_answers_are_refused(
    model: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.jsonl"
    call = ["generate", model, "--prompts", prompts, "--out", out]
    assert call_here(capsys, *call, *SHORT)[0] == 0
    before = out.read_bytes()
    for more, says in (
        (["--max-tokens", 13], "holds results with options max_tokens 12, this run has 13"),
        ([*SHORT, "--chat"], "holds results with chat false, this run has true"),
        ([*SHORT, "--temperature", 1], "options temperature 0.0, this run has 1.0"),
    ):
        check_refused(call_here(capsys, *call, *more), says)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "flags", "says"),
    [
        ('{"prompt": "a"}\n{"text": "b"}', [], 'line 2: expected a "prompt"'),
        ('{"prompt": "a"}\n{"prompt": "b", "family": 3}', [], 'expected "family" as a string'),
        ("", [], "an empty file"),
        ('{"prompt": "%s"}' % ("word " * 600), [], "prompts.jsonl, line 1: "),
        ('{"prompt": "a"}', ["--batch", 0], "--batch"),
        ('{"prompt": "a"}', ["--template-arg", "a=1"], "no effect without --chat"),
        ('{"prompt": "a"}', ["--gamma", 1, "--decoder", "ntp"], "--gamma"),
    ],
)
def test_bad_input(
    content: str,
    flags: list[object],
    says: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    path.write_text(content)
    done = call_here(capsys, "generate", model, "--prompts", path, "--out", out, *flags)
    check_refused(done, says)
    assert not out.exists()


def test_each_as_it_ends(engine: Engine) -> None:
    prompts: list[Any] = [{"prompt": "the", "max_tokens": 40, "ignore_eos": True}, "the", "x"]
    done = list(engine.generate_each(prompts, max_tokens=4, decoder="ntp"))
    assert [number for number, _ in done][-1] == 0  # the longest
    expected = engine.generate_batch(prompts, max_tokens=4, decoder="ntp")
    assert [completion.tokens for _, completion in sorted(done)] == [c.tokens for c in expected]
    # One at a time they end in their order; who has seen enough leaves nothing behind.
    one_by_one = engine.generate_each(prompts, at_once=1, max_tokens=4, decoder="ntp")
    assert next(one_by_one)[0] == 0
    one_by_one.close()
    assert engine.usage.admitted == 0
