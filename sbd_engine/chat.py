"""Chat templates: Jinja from the model file, in a sandbox, since a file is trusted in nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from .errors import SbdError, SbdValueError


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool,
    bos_token: str,
    eos_token: str,
) -> str:
    """The text of a conversation, in the conventions that templates are written for."""
    import jinja2
    from jinja2.ext import LoopControlExtension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            bos_token=bos_token,
            eos_token=eos_token,
        )
    except SbdError:
        raise
    except jinja2.TemplateError as error:
        raise SbdValueError(f"the model's chat template failed: {error}") from None
    except Exception as error:  # a program from the file: it may call itself without end
        raise SbdValueError(
            f"the model's chat template failed: {type(error).__name__}: {error}"
        ) from None


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # Jinja's own escapes for HTML


def _refuse(message: str) -> NoReturn:
    raise SbdValueError(f"the model's chat template refused the conversation: {message}")
