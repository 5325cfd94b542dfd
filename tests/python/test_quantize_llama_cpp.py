"""Mixes beside llama.cpp's own quantiser: the same types, no more lost, and it answers from ours.
Skipped where llama-cpp-python is not installed.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray

from sbd_engine.convert.importance import write_importance
from sbd_engine.convert.mixes import MIXES, mix_of, stored_type, wanted_types

from .checkpoints import convert_quietly, read_model, write_checkpoint
from .test_foreign_types import relative_error

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("torch")

NAMES = ("q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden_size": 256, "intermediate_size": 256},
    # Only ffn_down's rows are a multiple of 256.
    "llama": {"hidden_size": 128, "intermediate_size": 256, "tie_word_embeddings": True},
}


def quantised(source: Path, name: str, **options: Any) -> Path:
    target = source.with_name(f"theirs_{name}.bin")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = int(MIXES[name].file_type)
    for key, value in options.items():
        setattr(parameters, key, value)
    assert not llama_cpp.llama_model_quantize(
        str(source).encode(), str(target).encode(), parameters
    )
    return target


def types_of(path: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(path).tensors}


def last_logits(path: Path, ids: list[int]) -> NDArray[np.float32]:
    llama = llama_cpp.Llama(
        str(path), n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )
    llama.eval(ids)
    return np.array(llama.scores[: len(ids)])


@pytest.fixture(scope="module", params=SHAPES)
def checkpoint(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With its float32 model file beside it."""
    folder = tmp_path_factory.mktemp("model")
    write_checkpoint(
        folder / "checkpoint", request.param, num_hidden_layers=9, **SHAPES[request.param]
    )
    convert_quietly(folder / "checkpoint", folder / "f32.bin", type="f32")
    return folder


def test_the_mixes_are_llama_cpps(checkpoint: Path) -> None:
    shapes = {name: values.shape for name, values in read_model(checkpoint / "f32.bin")[1].items()}
    for name in NAMES:
        wanted = wanted_types(shapes, mix_of(name))
        ours = {each: stored_type(shapes[each], wanted[each]).name for each in shapes}
        assert ours == types_of(quantised(checkpoint / "f32.bin", name)), name


def test_no_more_is_lost(checkpoint: Path) -> None:
    exact = read_model(checkpoint / "f32.bin")[1]
    ids = np.random.default_rng(5).integers(0, 300, 30).tolist()
    expected = last_logits(checkpoint / "f32.bin", ids)
    for name in "q4_k_m", "q5_k_s":
        paths = checkpoint / f"{name}.bin", quantised(checkpoint / "f32.bin", name)
        convert_quietly(checkpoint / "checkpoint", paths[0], type=name)
        (keys, ours), (their_keys, theirs) = map(read_model, paths)
        for key in "general.file_type", "general.quantization_version":
            assert keys[key] == their_keys[key]
        for tensor, values in exact.items():
            lost, their_loss = (float(np.linalg.norm(e[tensor] - values)) for e in (ours, theirs))
            assert lost <= 1.02 * their_loss, (name, tensor)
        error, their_error = (relative_error(last_logits(path, ids), expected) for path in paths)
        assert error < 1.1 * their_error, name


def test_importance_in_both_quantisers(checkpoint: Path) -> None:
    """One file of ours, through each quantiser: neither loses more where it counts."""
    exact = read_model(checkpoint / "f32.bin")[1]
    rng = np.random.default_rng(6)
    matrices = [name for name in exact if name.startswith("blk.") and exact[name].ndim == 2]
    sums = {name: (100, np.exp(2 * rng.standard_normal(exact[name].shape[1]))) for name in matrices}
    file = checkpoint / "imatrix.gguf"
    keys: dict[str, Any] = {"architecture": "llama", "datasets": ["t"], "chunks": 1}
    write_importance(file, sums, **keys, chunk_size=100)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(file).tensors}
    columns = {n: tensors[f"{n}.in_sum2"][0] / tensors[f"{n}.counts"][0, 0] for n in matrices}
    entries = [
        llama_cpp.llama_model_imatrix_data(
            name.encode(), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), values.size
        )
        for name, values in columns.items()
    ]
    entries.append(llama_cpp.llama_model_imatrix_data(None, None, 0))
    array = (llama_cpp.llama_model_imatrix_data * len(entries))(*entries)
    pointer = ctypes.cast(array, ctypes.POINTER(llama_cpp.llama_model_imatrix_data))
    theirs = read_model(quantised(checkpoint / "f32.bin", "q4_k_m", imatrix=pointer))[1]
    convert_quietly(
        checkpoint / "checkpoint", checkpoint / "ours.bin", type="q4_k_m", importance=file
    )
    ours = read_model(checkpoint / "ours.bin")[1]
    for name in matrices:
        lost, their_loss = (
            float(np.sqrt((np.square(each[name] - exact[name]) * columns[name]).sum()))
            for each in (ours, theirs)
        )
        assert lost <= 1.03 * their_loss, name
