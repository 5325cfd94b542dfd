"""Qwen3 as an OpenVINO graph in the form that exporters give a decoder, so that the CPU
plugin finds its fused norms, rotary embeddings and attention; weights in NNCF's layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import opset13 as ops
from openvino.op.util import Variable, VariableInfo
from safetensors.numpy import load_file

Weight = Callable[[str], Any]  # a tensor's name to a node of float32 rows
GROUP_SIZE = 128  # of int4 weights


def qwen3(folder: Path, config: dict[str, Any], weights: str) -> ov.Model:
    """With a KV state per layer and logits of every row. weights: "bf16" (kept as F16), "int8"
    (one scale per output), or "int4" (one per 128 inputs; embedding and head stay int8)."""
    tensors = load_file(folder / "model.safetensors")
    embedding = "model.embed_tokens.weight"

    def weight(name: str) -> Any:
        values = tensors[name]
        if weights == "bf16":
            return ops.convert(ops.constant(values), "f32")
        return _compressed(values, 8 if weights == "int8" or name == embedding else 4)

    eps = config["rms_norm_eps"]

    def norm(x: Any, name: str) -> Any:
        variance = ops.reduce_mean(ops.power(x, _f32(2)), np.array([-1]), keep_dims=True)
        scale = ops.divide(_f32(1), ops.sqrt(ops.add(variance, _f32(eps))))
        return ops.multiply(ops.multiply(x, scale), _f32(tensors[name]))

    input_ids = _parameter("input_ids", [-1, -1], ov.Type.i64)
    position_ids = _parameter("position_ids", [-1, -1], ov.Type.i64)
    beam_idx = _parameter("beam_idx", [-1], ov.Type.i32)
    mask = _parameter("attention_mask", [-1, 1, -1, -1], ov.Type.f32)
    embedded = weight(embedding)
    x = ops.gather(embedded, ops.convert(input_ids, "i32"), np.array(0))
    batch = ops.gather(ops.shape_of(input_ids), np.array([0]), np.array(0))
    rotary = _rotary(position_ids, config)
    assigns: list[Any] = []
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."

        def linear(y: Any, name: str, prefix: str = prefix) -> Any:
            return ops.matmul(y, weight(f"{prefix}{name}_proj.weight"), False, True)

        y = norm(x, prefix + "input_layernorm.weight")
        q, k, v = (_heads(linear(y, f"self_attn.{part}"), config) for part in "qkv")
        q = rotary(_first(norm(q, prefix + "self_attn.q_norm.weight")))
        k = rotary(_first(norm(k, prefix + "self_attn.k_norm.weight")))
        k = _remembered(k, f"{layer}.key", batch, beam_idx, config, assigns)
        v = _remembered(_first(v), f"{layer}.value", batch, beam_idx, config, assigns)
        attended = ops.scaled_dot_product_attention(
            q, _repeated(k, config), _repeated(v, config), mask
        )
        attended = ops.transpose(attended, np.array([0, 2, 1, 3]))
        width = config["num_attention_heads"] * config["head_dim"]
        attended = ops.reshape(attended, np.array([0, 0, width]), True)
        x = ops.add(x, linear(attended, "self_attn.o"))
        y = norm(x, prefix + "post_attention_layernorm.weight")
        y = ops.multiply(ops.swish(linear(y, "mlp.gate")), linear(y, "mlp.up"))
        x = ops.add(x, linear(y, "mlp.down"))
    logits = ops.matmul(norm(x, "model.norm.weight"), embedded, False, True)
    result = ops.result(logits, name="logits")
    result.output(0).get_tensor().set_names({"logits"})
    return ov.Model([result], assigns, [input_ids, position_ids, beam_idx, mask], "qwen3")


def _parameter(name: str, shape: list[int], dtype: ov.Type) -> Any:
    node = ov.op.Parameter(dtype, ov.PartialShape(shape))
    node.set_friendly_name(name)
    node.output(0).get_tensor().set_names({name})
    return node


def _f32(value: Any) -> Any:
    return ops.constant(np.asarray(value, dtype=np.float32))


def _heads(x: Any, config: dict[str, Any]) -> Any:
    """[batch, rows, heads, head_dim]"""
    return ops.reshape(x, np.array([0, 0, -1, config["head_dim"]]), True)


def _first(x: Any) -> Any:
    """[batch, heads, rows, head_dim]"""
    return ops.transpose(x, np.array([0, 2, 1, 3]))


def _rotary(position_ids: Any, config: dict[str, Any]) -> Callable[[Any], Any]:
    dim = config["head_dim"]
    frequencies = config["rope_theta"] ** -(np.arange(0, dim, 2, dtype=np.float32) / dim)
    positions = ops.convert(ops.unsqueeze(position_ids, np.array(1)), "f32")
    angles = ops.matmul(_f32(frequencies.reshape(1, -1, 1)), positions, False, False)
    angles = ops.transpose(angles, np.array([0, 2, 1]))
    angles = ops.concat([angles, angles], -1)
    cos = ops.unsqueeze(ops.cos(angles), np.array(1))
    sin = ops.unsqueeze(ops.sin(angles), np.array(1))

    def rotate(x: Any) -> Any:
        def part(begin: int, end: int) -> Any:
            return ops.slice(x, *(np.array([n]) for n in (begin, end, 1, 3)))

        turned = ops.concat([ops.multiply(part(dim // 2, dim), _f32(-1)), part(0, dim // 2)], -1)
        return ops.add(ops.multiply(x, cos), ops.multiply(turned, sin))

    return rotate


def _remembered(
    new: Any, name: str, batch: Any, beam_idx: Any, config: dict[str, Any], assigns: list[Any]
) -> Any:
    """The KV state `name` with the rows `new` behind it."""
    heads, dim = config["num_key_value_heads"], config["head_dim"]
    info = VariableInfo()
    info.data_shape, info.data_type, info.variable_id = (
        ov.PartialShape([-1, heads, -1, dim]),
        ov.Type.f32,
        name,
    )
    variable = Variable(info)
    empty = ops.concat([batch, np.array([heads, 0, dim])], 0)
    past = ops.read_value(ops.broadcast(_f32(0), empty), variable)
    past = ops.gather(past, beam_idx, np.array(0))
    both = ops.concat([past, new], -2)
    assigns.append(ops.assign(both, variable))
    return both


def _repeated(x: Any, config: dict[str, Any]) -> Any:
    """Key or value heads, once per query head of their group."""
    heads, dim = config["num_key_value_heads"], config["head_dim"]
    group = config["num_attention_heads"] // heads
    each = np.array([1, 1, group, 1, 1])
    x = ops.broadcast(ops.unsqueeze(x, np.array(2)), each, broadcast_spec="BIDIRECTIONAL")
    return ops.reshape(x, np.array([0, heads * group, -1, dim]), True)


def _compressed(values: NDArray[Any], bits: int) -> Any:
    """Unsigned with a zero point, decompressed by (q - zero) * scale."""
    rows, columns = values.shape
    size = GROUP_SIZE if bits == 4 else columns
    x = values.astype(np.float32).reshape(rows, -1, size)
    low, high = np.minimum(x.min(-1), 0), np.maximum(x.max(-1), 0)
    top = 2**bits - 1
    scale = ((high - low) / top)[..., None]
    zero = np.round(-low[..., None] / scale)
    q = np.clip(np.round(x / scale) + zero, 0, top).astype(np.uint8)
    shape = (rows, columns // size, size) if bits == 4 else (rows, columns)
    ends = (*shape[:-1], 1)

    def stored(data: NDArray[np.uint8], stored_shape: tuple[int, ...]) -> Any:
        if bits == 8:
            return ops.constant(data.reshape(stored_shape))
        flat = data.reshape(-1)
        packed = flat[0::2] | flat[1::2] << 4
        tensor = ov.Tensor(packed, ov.Shape(stored_shape), ov.Type.u4)
        return ov.op.Constant(tensor, shared_memory=False)

    half = [
        ops.convert(node, "f16") for node in (stored(q, shape), stored(zero.astype(np.uint8), ends))
    ]
    scales = ops.constant(scale.reshape(ends).astype(np.float16))
    out = ops.multiply(ops.subtract(*half), scales)
    if bits == 4:
        out = ops.reshape(out, np.array([rows, columns]), False)
    return ops.convert(out, "f32")
