"""Texts that must be something, asked for in OpenAI's and vLLM's words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from python.serving import MESSAGES, Served, serve

from sbd_engine import Engine

pytest.importorskip("llguidance")
openai = pytest.importorskip("openai")

SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 22, 333]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA}}


@pytest.fixture(scope="module")
def tiny(model: Path) -> Iterator[Served]:
    with Engine(model) as engine, serve(engine, "tiny") as served:
        yield served


def client_of(served: Served) -> Any:
    return openai.OpenAI(base_url=served.url, api_key="none", max_retries=0)


@pytest.mark.parametrize("decoder", ["ntp", "sbd", "sbd_lossless"])
def test_a_schema_by_openai_s_client(tiny: Served, decoder: str) -> None:
    call: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "seed": 4}
    call |= {"response_format": FORMAT, "extra_body": {"decoder": decoder}}
    client = client_of(tiny)
    answer = client.chat.completions.create(**call)
    said = json.loads(answer.choices[0].message.content)
    assert set(said) == {"ok", "n"} and said["n"] in (1, 22, 333)
    assert answer.choices[0].finish_reason == "stop"
    pieces = client.chat.completions.create(**call, stream=True)
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert text == answer.choices[0].message.content


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"guided_choice": ["left", "right"]}, ("left", "right")),
        ({"guided_regex": "(up|down)"}, ("up", "down")),
        ({"guided_json": {"enum": [5, "six"]}}, ("5", '"six"')),
        ({"guided_json": '{"const": null}'}, ("null",)),
        ({"guided_grammar": 'start: "x" | "yy"'}, ("x", "yy")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, ("a", "b")),
        ({"structured_outputs": {"json": {"const": 7}}}, ("7",)),
        ({"structured_outputs": {"regex": "z{3}", "grammar": None}}, ("zzz",)),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": []}}}},
         ("[]",)),
    ],
)  # fmt: skip
def test_vllm_s_names(tiny: Served, fields: dict[str, Any], texts: tuple[str, ...]) -> None:
    answer = tiny.post("/v1/completions", prompt="Hello", n=3, **fields)
    for choice in answer["choices"]:
        assert choice["text"] in texts
        assert choice["finish_reason"] == "stop"


def test_json_mode_is_an_object(tiny: Served) -> None:
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": None}}},
    ):
        answer = tiny.post("/v1/completions", prompt="Hello", max_tokens=300, **fields)
        choice = answer["choices"][0]
        assert choice["text"].startswith("{")
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["text"]), dict)
    plain = tiny.post("/v1/completions", prompt="Hello", response_format={"type": "text"})
    assert not plain["choices"][0]["text"].startswith("{")
