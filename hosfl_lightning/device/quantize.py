"""Weight-only quantisation of a graph: frozen weights in 8 or 4 bits, everything else in fp32."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from hosfl_lightning.device.extra import device_extra, quiet

#: Elements of a weight below which it stays as it is.
LEAST = 1024
#: Weights with one scale, of int4.
BLOCK = 32
#: By operator: at which input the weight stands, and which of its axes has a scale an element; of Gemm see `_axis`.
AXES = {"MatMul": (1, 1), "Gemm": (1, 1), "Conv": (1, 0), "Gather": (0, 0)}


def quantized(graph: Any, kind: Literal["int8", "int4"]) -> Any:
    """The ``onnx.ModelProto`` with its large weights of MatMul, Gemm, Conv and embeddings quantised, symmetrically.

    int8: ``q = round(w / s)``, one s for an output channel, or a row of an embedding; int4: one for 32 weights of an
    output channel of a MatMul, all others as for int8. Activations stay fp32: quantising them, too, would ruin probes.
    """
    if kind == "int4":
        graph = _to_4_bits(graph)
    _to_8_bits(graph.graph)
    return graph


def _to_4_bits(graph: Any) -> Any:
    with device_extra(), quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        # Level 1 computes in fp32; 4, the fastest, would quantise activations as they come.
        quantizer = MatMulNBitsQuantizer(graph, block_size=BLOCK, is_symmetric=True, accuracy_level=1)
        quantizer.process()
    return quantizer.model.model


def _to_8_bits(graph: Any) -> None:
    from onnx import numpy_helper

    weights = {one.name: one for one in graph.initializer if _is_large(one)}
    axes: dict[str, set[int | None]] = {}
    gathered = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in weights:
                axes.setdefault(name, set()).add(_axis(node, place))
    chosen = {name: axis for name, [axis, *others] in axes.items() if not others and axis is not None}
    for name, axis in chosen.items():
        packed, scale = _rounded(numpy_helper.to_array(weights[name]), axis)
        if name in gathered:
            scale = scale[:, None]
        weights[name].CopyFrom(numpy_helper.from_array(packed, name))
        graph.initializer.append(numpy_helper.from_array(scale, f"{name}.scale"))
    nodes: list[Any] = []
    for node in graph.node:
        nodes += _with_scales(node, chosen)
    del graph.node[:]
    graph.node.extend(nodes)


def _is_large(tensor: Any) -> bool:
    from onnx import TensorProto

    return tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1 and int(np.prod(tensor.dims)) >= LEAST


def _axis(node: Any, place: int) -> int | None:
    """Of a weight at that input of a node, the axis that has a scale an element; None: it stays as it is."""
    if node.op_type not in AXES or AXES[node.op_type][0] != place:
        return None
    transposed = any(one.name == "transB" and one.i for one in node.attribute)
    return 0 if transposed else AXES[node.op_type][1]


def _rounded(weight: Any, axis: int) -> tuple[Any, Any]:
    """``round(w / s)`` int8 and s fp32, of one dimension."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(others, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale.reshape(-1)


def _with_scales(node: Any, chosen: dict[str, int]) -> list[Any]:
    """The node on what its quantised weight stands for, and the nodes before it that make it so."""
    from onnx import TensorProto, helper

    name = next((one for one in node.input if one in chosen), None)
    if name is None:
        return [node]
    if node.op_type == "Gather":  # the rows alone
        rows, scales, wide = (f"{node.output[0]}.{word}" for word in ("rows", "scales", "wide"))
        return [
            helper.make_node("Gather", [name, node.input[1]], [rows]),
            helper.make_node("Cast", [rows], [wide], to=TensorProto.FLOAT),
            helper.make_node("Gather", [f"{name}.scale", node.input[1]], [scales]),
            helper.make_node("Mul", [wide, scales], [*node.output]),
        ]
    wide = f"{node.output[0]}.weight"
    node.input[[*node.input].index(name)] = wide
    return [helper.make_node("DequantizeLinear", [name, f"{name}.scale"], [wide], axis=chosen[name]), node]
