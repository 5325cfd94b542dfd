"""Which type each tensor of a model file gets, by the names that llama.cpp's users know.

A mix gives the weights that suffer most from rounding a larger type than the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, LlamaFileType
from gguf import GGMLQuantizationType as WeightType

from .errors import ConvertError, listed

Shape = tuple[int, ...]
Q4_K, Q5_K, Q6_K = WeightType.Q4_K, WeightType.Q5_K, WeightType.Q6_K
# What rows take that are no multiple of a K-quant's 256 values.
SMALLER_BLOCKS = {Q4_K: WeightType.Q5_0, Q5_K: WeightType.Q5_1, Q6_K: WeightType.Q8_0}


def _nowhere(_layer: int, _layers: int) -> bool:
    return False


def _first_four(layer: int, _layers: int) -> bool:
    return layer < 4


def _first_eighth(layer: int, layers: int) -> bool:
    return layer < layers // 8


def _half_of_all(layer: int, layers: int) -> bool:
    """Both ends of the model, and each third layer between."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


@dataclass(frozen=True)
class Mix:
    usual: WeightType
    file_type: LlamaFileType
    better: WeightType | None = None  # in attn_v and ffn_down, where these say so
    attn_v: Callable[[int, int], bool] = _nowhere
    ffn_down: Callable[[int, int], bool] = _nowhere


MIXES = {
    "f32": Mix(WeightType.F32, LlamaFileType.ALL_F32),
    "f16": Mix(WeightType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": Mix(WeightType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": Mix(WeightType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q6_k": Mix(Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": Mix(Q5_K, LlamaFileType.MOSTLY_Q5_K_M, Q6_K, _half_of_all, _half_of_all),
    "q5_k_s": Mix(Q5_K, LlamaFileType.MOSTLY_Q5_K_S),
    "q4_k_m": Mix(Q4_K, LlamaFileType.MOSTLY_Q4_K_M, Q6_K, _half_of_all, _half_of_all),
    "q4_k_s": Mix(Q4_K, LlamaFileType.MOSTLY_Q4_K_S, Q5_K, _first_four, _first_eighth),
    "q4_0": Mix(WeightType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}


def mix_of(name: str) -> Mix:
    mix = MIXES.get(name.lower())
    if mix is None:
        raise ConvertError(f"--type: expected one of {', '.join(MIXES)}, got {name!r}")
    return mix


def stored_type(shape: Shape, wanted: WeightType) -> WeightType:
    """The type a tensor gets: vectors stay F32, and rows that blocks do not fill take smaller
    blocks, or F16."""
    if len(shape) == 1:
        return WeightType.F32
    while shape[-1] % GGML_QUANT_SIZES[wanted][0]:
        wanted = SMALLER_BLOCKS.get(wanted, WeightType.F16)
    return wanted


def wanted_types(shapes: Mapping[str, Shape], mix: Mix) -> dict[str, WeightType]:
    """Of a model's tensors by their names in the file, whatever the lengths of their rows."""
    layers = len({name.split(".")[1] for name in shapes if name.startswith("blk.")})
    return {name: _wanted(name, shapes, mix, layers) for name in shapes}


def _wanted(name: str, shapes: Mapping[str, Shape], mix: Mix, layers: int) -> WeightType:
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    if name == head and mix.usual in SMALLER_BLOCKS:
        fills = shapes[name][-1] % GGML_QUANT_SIZES[Q6_K][0] == 0
        return Q6_K if fills else WeightType.Q8_0
    if not name.startswith("blk."):
        return mix.usual
    _, layer, matrix = name.split(".", 2)
    rule = {"attn_v.weight": mix.attn_v, "ffn_down.weight": mix.ffn_down}.get(matrix, _nowhere)
    if mix.better is not None and rule(int(layer), layers):
        return mix.better
    # The largest models, of 80 layers, share it between many heads: it is small, and counts much.
    if matrix == "attn_v.weight" and mix.usual == Q4_K and layers == 80:
        shared = shapes[name][0] < shapes[f"blk.{layer}.attn_q.weight"][0]
        return Q5_K if shared else Q4_K
    return mix.usual


def types_of(
    shapes: Mapping[str, Shape], mix: Mix, warn: Callable[[str], None]
) -> dict[str, WeightType]:
    """The types that a model's tensors are stored in; those that had to be others are told."""
    wanted = wanted_types(shapes, mix)
    types = {name: stored_type(shape, wanted[name]) for name, shape in shapes.items()}
    odd: dict[tuple[WeightType, WeightType], list[str]] = {}
    for name, dtype in types.items():
        if len(shapes[name]) > 1 and dtype != wanted[name]:
            odd.setdefault((wanted[name], dtype), []).append(name)
    for (meant, got), names in odd.items():
        warn(
            f"{len(names)} tensors become {got.name}, not {meant.name}: their rows are no multiple "
            f"of {GGML_QUANT_SIZES[meant][0]}: {listed(names)}"
        )
    return types
