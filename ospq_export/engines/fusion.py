"""Which products of an ONNX file multiply quantized, which attentions are one kernel, and why the others are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from ospq_export.engines.plan import PlanLayer
from ospq_export.onnx.view import PRODUCTS, OnnxGraph

# What the fused Int8 attention kernel was seen to take.
MAX_SEQUENCE, HEAD_SIZES = 512, (16, 32, 64)


class Fusion(BaseModel):
    """What became of an ONNX file's products.

    Attributes:
        gemms: how many products (MatMul, Gemm, Conv) the file has.
        quantized_gemms: how many of them multiply quantized operands, inside attention kernels too.
        attentions: how many pairs of products around a Softmax the file has.
        fused_attentions: how many are one quantized kernel.
        not_quantized: the other products, by node name, with the reason.
        not_fused: the other attentions, by the name of the product after their Softmax, with the reason.
    """

    model_config = ConfigDict(frozen=True)

    gemms: int
    quantized_gemms: int
    attentions: int
    fused_attentions: int
    not_quantized: dict[str, str]
    not_fused: dict[str, str]


def analyse(model: Any, layers: Sequence[PlanLayer]) -> Fusion:
    """Hold a compiled plan against the file it was built from.

    Args:
        model: an `onnx.ModelProto`, its node names unique.
        layers: of the plan.
    """
    graph = OnnxGraph(model)
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    ran = {name: layer for layer in layers if layer.multiplies for name in layer.onnx}
    not_quantized = {
        node.name: _why_float(graph, node, ran.get(node.name))
        for node in products
        if node.name not in ran or not ran[node.name].is_quantized
    }
    attentions = [node for node in products if graph.reads_softmax(node)]
    fused = {name for layer in layers if layer.is_attention and layer.is_quantized for name in layer.onnx}
    not_fused = {n.name: _why_not_fused(graph, n) for n in attentions if n.name not in fused}
    return Fusion(
        gemms=len(products),
        quantized_gemms=len(products) - len(not_quantized),
        attentions=len(attentions),
        fused_attentions=len(attentions) - len(not_fused),
        not_quantized=not_quantized,
        not_fused=not_fused,
    )


def _why_float(graph: OnnxGraph, node: Any, layer: PlanLayer | None) -> str:
    bare = [
        f"operand {index} is not quantized"
        for index, name in enumerate(node.input[:2])
        if (source := graph.source(name)) is None or source.op_type != "DequantizeLinear"
    ]
    if bare:
        return ", ".join(bare)
    shape = graph.shapes.get(node.input[0], [])
    if node.op_type == "Conv" and len(shape) > 1 and shape[1] % 4:
        return f"a convolution over {shape[1]} channels: the builder takes multiples of 4"
    ran = "no layer of its own" if layer is None else f"{layer.kind} on {', '.join(layer.inputs[:2])}"
    return f"the builder chose {ran}"


def _why_not_fused(graph: OnnxGraph, node: Any) -> str:
    value = graph.shapes.get(node.input[1], [])
    if len(value) >= 2 and value[-1] not in (0, *HEAD_SIZES):
        return f"head size {value[-1]}: the kernel takes {', '.join(map(str, HEAD_SIZES))}"
    if len(value) >= 2 and value[-2] > MAX_SEQUENCE:
        return f"{value[-2]} keys: the kernel takes up to {MAX_SEQUENCE}"
    probabilities = graph.source(node.input[0])
    if probabilities is None or probabilities.op_type != "DequantizeLinear":
        return "the softmax's output is not quantized"
    quantizer = graph.source(probabilities.input[0])
    before = None if quantizer is None else graph.source(quantizer.input[0])
    if before is not None and before.op_type in ("Clip", "Sub"):
        return f"{before.op_type} between the softmax and its quantizer (fewer than 8 bits)"
    return "the builder chose separate kernels"
