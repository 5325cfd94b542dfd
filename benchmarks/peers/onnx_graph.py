"""Qwen3 as an ONNX graph of the operators that ONNX Runtime's own model builder uses: weights in
MatMulNBits, attention with its KV cache in GroupQueryAttention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file

GROUP_SIZE = 32
_INT8_PRODUCTS = 4  # accuracy_level of MatMulNBits


class Graph:
    """Nodes and weights, in the order they are made."""

    def __init__(self, folder: Path, config: dict[str, Any], bits: int, n_ctx: int) -> None:
        self._tensors = load_file(folder / "model.safetensors")
        self._config = config
        self._bits = bits
        self._nodes: list[Any] = []
        self._weights: list[Any] = []
        self._inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "rows"]),
            helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, [1]),
            helper.make_tensor_value_info("total_sequence_length", TensorProto.INT32, []),
        ]
        self._outputs = [
            helper.make_tensor_value_info(
                "logits", TensorProto.FLOAT, [1, "rows", config["vocab_size"]]
            )
        ]
        dim = config["head_dim"]
        frequencies = config["rope_theta"] ** -(np.arange(0, dim, 2) / dim)
        angles = np.arange(n_ctx)[:, None] * frequencies
        self._constant("cos_cache", np.cos(angles).astype(np.float32))
        self._constant("sin_cache", np.sin(angles).astype(np.float32))

    def build(self) -> bytes:
        table = self._constant("embedding", self._tensors["model.embed_tokens.weight"])
        x = self._node("Gather", [table, "input_ids"])
        x = self._node("Cast", [x], to=TensorProto.FLOAT)
        for layer in range(self._config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            y = self._norm(x, f"{prefix}input_layernorm.weight")
            x = self._node("Add", [x, self._attention(y, layer, f"{prefix}self_attn.")])
            y = self._norm(x, f"{prefix}post_attention_layernorm.weight")
            gate = self._linear(y, f"{prefix}mlp.gate_proj.weight")
            gate = self._node("Mul", [gate, self._node("Sigmoid", [gate])])
            y = self._node("Mul", [gate, self._linear(y, f"{prefix}mlp.up_proj.weight")])
            x = self._node("Add", [x, self._linear(y, f"{prefix}mlp.down_proj.weight")])
        x = self._norm(x, "model.norm.weight")
        self._linear(x, "model.embed_tokens.weight", output="logits")
        graph = helper.make_graph(self._nodes, "qwen3", self._inputs, self._outputs, self._weights)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
        return bytes(model.SerializeToString())

    def _attention(self, x: str, layer: int, prefix: str) -> str:
        config = self._config
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        q, k, v = (self._linear(x, f"{prefix}{part}_proj.weight") for part in "qkv")
        q = self._head_norm(q, f"{prefix}q_norm.weight", heads)
        k = self._head_norm(k, f"{prefix}k_norm.weight", kv_heads)
        shape = [1, kv_heads, "positions", config["head_dim"]]
        past, present = [], []
        for part in ("key", "value"):
            past.append(f"past.{layer}.{part}")
            present.append(f"present.{layer}.{part}")
            info = helper.make_tensor_value_info
            self._inputs.append(info(past[-1], TensorProto.FLOAT, shape))
            self._outputs.append(info(present[-1], TensorProto.FLOAT, shape))
        attended = f"attended.{layer}"
        self._nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [q, k, v, *past, "seqlens_k", "total_sequence_length", "cos_cache", "sin_cache"],
                [attended, *present],
                domain="com.microsoft",
                num_heads=heads,
                kv_num_heads=kv_heads,
                do_rotary=1,
            )
        )
        return self._linear(attended, f"{prefix}o_proj.weight")

    def _head_norm(self, x: str, name: str, heads: int) -> str:
        dim = self._config["head_dim"]
        apart = self._constant(f"{name}.apart", np.array([0, 0, heads, dim]))
        joined = self._constant(f"{name}.joined", np.array([0, 0, heads * dim]))
        x = self._norm(self._node("Reshape", [x, apart]), name)
        return self._node("Reshape", [x, joined])

    def _norm(self, x: str, name: str) -> str:
        scale = self._constant(name, self._tensors[name].astype(np.float32))
        eps = self._config["rms_norm_eps"]
        return self._node("SimplifiedLayerNormalization", [x, scale], axis=-1, epsilon=eps)

    def _linear(self, x: str, name: str, output: str = "") -> str:
        values = self._tensors[name].astype(np.float32)
        quants, scales = _quantised(values, self._bits)
        return self._node(
            "MatMulNBits",
            [x, self._constant(f"{name}.q", quants), self._constant(f"{name}.scale", scales)],
            output=output,
            domain="com.microsoft",
            K=values.shape[1],
            N=values.shape[0],
            bits=self._bits,
            block_size=GROUP_SIZE,
            accuracy_level=_INT8_PRODUCTS,
        )

    def _node(
        self, operator: str, inputs: list[str], output: str | None = None, **more: Any
    ) -> str:
        output = output or f"value.{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, inputs, [output], **more))
        return output

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        self._weights.append(numpy_helper.from_array(values, name))
        return name


def _quantised(values: NDArray[np.float32], bits: int) -> tuple[NDArray[np.uint8], Any]:
    """[rows, groups, bytes] around a zero of 2^(bits - 1), and [rows, groups] scales."""
    zero = 2 ** (bits - 1)
    groups = values.reshape(values.shape[0], -1, GROUP_SIZE)
    # The largest magnitude takes the end of the range that reaches further.
    peak = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
    scale = peak / -zero
    scale[scale == 0] = 1
    q = np.clip(np.round(groups / scale) + zero, 0, 2 * zero - 1).astype(np.uint8)
    if bits == 4:
        q = q[..., 0::2] | q[..., 1::2] << 4
    return q, scale[..., 0]
