"""Functions to call, and chat templates of families that do, in fewer words than their own."""

from __future__ import annotations

from typing import Any, NamedTuple

from tokenizers import AddedToken

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"$ref": "#/$defs/unit"},
    },
    "required": ["city", "unit"],
    "$defs": {"unit": {"enum": ["celsius", "fahrenheit"]}},
}
TIME = {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"]}
TOOLS = [
    {"type": "function", "function": {
        "name": "get_weather", "description": "The weather.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_time", "parameters": TIME, "strict": True}},
    {"type": "function", "function": {"name": "get"}},
]  # fmt: skip
SCHEMAS: dict[str, Any] = {
    "get_weather": {**WEATHER, "additionalProperties": False},
    "get_time": {**TIME, "additionalProperties": False},
    "get": {"const": {}},
}
MESSAGES = [{"role": "user", "content": "Weather in Oslo?"}]

HERMES = """\
{%- if tools %}<|system|>system
# Tools
<tools>{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
</tools>
Call as <tool_call>
{\\"name\\": <function-name>, \\"arguments\\": <args-json-object>}
</tool_call>
{%- endif %}
{%- for m in messages %}<|system|>{{ m.role }}
{%- if m.content %}
{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}
{%- endfor %}
{%- if add_generation_prompt %}<|system|>assistant
{% endif %}"""
MISTRAL = """\
{%- for m in messages %}
{%- if m.role == "user" %}
{%- if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}[INST]{{ m.content }}
{%- elif m.tool_calls is defined %}[TOOL_CALLS][
{%- for call in m.tool_calls %}
{%- if call.id is not defined or call.id | length != 9 %}
{{- raise_exception("ids of calls have 9 characters") }}{% endif %}
{{- call.function | tojson }}{{ ", " if not loop.last }}{% endfor %}]
{%- elif m.role == "tool" %}[TOOL_RESULTS]{{ m.content }} of {{ m.tool_call_id }}
{%- else %}{{ m.content }}{% endif %}
{%- endfor %}"""
MISTRAL_WITH_ARGS = MISTRAL.replace("[TOOL_CALLS][", "").replace(
    '{{- call.function | tojson }}{{ ", " if not loop.last }}{% endfor %}]',
    "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}",
)
LLAMA = """\
{%- if tools %}<|system|>system
{%- for tool in tools %}
{{ tool | tojson }}{% endfor %}
Respond in the format {"name": function name, "parameters": arguments}.{% endif %}
{%- for m in messages %}<|system|>{{ m.role }}
{%- if m.tool_calls %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception("one call at once") }}{% endif %}
{{- '{"name": "' + m.tool_calls[0].function.name + '", ' }}
{{- '"parameters": ' }}{{ m.tool_calls[0].function.arguments | tojson }}{{ "}" }}
{%- else %}
{{ m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|system|>assistant
{% endif %}"""


class Family(NamedTuple):
    """start: the token that begins a call, where it is one."""

    template: str
    tokens: tuple[AddedToken, ...] = ()
    start: str | None = None
    parallel: bool = True


def token(content: str, special: bool = False) -> AddedToken:
    return AddedToken(content, special=special, normalized=False)


FAMILIES = {
    "hermes": Family(HERMES, (token("<tool_call>"), token("</tool_call>")), "<tool_call>"),
    "hermes special": Family(
        HERMES, (token("<tool_call>", True), token("</tool_call>", True)), "<tool_call>"
    ),
    "hermes spelled": Family(HERMES),
    "mistral": Family(MISTRAL, (token("[TOOL_CALLS]", True),), "[TOOL_CALLS]"),
    "mistral spelled": Family(MISTRAL.replace("[TOOL_CALLS][", "[TOOL_CALLS] [")),
    "mistral args": Family(
        MISTRAL_WITH_ARGS, (token("[TOOL_CALLS]", True), token("[ARGS]", True)), "[TOOL_CALLS]"
    ),
    "llama": Family(LLAMA, (token("<|python_tag|>", True),), "<|python_tag|>", parallel=False),
    "llama spelled": Family(LLAMA, (), "{", parallel=False),
}
