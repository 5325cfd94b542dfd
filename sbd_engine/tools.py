"""Calls of functions, as a model writes them in its text: a form for each family of models, which
its chat template tells, and the grammar that holds a text to it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .continuing import stands_apart
from .tokenizer import Tokenizer

THINK, THOUGHT = "<think>", "</think>"  # around what a model thinks before it answers
_MARKS = (
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>"),
    *(THINK, THOUGHT),
)
_SPLIT = re.compile(f"({'|'.join(map(re.escape, _MARKS))})")
# As templates write the calls of a conversation, so that a model goes on as it has seen them.
_SPACES = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# Keywords beside which `additionalProperties` would mean another thing, or that say it themselves.
_OPEN = {
    *("additionalProperties", "unevaluatedProperties", "patternProperties", "propertyNames"),
    *("$ref", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas"),
}


class Function(NamedTuple):
    """parameters: a JSON Schema of an object."""

    name: str
    parameters: Mapping[str, Any]

    @property
    def schema(self) -> dict[str, Any]:
        """Of its arguments. Those that it does not name are none, where it does not say that there
        are others: a model must not make them up."""
        schema = {"type": "object", **self.parameters}
        if "properties" in schema and not _OPEN & schema.keys():
            schema["additionalProperties"] = False
        return schema


@dataclass(frozen=True)
class CallFormat:
    """Calls follow text: `begin`, a call or several with `between` between them, `end`. A call is
    `opens`, the function's name, `names`, the arguments as JSON, `closes`.

    begin: its first part is a mark, at which a text turns into calls; "": a text is one call or
    none, and begins with `{` where it is. between: None where there is one call at most. tag: a
    special token that may stand in front of such a call.
    """

    begin: str
    opens: str
    names: str
    closes: str
    between: str | None
    end: str
    tag: str = ""

    @property
    def mark(self) -> str:
        return _parts(self.begin)[0] if self.begin else ""

    def grammar(
        self,
        tokenizer: Tokenizer,
        functions: Sequence[Function],
        required: bool,
        parallel: bool,
        thinking: bool | None,
    ) -> str:
        """Of a whole text, in Lark's syntax as llguidance has it. required: it is a call, else any
        text that may end in one. parallel: or in several. thinking: whether the prompt has begun
        what the model thinks; None: it does not."""
        write = _Writer(tokenizer)
        after_mark = write.literal(self.begin[len(self.mark) :])
        several = f"({write.literal(self.between)} call)*" if parallel and self.between else ""
        lines = [
            f"calls: {after_mark} call {several} {write.literal(self.end)}",
            "call: " + " | ".join(f"call_{i}" for i in range(len(functions))),
        ]
        for i, function in enumerate(functions):
            head = write.literal(self.opens + function.name + self.names)
            lines += [
                f"call_{i}: {head} arguments_{i} {write.literal(self.closes)}",
                f"arguments_{i}: %json {json.dumps({**function.schema, 'x-guidance': _SPACES})}",
            ]
        tag = f"{write.token(self.tag)}?" if write.token(self.tag) else ""
        if required:
            gap = "" if thinking is None else "GAP?"
            lines += [f"answer: {gap} {write.literal(self.mark) or tag} calls", r"GAP: /\n{1,2}/"]
        elif self.mark:
            lines += ["answer: TEXT | to_mark calls", *write.text_to("to_mark", self.mark)]
        else:
            lines += [f"answer: BLANKS? (OTHER | {tag} calls)?", r"BLANKS: /\s+/"]
            lines += [r"OTHER: /[^\s{](?s:.)*/"]
        start = "answer"
        if thinking is not None:
            start = "thought answer" if thinking else "answer | think thought answer"
            think = write.token(THINK)
            lines.append(f"think: {think}" if think else f"think[lazy]: {json.dumps(THINK)}")
            lines += write.text_to("thought", THOUGHT)
        return "\n".join([f"start: {start}", *lines, r"TEXT: /(?s:.*)/"])


class _Writer:
    """Writes marks as the model's own tokens, where it has them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._id, self._added = tokenizer.backend.token_to_id, tokenizer.special_tokens.added

    def token(self, mark: str) -> str:
        id_ = self._id(mark)
        token = self._added.get(id_)
        return f"<[{id_}]>" if token and stands_apart(token.content, token.special) else ""

    def literal(self, text: str) -> str:
        return " ".join(self.token(part) or json.dumps(part) for part in _parts(text))

    def text_to(self, rule: str, mark: str) -> list[str]:
        """Any text up to the first mark, be it a token or spelled."""
        spelled = f"{rule}_spelled[lazy]: TEXT {json.dumps(mark)}"
        token = self.token(mark)
        return [f"{rule}: {rule}_spelled" + (f" | TEXT {token}" if token else ""), spelled]


def _parts(text: str) -> list[str]:
    """Marks, and what stands between them."""
    return [part for part in _SPLIT.split(text) if part]


_HERMES = CallFormat(
    begin="<tool_call>\n",
    opens='{"name": "',
    names='", "arguments": ',
    closes="}",
    between="\n</tool_call>\n<tool_call>\n",
    end="\n</tool_call>",
)
_MISTRAL = replace(_HERMES, begin="[TOOL_CALLS][", between=", ", end="]")
_MISTRAL_WITH_ARGS = CallFormat(
    begin="[TOOL_CALLS]", opens="", names="[ARGS]", closes="", between="[TOOL_CALLS]", end=""
)
_LLAMA = CallFormat(
    begin="",
    opens='{"name": "',
    names='", "parameters": ',
    closes="}",
    between=None,
    end="",
    tag="<|python_tag|>",
)


def knows_tools(template: str) -> bool:
    return re.search(r"\btools\b", template) is not None


def format_of(template: str) -> CallFormat | None:
    """The form that a chat template teaches its model; None: another one."""
    if "<tool_call>" in template:
        return _HERMES if _writes(template, "arguments") else None
    if "[TOOL_CALLS]" in template:
        if "[ARGS]" in template:
            return _MISTRAL_WITH_ARGS
        spaced = "[TOOL_CALLS] [" in template
        return replace(_MISTRAL, begin="[TOOL_CALLS] [") if spaced else _MISTRAL
    return _LLAMA if _writes(template, "parameters") else None


def _writes(template: str, key: str) -> bool:
    """Whether it shows calls as objects with a name and that key."""
    return re.search(rf'{{\\?"name\\?":.{{0,200}}?"{key}\\?"', template, re.DOTALL) is not None
