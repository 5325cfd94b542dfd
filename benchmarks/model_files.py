"""The models that are measured: random weights in a published shape, one file per weight type.

Speed does not depend on what the weights are, and every peer gets the same ones. Files are made
once and kept in a work folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from gguf import LlamaFileType
from numpy.typing import NDArray
from safetensors.numpy import save_file

from sbd_engine import _core
from sbd_engine.convert.architectures import tensor_specs
from sbd_engine.convert.conversion import convert
from sbd_engine.model_file import model_file

SHAPES = Path(__file__).parent / "shapes"
CONVERTED = ("f16", "bf16", "q8_0", "q4_0")
# llama.cpp's quantiser writes these; "m" is its usual mix, with some tensors in Q6_K.
QUANTISED = {
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q5_k": LlamaFileType.MOSTLY_Q5_K_M,
    "q5_0": LlamaFileType.MOSTLY_Q5_0,
    "q5_1": LlamaFileType.MOSTLY_Q5_1,
    "q4_1": LlamaFileType.MOSTLY_Q4_1,
    "q4_k": LlamaFileType.MOSTLY_Q4_K_M,
    "iq4_nl": LlamaFileType.MOSTLY_IQ4_NL,
    "iq4_xs": LlamaFileType.MOSTLY_IQ4_XS,
    "q3_k": LlamaFileType.MOSTLY_Q3_K_M,
    "q2_k": LlamaFileType.MOSTLY_Q2_K,
}
TYPES = (*CONVERTED, *QUANTISED)


def shapes() -> list[str]:
    return sorted(path.stem for path in SHAPES.glob("*.json"))


def read_shape(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((SHAPES / f"{name}.json").read_text())
    return config


def checkpoint(name: str, work_dir: Path) -> Path:
    """A Hugging Face checkpoint folder of the shape, its weights exact in F16 and in BF16."""
    folder = work_dir / name
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = read_shape(name)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    with model_file(None) as demo:  # any tokenizer does; llama.cpp opens no file without
        tokenizer = _core.read_gguf(demo)["metadata"]["tokenizer.huggingface.json"]
    (folder / "tokenizer.json").write_text(tokenizer)
    rng = np.random.default_rng(0)
    specs = tensor_specs(config, tied=bool(config["tie_word_embeddings"]))
    tensors = {spec.source: _random(spec.shape, rng) for spec in specs}
    unfinished = folder / "unfinished"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    os.replace(unfinished, folder / "model.safetensors")
    return folder


def gguf_file(name: str, dtype: str, work_dir: Path) -> Path:
    """The checkpoint as one model file of the type `dtype`. Raises ImportError where that takes
    llama.cpp's quantiser and there is none."""
    path = work_dir / f"{name}.{dtype}.gguf"
    if path.exists():
        return path
    if dtype in CONVERTED:
        convert(checkpoint(name, work_dir), path, type=dtype, warn=lambda _: None)
    else:
        _quantise(gguf_file(name, "f16", work_dir), path, QUANTISED[dtype])
    return path


def _random(shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float16]:
    """Matrices around 0, norms around 1, with the eight bits of precision that BF16 has."""
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= 0.02 if len(shape) > 1 else 0.1
    values += 0 if len(shape) > 1 else 1
    values.view(np.uint32)[...] &= 0xFFFF0000
    values[np.abs(values) < 2**-14] = 0  # F16 would round these
    return values.astype(np.float16)


def _quantise(source: Path, path: Path, file_type: LlamaFileType) -> None:
    from llama_cpp import llama_cpp as c

    params = c.llama_model_quantize_default_params()
    params.ftype = int(file_type)
    unfinished = path.with_suffix(".unfinished")
    if c.llama_model_quantize(str(source).encode(), str(unfinished).encode(), params) != 0:
        raise RuntimeError(f"llama.cpp could not write {path.name}")
    os.replace(unfinished, path)
