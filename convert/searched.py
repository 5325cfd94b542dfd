"""Quantised blocks whose scales are searched for: those that lose least of the weights.

Each group of values is tried with several scales; for each, least squares says which scale (and
minimum) fits the integers it leads to best, and the best of all is kept. A K-quant's scales are
integers themselves, times a scale of 256 values: these are refitted together, in turns.

Arrays are [values of a group, groups], so that numpy's inner loops run along the groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as WeightType
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

PIECE = 1 << 14  # values in hand at a time: all arrays of a search stay in a core's cache
TURNS = 3  # of refitting a K-quant's scales
SCALES = 63  # the largest scale and minimum of Q4_K and Q5_K
LEAST_IMPORTANT = 1e-4  # of a column, where the mean is 1
TINY = np.float32(1e-30)  # stands for 0 where it would divide


@dataclass(frozen=True)
class Affine:
    """Groups of scale * q + minimum, q from 0 to `top`, the minimum at most `most`."""

    top: int
    tries: tuple[float, ...]  # how many integers a group's span is stretched over
    most: float


@dataclass(frozen=True)
class Symmetric:
    """Groups of scale * q, q from -half to half - 1."""

    half: int
    tries: tuple[float, ...]  # what integer the value furthest from 0 becomes


def _affine(top: int, most: float = 0.0) -> Affine:
    return Affine(top, tuple(top + step for step in np.linspace(-1.2, 0.8, 11)), most)


def _symmetric(half: int) -> Symmetric:
    negative = [-half - step for step in np.linspace(-0.9, 0.7, 9)]
    return Symmetric(half, (*negative, half - 1.0, half - 0.5))


def search(rows: Floats, dtype: WeightType, importance: Floats | None = None) -> Bytes:
    """`rows` as blocks of `dtype`; importance: how much an error in each column counts."""
    encode = ENCODERS[dtype]
    values, size = GGML_QUANT_SIZES[dtype]
    flat = rows.reshape(-1, values)
    per_row = rows.shape[-1] // values
    columns = None if importance is None else _levelled(importance).reshape(per_row, values)
    out = np.empty((len(flat), size), np.uint8)
    step = max(1, PIECE // values)
    for start in range(0, len(flat), step):
        blocks = flat[start : start + step]
        weights = None
        if columns is not None:
            weights = columns[np.arange(start, start + len(blocks)) % per_row]
        out[start : start + step] = encode(blocks, weights)
    return out.reshape(*rows.shape[:-1], -1)


def _levelled(importance: Floats) -> Floats:
    """Within what float32 can weigh against each other."""
    mean = importance.mean(dtype=np.float64)
    if not mean > 0:
        return np.ones_like(importance)
    levelled: Floats = np.maximum(importance / mean, LEAST_IMPORTANT).astype(np.float32)
    return levelled


def _error_weights(blocks: Floats, importance: Floats | None) -> Floats:
    """What an error of each value costs: more where the value is large, as these do most."""
    squares = np.square(blocks)
    mean = squares.mean(-1, keepdims=True)
    weights: Floats = (
        np.sqrt(mean) + np.abs(blocks)
        if importance is None
        else importance * np.sqrt(mean + squares)
    )
    weights += TINY
    return weights


def _groups(blocks: Floats, size: int) -> Floats:
    """[size, all groups of all blocks]"""
    return np.ascontiguousarray(blocks.reshape(-1, size).T)


@dataclass
class _Sums:
    """Of a group, weighted: of q, of q squared and of q times the value."""

    q: Floats
    qq: Floats
    qx: Floats

    @classmethod
    def of(cls, q: Floats, x: Floats, weights: Floats) -> _Sums:
        weighted = weights * q
        total = weighted.sum(0)
        q *= weighted
        squares = q.sum(0)
        weighted *= x
        return cls(total, squares, weighted.sum(0))


def _integers(x: Floats, scale: Floats, minimum: Floats, low: int, high: int) -> Floats:
    q = x - minimum
    q *= np.where(scale == 0, 0, 1 / np.where(scale == 0, 1, scale))
    np.rint(q, out=q)
    return np.clip(q, low, high, out=q)


def _fit_affine(x: Floats, weights: Floats, kind: Affine) -> tuple[Floats, Floats]:
    """Of each group its scale and minimum."""
    low = np.minimum(x.min(0), np.float32(kind.most))
    span = x.max(0) - low
    from_low = x - low
    total, total_x = weights.sum(0), (weights * x).sum(0)
    scale, minimum = span / kind.top, low
    best = np.full_like(span, np.inf)
    q = np.empty_like(x)
    for stretched in kind.tries:
        np.multiply(from_low, np.float32(stretched) / np.maximum(span, TINY), out=q)
        np.rint(q, out=q)
        np.minimum(q, np.float32(kind.top), out=q)
        sums = _Sums.of(q, x, weights)
        s, m = _line(sums, total, total_x, kind.most, low)
        error = _error(sums, total, total_x, s, m)
        better = (error < best) & (s > 0)
        best = np.where(better, error, best)
        scale, minimum = np.where(better, s, scale), np.where(better, m, minimum)
    return scale, minimum


def _line(
    sums: _Sums, total: Floats, total_x: Floats, most: float, known: Floats
) -> tuple[Floats, Floats]:
    """The scale and the minimum, of at most `most`, that fit the integers best; the scale alone
    where one value counts so much that it is all there is to fit: the minimum is `known` then."""
    determinant = total * sums.qq - sums.q * sums.q
    sound = determinant > 1e-5 * total * sums.qq
    minimum = (sums.qq * total_x - sums.q * sums.qx) / np.where(sound, determinant, 1)
    minimum = np.minimum(np.where(sound, minimum, known), np.float32(most))
    return (sums.qx - minimum * sums.q) / np.maximum(sums.qq, TINY), minimum


def _error(sums: _Sums, total: Floats, total_x: Floats, scale: Floats, minimum: Floats) -> Floats:
    """What is lost, less what no scale changes."""
    fits = scale * (scale * sums.qq - 2 * sums.qx)
    return fits + minimum * (minimum * total + 2 * (scale * sums.q - total_x))


def _fit_symmetric(x: Floats, weights: Floats, kind: Symmetric) -> Floats:
    furthest: Floats = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
    inverse = np.where(np.abs(furthest) < TINY, 0, 1 / np.where(furthest == 0, 1, furthest))
    scale: Floats = np.zeros_like(furthest)
    best = np.zeros_like(furthest)
    q = np.empty_like(x)
    for reached in kind.tries:
        np.multiply(x, np.float32(reached) * inverse, out=q)
        np.rint(q, out=q)
        np.clip(q, -kind.half, kind.half - 1, out=q)
        weighted = weights * q
        q *= weighted
        squares = np.maximum(q.sum(0), TINY)
        weighted *= x
        products = weighted.sum(0)
        gained = products * products / squares
        better = gained > best
        best = np.where(better, gained, best)
        scale = np.where(better, products / squares, scale)
    return scale


def _half(values: Floats) -> Floats:
    """As F16 holds them."""
    return np.clip(values, -65504, 65504).astype(np.float16).astype(np.float32)


def _half_reaching(values: Floats) -> Floats:
    """The same, never nearer to 0: small ones are few, and the next may be half of it."""
    halves = np.clip(values, -65504, 65504).astype(np.float16)
    short = np.abs(halves.astype(np.float32)) < np.abs(values)
    further = np.nextafter(halves, np.copysign(np.float16(65504), halves))
    return np.where(short, further, halves).astype(np.float32)


def _ratio(values: Floats, unit: Floats, low: int, high: int) -> Floats:
    """Integers that times `unit` come nearest to the values."""
    ratio: Floats = np.rint(values / np.where(unit == 0, np.float32(np.inf), unit))
    return np.clip(ratio, low, high)


def _super_affine(
    blocks: Floats, importance: Floats | None, kind: Affine
) -> tuple[Floats, Floats, Floats, Floats, Bytes]:
    """A K-quant of 8 groups of 32: both scales, [n], the groups' integers, [n, 8], and q."""
    n = len(blocks)
    weights = _error_weights(blocks.reshape(n, 8, 32), _of_groups(importance, n, 32))
    x, weights = _groups(blocks, 32), _groups(weights, 32)
    total, total_x = weights.sum(0), (weights * x).sum(0)
    scale, minimum = _fit_affine(x, weights, kind)
    d, least = (
        _half_reaching(scale.reshape(n, 8).max(1) / SCALES),
        _half_reaching(-minimum.reshape(n, 8).min(1) / SCALES),
    )
    best = np.full(n, np.inf, np.float32)
    kept: list[Floats] = [d, least, np.zeros((n, 8), np.float32), np.zeros((n, 8), np.float32)]

    def each(values: Floats) -> Floats:
        return np.repeat(values, 8)

    sums = None
    for _ in range(TURNS + 1):
        scales = _ratio(scale, each(d), 0, SCALES)
        if sums is not None:  # the minimum that fits the rounded scale is another
            minimum = (total_x - scales * each(d) * sums.q) / total
        minima = _ratio(-minimum, each(least), 0, SCALES)
        if sums is not None:
            d, least = _refit(sums, total, total_x, scales, minima, n)
        s, m = scales * each(d), -minima * each(least)
        sums = _Sums.of(_integers(x, s, m, 0, kind.top), x, weights)
        error = _error(sums, total, total_x, s, m).reshape(n, 8).sum(1)
        better = error < best
        best = np.where(better, error, best)
        now = (d, least, scales.reshape(n, 8), minima.reshape(n, 8))
        for old, new in zip(kept, now, strict=True):
            old[better] = new[better]
        scale, minimum = _line(sums, total, total_x, kind.most, m)
    d, least, scales, minima = kept
    s, m = scales.ravel() * each(d), -minima.ravel() * each(least)
    q = _integers(x, s, m, 0, kind.top).astype(np.uint8)
    return d, least, scales, minima, np.ascontiguousarray(q.T).reshape(n, 8, 32)


def _refit(
    sums: _Sums, total: Floats, total_x: Floats, scales: Floats, minima: Floats, n: int
) -> tuple[Floats, Floats]:
    """The two scales of 256 values that fit all their integers best."""

    def summed(values: Floats) -> Floats:
        each: Floats = values.reshape(n, 8).sum(1)
        return each

    qq, mm = summed(scales * scales * sums.qq), summed(minima * minima * total)
    qm = summed(scales * minima * sums.q)
    qx, mx = summed(scales * sums.qx), -summed(minima * total_x)
    determinant = qq * mm - qm * qm
    sound = determinant > 1e-6 * qq * mm
    determinant = np.where(sound, determinant, 1)
    d = np.where(sound, (qx * mm + mx * qm) / determinant, qx / np.maximum(qq, TINY))
    least = np.where(sound, (qq * mx + qm * qx) / determinant, 0)
    return _half(np.maximum(d, 0)), _half(np.maximum(least, 0))


def _of_groups(importance: Floats | None, n: int, size: int) -> Floats | None:
    return None if importance is None else importance.reshape(n, -1, size)


def _six_bits(scales: Floats, minima: Floats) -> Bytes:
    s, m = scales.astype(np.uint8), minima.astype(np.uint8)
    first = s[:, :4] | (s[:, 4:] >> 4) << 6
    second = m[:, :4] | (m[:, 4:] >> 4) << 6
    return np.concatenate([first, second, s[:, 4:] & 15 | m[:, 4:] << 4], axis=1)


def _nibbles(low: Bytes, high: Bytes) -> Bytes:
    packed: Bytes = np.bitwise_or(low & 15, high << 4, dtype=np.uint8)
    return packed.reshape(len(low), -1)


def _f16(values: Floats) -> Bytes:
    return values.astype(np.float16)[:, None].view(np.uint8)


def _q4_k(blocks: Floats, importance: Floats | None) -> Bytes:
    d, least, scales, minima, q = _super_affine(blocks, importance, Q4)
    pairs = q.reshape(-1, 4, 2, 32)
    return np.concatenate(
        [_f16(d), _f16(least), _six_bits(scales, minima), _nibbles(pairs[:, :, 0], pairs[:, :, 1])],
        axis=1,
    )


def _q5_k(blocks: Floats, importance: Floats | None) -> Bytes:
    d, least, scales, minima, q = _super_affine(blocks, importance, Q5)
    high = np.packbits(q >> 4, axis=1, bitorder="little")[:, 0]
    pairs = q.reshape(-1, 4, 2, 32)
    packed = _nibbles(pairs[:, :, 0], pairs[:, :, 1])
    return np.concatenate([_f16(d), _f16(least), _six_bits(scales, minima), high, packed], axis=1)


def _q6_k(blocks: Floats, importance: Floats | None) -> Bytes:
    n = len(blocks)
    weights = _error_weights(blocks.reshape(n, 16, 16), _of_groups(importance, n, 16))
    x, weights = _groups(blocks, 16), _groups(weights, 16)
    scale = _fit_symmetric(x, weights, Q6)
    by_block = scale.reshape(n, 16)
    furthest: Floats = np.take_along_axis(by_block, np.abs(by_block).argmax(1)[:, None], 1)[:, 0]
    d, best = _half_reaching(furthest / np.float32(-128)), np.full(n, np.inf, np.float32)
    kept_d, kept = d.copy(), np.zeros((n, 16), np.float32)
    none = np.zeros_like(scale)
    sums = None
    for _ in range(TURNS + 1):
        scales = _ratio(scale, np.repeat(d, 16), -128, 127)
        if sums is not None:
            fitted = (scales * sums.qx).reshape(n, 16).sum(1)
            squares = (scales * scales * sums.qq).reshape(n, 16).sum(1)
            d = _half(fitted / np.maximum(squares, TINY))
        s = scales * np.repeat(d, 16)
        sums = _Sums.of(_integers(x, s, none, -32, 31), x, weights)
        error = (s * (s * sums.qq - 2 * sums.qx)).reshape(n, 16).sum(1)
        better = error < best
        best = np.where(better, error, best)
        kept_d[better], kept[better] = d[better], scales.reshape(n, 16)[better]
        scale = sums.qx / np.maximum(sums.qq, TINY)
    s = kept.ravel() * np.repeat(kept_d, 16)
    q = (_integers(x, s, none, -32, 31) + 32).astype(np.uint8)
    q = np.ascontiguousarray(q.T).reshape(n, 2, 4, 32)
    halves = q.reshape(n, 2, 2, 64)
    low = _nibbles(halves[:, :, 0], halves[:, :, 1])
    high = q >> 4 << np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = np.bitwise_or.reduce(high, axis=2).reshape(n, 64)
    return np.concatenate([low, high, kept.astype(np.int8).view(np.uint8), _f16(kept_d)], axis=1)


def _q5_0(blocks: Floats, importance: Floats | None) -> Bytes:
    weights = _groups(_error_weights(blocks, importance), 32)
    x = _groups(blocks, 32)
    d = _half(_fit_symmetric(x, weights, HALF_16))
    q = (_integers(x, d, np.zeros_like(d), -16, 15) + 16).astype(np.uint8).T
    return np.concatenate([_f16(d), _high_bits(q), _nibbles(q[:, :16], q[:, 16:])], axis=1)


def _q5_1(blocks: Floats, importance: Floats | None) -> Bytes:
    weights = _groups(_error_weights(blocks, importance), 32)
    x = _groups(blocks, 32)
    d, minimum = map(_half, _fit_affine(x, weights, TOP_31))
    q = _integers(x, d, minimum, 0, 31).astype(np.uint8).T
    packed = _nibbles(q[:, :16], q[:, 16:])
    return np.concatenate([_f16(d), _f16(minimum), _high_bits(q), packed], axis=1)


def _high_bits(q: Bytes) -> Bytes:
    return np.packbits(q >> 4, axis=1, bitorder="little")


Q4, Q5, TOP_31 = _affine(15), _affine(31), _affine(31, np.inf)
Q6, HALF_16 = _symmetric(32), _symmetric(16)
ENCODERS: dict[WeightType, Callable[[Floats, Floats | None], Bytes]] = {
    WeightType.Q4_K: _q4_k,
    WeightType.Q5_K: _q5_k,
    WeightType.Q6_K: _q6_k,
    WeightType.Q5_0: _q5_0,
    WeightType.Q5_1: _q5_1,
}
