"""The importance of columns: what matmuls read, against transformers' own inputs; its file, against
the gguf library; and what quantising makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter

from sbd_engine import Engine
from sbd_engine.cli import main

from .checkpoints import convert_quietly, read_model, refusal, write_checkpoint

TEXT = "def add(a, b):\n    return a + b\n" * 40
LAYERS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
THEIRS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, its model file and the importance that the command makes of it."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("importance")
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    write_checkpoint(folder / "checkpoint", "qwen3", **shape)
    convert_quietly(folder / "checkpoint", folder / "f32.bin", type="f32")
    (folder / "text.txt").write_text(TEXT)
    assert importance(folder, "f32.bin", "-c", "64") == 0
    return folder


def importance(folder: Path, model: str, *options: str) -> int:
    paths = ["--text", str(folder / "text.txt"), "-o", str(folder / "imatrix.gguf")]
    return main.run(["importance", str(folder / model), *paths, *options])


def mean_squares(path: Path) -> dict[str, np.ndarray]:
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(path).tensors}
    return {
        name[: -len(".in_sum2")]: data[0] / tensors[name.replace("in_sum2", "counts")][0, 0]
        for name, data in tensors.items()
        if name.endswith(".in_sum2")
    }


def test_what_matmuls_read(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    expected: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        parts = name.split(".")
        if parts[-1] in THEIRS:
            ours = f"blk.{parts[2]}.{LAYERS[THEIRS.index(parts[-1])]}.weight"

            def hear(_: object, inputs: tuple[torch.Tensor, ...], ours: str = ours) -> None:
                expected[ours] = inputs[0][0].double().square().sum(0).numpy()

            module.register_forward_pre_hook(hear)
    ids = np.random.default_rng(0).integers(0, 300, 50).tolist()
    with torch.no_grad():
        model(torch.tensor([ids[:-1]]))
    with Engine(folder / "f32.bin", kv_dtype="f32", prefix_cache=0) as engine:
        actual = engine.input_squares(ids)
        again = engine.input_squares(ids)
    assert actual.keys() == expected.keys()
    for name, sums in expected.items():
        rows, squares = actual[name]
        assert rows == 49  # the last token predicts nothing, so it is not read
        np.testing.assert_allclose(squares, sums, rtol=1e-3, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(again[name][1], squares)


def test_its_file(folder: Path) -> None:
    reader = GGUFReader(folder / "imatrix.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.type"] == "imatrix"
    assert keys["imatrix.datasets"] == ["text.txt"]
    assert keys["imatrix.chunk_size"] == 64
    with Engine(folder / "f32.bin") as engine:
        n_tokens = len(engine.tokenizer.encode(TEXT))
        windows = n_tokens // 64
        assert keys["imatrix.chunk_count"] == windows > 2
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert len(shapes) == 2 * 7 * 2
    assert shapes["blk.0.ffn_down.weight.in_sum2"] == [512, 1]
    assert shapes["blk.0.ffn_down.weight.counts"] == [1, 1]


@pytest.mark.parametrize("command", ["convert", "requantise"])
def test_columns_that_count_lose_less(folder: Path, command: str, tmp_path: Path) -> None:
    exact = read_model(folder / "f32.bin")[1]
    weights = mean_squares(folder / "imatrix.gguf")
    lost = []
    for options in [], ["--importance", str(folder / "imatrix.gguf")]:
        if command == "convert":
            arguments = [str(folder / "checkpoint"), "-o", str(tmp_path / "out.bin")]
        else:
            arguments = [str(folder / "f32.bin"), str(tmp_path / "out.bin")]
        assert main.run([command, *arguments, "--type", "q4_k_s", *options]) in (0, None)
        keys, tensors = read_model(tmp_path / "out.bin")
        lost.append(
            sum(
                float((np.square(tensors[name] - exact[name]) * columns).mean() / columns.mean())
                for name, columns in weights.items()
            )
        )
    assert keys["quantize.imatrix.file"] == "imatrix.gguf"
    assert keys["quantize.imatrix.entries_count"] == 14
    assert lost[1] < 0.97 * lost[0]


def test_files_that_are_none(folder: Path, tmp_path: Path) -> None:
    def told(path: Path, type: str = "q4_k_m") -> str:
        output = tmp_path / "out.bin"
        line = refusal(folder / "checkpoint", output, type=type, importance=path)
        assert not output.exists()
        return line

    def written(kind: str = "imatrix", **tensors: np.ndarray) -> Path:
        writer = GGUFWriter(tmp_path / "imatrix.gguf", "llama")
        writer.add_string("general.type", kind)
        for name, values in tensors.items():
            writer.add_tensor(f"blk.0.attn_q.weight.{name}", values.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / "imatrix.gguf"

    one, ones = np.ones((1, 1)), np.ones((1, 256))
    assert "would change nothing" in told(folder / "imatrix.gguf", "q8_0")
    assert "no such file" in told(tmp_path / "none")
    assert "got 'model'" in told(folder / "f32.bin")
    assert "not a whole GGUF file" in told(folder / "text.txt")
    assert "expected float32 .in_sum2 and .counts" in told(written(in_sum2=ones))
    assert "expected sums of squares" in told(written(in_sum2=-ones, counts=one))
    assert "expected sums of squares" in told(written(in_sum2=ones * np.nan, counts=one))
    assert "says nothing of" in told(written(in_sum2=ones, counts=0 * one))
    assert "says nothing of" in told(written())
    line = told(written(in_sum2=np.ones((1, 96)), counts=one))
    assert "blk.0.attn_q.weight has 96 columns there, 256 in the model" in line


def test_bad_arguments(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "text.txt").read_bytes()
    text = ["--text", str(folder / "text.txt")]
    for arguments, expected in (
        ([*text, "-o", str(folder / "text.txt")], "is one of the files to read"),
        ([*text, "-o", str(folder / "no" / "x")], "no such folder"),
        (["--text", str(folder / "none"), "-o", str(folder / "x")], "no such file"),
        ([*text, "-o", str(folder / "x"), "-c", "2"], "expected --n-ctx 3 at least, got 2"),
        ([*text], "Missing option '--output'"),
    ):
        assert main.run(["importance", str(folder / "f32.bin"), *arguments]) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
    assert not (folder / "x").exists()
    assert (folder / "text.txt").read_bytes() == before
