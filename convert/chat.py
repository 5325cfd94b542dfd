"""What a chat template needs of a checkpoint: its text, and the special tokens by their names."""

from __future__ import annotations

import json
from typing import Any

from .checkpoint import Checkpoint, read_text
from .errors import ConvertError
from .values import Value


def chat_metadata(templates: dict[str, str], config: dict[str, Any]) -> dict[str, Value]:
    """The templates, in the keys that llama.cpp has for them, and the special tokens that each of
    them sees: those that `config`, tokenizer_config.json, names."""
    values: dict[str, Value] = {}
    for name, template in templates.items():
        suffix = "" if name == "default" else f".{name}"
        values[f"tokenizer.chat_template{suffix}"] = template
    others = [name for name in templates if name != "default"]
    if others:
        values["tokenizer.chat_templates"] = others
    if templates:
        named = json.dumps(_special_tokens(config), ensure_ascii=False)
        values["tokenizer.huggingface.special_tokens_map"] = named
    return values


def chat_templates(checkpoint: Checkpoint) -> dict[str, str]:
    """By name; "default" is the one. Files of their own come before what the JSON files say."""
    files = {"default": checkpoint.folder / "chat_template.jinja"}
    for path in sorted((checkpoint.folder / "additional_chat_templates").glob("*.jinja")):
        files[path.stem] = path
    found = {name: read_text(path) for name, path in files.items() if path.is_file()}
    if found:
        return found
    for source in ("tokenizer_config.json", "chat_template.json"):
        given = checkpoint.json(source).get("chat_template")
        if isinstance(given, str) and given:
            return {"default": given}
        if isinstance(given, list):
            given = {
                each.get("name"): each.get("template") for each in given if isinstance(each, dict)
            }
        if isinstance(given, dict):
            if not all(isinstance(text, str) for pair in given.items() for text in pair):
                raise ConvertError(
                    f"{checkpoint.folder / source}: chat_template: expected a template, or a list "
                    'of {"name": ..., "template": ...}'
                )
            return given
    return {}


def _special_tokens(config: dict[str, Any]) -> dict[str, str | list[str]]:
    named: dict[str, str | list[str]] = {}
    extra = config.get("extra_special_tokens")
    for name, token in [*config.items(), *(extra.items() if isinstance(extra, dict) else ())]:
        text = _content(token)
        if name.endswith("_token") and text is not None:
            named[name] = text
    additional = config.get("additional_special_tokens")
    if isinstance(additional, list):
        texts = [_content(token) for token in additional]
        named["additional_special_tokens"] = [text for text in texts if text is not None]
    return named


def _content(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
