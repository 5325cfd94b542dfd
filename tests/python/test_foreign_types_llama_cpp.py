"""llama.cpp's quantiser makes files of its usual mixes, which the engine and llama.cpp read.

Skipped where llama-cpp-python is not installed: it takes longer to build than all tests to run.
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
from .test_foreign_types import (
    IQ4_NL,
    IQ4_XS,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    reference_of,
    relative_error,
)

llama_cpp = pytest.importorskip("llama_cpp")
pytest.importorskip("torch")


F32, Q4_0 = WeightType.F32, WeightType.Q4_0
# llama.cpp's name of a mix, the types of its matrices where rows are multiples of 256, and those
# where they are of 32 only.
MIXES = {
    "Q5_0": ({Q5_0, Q6_K}, {Q5_0, Q8_0}),
    "Q5_1": ({Q5_1, Q6_K}, {Q5_1, Q8_0}),
    "Q2_K": ({Q2_K, Q3_K, Q6_K}, {Q4_0, IQ4_NL, Q8_0}),
    "Q3_K_M": ({Q3_K, Q5_K, Q4_K, Q6_K}, {Q4_0, IQ4_NL, Q5_1, Q5_0, Q8_0}),
    "Q4_K_M": ({Q4_K, Q6_K}, {Q5_0, Q8_0}),
    "Q5_K_M": ({Q5_K, Q6_K}, {Q5_1, Q8_0}),
    "IQ4_NL": ({IQ4_NL, Q5_K, Q6_K}, {IQ4_NL, Q5_1, Q8_0}),
    "IQ4_XS": ({IQ4_XS, Q5_K, Q6_K}, {IQ4_NL, Q5_1, Q8_0}),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, dict[str, Any]]]:
    """A model in F16 and its checkpoint's configuration, by its width."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    made = {}
    for width in (256, 320):
        shape = {"hidden_size": width, "intermediate_size": 2 * width, "head_dim": 64}
        checkpoint = write_checkpoint(folder / f"checkpoint {width}", "qwen3", **shape)
        path = folder / f"f16 {width}.bin"
        convert_quietly(checkpoint, path, type="f16")
        made[width] = path, json.loads((checkpoint / "config.json").read_text())
    return made


def quantised(source: Path, mix: str) -> Path:
    target = source.with_name(f"{source.stem} {mix}.bin")
    if not target.exists():
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{mix}")
        names = str(source).encode(), str(target).encode()
        assert llama_cpp.llama_model_quantize(*names, parameters) == 0
    return target


@pytest.mark.parametrize("width", [256, 320])
@pytest.mark.parametrize("mix", MIXES)
def test_a_file_of_llama_cpp(
    mix: str, width: int, sources: dict[int, tuple[Path, dict[str, Any]]]
) -> None:
    source, config = sources[width]
    path = quantised(source, mix)
    kinds = {tensor.tensor_type for tensor in GGUFReader(path).tensors} - {F32}
    assert kinds <= MIXES[mix][0] | MIXES[mix][1]
    ids = np.random.default_rng(4).integers(0, 300, 60).tolist()
    expected = reference_of(path, config).forward(ids, causal(len(ids)))
    with Engine(path, kv_dtype="f32") as engine:
        assert relative_error(engine.forward(ids), expected) < 0.03


@pytest.mark.parametrize("mix", MIXES)
def test_llama_cpp_computes_the_same(
    mix: str, sources: dict[int, tuple[Path, dict[str, Any]]]
) -> None:
    """Logits alike, and the same greedy tokens up to the first that is nearly tied."""
    path = quantised(sources[256][0], mix)
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
    rows = actual[len(prompt) - 1 : -1]
    best = np.max(rows, axis=-1)
    behind = best - rows[np.arange(len(theirs)), theirs]
    assert np.all(behind < 0.3 * np.std(actual))  # logits this random are nearly tied now and then
    until = len(theirs) if not behind.any() else int(np.argmax(behind > 0))
    assert ours[:until] == theirs[:until]
