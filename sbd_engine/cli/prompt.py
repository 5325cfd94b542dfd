"""Where a prompt comes from, and what in it is literal."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from ..errors import SbdValueError
from ..text_file import decode_utf8, read_standard_input, read_text


def read_prompt(prompt: str | None, file: Path | None, escape: bool, chomp: bool) -> str:
    """The text of --prompt, of --file, or of standard input."""
    if prompt is not None and file is not None:
        raise SbdValueError("expected the prompt from --prompt or --file, got both")
    piped = prompt == "-" or (prompt is None and file is None and not sys.stdin.isatty())
    if prompt is not None and not piped:
        if chomp:
            raise SbdValueError("--chomp has no effect with --prompt TEXT: leave it out")
        return unescaped(prompt, "--prompt") if escape else prompt
    if file is not None:
        text = read_text(file)
    elif piped:
        text = read_standard_input()
    else:
        raise SbdValueError("expected a prompt: give --prompt TEXT, --file FILE, or pipe it in")
    return re.sub(r"\r?\n\Z", "", text) if chomp else text


_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"\\": b"\\", b"'": b"'", b'"': b'"'}


def unescaped(text: str, source: str) -> str:
    r"""With \n, \t, \r, \\, \', \" and \xHH (a byte) in place of what they stand for; another
    backslash stays. `source` is how the text was given, for the error."""

    def replace(match: re.Match[bytes]) -> bytes:
        what = match[1]
        if len(what) == 3:
            return bytes([int(what[1:], 16)])
        return _ESCAPES.get(what, match[0])

    data = text.encode(errors="surrogateescape")
    return decode_utf8(
        re.sub(rb"\\(x[0-9a-fA-F]{2}|.)", replace, data, flags=re.DOTALL), f"{source}, unescaped"
    )


_TAKEN = ("self", "messages", "fits")  # what no argument of a template may be called


def check_template_name(name: str) -> None:
    """Of an argument that comes from a file."""
    if not name.isidentifier() or name in _TAKEN:
        raise SbdValueError(f"expected names of what the chat template takes, got {name!r}")


def template_argument(text: str) -> tuple[str, Any]:
    """NAME=VALUE for a chat template: JSON where it is, else a string."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier() or name in _TAKEN:
        raise SbdValueError(
            f"expected --template-arg NAME=VALUE, such as enable_thinking=false, got {text!r}"
        )
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value
