"""llama.cpp's quantiser makes a Q4_K_M file, which the engine and llama.cpp read. Skipped where
llama-cpp-python is not installed: it takes longer to build than all other tests take to run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as WeightType
from gguf import GGUFReader
from reference.model import causal

from sbd_engine import Engine

from .checkpoints import convert_quietly, write_checkpoint
from .test_foreign_types import Q4_K, Q6_K, reference_of, relative_error

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("torch")


@pytest.fixture(scope="module")
def llama_cpp_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A Q4_K_M file of llama.cpp's quantiser, and its checkpoint's configuration."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    checkpoint = write_checkpoint(folder / "checkpoint", "qwen3", **shape)
    convert_quietly(checkpoint, folder / "f16.bin", type="f16")
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    source, target = folder / "f16.bin", folder / "q4_k_m.bin"
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), parameters)
    assert failed == 0
    return target, json.loads((checkpoint / "config.json").read_text())


def test_a_file_of_llama_cpp(llama_cpp_file: tuple[Path, dict[str, Any]]) -> None:
    path, config = llama_cpp_file
    kinds = {tensor.tensor_type for tensor in GGUFReader(path).tensors}
    assert kinds == {Q4_K, Q6_K, WeightType.F32}
    ids = np.random.default_rng(4).integers(0, 300, 60).tolist()
    expected = reference_of(path, config).forward(ids, causal(len(ids)))
    with Engine(path, kv_dtype="f32") as engine:
        assert relative_error(engine.forward(ids), expected) < 0.03


def test_llama_cpp_computes_the_same(llama_cpp_file: tuple[Path, dict[str, Any]]) -> None:
    """Logits alike, and the same greedy tokens up to the first that is nearly tied."""
    path, _ = llama_cpp_file
    prompt = np.random.default_rng(5).integers(0, 300, 20).tolist()
    f32 = 0
    llama = llama_cpp.Llama(
        str(path), n_ctx=128, logits_all=True, type_k=f32, type_v=f32, verbose=False
    )
    llama.eval(prompt)
    theirs = []
    for _ in range(40):
        theirs.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(theirs[-1:])
    expected = llama.scores[: llama.n_tokens]
    with Engine(path, kv_dtype="f32") as engine:
        actual = engine.forward(prompt + theirs)
        ours = engine.generate(prompt, decoder="ntp", max_tokens=40, ignore_eos=True).tokens
    # llama.cpp rounds activations to 8 bits of the largest of 256, the engine of 32.
    assert relative_error(actual, expected) < 0.06
    agree = np.argmax(actual[len(prompt) - 1 : -1], axis=-1) == theirs
    assert np.mean(agree) >= 0.9  # logits this random are nearly tied now and then
    until = len(agree) if agree.all() else int(np.argmin(agree))
    assert until >= 5
    assert ours[:until] == theirs[:until]
