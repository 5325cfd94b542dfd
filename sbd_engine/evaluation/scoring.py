"""When a text is right. Answers and patterns may be anyone's: all of it takes linear time."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal
from functools import cache
from typing import Any

from ..errors import SbdValueError

EXACT = "exact"
_MOST_PATTERN = 1000  # characters
# With groups of three, a fraction, an exponent; a minus between two words is none.
_NUMBER = re.compile(
    r"(?:(?<![\w.)])[-\u2212])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3}(?!\d))?"
)


def is_right(score: str, text: str, answer: str) -> bool:
    """Whether a generated text has the answer."""
    return SCORES[score](text, answer)


def check_answer(score: str, answer: str) -> None:
    """Raises SbdValueError where no text could be compared with it."""
    if score == "regex":
        _compiled(answer)
    if score == "last_number" and _last_number(answer) is None:
        raise SbdValueError(f'expected a number in "answer", got {answer!r:.40}')


def _exact(text: str, answer: str) -> bool:
    return text.strip() == answer.strip()


def _contains(text: str, answer: str) -> bool:
    return answer.strip() in text


def _regex(text: str, answer: str) -> bool:
    return _compiled(answer).search(text) is not None


def _same_number(text: str, answer: str) -> bool:
    return _last_number(text) == _last_number(answer)  # 42 and 42.0 are one


SCORES: dict[str, Callable[[str, str], bool]] = {
    EXACT: _exact,
    "contains": _contains,
    "regex": _regex,
    "last_number": _same_number,
}


def _last_number(text: str) -> Decimal | None:
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "").replace("\u2212", "-")) if numbers else None


@cache
def _compiled(pattern: str) -> Any:
    """RE2 knows neither look-around nor back-references, which is why no pattern can stall it."""
    import re2

    if len(pattern) > _MOST_PATTERN:
        raise SbdValueError(
            f'expected a regular expression of at most {_MOST_PATTERN} characters in "answer", '
            f"got {len(pattern)}"
        )
    options = re2.Options()
    options.log_errors, options.never_capture = False, True
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        what = error.args[0]
        reason = what.decode(errors="replace") if isinstance(what, bytes) else str(what)
        raise SbdValueError(
            f'expected "answer" as a regular expression of RE2, got {pattern!r:.40}: {reason:.80}'
        ) from None
