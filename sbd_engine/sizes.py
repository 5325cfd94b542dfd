"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

from .errors import SbdValueError

_LETTERS = "KMGT"


def parse_size(name: str, text: str) -> int:
    """Of 1000000, 512MiB, 2G (both of 1024) or 2GB (of 1000). Raises SbdValueError, which names
    what the size is of."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([kmgt])(i?b?)|b?)", text.strip(), re.IGNORECASE)
    if match is None:
        raise SbdValueError(f"expected {name} in bytes, such as 2GiB or 512MiB, got {text!r}")
    number, letter, ending = match.groups()
    power = _LETTERS.index(letter.upper()) + 1 if letter else 0
    unit: int = (1000 if (ending or "").upper() == "B" else 1024) ** power
    return round(float(number) * unit) if "." in number else int(number) * unit


def shown(size: int) -> str:
    """With one decimal, in the largest unit that it is at least one of."""
    power = min(max(0, size.bit_length() - 1) // 10, len(_LETTERS))
    return f"{size / 1024**power:.1f} {_LETTERS[power - 1]}iB" if power else f"{size} bytes"
