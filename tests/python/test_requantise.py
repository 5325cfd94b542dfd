"""`sbd-engine requantise`: keys and values against the gguf library's reading of both files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as WeightType
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize
from numpy.typing import NDArray

from sbd_engine import Engine
from sbd_engine.cli import main

from .test_foreign_types import write_model

Keys = dict[str, tuple[list[GGUFValueType], object]]
F32, F16, Q8_0 = WeightType.F32, WeightType.F16, WeightType.Q8_0
Q4_1, Q4_K, Q6_K = WeightType.Q4_1, WeightType.Q4_K, WeightType.Q6_K


def read(path: Path) -> tuple[Keys, dict[str, tuple[WeightType, NDArray[np.float32]]]]:
    reader = GGUFReader(path)
    keys = {n: (f.types, f.contents()) for n, f in reader.fields.items() if n[:5] != "GGUF."}
    return keys, {
        t.name: (t.tensor_type, dequantize(t.data, t.tensor_type)) for t in reader.tensors
    }


def run(*arguments: object) -> int:
    return main.run(["requantise", *map(str, arguments)])


def test_all_keys_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "source.bin", "llama", [F16])
    writer = GGUFWriter(tmp_path / "more.bin", "llama")
    plain, tensors = GGUFReader(source).fields, GGUFReader(source).tensors
    for key, field in plain.items():
        if key != "general.architecture" and not key.startswith("GGUF."):
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_uint64("other.u64", 1 << 40)
    writer.add_int8("other.i8", -3)
    writer.add_float64("other.f64", 0.1)
    writer.add_bool("other.bool", False)
    writer.add_array("other.words", ["a", "", "ü"])
    writer.add_array("other.numbers", [1.5, -2.5])
    writer.add_array("other.flags", [True, False])
    writer.add_string("general.type", "model")
    for tensor in tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert run(tmp_path / "more.bin", tmp_path / "out.bin", "--type", "q4_k_m") == 0
    assert "16 of 21 tensors made q4_k_m" in capsys.readouterr().out
    (before, exact), (after, values) = read(tmp_path / "more.bin"), read(tmp_path / "out.bin")
    assert after.pop("general.file_type")[1] == 15
    assert after.pop("general.quantization_version")[1] == 2
    assert after == before
    assert values.keys() == exact.keys()
    for name, (kind, weights) in values.items():
        vector = weights.ndim == 1
        assert kind == F32 if vector else kind in (Q4_K, Q6_K)
        error = np.linalg.norm(weights - exact[name][1]) / np.linalg.norm(exact[name][1])
        assert error == 0 if vector else 0.01 < error < 0.08, name
    with Engine(tmp_path / "out.bin") as engine:
        assert np.isfinite(engine.forward([1, 2, 3])).all()


def test_what_would_lose_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = write_model(tmp_path / "source.bin", "llama", [Q4_1]), tmp_path / "out.bin"
    assert run(source, output, "--type", "q4_k_s") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {source}: 16 tensors are Q4_1 already") and len(error) < 1000
    assert "--allow-requantise" in error and error.count("\n") == 1
    assert not output.exists()
    assert run(source, output, "--type", "q4_k_s", "--allow-requantise") == 0
    # Nothing is lost in float32, and next to nothing by Q8_0; what has its type is copied.
    assert run(source, output, "--type", "f32") == 0
    for name, (_, weights) in read(output)[1].items():
        np.testing.assert_array_equal(weights, read(source)[1][name][1])
    assert run(output, tmp_path / "q8_0.bin", "--type", "q8_0") == 0
    assert run(tmp_path / "q8_0.bin", output, "--type", "q6_k") == 0
    first = output.read_bytes()
    assert run(output, tmp_path / "again.bin", "--type", "q6_k") == 0
    assert (tmp_path / "again.bin").read_bytes() == first
    assert "0 of 21 tensors made q6_k" in capsys.readouterr().out


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = write_model(tmp_path / "source.bin", "llama", [F32]), tmp_path / "out.bin"
    cut = tmp_path / "cut.bin"
    cut.write_bytes(source.read_bytes()[:-1000])
    adapter = tmp_path / "adapter.bin"
    writer = GGUFWriter(adapter, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_tensor("x", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for arguments, expected in (
        ((source, output, "--type", "q3_k_m"), "--type: expected one of f32, "),
        ((source, source, "--type", "q8_0"), "is the model file to read"),
        ((source, tmp_path / "no" / "out.bin", "--type", "q8_0"), "no such folder"),
        ((source, tmp_path, "--type", "q8_0"), "is a folder"),
        ((tmp_path, output, "--type", "q8_0"), "expected a model file, got a folder"),
        ((tmp_path / "none", output, "--type", "q8_0"), "no such file"),
        ((cut, output, "--type", "q8_0"), "cut.bin: "),
        ((adapter, output, "--type", "q8_0"), "expected a model's file, got one of type 'adapter'"),
        ((source, output), "Missing option '--type'"),
    ):
        assert run(*arguments) == 2, arguments
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1 and error.startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} == {"source.bin", "cut.bin", "adapter.bin"}


def test_values_that_a_type_has_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = write_model(tmp_path / "source.bin", "llama", [F32]), tmp_path / "out.bin"
    data = bytearray(source.read_bytes())
    tensor = next(t for t in GGUFReader(source).tensors if t.name == "blk.1.ffn_up.weight")
    data[tensor.data_offset : tensor.data_offset + 4] = np.float32("nan").tobytes()
    source.write_bytes(data)
    assert run(source, output, "--type", "q4_k_m") == 2
    assert "tensor blk.1.ffn_up.weight holds NaN" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]
