"""Calls in a model's text: which texts a family's grammar lets be, and what is read in them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from python.tiny_model import EOS, byte_tokenizer
from python.tool_templates import FAMILIES, HERMES, Family

from sbd_engine.grammars import Grammars
from sbd_engine.parameters import Constraint
from sbd_engine.server.calls import CallSplitter
from sbd_engine.tokenizer import Tokenizer
from sbd_engine.tools import CallFormat, Function, format_of, knows_tools

pytest.importorskip("llguidance")

FUNCTIONS = [
    Function("get", {"properties": {}}),
    Function("get_time", {"properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"]}),
]
ZONES = '{"zone": "UTC"}', '{"zone": "CET"}'


class Reader:
    """A family's texts, as a grammar takes them."""

    def __init__(self, family: Family) -> None:
        backend = byte_tokenizer()
        backend.add_tokens([*family.tokens])
        eos = backend.token_to_id(EOS)
        self.tokenizer = Tokenizer({"tokenizer.huggingface.json": backend.to_str()}, [eos])
        self._grammars = Grammars(self.tokenizer, backend.get_vocab_size())
        form = format_of(family.template)
        assert form is not None
        self.form: CallFormat = form

    def spelled(self, text: str) -> list[int]:
        """With no token of its own for a mark."""
        return [id_ for each in text for id_ in self.tokenizer.encode(each, add_bos=False)]

    def may_be(
        self,
        *parts: str | list[int],
        required: bool = False,
        parallel: bool = True,
        thinking: bool | None = None,
        functions: list[Function] = FUNCTIONS,
    ) -> bool | None:
        """Whether it is a whole text; None: the beginning of one."""
        grammar = self.form.grammar(self.tokenizer, functions, required, parallel, thinking)
        self._grammars.get(Constraint("grammar", grammar))  # compiles, and may end
        matcher = self._grammars._matcher({"lark_grammar": grammar})
        ids: list[int] = []
        for part in parts:
            ids += self.tokenizer.encode(part, add_bos=False) if isinstance(part, str) else part
        if matcher.try_consume_tokens(ids) != len(ids):
            return False
        return True if matcher.is_accepting() else None

    def call(self, *arguments: str, name: str = "get_time") -> str:
        form = self.form
        calls = [f"{form.opens}{name}{form.names}{each}{form.closes}" for each in arguments]
        return form.begin + (form.between or "; ").join(calls) + form.end


@pytest.fixture(scope="module", params=[*FAMILIES])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def reader(name: str) -> Reader:
    return Reader(FAMILIES[name])


def test_a_call_is_one_of_a_function(reader: Reader, name: str) -> None:
    for required in (False, True):
        assert reader.may_be(reader.call(ZONES[0]), required=required)
        assert reader.may_be(reader.call("{}", name="get"), required=required)
        two = reader.call(*ZONES)
        assert bool(reader.may_be(two, required=required)) == FAMILIES[name].parallel
        assert not reader.may_be(two, required=required, parallel=False)
        for wrong in (
            reader.call('{"zone": "EST"}'),
            reader.call("{}"),
            reader.call('{"zone": "UTC", "more": 1}'),
            reader.call('{"a": 1}', name="get"),
            reader.call(ZONES[0], name="get_tim"),
            reader.call(ZONES[0]) + " and more",
        ):
            assert reader.may_be(wrong, required=required) is False, wrong


def test_text_is_free_where_no_call_is_required(reader: Reader) -> None:
    for text in ("", "Hello.", " \n Hello {x} <tool> [TOOL_CALL] <|python", "größe\n\n"):
        assert reader.may_be(text)
        assert not reader.may_be(text, required=True)
    if reader.form.mark:
        mark = reader.form.mark
        for each in (mark, reader.spelled(mark)):
            behind = reader.call(ZONES[0])[len(mark) :]
            assert reader.may_be("I call it. ", each, behind), "in front of a call as well"
            assert reader.may_be("Now ", each, " is") is False
    else:
        assert reader.may_be(f" \n{reader.call(ZONES[0])}")
        assert reader.may_be("{Hello}") is False
        assert reader.may_be(f"I call {reader.call(ZONES[0])}")  # is text


def test_marks_of_its_own_are_no_text(reader: Reader, name: str) -> None:
    """Where a grammar does not name them: spelled, they are."""
    spells = Function("get", {"properties": {"a": {"type": "string"}}})
    for token in FAMILIES[name].tokens:
        mark = token.content
        head, tail = reader.call('{"a": "xy"}', name="get").split("xy")
        assert reader.may_be(head, reader.spelled(mark), tail, functions=[spells])
        assert not reader.may_be(head, mark, tail, functions=[spells])
        assert reader.may_be("Hello ", mark) is (None if mark == reader.form.mark else False)


def test_what_is_thought_is_free(reader: Reader) -> None:
    call = reader.call(ZONES[0])
    thought = reader.spelled(f"I could {reader.form.mark} or {{not}}.\n</think>\n\n")
    for required in (False, True):
        assert reader.may_be(thought, call, required=required, thinking=True)
        assert reader.may_be("<think>", thought, call, required=required, thinking=False)
        assert reader.may_be(call, required=required, thinking=False)
        assert reader.may_be(thought[:5], required=required, thinking=True) is None
    assert reader.may_be(thought, "Hello.", thinking=True)
    assert reader.may_be("<think>", thought, "Hello.", thinking=False)
    assert not reader.may_be(thought, "Hello.", required=True, thinking=True)


def test_a_text_in_pieces(reader: Reader) -> None:
    """Reads the same however it is cut."""
    tricky = '{"zone": "}\\\\\\"{ [", "more": [{"a": {}}, "]"]}'
    calls = [tricky, "{}"] if reader.form.between else [tricky]
    before = "I see. " if reader.form.mark else ""
    cases: list[tuple[str, bool, str, list[str], bool]] = [
        (before + "\n" + reader.call(*calls), False, before.strip(), calls, True),
        (reader.call(*calls), True, "", calls, True),
        ("No call. \n", False, "No call. \n", [], False),
        ("  ", False, "  ", [], False),
        (reader.call(ZONES[0]).split("UTC")[0], True, "", ['{"zone": "'], False),
        (reader.call(ZONES[0]).split("time")[0], True, "", [], False),
    ]
    draw = random.Random(5)
    for text, required, said, arguments, whole in cases:
        for _ in range(40):
            cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randrange(5)))
            splitter = CallSplitter(reader.form, required)
            told, told_calls = "", []
            for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
                heard = splitter.feed(text[begin:end], last=end == len(text))
                told += heard.text
                for call in heard.calls:
                    if "id" in call:
                        assert call["index"] == len(told_calls)
                        assert call["function"]["name"] == "get_time"
                        told_calls.append("")
                    told_calls[call["index"]] += call["function"]["arguments"]
            assert (told, told_calls, splitter.whole) == (said, arguments, whole), (text, cuts)


def test_what_is_certain_is_told_at_once() -> None:
    form = format_of(HERMES)
    assert form is not None
    splitter = CallSplitter(form, required=False)
    assert splitter.feed("One two").text == "One two"
    assert splitter.feed(" <tool").text == ""
    assert splitter.feed("s> ").text == " <tools>"
    assert splitter.feed("\n<tool_call>").text == ""
    assert splitter.feed('\n{"name": "x", "arguments": {"a": ').calls[0]["function"] == {
        "name": "x",
        "arguments": '{"a": ',
    }
    assert splitter.feed("5").calls == [{"index": 0, "function": {"arguments": "5"}}]


def test_the_template_tells_the_family() -> None:
    marks = {
        name: getattr(format_of(each.template), "mark", None) for name, each in FAMILIES.items()
    }
    assert marks == {
        **dict.fromkeys(("hermes", "hermes special", "hermes spelled"), "<tool_call>"),
        **dict.fromkeys(("mistral", "mistral spelled", "mistral args"), "[TOOL_CALLS]"),
        **dict.fromkeys(("llama", "llama spelled"), ""),
    }
    for template in (
        "{{ tools }}",
        "{{ tools }}<tool_call><function=example>{{ call.arguments }}",
        "{{ tools }}<tool_call>{{ call.name }}<arg_key>",
        '[{"tool_name": title of the tool, "parameters": a dictionary}]',
    ):
        assert format_of(template) is None
    assert knows_tools("{% if tools %}") and not knows_tools("{{ toolset }}")


def test_a_schema_keeps_to_its_own_arguments() -> None:
    named = {"properties": {"a": {"type": "string"}}}
    assert Function("x", named).schema["additionalProperties"] is False
    others: list[dict[str, Any]] = [{"additionalProperties": True}, {"anyOf": [{}]}]
    for other in others:
        made = Function("x", {**named, **other}).schema
        assert made.get("additionalProperties", True) is True
    assert "additionalProperties" not in Function("x", {}).schema
