"""Requests as they must not be: each is refused with its field named, and the engine stays as it
was."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from python.serving import MESSAGES, Served, serve
from python.tool_templates import TOOLS

from sbd_engine import Engine
from sbd_engine.server.fields import CHAT_FIELDS, COMPLETION_FIELDS

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def tiny(model: Path) -> Iterator[Served]:
    with Engine(model, n_threads=1) as engine, serve(engine, "tiny") as served:
        yield served


@pytest.fixture(scope="module")
def calling(tiny: Served) -> Iterator[Served]:
    """With a template that knows tools, and writes nothing of them."""
    template = (
        """{{ tools | length }}{{ messages | length }}{# <tool_call>{"name":"arguments"} #}"""
    )
    with serve(tiny.engine, "tiny", chat_template=template) as served:
        yield served


@pytest.fixture(autouse=True)
def untouched(tiny: Served) -> Iterator[None]:
    """No sequence is left over."""
    yield
    assert tiny.engine._core.n_sequences == 0


# Field, value, and what is said of it.
WRONG: list[tuple[str, Any, str]] = [
    ("temperature", -0.1, "expected `temperature` >= 0"),
    ("temperature", "1", "expected `temperature` as a number, got '1'"),
    ("temperature", True, "as a number"),
    ("temperature", 10**400, "got inf"),
    ("top_p", 0, "above 0 and at most 1"),
    ("top_p", 1.5, "above 0 and at most 1"),
    ("top_k", -1, ">= 0"),
    ("top_k", 2.0, "an integer"),
    ("min_p", 2, "from 0 to 1"),
    ("seed", -1, ">= 0"),
    ("seed", 2**64, "<= 18446744073709551615"),
    ("n", 0, ">= 1"),
    ("n", 129, "<= 128"),
    ("n", "2", "an integer"),
    ("max_tokens", -1, ">= "),
    ("max_tokens", 1.5, "an integer"),
    ("max_tokens", True, "an integer"),
    ("stop", "", "at least one character"),
    ("stop", ["a"] * 17, "at most 16"),
    ("stop", ["a", 1], "as a string or several"),
    ("stop", {"a": 1}, "as a string or an array"),
    ("stop", 5, "as a string or an array"),
    ("logit_bias", {"a": 1}, "token ids as keys"),
    ("logit_bias", {"-1": 1}, "token ids as keys"),
    ("logit_bias", {"1": "x"}, "as a number"),
    ("logit_bias", {"99999": 1}, "outside the vocabulary of 272"),
    ("logit_bias", [1], "as an object"),
    ("presence_penalty", 2.1, "from -2 to 2"),
    ("frequency_penalty", -3, "from -2 to 2"),
    ("repetition_penalty", 0, "above 0"),
    ("ignore_eos", "yes", "True or False"),
    ("decoder", "warp", 'unknown `decoder` "warp"'),
    ("decoder", 5, "as a string"),
    ("decoder", "\ud83d", "UTF-8"),
    ("unmask", "\ud83d", "UTF-8"),
    ("block_size", 0, "`block_size`"),
    ("gamma", -1, ">= 0"),
    ("unmask", "best", "entropy_bounded"),
    ("horizon", 2, "no effect with decoder"),
    ("stream", "yes", "true or false, got a string"),
    ("stream", 1, "true or false, got a number"),
    ("stream_options", {"include_usage": True}, "no effect without `stream`"),
    ("stream_options", [], "as an object"),
    ("stream_options", {"include_usage": 1}, "`stream_options`.include_usage"),
    ("stream_options", {"usage": True}, "unknown field"),
    ("model", 5, "as a string"),
    ("user", 5, "as a string"),
    ("response_format", {"type": "xml"}, 'of type text, json_object, json_schema, got "xml"'),
    ("response_format", "json", "as an object"),
    ("response_format", {"type": "json_schema"}, "json_schema as an object, got null"),
    ("response_format", {"type": "json_object", "schema": {}}, "unknown field 'schema'"),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}},
        "`response_format`.json_schema.schema: ",
    ),
    ("guided_regex", "(", "`guided_regex`: "),
    ("guided_json", "{", "expected `guided_json` as JSON"),
    ("guided_choice", "yes", "expected `guided_choice` as a list of strings"),
    ("guided_grammar", "x", "`guided_grammar`: "),
    ("structured_outputs", {}, "got none"),
    ("structured_outputs", {"json": {}, "regex": "a"}, "got json and regex"),
    ("structured_outputs", {"structural_tag": "x"}, "unknown field 'structural_tag'"),
    ("structured_outputs", {"regex": "("}, "`structured_outputs`.regex: "),
    ("structured_outputs", {"choice": "a"}, "expected `structured_outputs`.choice as a list"),
    (
        "response_format",
        {"type": "json_schema", "json_schema": {"strict": "yes"}},
        "expected `response_format`.json_schema.strict as true or false, got a string",
    ),
    ("unknown", 1, "unknown field 'unknown'"),
    ("temprature", 1, "did you mean temperature?"),
]
OF_CHAT: list[tuple[str, Any, str]] = [
    ("messages", [], "at least one message"),
    ("messages", "hi", "as an array"),
    ("messages[0]", "hi", "as an object, got a string"),
    ("messages[0].role", {"content": "x"}, "expected a role"),
    ("messages[0].role", {"role": None, "content": "x"}, "expected a role"),
    ("messages[0].role", {"role": 5, "content": "x"}, "as a string"),
    ("messages[0].content", {"role": "user"}, "expected a content"),
    ("messages[0].content", {"role": "user", "content": 5}, "as an array"),
    ("messages[0].content", {"role": "user", "content": [{"type": "image_url"}]}, '"image_url"'),
    ("messages[0].content", {"role": "user", "content": [{"type": "text"}]}, "a string, got null"),
    ("messages[0].mood", {"role": "user", "content": "x", "mood": "good"}, "unknown field 'mood'"),
    ("max_tokens", 0, ">= 1"),
    ("max_completion_tokens", 0, ">= 1"),
    ("logprobs", 1, "true or false"),
    ("top_logprobs", 21, "<= 20"),
    ("top_logprobs", 2, "no effect without `logprobs`"),
    ("tool_choice", "required", "no effect without `tools`"),
    ("functions", [{"name": "x"}], "use `tools`"),
    ("function_call", "x", "use `tool_choice`"),
    ("chat_template_kwargs", {"sanitize_control_tokens": False}, "must not hold"),
    ("chat_template_kwargs", {"messages": []}, "must not hold"),
    ("chat_template_kwargs", [], "as an object"),
    ("prompt", "x", "unknown field 'prompt'"),
]  # fmt: skip
OF_COMPLETIONS: list[tuple[str, Any, str]] = [
    ("prompt", "", "at least one character"),
    ("prompt", [], "an empty array"),
    ("prompt", [[]], "at least one token"),
    ("prompt", 5, "as an array"),
    ("prompt", {"a": 1}, "as an array"),
    ("prompt", ["a", 1], "got a number at position 1"),
    ("prompt", [1, "a"], "got a string at position 1"),
    ("prompt", [1, True], "got a boolean at position 1"),
    ("prompt", [1.0], "got a number at position 0"),
    ("prompt", [272], "from 0 to 271, got 272 at position 0"),
    ("prompt", [-1], "from 0 to 271, got -1"),
    ("prompt", [10**30], "from 0 to 271"),
    ("prompt", ["a"] * 129, "at most 128 texts"),
    ("prompt", "\ud800", "UTF-8"),
    ("max_tokens", 0, "without `echo`"),
    ("logprobs", 21, "<= 20"),
    ("logprobs", True, "an integer"),
    ("echo", "yes", "true or false"),
    ("best_of", 2, "not supported here"),
    ("suffix", "x", "not supported here"),
    ("messages", MESSAGES, "unknown field 'messages'"),
]


def request(path: str, field: str, value: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": MESSAGES} if path == CHAT else {"prompt": "Hello"}
    if field.startswith("messages["):
        return {"messages": [value]}
    return {**body, field: value}


@pytest.mark.parametrize(("field", "value", "said"), WRONG)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_field_of_both(tiny: Served, path: str, field: str, value: Any, said: str) -> None:
    error = tiny.refuse(path, **request(path, field, value))
    assert error["param"] == field
    assert said in error["message"]


@pytest.mark.parametrize(("field", "value", "said"), OF_CHAT)
def test_a_field_of_chat(tiny: Served, field: str, value: Any, said: str) -> None:
    error = tiny.refuse(CHAT, **request(CHAT, field, value))
    assert error["param"] == field
    assert said in error["message"]


@pytest.mark.parametrize(("field", "value", "said"), OF_COMPLETIONS)
def test_a_field_of_completions(tiny: Served, field: str, value: Any, said: str) -> None:
    error = tiny.refuse(COMPLETIONS, **request(COMPLETIONS, field, value))
    assert error["param"] == field
    assert said in error["message"]


def test_fields_that_contradict_each_other(tiny: Served) -> None:
    error = tiny.refuse(CHAT, messages=MESSAGES, max_tokens=4, max_completion_tokens=5)
    assert error["param"] == "max_completion_tokens"
    error = tiny.refuse(COMPLETIONS, prompt="Hello", decoder="ntp", gamma=0.1)
    assert (error["param"], "no effect" in error["message"]) == ("gamma", True)
    error = tiny.refuse(COMPLETIONS, prompt="Hello", gamma=0.1, factor=0.5)
    assert error["param"] in ("gamma", "factor")
    error = tiny.refuse(CHAT, messages=MESSAGES, guided_regex="a", guided_choice=["a"])
    assert error["param"] == "guided_choice"
    error = tiny.refuse(CHAT, messages=MESSAGES, guided_regex="a", decoder="d2f")
    assert "leave out `guided_regex`" in error["message"]
    assert tiny.refuse(CHAT, prompt="x")["param"] == "prompt"
    assert tiny.refuse(CHAT)["param"] == "messages"
    assert tiny.refuse(COMPLETIONS)["param"] == "prompt"
    assert tiny.refuse("/tokenize")["param"] == "prompt"
    assert tiny.refuse("/tokenize", prompt="a", messages=MESSAGES)["param"] == "prompt"
    assert tiny.refuse("/detokenize")["param"] == "tokens"
    assert tiny.refuse("/detokenize", tokens=[272])["param"] == "tokens"
    assert tiny.refuse("/detokenize", tokens=["a"])["param"] == "tokens"


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_past_the_context_say_both_lengths(tiny: Served, stream: bool) -> None:
    for path, body in (
        (COMPLETIONS, {"prompt": [65] * 512}),
        (COMPLETIONS, {"prompt": "!" * 600}),
        (CHAT, {"messages": [{"role": "user", "content": "!" * 600}]}),
    ):
        error = tiny.refuse(path, **body, stream=stream)
        assert error["code"] == "context_length_exceeded"
        assert error["param"] in body
        assert "at most 511 tokens" in error["message"]
    whole = tiny.post(COMPLETIONS, prompt=[65] * 512, max_tokens=0, echo=True, logprobs=0)
    assert len(whole["choices"][0]["logprobs"]["tokens"]) == 512
    error = tiny.refuse(COMPLETIONS, prompt="!" * 1_000_000)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
    error = tiny.refuse(CHAT, messages=[{"role": "user", "content": "!" * 1_000_000}])
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert "characters" in error["message"]  # not all of them were looked at


def test_null_is_as_good_as_absent(tiny: Served) -> None:
    for path, fields in ((CHAT, CHAT_FIELDS), (COMPLETIONS, COMPLETION_FIELDS)):
        nulls = dict.fromkeys(fields)
        body = {**nulls, **request(path, "max_tokens", 4), "seed": 3}
        given = tiny.post(path, **body)
        bare = tiny.post(path, **{k: v for k, v in body.items() if v is not None})
        assert given["choices"] == bare["choices"]


def test_options_of_sampling_change_nothing_at_temperature_zero(tiny: Served) -> None:
    given = tiny.post(COMPLETIONS, prompt="a", temperature=0, top_p=0.5, top_k=3, min_p=0.1, n=2)
    bare = tiny.post(COMPLETIONS, prompt="a", temperature=0)
    assert [each["text"] for each in given["choices"]] == [bare["choices"][0]["text"]] * 2


# A body as it is, and what is said of it.
BODIES: list[tuple[bytes, str]] = [
    (b"", "expected a body of JSON"),
    (b"{", "expected a body of JSON"),
    (b"[]", "expected a body of one JSON object, got an array"),
    (b"null", "got null"),
    (b'"x"', "got a string"),
    (b'{"prompt": "\xff"}', "expected UTF-8 text, got byte 0xff at offset 12"),
    (b'{"prompt": "a", "temperature": NaN}', "NaN is no number in JSON"),
    (b'{"prompt": "a", "temperature": -Infinity}', "-Infinity is no number"),
    (b'{"prompt": "a", "temperature": 1e999}', "finite"),
    (b'{"seed": ' + b"9" * 5000 + b"}", "thousands of digits"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    (b'{"prompt": ' + b"[" * 300 + b"]" * 300 + b"}", "at position 0"),
    (b'{"messages": [{"content": ' + b"[" * 900 + b"]" * 900 + b"}]}", "unknown field"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "said"), BODIES)
def test_bodies_that_are_no_request(tiny: Served, body: bytes, said: str) -> None:
    status, _, answer = tiny.ask("POST", COMPLETIONS, body)
    assert status == 400
    assert said in answer["error"]["message"]


def test_paths_and_methods(tiny: Served) -> None:
    status, _, answer = tiny.ask("GET", "/v2/chat")
    assert (status, answer["error"]["type"]) == (404, "not_found_error")
    status, headers, answer = tiny.ask("GET", CHAT)
    assert (status, headers["allow"]) == (405, "POST")
    assert "not for GET" in answer["error"]["message"]
    assert tiny.ask("DELETE", "/v1/models")[0] == 405
    assert tiny.ask("POST", "/health", {})[0] == 405


JUNK: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3.5, 1e308, -0.0, 2**31, 2**63, 2**64, 10**40),
    *("", "a", "\x00", "\ud83d", "🙂" * 9, "auto", "sbd", [], {}, [[]], [None], ["a"], [1, 2]),
    *({"a": {}}, {"type": "text"}, [{"role": "user", "content": "x"}], "x" * 3000),
]


def mutated(draw: random.Random, body: Any) -> Any:
    """The same with a few of its values, at any depth, something else."""
    body = copy.deepcopy(body)
    for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
        at = body
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = draw.choice(keys)
            if isinstance(at[key], (dict, list)) and at[key] and draw.random() < 0.6:
                at = at[key]
                continue
            at[key] = copy.deepcopy(draw.choice(JUNK))
            break
    return body


CALL = {"id": "x", "type": "function", "function": {"name": "get", "arguments": '{"a": 5}'}}
SEEDS: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {
        "model": "tiny", "messages": MESSAGES, "max_tokens": 3, "temperature": 0.5, "seed": 1,
        "logprobs": True, "top_logprobs": 2, "stop": ["x", "y"], "n": 2, "top_p": 0.9,
        "stream": True, "stream_options": {"include_usage": True, "sbd_blocks": True},
        "chat_template_kwargs": {"a": 1}, "logit_bias": {"5": 1}, "decoder": "sbd",
    }),
    (COMPLETIONS, {
        "model": "tiny", "prompt": ["a", "b"], "max_tokens": 3, "logprobs": 2, "echo": True,
        "decoder": "sbd", "block_size": 4, "gamma": 0.2, "top_k": 5, "min_p": 0.1,
        "repetition_penalty": 1.1, "presence_penalty": 0.1, "ignore_eos": True,
    }),
    (COMPLETIONS, {"prompt": [[65, 66], [67]], "max_tokens": 2, "n": 2, "unmask": "top_n"}),
    (CHAT, {
        "messages": [*MESSAGES, {"role": "assistant", "tool_calls": [CALL]},
                     {"role": "tool", "tool_call_id": "x", "content": "5"}],
        "max_tokens": 3, "tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False,
    }),
    ("/tokenize", {"prompt": "a", "add_special_tokens": True}),
    ("/tokenize", {"messages": MESSAGES, "chat_template_kwargs": {}}),
    ("/detokenize", {"tokens": [1, 2, 3]}),
]  # fmt: skip


def fuzz(served: Served, seed: int, requests: int) -> dict[int, int]:
    """Sends mutated requests; how often each status came. None may be a fault of the server."""
    draw = random.Random(seed)
    statuses: dict[int, int] = {}
    for _ in range(requests):
        path, body = draw.choice(SEEDS)
        data = json.dumps(mutated(draw, body)).encode()
        if draw.random() < 0.1:
            cut = draw.randrange(len(data))
            data = data[:cut] + bytes([draw.randrange(256)]) + data[cut + draw.randint(0, 2) :]
        status, _, answer = served.ask("POST", path, data)
        statuses[status] = statuses.get(status, 0) + 1
        assert status in (200, 400, 404), (path, data, answer)
        if status != 200:
            assert answer["error"]["message"]
        else:
            assert '"error"' not in str(answer), (path, data, answer)
    return statuses


def test_mutated_requests(calling: Served) -> None:
    """SBD_FUZZ_REQUESTS=100000 for many."""
    requests = int(os.environ.get("SBD_FUZZ_REQUESTS", "400"))
    statuses = fuzz(calling, seed=requests, requests=requests)
    print(statuses)
    assert statuses[200] > requests / 10
    assert statuses[400] > requests / 3
