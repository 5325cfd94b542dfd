"""What a sweep tries: rules of unmasking from careful to bold, what the file says, the lossless."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import SbdValueError
from ..parameters import unknown
from .answering import NTP, Setting, plain

GAMMAS = (0.0, 0.01, 0.1, 0.2, 0.4, 0.8, 1.5)  # of the paper's ablation
LOSSLESS = "sbd_lossless"


class Rule(NamedTuple):
    """An unmasking rule: the option that sets how bold it is, the model file's key of that, and
    values from careful to bold."""

    option: str
    key: str
    ladder: tuple[float, ...]


RULES = {
    "entropy_bounded": Rule("gamma", "sbd.gamma", GAMMAS),
    "factor": Rule("factor", "sbd.factor", (0.01, 0.03, 0.1, 0.25, 0.5, 1.0, 2.0)),
    "confidence": Rule(
        "confidence_threshold", "sbd.confidence_threshold", (0.999, 0.99, 0.95, 0.9, 0.8, 0.7, 0.5)
    ),
    "top_n": Rule("top_n", "sbd.top_n", (1, 2, 3, 4, 5, 6, 8)),
}


class Point(NamedTuple):
    """One setting of the sweep: options of Engine.generate; default: what the file itself says."""

    options: Mapping[str, Any]
    default: bool = False

    @property
    def name(self) -> str:
        size = self.options.get("block_size")
        return label(self.options) if size is None else f"block_size {size}, {label(self.options)}"


def label(options: Mapping[str, Any]) -> str:
    """A setting in a word or two, its block size left out."""
    if "unmask" not in options:
        return str(options["decoder"])
    option = RULES[options["unmask"]].option
    return f"{option.removesuffix('_threshold')} {float(options[option]):g}"


def grid(block_sizes: Iterable[int], rules: Iterable[str], gammas: Sequence[float]) -> list[Point]:
    """Every rule's ladder in every block size; top_n ends with the whole block."""
    points = []
    for size in block_sizes:
        for name in rules:
            if name not in RULES:
                raise SbdValueError(unknown("unmask", name, list(RULES)))
            values = gammas if name == "entropy_bounded" else RULES[name].ladder
            if name == "top_n":
                values = sorted({min(value, size) for value in values})
            points += [_sbd(size, name, value) for value in values]
    return points


def _sbd(block_size: int, unmask: str, value: float) -> Point:
    options = {"decoder": "sbd", "block_size": block_size, "unmask": unmask}
    return Point({**options, RULES[unmask].option: value})


def with_files_own(
    points: Sequence[Point],
    auto: str,
    able: Collection[str],
    defaults: Mapping[str, Any],
) -> list[Point]:
    """The points and, where they are not among them: sbd_lossless, where the file can run it, which
    chooses its blocks by itself, and what the file says, `auto` being its decoder and `defaults`
    its options."""
    own = _own(auto, defaults)
    swept = [*points, *([Point({"decoder": LOSSLESS})] if LOSSLESS in able else ())]
    if own is None:
        return swept
    found = [point._replace(default=point.options == own.options) for point in swept]
    return found if any(point.default for point in found) else [own, *found]


def _own(auto: str, defaults: Mapping[str, Any]) -> Point | None:
    if auto == NTP:
        return None
    if auto == "sbd":
        unmask = defaults["unmask"]
        own = _sbd(defaults["block_size"], unmask, defaults[RULES[unmask].option])
        return own._replace(default=True)
    return Point({"decoder": auto}, default=True)


def settings(points: Sequence[Point]) -> list[Setting]:
    return [
        Setting(NTP, {"decoder": NTP}),
        *(Setting(point.name, point.options) for point in points),
    ]


def as_row(point: Point | None, figures: dict[str, Any]) -> dict[str, Any]:
    """A line of the report; None is NTP."""
    if point is None:
        return {"decoder": NTP, **figures}
    return {**plain(point.options), "default": point.default, **figures}
