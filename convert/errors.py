from __future__ import annotations


class ConvertError(ValueError):
    """What cannot be converted, in one line: what is wrong, and how to mend it."""


def listed(names: list[str], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
