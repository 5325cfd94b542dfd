"""Functions that a model may call: what it writes is a call of one, whatever the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
from python.serving import Served, serve
from python.tiny_model import with_template
from python.tool_templates import FAMILIES, HERMES, MESSAGES, SCHEMAS, TOOLS
from tokenizers import AddedToken

from sbd_engine import Engine

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
openai = pytest.importorskip("openai")


@pytest.fixture(
    scope="module", params=["hermes", "hermes spelled", "mistral", "mistral args", "llama"]
)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    path = with_template(folder, family.template, family.tokens, n_ctx=2048)
    with Engine(path) as engine, serve(engine, request.param) as served:
        yield served


def name_of(served: Served) -> str:
    return str(client_of(served).models.list().data[0].id)


def client_of(served: Served) -> Any:
    return client_at(served.url)


@cache
def client_at(url: str) -> Any:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def check_calls(calls: Any) -> None:
    assert calls
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        assert call.type == "function"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


@pytest.mark.parametrize("decoder", ["ntp", "sbd", "sbd_lossless", "nemotron_spec"])
def test_a_call_that_is_required(served: Served, decoder: str) -> None:
    create = client_of(served).chat.completions.create
    for seed in range(2):
        answer = create(
            model=None, messages=MESSAGES, tools=TOOLS, tool_choice="required", seed=seed,
            temperature=seed % 2, max_tokens=400, parallel_tool_calls=False,
            extra_body={"decoder": decoder},
        ).choices[0]  # fmt: skip
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        assert len(answer.message.tool_calls) == 1
        check_calls(answer.message.tool_calls)


def ask(served: Served, **fields: Any) -> Any:
    call: dict[str, Any] = {"model": None, "messages": MESSAGES, "tools": TOOLS, "max_tokens": 300}
    return client_of(served).chat.completions.create(**call | fields)


def joined(chunks: Any) -> tuple[str, list[dict[str, Any]], str]:
    """What a stream comes to: text, calls, and why it ended."""
    text, calls, reason = "", [], ""
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
            for piece in choice.delta.tool_calls or []:
                if piece.index == len(calls):
                    assert piece.id and piece.type == "function"
                    calls.append({"name": piece.function.name, "arguments": ""})
                calls[piece.index]["arguments"] += piece.function.arguments
    return text, calls, reason


def test_a_stream_has_the_same_in_pieces(served: Served) -> None:
    for seed, parallel in enumerate((True, False, True)):
        call = {"tool_choice": "required", "parallel_tool_calls": parallel, "seed": seed}
        answer = ask(served, **call).choices[0]
        text, calls, reason = joined(ask(served, **call, stream=True))
        assert text == ""
        assert calls == [
            {"name": each.function.name, "arguments": each.function.arguments}
            for each in answer.message.tool_calls
        ]
        assert reason == answer.finish_reason
    named = {"type": "function", "function": {"name": "get_weather"}}
    one_by_one = {"decoder": "ntp", "tool_choice": named, "seed": 3}
    pieces = served.stream(CHAT, messages=MESSAGES, tools=TOOLS, **one_by_one)
    first, *others = [p["choices"][0]["delta"].get("tool_calls") for p in pieces if p["choices"]]
    assert first is None or first[0]["function"]["name"]
    assert sum(bool(each) for each in others) > 1  # as they come


def test_one_function_that_is_named(served: Served) -> None:
    for name in SCHEMAS:
        chosen = {"type": "function", "function": {"name": name}}
        answer = ask(served, tool_choice=chosen, seed=5).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert [call.function.name for call in answer.message.tool_calls] == [name]
        check_calls(answer.message.tool_calls)


def test_several_calls(served: Served) -> None:
    """One after the other, as long as the model goes on."""
    tools = [TOOLS[1], TOOLS[2]]
    most = 0
    answer = ask(served, tools=tools, tool_choice="required", temperature=2, seed=4, n=16)
    for choice in answer.choices:
        calls = choice.message.tool_calls
        most = max(most, len(calls))
        if choice.finish_reason == "tool_calls":
            check_calls(calls)
    assert most > 1 if FAMILIES[name_of(served)].parallel else most == 1
    alone = ask(served, tool_choice="required", parallel_tool_calls=False, n=4, seed=9)
    assert all(len(choice.message.tool_calls) == 1 for choice in alone.choices)


def test_a_call_that_is_cut_is_told_as_far_as_it_came(served: Served) -> None:
    whole = ask(served, tool_choice="required", seed=2, temperature=0, parallel_tool_calls=False)
    (call,) = whole.choices[0].message.tool_calls
    for size in range(1, whole.usage.completion_tokens, 19):
        cut = ask(served, tool_choice="required", seed=2, temperature=0, max_tokens=size,
                  parallel_tool_calls=False).choices[0]  # fmt: skip
        assert cut.finish_reason == "length"
        for each in cut.message.tool_calls or []:
            assert call.function.arguments.startswith(each.function.arguments)
            assert each.function.name == call.function.name


def test_auto_is_any_text_or_a_call(served: Served) -> None:
    free = ask(served, seed=1, max_tokens=30).choices[0]
    assert free.message.tool_calls is None and free.message.content
    assert free.finish_reason == "length"
    mark = FAMILIES[name_of(served)].start
    if mark is None:
        return
    bias = {str(served.engine.tokenizer.encode(mark, add_bos=False)[0]): 100}
    called = ask(served, logit_bias=bias, seed=1, parallel_tool_calls=False).choices[0]
    assert called.finish_reason == "tool_calls" and called.message.content is None
    check_calls(called.message.tool_calls)


def test_text_in_front_of_a_call(served: Served) -> None:
    mark = FAMILIES[name_of(served)].start
    if mark is None or mark == "<|python_tag|>":
        return
    # Not at once, but some time.
    call: dict[str, Any] = {"frequency_penalty": 1, "parallel_tool_calls": False}
    call["logit_bias"] = {str(served.engine.tokenizer.encode(mark, add_bos=False)[0]): 20}
    for seed in range(8):
        call["seed"] = seed
        answer = ask(served, **call).choices[0]
        if answer.message.content and answer.finish_reason == "tool_calls":
            break
    assert mark not in answer.message.content
    check_calls(answer.message.tool_calls)
    text, (told,), reason = joined(ask(served, **call, stream=True))
    (function,) = (each.function for each in answer.message.tool_calls)
    assert (text, reason) == (answer.message.content, "tool_calls")
    assert told == {"name": function.name, "arguments": function.arguments}


def test_none_is_text(served: Served) -> None:
    with_tools = ask(served, tool_choice="none", seed=1, max_tokens=20)
    assert with_tools.choices[0].message.content
    assert with_tools.choices[0].message.tool_calls is None
    without = ask(served, tools=openai.NOT_GIVEN, seed=1, max_tokens=20)
    assert with_tools.usage.prompt_tokens > without.usage.prompt_tokens  # the template has them


def test_a_round_trip(served: Served) -> None:
    """Question, call, the tool's answer, and what the model makes of it; the conversation is the
    one that the template writes of it."""
    asked = ask(served, tool_choice="required", parallel_tool_calls=False, seed=6).choices[0]
    (call,) = asked.message.tool_calls
    messages: list[Any] = [
        *MESSAGES,
        asked.message,
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    answer = ask(served, messages=messages, tool_choice="none", max_tokens=9, temperature=0)
    arguments = json.loads(call.function.arguments)
    ids = served.engine.tokenizer.encode_chat(
        [
            *MESSAGES,
            {"role": "assistant", "tool_calls": [{
                "id": call.id, "type": "function",
                "function": {"name": call.function.name, "arguments": arguments}}]},
            {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
        ],
        tools=TOOLS,
    )  # fmt: skip
    assert answer.usage.prompt_tokens == len(ids)
    assert served.engine.tokenizer.decode(ids).find(json.dumps(arguments)) > 0
    assert answer.choices[0].message.content == served.engine.generate(ids, max_tokens=9).text
    for none in (None, []):
        said: dict[str, Any] = {"role": "assistant", "content": "Hello"}
        plain = served.engine.tokenizer.encode_chat([*MESSAGES, said])
        told = served.post("/tokenize", messages=[*MESSAGES, {**said, "tool_calls": none}])
        assert told["tokens"] == plain
    counted = served.post("/tokenize", messages=MESSAGES, tools=TOOLS)
    own = served.engine.tokenizer.encode_chat(MESSAGES, tools=TOOLS)
    assert counted["tokens"] == own


def tool(name: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


def called(arguments: Any) -> dict[str, Any]:
    function = {"name": "get", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


CHAT = "/v1/chat/completions"
NAME, PARAMETERS = "tools[0].function.name", "tools[0].function.parameters"
CALLED = "messages[0].tool_calls[0].function"
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": {}}, "tools", "as an array"),
    ({"tools": [5]}, "tools[0]", "as an object"),
    ({"tools": [{"type": "search"}]}, "tools[0].type", 'of type "function", got "search"'),
    ({"tools": [{"type": "function"}]}, "tools[0].function", "as an object, got null"),
    ({"tools": [tool(None)]}, NAME, "as a string"),
    ({"tools": [tool("two words")]}, NAME, "letters, digits, _ and -"),
    ({"tools": [tool("x" * 65)]}, NAME, "1 to 64"),
    ({"tools": [tool("größe")]}, NAME, "letters"),
    ({"tools": [tool("a"), tool("b"), tool("a")]}, "tools[2].function.name", "[0] and tools[2]"),
    ({"tools": [tool("a", mood="good")]}, "tools[0].function.mood", "unknown field 'mood'"),
    ({"tools": [tool("a", strict="yes")]}, "tools[0].function.strict", "true or false"),
    ({"tools": [tool("a", description=5)]}, "tools[0].function.description", "as a string"),
    ({"tools": [tool("a")] * 129}, "tools", "at most 128"),
    ({"tools": [tool("a", parameters=[])]}, PARAMETERS, "as an object"),
    ({"tools": [tool("a", parameters={"type": "array"})]}, PARAMETERS, 'of type "object"'),
    ({"tools": [tool("a", parameters={"properties": {"x": {"not": {}}}})]}, PARAMETERS, "not"),
    ({"tools": [tool("a", parameters={"properties": {"x": {"type": "odd"}}})]}, PARAMETERS, "odd"),
    ({"tools": [tool("a", parameters={"properties": {"x": {"$ref": "#"}}, "required": ["x"],
                                      "type": "object"})]}, PARAMETERS, "never ends"),
    ({"tool_choice": "any"}, "tool_choice", "unknown `tool_choice`"),
    ({"tool_choice": 5}, "tool_choice", "got a number"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "allowed_tools"),
    ({"tool_choice": {"type": "function", "function": {"name": "get_wether"}}},
     "tool_choice.function.name", "did you mean get_weather"),
    ({"parallel_tool_calls": "no"}, "parallel_tool_calls", "true or false"),
    ({"response_format": {"type": "json_object"}}, "response_format", "and `tools`, got both"),
    ({"ignore_eos": True}, "ignore_eos", "no effect with `tools`"),
    ({"decoder": "d2f"}, "tools", "`tools`"),
    ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages[0].content", "a content"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"type": "function"}]}]},
     "messages[0].tool_calls[0].function", "as an object"),
    ({"messages": [called("{")]}, f"{CALLED}.arguments", "as JSON"),
    ({"messages": [called("[1]")]}, f"{CALLED}.arguments", "as an object"),
    ({"messages": [called(None)]}, f"{CALLED}.arguments", "as an object, got null"),
]  # fmt: skip


@pytest.mark.parametrize("served", ["hermes"], indirect=True)
def test_what_is_wrong_is_told_by_its_field(served: Served) -> None:
    for fields, param, said in REFUSED:
        error = served.refuse(CHAT, **{"messages": MESSAGES, "tools": TOOLS, **fields})
        assert (error["param"], said in error["message"]) == (param, True), (fields, error)


def test_a_template_that_knows_no_tools(model: Path, tmp_path: Path) -> None:
    with Engine(model) as engine:
        with serve(engine, "tiny") as served:
            error = served.refuse(CHAT, messages=MESSAGES, tools=TOOLS)
            assert error["param"] == "tools"
            assert error["message"] == "the chat template of the model tiny knows no tools"
            served.post(CHAT, messages=MESSAGES, tools=[], tool_choice="auto", max_tokens=2)
        with serve(engine, chat_template="{{ tools | length }}<tool_call><function=x>") as served:
            error = served.refuse(CHAT, messages=MESSAGES, tools=TOOLS)
            assert error["param"] == "tools" and "not known here" in error["message"]
            served.post(CHAT, messages=MESSAGES, tools=TOOLS, tool_choice="none", max_tokens=2)


def test_a_model_that_thinks_calls_behind_its_thoughts(tmp_path: Path) -> None:
    thinking = HERMES.replace("assistant\n", "assistant\n<think>\n").replace(
        "{%- if tools", "{%- set end = '</think>' %}{%- if tools", 1
    )
    end = AddedToken("</think>", normalized=False)
    path = with_template(tmp_path, thinking, [*FAMILIES["hermes"].tokens, end], n_ctx=2048)
    with Engine(path) as engine, serve(engine) as served:
        bias = {str(engine.tokenizer.backend.token_to_id("</think>")): 25}  # or it never ends
        asked: dict[str, Any] = {"tool_choice": "required", "logit_bias": bias, "n": 8, "seed": 1}
        asked |= {"frequency_penalty": 1}
        thoughts = whole = 0
        for choice in ask(served, **asked).choices:
            assert not choice.message.content
            thoughts += len(choice.message.reasoning_content or "") > 3
            if choice.finish_reason == "tool_calls":
                whole += 1
                check_calls(choice.message.tool_calls)
        assert min(thoughts, whole) > 2


def test_langchain_s_tools(tmp_path: Path) -> None:
    langchain = pytest.importorskip("langchain_openai")
    messages = pytest.importorskip("langchain_core.messages")

    def convert(amount: Literal[1, 20, 300], unit: Literal["kg", "pound"]) -> str:
        """Converts an amount."""
        return f"{amount} {unit}"

    family = FAMILIES["hermes"]
    path = with_template(tmp_path, family.template, family.tokens, n_ctx=2048)
    with Engine(path) as engine, serve(engine, "tiny") as served:
        chat = langchain.ChatOpenAI(
            base_url=served.url, api_key="none", model="tiny", seed=3, max_retries=0
        )
        bound = chat.bind_tools([convert], tool_choice="any", parallel_tool_calls=False)
        asked = messages.HumanMessage("How heavy are 20 kg?")
        called = bound.invoke([asked])
        (call,) = called.tool_calls
        assert call["name"] == "convert"
        assert call["args"]["amount"] in (1, 20, 300) and call["args"]["unit"] in ("kg", "pound")
        streamed = sum(bound.stream([asked]), start=messages.AIMessageChunk(""))
        assert streamed.tool_calls[0]["args"] == call["args"]
        result = messages.ToolMessage("42", tool_call_id=call["id"])
        assert chat.bind(max_tokens=4).invoke([asked, called, result]).content
