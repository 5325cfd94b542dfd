"""Tools that people have, against the server; each where it is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from python.serving import MESSAGES, Served, serve

from sbd_engine import Engine

QUESTIONS = [
    {"prompt": "def add(a, b):\n    return", "choices": [" a + b", " a - b", " cat"], "answer": 0},
    {"prompt": "import os\nimport", "choices": [" sys", " )(", " 77"], "answer": 0},
    {"prompt": "for i in", "choices": [" zebra:", " range(10):"], "answer": 1},
]
TASK = {
    "dataset_path": "json",
    "test_split": "train",
    "doc_to_text": "{{prompt}}",
    "target_delimiter": "",
}
CHOICES = {
    "task": "choices",
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
TEXTS = {
    "task": "texts",
    "output_type": "generate_until",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "temperature": 0},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    with Engine() as engine, serve(engine) as served:
        yield served


def test_lm_eval_has_the_engines_own_scores(
    demo: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("aiohttp")
    data = tmp_path / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    for task in (CHOICES, TEXTS):
        whole = {**TASK, **task, "dataset_kwargs": {"data_files": str(data)}}
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(whole))  # YAML has JSON in it
    results = lm_eval.simple_evaluate(
        "local-completions",
        model_args=f"model=demo,base_url={demo.url}/completions,num_concurrent=3,max_length=1024",
        tasks=["choices", "texts"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )
    samples: dict[str, Any] = results["samples"]
    encode = demo.engine.tokenizer.encode
    for question, sample in zip(QUESTIONS, samples["choices"], strict=True):
        for choice, told in zip(question["choices"], sample["resps"], strict=True):
            ids = encode(question["prompt"]) + encode(choice)
            scores = demo.engine.score(ids)
            own = slice(len(encode(question["prompt"])), None)
            assert told[0][0] == pytest.approx(sum(scores.logprobs[own]), rel=1e-6)
            assert told[0][1] == (not any(scores.ranks[own]))
    assert results["results"]["choices"]["acc,none"] == 1
    for question, sample in zip(QUESTIONS, samples["texts"], strict=True):
        done = demo.engine.generate(question["prompt"], max_tokens=24, stop=["\n"])
        assert sample["resps"][0][0].strip() == done.text.strip()


def test_langchain(model: Path) -> None:
    langchain = pytest.importorskip("langchain_openai")
    with Engine(model) as engine, serve(engine, "tiny") as served:
        chat = langchain.ChatOpenAI(
            base_url=served.url, api_key="none", model="tiny", max_tokens=20, temperature=0.7,
            seed=4, max_retries=0, stream_usage=True,
        )  # fmt: skip
        ids = engine.tokenizer.encode_chat(MESSAGES)
        done = engine.generate(ids, max_tokens=20, temperature=0.7, seed=4)
        answer = chat.invoke([("user", MESSAGES[0]["content"])])
        assert answer.content == done.text
        assert answer.usage_metadata["output_tokens"] == len(done.tokens)
        assert answer.response_metadata["finish_reason"] == done.finish_reason
        chunks = list(chat.stream([("user", MESSAGES[0]["content"])]))
        assert "".join(chunk.content for chunk in chunks) == done.text
        own = chat.bind(extra_body={"decoder": "ntp"})
        assert own.batch([[("user", "a")], [("user", "b")]])
