"""Chat templates that a model file may hold, and conversations for them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random
from typing import Any

from fuzz_tokenizers import BPE, added
from rounds import fuzz

from sbd_engine import SbdError
from sbd_engine.template_process import TemplateProcess
from sbd_engine.tokenizer import Tokenizer

CPU_SECONDS = 0.05  # of a rendering in most rounds: one in fifty spends all that it may
FULL_EVERY = 200  # rounds: then what a rendering may take is what it may of a user's
MOST_MIB = 512  # that the templates' process may take

VALUES = (
    *("messages", "messages[0]", "messages[0].content", "messages[-1]['role']", "tools", "x", "ns"),
    *("bos_token", "add_generation_prompt", "undefined", "loop.index", "self", "namespace(a=1)"),
    *("'a'", "''", "0", "1", "-1", "9", "10**9", "2.5", "1e308", "none", "true", "[]", "{}"),
    *("[1, 2]", "{'a': 1}", "range(9)", "range(99999)", "dict", "lipsum", "cycler", "joiner"),
    *("'<|end|>'", "'\\x1b[2J'", "''.__class__", "messages.__class__.__mro__", "'%s' % 1"),
    *("strftime_now('%Y' * 9)", "raise_exception('no')", "('a', 'b')", "messages|length"),
)
OPERATORS = ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "and", "or", "is not")
FILTERS = (
    *("length", "string", "list", "tojson", "upper", "trim", "first", "last", "join", "int"),
    *("join('ab')", "replace('a', 'aaaaaaaaaa')", "center(99999999)", "indent(9999999)", "sort"),
    *("batch(3)|list", "format(1, 2)", "wordwrap(1)", "items|list", "reverse", "unique|list"),
    *("map('upper')|list", "selectattr('role')|list", "groupby('role')", "sum", "min", "random"),
    *("attr('format')", "escape", "urlize", "xmlattr", "truncate(9)", "tojson(indent=99999999)"),
    *("default('x')", "dictsort", "pprint", "filesizeformat", "slice(3)|list", "striptags"),
)


def expression(random: Random, depth: int = 0) -> str:
    kind = random.randrange(6) if depth < 4 else 0
    if kind <= 1:
        return random.choice(VALUES)
    inner = expression(random, depth + 1)
    if kind == 2:
        return f"({inner} {random.choice(OPERATORS)} {expression(random, depth + 1)})"
    if kind == 3:
        return f"({inner})|{random.choice(FILTERS)}"
    if kind == 4:
        index = random.choice(("0", "-1", "'a'", "1:", "::-1", "99999", ":9999999999"))
        return f"({inner})[{index}]"
    return f"({inner} if {expression(random, depth + 1)} else {expression(random, depth + 1)})"


def statements(random: Random, depth: int = 0) -> str:
    return "".join(statement(random, depth) for _ in range(random.randrange(1, 4)))


def statement(random: Random, depth: int) -> str:
    value = expression(random)
    kind = random.randrange(12) if depth < 4 else random.randrange(3)
    if kind == 0:
        return random.choice(("text\n", "<|end|>", "\u202e", "{# note #}", "a" * 200, "é🙂"))
    if kind <= 2:
        return f"{{{{ {value} }}}}"
    if kind == 3:
        return f"{{% set x = {value} %}}"
    if kind == 4:
        return f"{{% set ns.a = {value} %}}"
    inner = statements(random, depth + 1)
    name = random.choice(("m", "n"))
    return random.choice(
        (
            f"{{% for x in {value} %}}{inner}{{% endfor %}}",
            f"{{% for x in {value} recursive %}}{inner}{{{{ loop(x) }}}}{{% endfor %}}",
            f"{{% for x in {value} %}}{{% break %}}{inner}{{% else %}}{inner}{{% endfor %}}",
            f"{{% if {value} %}}{inner}{{% elif {value} %}}b{{% else %}}c{{% endif %}}",
            f"{{% macro {name}(x) %}}{inner}{{{{ {name}(x) }}}}{{% endmacro %}}{{{{ {name}(1) }}}}",
            f"{{% macro {name}(x) %}}{inner}{{% endmacro %}}{{{{ {name}({value}) }}}}",
            f"{{% call(x) m({value}) %}}{inner}{{% endcall %}}",
            f"{{% filter {random.choice(FILTERS)} %}}{inner}{{% endfilter %}}",
            f"{{% block {name} %}}{inner}{{{{ self.{name}() }}}}{{% endblock %}}",
            f"{{% generation %}}{inner}{{% endgeneration %}}",
            f"{{% include {value} %}}",
            f"{{% extends {value} %}}",
            f"{{% with x = {value} %}}{inner}{{% endwith %}}",
            f"{{% raw %}}{inner}{{% endraw %}}",
        )
    )


def cut(random: Random, text: str) -> str:
    """Now and then no template at all."""
    if random.random() > 0.1:
        return text
    at = random.randrange(len(text) + 1)
    return text[:at] + random.choice(("", "{%", "}}", "{{", "%}" * 200, "(" * 3000)) + text[at:]


TEXTS = (
    *("", "a", "<|end|>", "a<s>b<|end|>", "{{ 7 * 7 }}", "\0\x1b[2J\n\u202e", "é🙂", "ab" * 3000),
    *("<|en", "d|>", "</think>x", "\u2028", "\ud800"),
)


def content(random: Random, depth: int = 0) -> Any:
    kind = random.randrange(8) if depth < 3 else 0
    if kind == 5:
        return [content(random, depth + 1) for _ in range(random.randrange(4))]
    if kind == 6:
        return {random.choice(("type", "text", "a")): content(random, depth + 1)}
    if kind == 7:
        return random.choice((None, 1, 2.5, True, float("nan"), 10**30, b"a", (1,), object))
    return random.choice(TEXTS)


def conversation(random: Random) -> list[Any]:
    roles = ("user", "assistant", "system", "tool", "<|end|>", "")
    return [
        {"role": random.choice(roles), "content": content(random)}
        | ({"tool_calls": content(random)} if random.random() < 0.2 else {})
        for _ in range(random.choice((1, 1, 2, 5)))
    ]


def tokenizer(process: TemplateProcess) -> Tokenizer:
    whole = {"version": "1.0", "added_tokens": [added(17, "<s>"), added(18, "<|end|>")]}
    made = Tokenizer({"tokenizer.huggingface.json": json.dumps(whole | {"model": BPE})}, [17])
    made._chat._process = process
    return made


TOKENIZER = tokenizer(TemplateProcess(CPU_SECONDS))
FULL = tokenizer(TemplateProcess())


def one(random: Random) -> None:
    template = cut(random, statements(random)) + "{" * (random.random() < 0.01)
    arguments: dict[str, Any] = {"tools": content(random)} if random.random() < 0.2 else {}
    if random.random() < 0.1:
        arguments[random.choice(("x", "y", "messages2", "enable_thinking"))] = content(random)
    if "{" not in template:
        template += "{{ x }}"
    messages = conversation(random)
    used = FULL if random.randrange(FULL_EVERY) == 0 else TOKENIZER
    used.encode_chat(
        messages,
        chat_template=template,
        sanitize_control_tokens=random.random() < 0.7,
        fits=4096,
        **arguments,
    )
    process = used._chat._process._process
    if process is not None:
        status = Path(f"/proc/{process.pid}/statm").read_text().split()
        mib = int(status[1]) * 4096 >> 20
        if mib > MOST_MIB:
            raise AssertionError(f"the templates' process takes {mib} MiB")


if __name__ == "__main__":
    sys.exit(fuzz(one, (SbdError,)))
