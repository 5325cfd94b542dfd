from __future__ import annotations

MOST_CHARACTERS = 1000  # of an error: names and values in it come from files and requests
LISTED = 4  # names in a message


class ConvertError(ValueError):
    """What cannot be converted, in one line: what is wrong, and how to mend it."""

    def __init__(self, message: str) -> None:
        super().__init__(error_line(message))


def error_line(message: str) -> str:
    """As one_line, and no longer than a line may be: its beginning and its end say most."""

    def cut(text: str, most: int) -> str:
        return text if len(text) <= most else f"{text[: most - 205]} ... {text[-200:]}"

    return cut(one_line(cut(message, 4 * MOST_CHARACTERS)), MOST_CHARACTERS)


def one_line(text: str) -> str:
    """For a terminal or a log: what a file's own names hold can neither look like another line nor
    be obeyed as an escape sequence or a change of direction."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in " ".join(text.split())
    )


def listed(names: list[str], limit: int = LISTED, total: int | None = None) -> str:
    """The first few names, and how many more there are, of `total` where that is not all."""
    left = (len(names) if total is None else total) - limit
    return ", ".join(names[:limit]) + (f" and {left} more" if left > 0 else "")
