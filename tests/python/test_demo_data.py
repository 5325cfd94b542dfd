"""The demo model's text: right answers, held-out questions held out, steps that can be repeated."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from training.demo import corpus, tasks
from training.demo.corpus import EOS, MASK, DemoData, draw_document, train_tokenizer
from training.demo.python_text import _whole_document, python_document
from training.demo.tasks import FAMILIES, VOCABULARY, draw_task, is_held_out

SHIPPED = Path(__file__).parents[2] / "sbd_engine" / "tasks" / "exact.jsonl"
PYTHON = ["def f(x):\n    return x", "import os\nprint(os.getcwd())"]


@pytest.fixture(scope="module")
def held_out() -> list[dict[str, str]]:
    return [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def data() -> DemoData:
    """The corpus of a run, but for the standard library, which takes seconds to read."""
    rng = Random(0)
    texts = ["".join(draw_document(rng, PYTHON)) for _ in range(2000)]
    words = "".join(f" {word}\n{word}" for word in VOCABULARY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "stdlib_documents", lambda: PYTHON)
        return DemoData(train_tokenizer([*texts, *[words] * 100], 2048), seed=0, late_from=30)


def trained_texts(data: DemoData, steps: int = 60) -> str:
    return "\0".join(text for step in range(steps) for text in data.documents(step))


def test_no_held_out_question_is_trained_on(data: DemoData, held_out: list[dict[str, str]]) -> None:
    text = trained_texts(data)
    assert not [task for task in held_out if task["prompt"] in text]
    asked = [document for document in text.split("\0") if not document.startswith(("def", "class"))]
    tasks_seen = 0
    for document in asked:
        prompt, newline, _ = document.partition("\n")
        if prompt.split(" ")[0] in {"Add", "Copy", "Reverse", "Sort", "JSON:"}:
            assert not is_held_out(prompt + newline)
            tasks_seen += 1
    assert tasks_seen > 1000


def test_the_draw_alone_would_ask_held_out_questions(
    data: DemoData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the test above would show nothing."""
    anything = lambda family, rng, held_out: tasks.Task(family, *FAMILIES[family](rng))  # noqa: E731
    monkeypatch.setattr(corpus, "draw_task", anything)
    prompts = {document.partition("\n")[0] + "\n" for document in trained_texts(data).split("\0")}
    share = sum(map(is_held_out, prompts)) / len(prompts)
    assert share > tasks.HELD_OUT_SHARE / 2


def test_the_shipped_questions_are_the_held_out_draw(held_out: list[dict[str, str]]) -> None:
    assert held_out == [task._asdict() for task in tasks.held_out_tasks(200)]
    assert all(is_held_out(task["prompt"]) for task in held_out)
    assert len({task["prompt"] for task in held_out}) == len(held_out) == 200 * len(FAMILIES)


def test_holding_out_looks_through_case_and_spaces() -> None:
    prompts = [f"Add {a} + {b}\n" for a in range(40) for b in range(40)]
    assert sum(map(is_held_out, prompts)) / 1600 == pytest.approx(tasks.HELD_OUT_SHARE, abs=0.03)
    assert all(is_held_out(p) == is_held_out(f" {p.upper().replace(' ', '  ')}") for p in prompts)


def words_of(answer: str) -> list[str]:
    """The words of any layout."""
    if answer.startswith("["):
        return list(json.loads(answer))
    if answer.startswith("1."):
        numbers, words = zip(*(line.split(". ") for line in answer.split("\n")), strict=True)
        assert list(numbers) == [str(i) for i in range(1, len(words) + 1)]
        return list(words)
    return answer.split(", ")


ORDERS: dict[str, Callable[[list[str]], list[str]]] = {
    "copying": lambda given: given,
    "reversing": lambda given: given[::-1],
    "sorting": sorted,
}


@pytest.mark.parametrize("family", ORDERS)
def test_words_come_in_the_order_asked_for(held_out: list[dict[str, str]], family: str) -> None:
    for task in held_out:
        if task["family"] == family:
            given = task["prompt"].split(":")[1].split()
            if task["prompt"].startswith("Copy twice"):
                assert [line.split() for line in task["answer"].split("\n")] == [given, given]
            else:
                assert words_of(task["answer"]) == ORDERS[family](given)


def test_sums_are_right_line_by_line(held_out: list[dict[str, str]]) -> None:
    for task in held_out:
        if task["family"] == "addition":
            a, b = map(int, task["prompt"].removeprefix("Add ").split(" + "))
            *lines, answer = task["answer"].split("\n")
            assert answer == f"answer {a + b}"
            written = carry = 0
            for place, line in enumerate(lines):
                left, right = line.split(", carry ")
                terms, total = left.split(" = ")
                assert eval(terms) == int(total)
                assert terms.endswith(f"+ {carry}")
                carry = int(right)
                assert carry == int(total) // 10
                written += int(total) % 10 * 10**place
            assert written + carry * 10 ** len(lines) == a + b


def test_problems_work_out(held_out: list[dict[str, str]]) -> None:
    for task in held_out:
        if task["family"] == "problems":
            *lines, sentence = task["answer"].split("\n")
            for line in lines:
                step, result = line.split(" = ")
                assert eval(step) == int(result)
                assert all(int(term) >= 1 for term in step.split()[::2])
            assert f" {result} " in sentence


def test_records_hold_what_the_prompt_says(held_out: list[dict[str, str]]) -> None:
    for task in held_out:
        if task["family"] == "records":
            for key, value in json.loads(task["answer"]).items():
                if not isinstance(value, bool):
                    assert str(value) in task["prompt"].replace(".", " ").replace(",", " ").split()
                elif value:
                    assert "has paid" in task["prompt"] or f"{key} is yes" in task["prompt"]
                else:
                    assert "not paid" in task["prompt"] or f"{key} is no" in task["prompt"]


def test_a_step_is_always_the_same_and_replicas_share_it(data: DemoData) -> None:
    whole = data.step(3)
    assert whole == data.step(3) != data.step(4)
    assert len(whole) == corpus.BATCH_SIZE
    sizes = [sum(len(example.tokens) for example in sequence) for sequence in whole]
    assert corpus.LENGTH * 0.9 < sum(sizes) / len(sizes) <= max(sizes) <= corpus.LENGTH
    data._mine = slice(1, None, 2)  # as the second of two replicas
    assert data.step(3) == whole[1::2]
    data._mine = slice(0, None, 1)


def test_prompts_and_answers_are_encoded_as_decoding_does(data: DemoData) -> None:
    tokenizer = data._tokenizer
    task = draw_task("records", Random(0), held_out=False)
    example = data._example(task.prompt, task.answer)
    tokens = list(example.tokens)
    assert tokens[: example.prompt_length] == tokenizer.encode(task.prompt).ids
    assert tokenizer.decode(tokens[example.prompt_length : -1]) == task.answer
    assert tokens[-1] == tokenizer.token_to_id(EOS)


def test_tokenizer_keeps_text_and_digits_apart(data: DemoData) -> None:
    tokenizer = data._tokenizer
    text = "def f(x):\n    return x + 1234  # naïve \U0001f40d\n"
    assert (tokenizer.token_to_id(EOS), tokenizer.token_to_id(MASK)) == (0, 1)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("1234").tokens == ["1", "2", "3", "4"]
    for word in VOCABULARY:
        assert len(tokenizer.encode(f" {word}").ids) == len(tokenizer.encode(word).ids) == 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="3.10 unparses targets in parentheses")
def test_generated_python_has_the_layout_of_the_real_text() -> None:
    rng = Random(0)
    for _ in range(300):
        document = _whole_document(rng)
        assert ast.unparse(ast.parse(document)) == document


def test_some_documents_start_further_down() -> None:
    seeds = range(400)
    whole = sum(_whole_document(Random(seed)) == python_document(Random(seed)) for seed in seeds)
    assert 0.7 < whole / len(seeds) < 0.9
    assert all(
        _whole_document(Random(seed)).endswith(
            python_document(Random(seed)).split("\n")[-1].strip()
        )
        for seed in seeds
    )
