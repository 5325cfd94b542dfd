"""The process that renders chat templates: a script that loads jinja2 and nothing of this package.

A template is a program out of a model file, and one operation of it can take all time and memory,
which no sandbox bounds: `10 ** 10 ** 9`, `'a' * 10 ** 10`. Here the kernel does, for each request
anew. What goes over standard input and output is JSON behind its length in bytes.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

WALL_SECONDS = 30  # no template waits for anything: only a machine without a processor to spare
MEMORY_BYTES = 128 << 20
MEMORY_PER_BYTE = 32  # of the request: text of 4 bytes a character, in several copies
TEXT_CHARACTERS = 1 << 20
TEXT_PER_BYTE = 8
_MESSAGE_CHARACTERS = 500
_LENGTH_BYTES = 8


class Refusal(Exception):
    """What a template says with raise_exception."""


def main(cpu_seconds: float) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine's process decides what it ends
    for kind in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(kind, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    sys.path[:] = json.loads(sys.stdin.buffer.read(_length() or 0))
    with suppress(ImportError):  # the first rendering says so
        _environment()  # to load jinja2 takes none of what the first rendering may
    while (size := _length()) is not None:
        _allow(MEMORY_BYTES + MEMORY_PER_BYTE * size)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        signal.alarm(WALL_SECONDS)
        try:
            answer = _answer(json.loads(sys.stdin.buffer.read(size)), size)
        except MemoryError:
            needed = (MEMORY_BYTES + MEMORY_PER_BYTE * size) >> 20
            answer = {"problem": f"needs more memory than its {needed} MiB"}
        _allow(None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        data = json.dumps(answer).encode()
        sys.stdout.buffer.write(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
        sys.stdout.buffer.flush()


def _length() -> int | None:
    """The length of what follows; None where nothing does."""
    head = sys.stdin.buffer.read(_LENGTH_BYTES)
    return int.from_bytes(head, "little") if len(head) == _LENGTH_BYTES else None


def _allow(new_bytes: int | None) -> None:
    """Sets how much address space may be taken beyond what is; None takes the limit away."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = hard
    if new_bytes is not None:
        with open("/proc/self/statm") as file:
            soft = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + new_bytes
        if hard != resource.RLIM_INFINITY:
            soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _answer(request: dict[str, Any], size: int) -> dict[str, str]:
    global _now
    _now = request["now"]
    random.seed(0)  # the filter `random`: the same request, the same text
    try:
        text: str = _compiled(request["template"]).render(request["variables"])
    except MemoryError:
        raise
    except Refusal as refusal:
        return {"problem": f"refused the conversation: {_short(refusal)}"}
    except Exception as error:
        kind = "" if _is_template_error(error) else f"{type(error).__name__}: "
        return {"problem": f"failed: {kind}{_short(error)}"}
    most = TEXT_CHARACTERS + TEXT_PER_BYTE * size
    if len(text) > most:
        return {"problem": f"wrote {len(text)} characters, more than its {most}"}
    return {"text": text}


def _short(error: Exception) -> str:
    return str(error)[:_MESSAGE_CHARACTERS]


def _is_template_error(error: Exception) -> bool:
    import jinja2

    return isinstance(error, jinja2.TemplateError)


# ---- what a template sees: as transformers' apply_chat_template has it ----

_now = 0.0


@lru_cache(maxsize=8)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> Any:
    from jinja2 import nodes
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}: marks what a model wrote, for training; here it is only text."""

        tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Without the escapes for HTML that Jinja's own has."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.fromtimestamp(_now).strftime(form)


def _refuse(message: str) -> NoReturn:
    raise Refusal(message)


if __name__ == "__main__":
    main(float(sys.argv[1]))
