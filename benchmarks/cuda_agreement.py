"""Does a device compute what the CPU does in float32? Logits by types of weights and cache, and the
demo model's tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType as WeightType
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

from sbd_engine import Engine, _core
from sbd_engine.convert.architectures import TensorSpec, model_metadata, tensor_specs
from sbd_engine.convert.mixes import mix_of, stored_type
from sbd_engine.convert.quantize import encode
from sbd_engine.convert.writer import OutputTensor, write_gguf
from sbd_engine.model_file import model_file


class Case(NamedTuple):
    weights: str
    cache: str
    bound: float  # of the logits' error, as a share of a row's norm


# Tensor cores round activations to the weights' type, for quants to halves, and queries and
# probabilities to the cache's.
CASES = {
    "f32": Case("f32", "f32", 1e-4),
    "f16": Case("f16", "f16", 3e-3),
    "f16, bf16 cache": Case("f16", "bf16", 2e-2),
    "bf16": Case("bf16", "f16", 2e-2),
    "q8_0": Case("q8_0", "f16", 3e-3),
}
_LAYERS = 2  # of the models that are compared; the widths are the shape's own
_ROWS = (1, 5, 16, 33, 64)  # as one block behind...
_PROMPT = 300  # ...so many causal rows
_TOKENS = 64
_DEMO = CASES["q8_0"]

Floats = NDArray[np.float32]


def relative_error(got: Floats, expected: Floats) -> float:
    """Of the worst row. NaN is infinitely wrong."""
    off = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float(np.nan_to_num(off, nan=np.inf).max())


# ---- logits ----


def logits_errors(
    config: dict[str, Any], folder: Path, device: str, cases: Sequence[str], vocab: int
) -> Iterator[tuple[str, float]]:
    """Case by case, f32 first: the error on a model of the shape's widths, whose weights every type
    holds exactly, from the CPU's float32 path."""
    config = config | {"num_hidden_layers": _LAYERS, "vocab_size": vocab}
    expected: list[Floats] = []
    path = folder / "agreement.bin"
    try:
        for name in cases:
            case = CASES[name]
            _write_model(config, case.weights, path)
            if not expected:
                expected = list(_all_logits(path, "cpu", "f32", vocab))
            got = _all_logits(path, device, case.cache, vocab)
            yield name, max(map(relative_error, got, expected))
    finally:
        path.unlink(missing_ok=True)


def _all_logits(path: Path, device: str, kv_dtype: str, vocab: int) -> Iterator[Floats]:
    rng = np.random.default_rng(1)
    with Engine(path, device=device, kv_dtype=kv_dtype, n_ctx=_PROMPT + max(_ROWS)) as engine:
        for rows in _ROWS:
            ids = rng.integers(0, vocab, _PROMPT + rows).tolist()
            yield engine.forward(ids, block=rows)


def _write_model(config: dict[str, Any], dtype: str, path: Path) -> None:
    tensors = []
    for index, spec in enumerate(tensor_specs(config, tied=False)):
        stored = stored_type(spec.shape, mix_of(dtype).usual)

        def piece(
            index: int = index, spec: TensorSpec = spec, stored: WeightType = stored
        ) -> NDArray[np.generic]:
            return encode(_exact_values(index, spec.shape), stored, spec.name)

        tensors.append(OutputTensor(spec.name, spec.shape, stored, [piece]))
    write_gguf(path, model_metadata(config), tensors)


def _exact_values(seed: int, shape: tuple[int, ...]) -> Floats:
    """Seven bits and a sign, the largest of every 32 being 127: exact in F16, BF16 and Q8_0."""
    rng = np.random.default_rng(seed)
    if len(shape) == 1:
        norm: Floats = rng.random(shape, np.float32) + np.float32(0.5)
        return norm
    values = rng.integers(-127, 128, shape, dtype=np.int8)
    values[..., ::32] = 127
    values[:, ::64] *= rng.choice(np.array([-1, 1], np.int8), (shape[0], 1))
    matrix: Floats = values.astype(np.float32) * np.float32(1 / 4096)
    return matrix


# ---- tokens ----


class Step(NamedTuple):
    """What a forward decided: (position in the text, token)."""

    revealed: list[tuple[int, int]]


def compare_tokens(folder: Path, device: str, n_prompts: int) -> dict[str, Any]:
    """Set Block Decoding of the demo model, on the device and on the CPU in float32. Where a text
    differs, both are asked for the logits of the forward that decided differently: they have to
    agree within the bound, and each device has to have decided by its own. Then the difference is
    a tie within that error."""
    prompts = _prompts(n_prompts)
    exact = folder / "demo-f32.bin"
    differing: list[dict[str, Any]] = []
    with model_file(None) as demo:
        _write_f32(demo, exact)
        try:
            with (
                Engine(demo, device=device, n_ctx=512, prefix_cache=0) as tested,
                Engine(exact, "cpu", n_ctx=512, kv_dtype="f32", prefix_cache=0) as reference,
            ):
                for index, prompt in enumerate(prompts):
                    ids = reference.tokenizer.encode(prompt)
                    found = first_difference(_steps(tested, ids), _steps(reference, ids))
                    if found is not None:
                        at = {"prompt": index, **_explain(tested, reference, ids, *found)}
                        differing.append(at)
        finally:
            exact.unlink(missing_ok=True)
    return {
        "prompts": len(prompts),
        "equal": len(prompts) - len(differing),
        "ties": sum(d["error"] <= _DEMO.bound and d["own_tokens"] for d in differing),
        "differing": differing,
    }


def _prompts(n: int) -> list[str]:
    lines = resources.files("sbd_engine").joinpath("tasks/exact.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines[:: len(lines) // n]][:n]


def _steps(engine: Engine, ids: Sequence[int]) -> list[Step]:
    with engine.stream(list(ids), max_tokens=_TOKENS, decoder="sbd") as stream:
        return [Step(sorted(reveal[:2] for reveal in chunk.revealed)) for chunk in stream]


def first_difference(
    a: Sequence[Step], b: Sequence[Step]
) -> tuple[dict[int, int], Step, Step] | None:
    """What was revealed before the first forward that decided differently, and the two decisions;
    None where there is none."""
    before: dict[int, int] = {}
    for mine, theirs in zip(a, b, strict=False):
        if mine != theirs:
            return before, mine, theirs
        before.update(mine.revealed)
    return None if len(a) == len(b) else (before, Step([]), Step([]))


def _explain(
    tested: Engine,
    reference: Engine,
    prompt: list[int],
    before: Mapping[int, int],
    by_tested: Step,
    by_reference: Step,
) -> dict[str, Any]:
    size = reference.defaults["block_size"]
    mask = reference.model_config["mask_token_id"]
    start = len(before) // size * size  # a block is whole before the next begins
    block = [before.get(start + i, mask) for i in range(size)]
    ids = [*prompt, *(before[i] for i in range(start)), *block]
    got, expected = (engine.forward(ids, block=size)[-size:] for engine in (tested, reference))
    open_rows = [i for i in range(size) if start + i not in before]
    off = float(np.abs(got - expected)[open_rows].max())
    own = all(
        is_choice(logits[position - start], token, mask, 2 * off)
        for logits, step in ((got, by_tested), (expected, by_reference))
        for position, token in step.revealed
    )
    return {
        "position": start,
        "error": relative_error(got[open_rows], expected[open_rows]),
        "own_tokens": own,
    }


def is_choice(row: Floats, token: int, mask: int, slack: float) -> bool:
    """Whether the token has the highest logit of a row, the mask left out, up to a slack."""
    others = np.delete(row, mask)
    return bool(row[token] >= others.max() - slack)


def _write_f32(source: Path, path: Path) -> None:
    """The same model, every weight a float."""
    tensors = []
    for tensor in GGUFReader(source).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        piece = partial(encode, values, WeightType.F32, tensor.name)
        tensors.append(OutputTensor(tensor.name, shape, WeightType.F32, [piece]))
    metadata = _core.read_gguf(source)["metadata"]
    metadata.pop("general.alignment", None)  # the writer has its own
    write_gguf(path, metadata, tensors)
