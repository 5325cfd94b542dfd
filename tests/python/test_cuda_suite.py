"""What decides the GPU's results page: the checks, the mix of forwards, exact weights; and the
whole suite on a tiny shape, with the CPU in the GPU's place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf.quants import dequantize

from sbd_engine.convert.quantize import encode, weight_type

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # last, so that an installed package comes first

import cuda_agreement  # noqa: E402
import cuda_page  # noqa: E402
import cuda_suite  # noqa: E402
from cuda_agreement import Step, first_difference, is_choice, relative_error  # noqa: E402
from cuda_speed import mixed  # noqa: E402


def test_an_error_is_the_worst_rows_and_nan_is_infinite() -> None:
    expected = np.array([[3.0, 4.0], [0.0, 1.0]], np.float32)
    assert relative_error(expected, expected) == 0
    off = np.array([[0.0, 0.0], [0.0, 0.5]], np.float32)
    assert relative_error(expected + off, expected) == 0.5
    assert relative_error(expected * np.float32("nan"), expected) == np.inf


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_every_type_holds_the_weights_exactly(dtype: str) -> None:
    values = cuda_agreement._exact_values(3, (7, 256))
    stored = encode(values, weight_type(dtype), "w")
    np.testing.assert_array_equal(dequantize(stored, weight_type(dtype)), values)
    assert np.abs(values).max() == 127 / 4096
    assert len(np.unique(values)) > 200


def test_first_difference() -> None:
    a = [Step([(1, 7)]), Step([(0, 5), (2, 6)]), Step([(3, 1)])]
    assert first_difference(a, list(a)) is None
    other = [a[0], Step([(0, 5)])]
    assert first_difference(a, other) == ({1: 7}, a[1], other[1])
    assert first_difference(a, a[:2]) == ({1: 7, 0: 5, 2: 6}, Step([]), Step([]))


def test_a_choice_is_the_highest_logit_but_the_masks() -> None:
    row = np.array([1.0, 9.0, 2.0, 1.5], np.float32)
    assert is_choice(row, 2, mask=1, slack=0)
    assert not is_choice(row, 3, mask=1, slack=0.25)
    assert is_choice(row, 3, mask=1, slack=0.5)


def test_blocks_of_two_kinds_average_the_forwards() -> None:
    block_s = {4: 1.0, 6: 2.0, 8: 4.0}
    assert mixed(block_s, 4) == 1
    assert mixed(block_s, 5.5) == pytest.approx(0.25 * 1 + 0.75 * 2)
    assert mixed(block_s, 7) == 3
    with pytest.raises(ValueError, match="expected 4 to 8 forwards per block, got 9"):
        mixed(block_s, 9)


def bench(dtype: str, ms: dict[int, float]) -> dict[str, Any]:
    results = [
        {
            "rows": rows,
            "context": 1024,
            "ms_per_forward": each,
            "ratio_to_one_row": each / ms[1],
            "floor_ms": 4.0,
            "read_gb_s": 15000 / each,
        }
        for rows, each in ms.items()
    ]
    return {"shape": "s", "type": dtype, "machine": {"read_gb_s": 3000.0}, "results": results}


def test_checks() -> None:
    """Each bound from both sides."""
    speedups = [{"reduction": 3.0, "measured": 2.75, "formula": 2.9, "modelled": 2.95}]
    generation = {"shape": "s", "type": "bf16", "context": 256, "prefill_tok_s": 1, "ntp_tok_s": 1}
    tokens = {"prompts": 200, "equal": 197, "ties": 2, "differing": []}
    report = {
        "agreement": {"logits": {"s": {"f32": 2e-4, "f16, bf16 cache": 1e-2}}, "tokens": tokens},
        "forwards": [bench("bf16", {1: 5.0, 32: 5.5, 64: 7.0}), bench("q8_0", {1: 3.5})],
        "generations": [
            {**generation, "batch": 1, "speedups": speedups},
            {**generation, "batch": 4, "missing": "too small"},
        ],
    }
    checks = [line[1:] for line in next(cuda_page.tables(report)).lines]
    assert checks == [
        ["2.0e-04", "<= 1.0e-04", "NO"],
        ["1.0e-02", "<= 2.0e-02", "yes"],
        ["199", ">= 200", "NO"],
        ["1.00", ">= 0.85", "yes"],
        ["1.10", "<= 1.15", "yes"],
        ["1.40", "<= 1.35", "NO"],
        ["0.70", "<= 0.60", "NO"],
        ["2.75", ">= 2.70", "yes"],
    ]
    nothing = {"agreement": {"logits": {"s": {"f32": float("nan")}}, "tokens": tokens}}
    assert next(cuda_page.tables(nothing)).lines[0][-1] == "NO"


def test_an_unknown_part_is_one_line() -> None:
    done = subprocess.run(
        ["bash", BENCHMARKS / "cuda_suite.sh", "tests", "speed"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: speed: expected tests, sanitizer, agreement, forwards, generations or torch\n"
    )


def test_the_suite(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = tmp_path / "shapes"
    shapes.mkdir()
    config = json.loads((cuda_suite.SHAPES / "qwen3-8b.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    (shapes / "tiny.json").write_text(json.dumps(config | {"vocab_size": 256}))
    monkeypatch.setattr(cuda_suite, "SHAPES", shapes)
    monkeypatch.setattr(cuda_suite, "DOCS", tmp_path)
    monkeypatch.setattr(cuda_agreement, "_VOCAB", 256)
    monkeypatch.setattr(cuda_agreement, "_PROMPTS", 6)
    for parts in ("agreement", "forwards,generations"):  # one run adds to the other
        flags = ["--parts", parts, "--device", "cpu", "--work-dir", str(tmp_path), "--write-docs"]
        flags += ["--rounds", "1", "--types", "bf16,q8_0", "--context", "24", "--batch", "1,2"]
        monkeypatch.setattr(sys, "argv", ["cuda_suite.py", *flags])
        cuda_suite.main()
    report = json.loads((tmp_path / "cuda_suite.json").read_text())
    errors = report["agreement"]["logits"]["tiny"]
    assert errors["f32"] == 0
    cases = ("f16", "f16, bf16 cache", "bf16", "q8_0")
    assert all(0 < errors[case] < 0.05 for case in cases)
    assert errors["f16, bf16 cache"] != errors["f16"]
    assert report["agreement"]["tokens"]["prompts"] == 6
    assert [(r["type"], len(r["results"])) for r in report["forwards"]] == [
        ("bf16", 7),
        ("q8_0", 7),
    ]
    assert [(r["batch"], len(r["speedups"])) for r in report["generations"]] == [(1, 4), (2, 4)]
    for result in report["generations"]:
        assert result["ntp_tok_s"] > 0 and result["prefill_tok_s"] > 0
    page = (tmp_path / "results-gpu.md").read_text()
    assert page.startswith(f"# Results on a GPU\n\n{report['device']}; medians of 1 rounds")
    assert page.count("\n## ") == 5
    assert "tiny, q8_0; " in capsys.readouterr().out
