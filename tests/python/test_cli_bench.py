"""`sbd-engine bench`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from python.command import check_error, run, run_here

from sbd_engine.roofline import work


class TestBench:
    def test_config(self, model: Path) -> None:
        config = model.parent / "checkpoint" / "config.json"
        done = run(
            *("bench", "--config", config, "--type", "f16", "--rows", "32,1,16"),
            *("--context", "8,20", "--repeats", 3, "--nfe-reduction", 4, "--threads", 1, "--json"),
        )
        values = json.loads(done.stdout)
        results = {(r["context"], r["rows"]): r for r in values["results"]}
        assert set(results) == {(c, r) for c in (8, 20) for r in (1, 16, 32)}
        for (context, _), result in results.items():
            one = results[context, 1]["ms_per_forward"]
            assert result["ms_per_forward"] > 0
            assert result["ratio_to_one_row"] == result["ms_per_forward"] / one
        implied = values["implied_speedup"]
        assert implied["nfe_reduction"] == 4
        assert [(r["context"], r["block_size"]) for r in implied["results"]] == [(8, 16), (20, 16)]
        for speedup in implied["results"]:
            time = {n: results[speedup["context"], n]["ms_per_forward"] for n in (1, 16, 32)}
            expected = 16 * time[1] / (time[32] + 3 * time[16])
            assert speedup["speedup"] == pytest.approx(expected)
        assert values["n_threads"] == 1
        machine = values["machine"]
        assert machine["read_gb_s"] > 0.1
        assert machine["int8_gop_s"] > 0.1
        assert machine["bf16_gflop_s"] > 0.1
        # Tied: the embedding is read as the head. 2 bytes a weight, 4 in norms, and the KV cache.
        shape = json.loads(config.read_text())
        heads, width = shape["num_attention_heads"], shape["head_dim"]
        kv, hidden = shape["num_key_value_heads"] * width, shape["hidden_size"]
        weights = 2 * hidden * heads * width + 2 * hidden * kv
        weights += 3 * hidden * shape["intermediate_size"]
        layers = shape["num_hidden_layers"]
        matrices = 272 * hidden + layers * weights
        total = 2 * matrices + 4 * hidden + 4 * layers * 2 * (hidden + width)
        assert values["weight_bytes"] == total
        for (context, rows), result in results.items():
            read = (total + context * layers * 2 * kv * 2) / machine["read_gb_s"]
            attention = rows * 4 * layers * (context + rows) * heads * width
            dots = max(machine["f32_gflop_s"], machine["bf16_gflop_s"])  # of an F16 cache
            multiply = rows * 2 * matrices / machine["f32_gflop_s"] + attention / dots
            assert result["floor_ms"] == pytest.approx(max(read, multiply) / 1e6)
            bandwidth = read * machine["read_gb_s"] / result["ms_per_forward"] / 1e6
            assert result["read_gb_s"] == pytest.approx(bandwidth)

    def test_batch(self, model: Path) -> None:
        """Each sequence reads its own cache, all of them read the weights once."""
        call = ("bench", model, "--rows", "1,4", "--context", 16, "--repeats", 1, "--json")
        caches = []
        for batch in (1, 3):
            report = json.loads(run(*call, "--batch", batch).stdout)
            assert report["batch"] == batch
            for result in report["results"]:
                n_bytes = result["read_gb_s"] * result["ms_per_forward"] * 1e6
                caches.append(n_bytes - report["weight_bytes"])
        assert caches[0] > 0
        assert caches == pytest.approx([caches[0], caches[0], 3 * caches[0], 3 * caches[0]])

    def test_model(self, model: Path) -> None:
        done = run("bench", model, "--rows", "1,2", "--context", "16", "--repeats", 1)
        assert done.returncode == 0
        said = done.stdout.decode()
        assert "GB/s" in said
        assert "best block size" not in said  # nothing to tell it from

    @pytest.mark.parametrize(
        ("flags", "complaint"),
        [
            (["--rows", "0"], "--rows"),
            (["--rows", "1,x"], "'1,x'"),
            (["--context", "-1"], "--context"),
            (["--repeats", "0"], "--repeats >= 1, got 0"),
            (["--batch", "0"], "--batch >= 1, got 0"),
            (["--nfe-reduction", "nan"], "--nfe-reduction"),
            (["--context", "600"], "600"),
            (["--config", "config.json"], "got both"),
        ],
    )
    def test_bench(
        self, model: Path, flags: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        check_error(run_here(capsys, "bench", model, *flags), complaint)

    def test_bench_config(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = tmp_path / "config.json"
        check_error(run_here(capsys, "bench", "--config", config), "no such file")
        for content, complaint in (("{", "JSON"), ("[]", "no JSON object"), ("{}", "model_type")):
            config.write_text(content)
            check_error(run_here(capsys, "bench", "--config", config), complaint)


def test_bytes_of_a_position_by_the_type_of_the_cache() -> None:
    config = {"num_hidden_layers": 3, "num_key_value_heads": 2, "num_attention_heads": 4}
    config["head_dim"] = 64
    for kv_dtype, of_32 in (("f32", 128), ("f16", 64), ("bf16", 64), ("q8_0", 34)):
        assert work([], config, kv_dtype).kv_bytes == 3 * 2 * 2 * 2 * of_32
