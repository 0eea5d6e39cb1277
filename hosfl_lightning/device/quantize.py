"""Weight-only quantisation of a graph: frozen weights in 8 or 4 bits, everything else in fp32."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

#: Elements of a weight below which it stays as it is.
LEAST = 1024
#: Weights of a matrix with one scale.
BLOCK = 32
#: Of ONNX Runtime's own operators.
DOMAIN = "com.microsoft"
#: Of MatMulNBits: compute in fp32. Level 4, the fastest, quantises activations as they come, which loses a probe's
#: small step; a DequantizeLinear before a MatMul becomes that, too.
FP32 = 1
#: By operator, at which input its weight stands.
PLACES = {"MatMul": 1, "Gemm": 1, "Gather": 0, "Conv": 1}


def quantized(graph: Any, kind: Literal["int8", "int4"]) -> Any:
    """Quantise, in place, the large weights of an ``onnx.ModelProto``, symmetrically: ``q = round(w / s)``.

    Of MatMul and Gemm in 8 or 4 bits, one s for 32 weights of an output channel; of embeddings and convolutions in 8
    bits, one s for a row or an output channel.
    """
    from onnx import TensorProto, helper, numpy_helper

    weights = {one.name: one for one in graph.graph.initializer if one.data_type == TensorProto.FLOAT}
    weights = {name: one for name, one in weights.items() if len(one.dims) > 1 and np.prod(one.dims) >= LEAST}
    made: dict[str, Any] = {}
    nodes: list[Any] = []
    for node in graph.graph.node:
        name = node.input[PLACES[node.op_type]] if node.op_type in PLACES else ""
        if name not in weights or not _fits(node, weights[name]):
            nodes.append(node)
            continue
        new, tensors = _rewritten(node, name, numpy_helper.to_array(weights[name]), int(kind.removeprefix("int")))
        nodes += new
        made |= tensors
    read = {name for node in nodes for name in node.input}
    kept = [one for one in graph.graph.initializer if one.name not in weights or one.name in read]
    for field, values in (("node", nodes), ("initializer", kept)):
        graph.graph.ClearField(field)
        getattr(graph.graph, field).extend(values)
    graph.graph.initializer.extend(numpy_helper.from_array(tensor, name) for name, tensor in made.items())
    if not any(one.domain == DOMAIN for one in graph.opset_import):
        graph.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return graph


def blocks(weight: Any, bits: int) -> tuple[Any, Any]:
    """A matrix ``(K, N)`` as MatMulNBits takes it: ``(N, K/32, bytes)`` uint8, the lower half byte first; s fp32.

    The largest weight of a block becomes the lowest integer, -8 or -128, of which there is one more.
    """
    inputs, outputs = weight.shape
    count = -(-inputs // BLOCK)
    w = np.zeros((outputs, count * BLOCK), np.float32)
    w[:, :inputs] = weight.T
    w = w.reshape(outputs, count, BLOCK)
    extreme = np.take_along_axis(w, np.abs(w).argmax(-1, keepdims=True), -1)
    middle = 1 << bits - 1
    scale = np.where(extreme != 0, extreme / np.float32(-middle), np.float32(1)).astype(np.float32)
    q = np.clip(np.rint(w / scale) + middle, 0, 2 * middle - 1).astype(np.uint8)
    return (q[..., ::2] | q[..., 1::2] << 4 if bits == 4 else q), scale[..., 0]


def rows(weight: Any) -> tuple[Any, Any]:
    """int8 of the weight's shape, and s fp32 for each index of the first axis, of as many dimensions."""
    largest = np.abs(weight).max(tuple(range(1, weight.ndim)), keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def _attributes(node: Any) -> dict[str, Any]:
    from onnx import helper

    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def _fits(node: Any, weight: Any) -> bool:
    """Whether it is the operator in its plain form."""
    attributes = _attributes(node)
    match node.op_type:
        case "MatMul":
            return len(weight.dims) == 2
        case "Gemm":
            return attributes.get("alpha", 1) == attributes.get("beta", 1) == 1 and not attributes.get("transA", 0)
        case "Gather":
            return len(weight.dims) == 2 and attributes.get("axis", 0) == 0
    return True


def _rewritten(node: Any, name: str, weight: Any, bits: int) -> tuple[list[Any], dict[str, Any]]:
    """In place of a node, others that read the quantised weight, and its tensors."""
    from onnx import TensorProto, helper

    out, make = node.output[0], helper.make_node
    if node.op_type in ("MatMul", "Gemm"):
        weight = weight.T if _attributes(node).get("transB", 0) else weight
        q, scale = blocks(weight, bits)
        biased = node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]
        product = make(
            "MatMulNBits", [node.input[0], f"{name}.q", f"{name}.s"], [f"{out}.product" if biased else out],
            domain=DOMAIN, K=weight.shape[0], N=weight.shape[1], bits=bits, block_size=BLOCK, accuracy_level=FP32,
        )  # fmt: skip
        nodes = [product, make("Add", [f"{out}.product", node.input[2]], [out])] if biased else [product]
        return nodes, {f"{name}.q": q, f"{name}.s": scale}
    q, scale = rows(weight)
    if node.op_type == "Gather":
        return [
            make("Gather", [f"{name}.rows", node.input[1]], [f"{out}.rows"]),
            make("Cast", [f"{out}.rows"], [f"{out}.wide"], to=TensorProto.FLOAT),
            make("Gather", [f"{name}.scales", node.input[1]], [f"{out}.scales"]),
            make("Mul", [f"{out}.wide", f"{out}.scales"], [out]),
        ], {f"{name}.rows": q, f"{name}.scales": scale}
    wide = make("DequantizeLinear", [f"{name}.rows", f"{name}.scales"], [f"{out}.weight"], axis=0)
    node.input[PLACES["Conv"]] = f"{out}.weight"
    return [wide, node], {f"{name}.rows": q, f"{name}.scales": scale.reshape(-1)}
