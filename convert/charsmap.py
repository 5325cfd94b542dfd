"""Sentencepiece's map of characters in a tokenizer.json: what the library that follows it trusts.

Behind the size of a trie in bytes stand its units, then the texts that its leaves point to, each
with a zero behind it. A unit's children are at its own index xor its offset xor a byte of the text;
where it has a leaf, that is the child of byte 0 (darts-clone's double array).
"""

from __future__ import annotations

import base64
import binascii
from typing import Any


def longest_replacement(charsmap: Any) -> float:
    """Bytes of the longest text that stands for a character. Raises ValueError for a map that
    points out of itself: the library would end in a panic, at this or that text."""
    import numpy as np  # few files have one, and it takes 0.2 s to import

    try:
        data = base64.b64decode(charsmap or "", validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ValueError("its precompiled_charsmap is not base64") from None
    size = int.from_bytes(data[:4], "little")
    if size < 4 or 4 + size > len(data):
        raise ValueError(
            f"its precompiled_charsmap of {len(data)} bytes ends before its trie of {size}"
        )
    units = np.frombuffer(data, "<u4", size // 4, 4).astype(np.int64)
    texts = data[4 + 4 * len(units) :]
    try:
        texts.decode()
    except UnicodeDecodeError:
        raise ValueError("its precompiled_charsmap holds texts that are not UTF-8") from None
    children = np.arange(len(units)) ^ ((units >> 10) << ((units & 0x200) >> 6))
    inner = units < 1 << 31  # the others are values
    inner[0] = True  # the root, whatever it looks like
    if np.any((children[inner] | 0xFF) >= len(units)):
        raise ValueError("its precompiled_charsmap points out of its trie")
    leaves = units[children[inner & (units & 0x100 != 0)]] & 0x7FFFFFFF
    if np.any(leaves > len(texts)) or np.any(
        np.frombuffer(texts + b"\0", np.uint8)[leaves] & 0xC0 == 0x80
    ):
        raise ValueError("its precompiled_charsmap points at no text")
    return max(1.0, *(len(text) for text in texts.split(b"\0")), 1.0)
