from __future__ import annotations


class ConvertError(ValueError):
    """What cannot be converted, in one line: what is wrong, and how to mend it."""


LISTED = 4  # names in a message


def listed(names: list[str], limit: int = LISTED, total: int | None = None) -> str:
    """The first few names, and how many more there are, of `total` where that is not all."""
    left = (len(names) if total is None else total) - limit
    return ", ".join(names[:limit]) + (f" and {left} more" if left > 0 else "")


def one_line(text: str) -> str:
    """For a terminal: what a file's own names hold can neither look like another line nor be obeyed
    as an escape sequence or a change of direction."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in " ".join(text.split())
    )
