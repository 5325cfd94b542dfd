"""K-quants and the types beside them as `convert` writes them: read by the gguf library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as WeightType
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

from sbd_engine import Engine
from sbd_engine.convert.errors import ConvertError
from sbd_engine.convert.mixes import MIXES, mix_of, stored_type, wanted_types
from sbd_engine.convert.quantize import LIMITS, encode

from .checkpoints import convert_quietly, refusal, write_checkpoint

Floats = NDArray[np.float32]
Q4_K, Q5_K, Q6_K = WeightType.Q4_K, WeightType.Q5_K, WeightType.Q6_K
Q5_0, Q5_1, Q8_0 = WeightType.Q5_0, WeightType.Q5_1, WeightType.Q8_0
# Of each type: the values that share a scale, the largest integer, and whether there is a minimum.
GROUPS = {
    Q4_K: (32, 15, True),
    Q5_K: (32, 31, True),
    Q6_K: (16, 31, False),
    Q5_0: (32, 15, False),
    Q5_1: (32, 31, True),
}


def random_rows(seed: int = 0) -> Floats:
    """Rows of different sizes, with a few values far out, as weights have them."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_t(5, (64, 512)) * np.exp(rng.standard_normal((64, 1))) * 0.03
    return rows.astype(np.float32)


def rounded(rows: Floats, dtype: WeightType) -> NDArray[np.float64]:
    """Each group rounded between its own ends, its scale exact: without any search."""
    size, top, has_minimum = GROUPS[dtype]
    groups = rows.astype(np.float64).reshape(-1, size)
    low = np.minimum(groups.min(1, keepdims=True), 0) if has_minimum else 0.0
    furthest = np.abs(groups).max(1, keepdims=True)
    scale = (groups.max(1, keepdims=True) - low if has_minimum else furthest) / top
    return (np.rint((groups - low) / scale) * scale + low).reshape(rows.shape)


def lost(rows: Floats, other: NDArray[np.floating], weights: Floats | float = 1.0) -> float:
    return float(np.sqrt(np.mean(np.square(other - rows) * weights)))


@pytest.mark.parametrize("dtype", GROUPS)
def test_less_is_lost_than_by_rounding(dtype: WeightType) -> None:
    rows = random_rows()
    actual = dequantize(encode(rows, dtype, "w"), dtype)
    assert lost(rows, actual) < 0.97 * lost(rows, rounded(rows, dtype))


@pytest.mark.parametrize("dtype", GROUPS)
def test_what_no_search_can_better(dtype: WeightType) -> None:
    """Blocks of 0, of one value, of one far out, tiny and as large as the type goes."""
    rng = np.random.default_rng(1)
    rows = np.zeros((10, 256), np.float32)
    rows[1], rows[2] = 0.5, -0.5
    rows[3, 100] = 2.0
    rows[4] = rng.standard_normal(256) * 1e-12  # a scale that F16 has not
    rows[5] = rng.uniform(0.9, 1.0, 256)
    rows[6] = rng.standard_normal(256) * 1e-4
    rows[7] = rng.standard_normal(256) * np.float32(LIMITS[dtype] / 8)
    rows[7, ::32] = LIMITS[dtype] * rng.choice([-1, 1], 8)
    rows[8] = rng.choice([-1.0, 1.0], 256)
    rows[9] = np.where(np.arange(256) < 32, 1.0, 1e-3) * rng.standard_normal(256)
    actual = dequantize(encode(rows, dtype, "w"), dtype)
    assert np.isfinite(actual).all()
    assert not actual[0].any()
    top = 15 if dtype in (Q4_K, Q5_0) else 31
    for i in range(1, 10):
        # Half a step of the largest group, and as much for its scales' rounding.
        span = np.ptp(np.append(rows[i], 0)) if GROUPS[dtype][2] else 2 * np.abs(rows[i]).max()
        bound = span / top if GROUPS[dtype][2] else span / (2 * top)
        assert np.abs(actual[i] - rows[i]).max() <= bound * 1.05 + 1e-6, i


@pytest.mark.parametrize("dtype", GROUPS)
def test_columns_that_matter_lose_less(dtype: WeightType) -> None:
    rows = random_rows(2)
    columns = np.exp(2 * np.random.default_rng(3).standard_normal(512)).astype(np.float32)
    plain = dequantize(encode(rows, dtype, "w"), dtype)
    aimed = dequantize(encode(rows, dtype, "w", columns), dtype)
    assert lost(rows, aimed, columns) < 0.9 * lost(rows, plain, columns)
    # One column as good as alone, columns that were never read, all of them alike.
    for columns in (np.ones(512), np.zeros(512), np.where(np.arange(512) == 9, 1e12, 1e-12)):
        aimed = dequantize(encode(rows, dtype, "w", columns.astype(np.float32)), dtype)
        assert lost(rows, aimed) < 2 * lost(rows, plain)


def test_what_a_type_cannot_hold() -> None:
    for dtype, limit in LIMITS.items():
        if dtype != WeightType.F32:
            rows = np.full((1, 256), limit * 1.002, np.float32)
            with pytest.raises(ConvertError, match=f"tensor w: .* does not fit {dtype.name}"):
                encode(rows, dtype, "w")
    with pytest.raises(ConvertError, match="tensor w holds NaN"):
        encode(np.full((1, 256), np.nan, np.float32), Q4_K, "w")


def model_shapes(layers: int, width: int = 256, tied: bool = False) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (96, width)}
    for i in range(layers):
        shapes[f"blk.{i}.attn_norm.weight"] = (width,)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            rows = width // 4 if name in ("attn_k", "attn_v") else width
            shapes[f"blk.{i}.{name}.weight"] = (rows, width)
    return shapes | ({} if tied else {"output.weight": (96, width)})


def test_the_mixes() -> None:
    """llama.cpp's, by hand; test_quantize_llama_cpp.py compares with its own quantiser."""
    many = [0, 1, 4, 7, 10, 13, 14, 15]  # of 16 layers: an eighth at both ends, each third between
    for name, better, in_v, in_down in (
        ("q4_k_m", Q6_K, many, many),
        ("q5_k_m", Q6_K, many, many),
        ("q4_k_s", Q5_K, [0, 1, 2, 3], [0, 1]),
        ("q5_k_s", None, [], []),
        ("q6_k", None, [], []),
    ):
        mix = mix_of(name)
        expected = dict.fromkeys(model_shapes(16), mix.usual)
        expected["output.weight"] = Q6_K
        for matrix, layers in (("attn_v", in_v), ("ffn_down", in_down)):
            expected |= {f"blk.{i}.{matrix}.weight": better for i in layers if better}
        assert wanted_types(model_shapes(16), mix) == expected, name
    tied = wanted_types(model_shapes(2, tied=True), mix_of("q4_k_s"))
    assert tied["token_embd.weight"] == Q6_K
    assert wanted_types(model_shapes(2, width=288), mix_of("q4_k_m"))["output.weight"] == Q8_0
    assert set(wanted_types(model_shapes(2), mix_of("q4_0")).values()) == {WeightType.Q4_0}


def test_rows_that_blocks_do_not_fill() -> None:
    for wanted, smaller in (Q4_K, Q5_0), (Q5_K, Q5_1), (Q6_K, Q8_0):
        assert stored_type((4, 512), wanted) == wanted
        assert stored_type((4, 576), wanted) == smaller
        assert stored_type((4, 40), wanted) == WeightType.F16
        assert stored_type((512,), wanted) == WeightType.F32
    assert stored_type((4, 40), Q8_0) == WeightType.F16


def test_a_checkpoint_in_a_mix(tmp_path: Path) -> None:
    """The engine runs it; the name is taken in either case, and a wrong one is told."""
    pytest.importorskip("transformers")
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "qwen3", **shape)
    for name in ("f32", "q4_0", "Q4_K_M"):
        convert_quietly(checkpoint, tmp_path / f"{name}.bin", type=name)
    reader = GGUFReader(tmp_path / "Q4_K_M.bin")
    assert reader.fields["general.file_type"].contents() == MIXES["q4_k_m"].file_type == 15
    assert {t.tensor_type for t in reader.tensors} == {Q4_K, Q6_K, WeightType.F32}
    ids = np.random.default_rng(4).integers(0, 300, 40).tolist()
    logits = []
    for name in ("f32", "q4_0", "Q4_K_M"):
        with Engine(tmp_path / f"{name}.bin") as engine:
            logits.append(engine.forward(ids))
    exact, rounded, mixed = logits
    assert 0.1 * lost(exact, rounded) < lost(exact, mixed) < 0.9 * lost(exact, rounded)
    line = refusal(checkpoint, tmp_path / "x.bin", type="q3_k")
    assert "--type: expected one of f32, f16" in line and "q4_k_m" in line and "'q3_k'" in line


def test_rows_of_another_length_are_told(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from sbd_engine.convert import convert

    checkpoint = write_checkpoint(tmp_path / "checkpoint", "llama")
    warnings: list[str] = []
    convert(checkpoint, tmp_path / "mix.bin", type="q5_k_s", warn=warnings.append)
    kinds = {t.tensor_type for t in GGUFReader(tmp_path / "mix.bin").tensors}
    assert kinds == {Q5_1, Q8_0, WeightType.F32}
    assert "become Q5_1, not Q5_K: their rows are no multiple of 256: " in warnings[0]
