"""`sbd-engine inspect`."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from python.command import CLEAR, check_error, run, run_here
from python.tiny_model import EOS, MASK, byte_tokenizer, write_tiny_model

from sbd_engine.convert import convert
from sbd_engine.convert.values import Value
from sbd_engine.convert.writer import OutputTensor, write_gguf


@pytest.fixture(scope="module")
def hostile_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No model: escape sequences wherever a file has text, each before a name to look for."""
    path = tmp_path_factory.mktemp("hostile") / "hostile.bin"
    metadata: dict[str, Value] = {
        "general.architecture": f"{CLEAR}architecture",
        "general.name": f"{CLEAR}title\nforged  line",
        f"sbd.{CLEAR}key": f"{CLEAR}value",
    }
    values = np.ones(2, np.float32)
    tensor = OutputTensor(f"{CLEAR}tensor", (2,), GGMLQuantizationType.F32, [lambda: values])
    write_gguf(path, metadata, [tensor])
    return path


class TestInspect:
    def test_json(self, model: Path) -> None:
        done = run("inspect", model, "--json", "--tensors")
        values = json.loads(done.stdout)
        assert values["file"] == "tiny.bin"
        assert values["file_bytes"] == model.stat().st_size
        assert values["architecture"] == "qwen3"
        assert list(values["decoders"]) == ["sbd", "ntp", "sbd_lossless"]
        assert values["decoders"]["sbd"]["gamma"] == 0.35
        assert values["defaults"]["block_size"] == values["sbd"]["sbd.block_size"] == 16
        assert values["defaults"]["gamma"] == 0.35
        assert values["model_config"]["max_position_embeddings"] == 512
        assert values["model_config"]["mask_token_id"] == byte_tokenizer().token_to_id(MASK)
        assert values["model_config"]["eos_token_ids"] == [byte_tokenizer().token_to_id(EOS)]
        assert values["tokenizer"] == "tokenizer.json"
        assert values["chat_template"] is True
        assert values["problem"] is None
        assert len(values["tensors"]) == values["n_tensors"] > 10
        embedding = next(t for t in values["tensors"] if t["name"] == "token_embd.weight")
        assert embedding["type"] == "f32"
        assert embedding["shape"] == [272, values["model_config"]["hidden_size"]]
        assert embedding["bytes"] == 4 * 272 * values["model_config"]["hidden_size"]
        assert sum(t["bytes"] for t in values["tensors"]) == sum(values["bytes_by_type"].values())

    def test_json_has_no_infinity(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        model = write_tiny_model(tmp_path)
        convert(tmp_path / "checkpoint", model, type="f32", block_size=4, gamma=math.inf)
        done = run_here(capsys, "inspect", model, "--json")
        values = json.loads(done.stdout, parse_constant=pytest.fail)
        gammas = values["sbd"]["sbd.gamma"], values["defaults"]["gamma"]
        assert {*gammas, values["decoders"]["sbd"]["gamma"]} == {"inf"}

    def test_for_people(self, model: Path, plain_model: Path) -> None:
        text = run("inspect", model, "--tensors").stdout.decode()
        for part in ("tiny.bin", "qwen3", "sbd (block_size 16, unmask entropy_bounded"):
            assert part in text
        assert re.search(r"also +ntp\n", text)
        assert "token_embd.weight" in text
        assert "blk.0.attn_q_norm.weight" in text
        plain = run("inspect", plain_model).stdout.decode()
        assert re.search(r"decoder +ntp\n", plain)
        assert "token_embd.weight" not in plain

    def test_no_escape_sequence_of_the_file_reaches_a_terminal(self, hostile_model: Path) -> None:
        done = run("inspect", hostile_model, "--tensors")
        assert (done.returncode, done.stderr) == (0, b"")
        text = done.stdout.decode()
        assert "\x1b" not in text
        for part in ("[2Jarchitecture", "[2Jtitle forged", "sbd.[2Jkey", "[2Jvalue", "[2Jtensor"):
            assert part in text

    def test_a_sliding_window_bounds_the_context(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model = write_tiny_model(tmp_path)
        config = tmp_path / "checkpoint" / "config.json"
        window = {"sliding_window": 256, "use_sliding_window": True, "max_window_layers": 1}
        config.write_text(json.dumps(json.loads(config.read_text()) | window))
        convert(tmp_path / "checkpoint", model, type="f32")
        text = run_here(capsys, "inspect", model).stdout.decode()
        assert re.search(
            "context +256 tokens: the sliding window, beyond which this engine does not compute, "
            "of the model's 512\n",
            text,
        )
        check_error(
            run_here(capsys, "run", model, "-p", "x" * 300),
            "the context of 256 tokens, got 301 tokens: shorten it: this engine computes no more "
            "than the model's sliding window of 256\n",
        )
        check_error(
            run_here(capsys, "run", model, "-p", "x", "-c", 300),
            "--n-ctx 300 is beyond the model's sliding window of 256",
        )
