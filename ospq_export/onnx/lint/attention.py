"""Which attentions do not become one kernel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from onnx import TensorProto

from ospq_export.onnx.lint.findings import Finding, name_of, warning
from ospq_export.onnx.lint.network import Network
from ospq_export.onnx.lint.precision import ProductKind, product_kinds
from ospq_export.onnx.view import DEQUANTIZE, MOVES, QUANTIZE, OnnxGraph

# The fused FP8 kernel was seen to take this many keys or more, and heads up to this size.
FP8_KEYS, FP8_HEAD_SIZE = 32, 256
# What is computed on logits before the softmax.
_ON_LOGITS = (*MOVES, "Add", "Sub", "Mul", "Div", "Where")
# What lies between an attention and the quantizer behind it, and only moves values.
_MOVED = ("Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze")


def attention(network: Network) -> Iterator[Finding]:
    """What keeps an attention from becoming one quantized kernel."""
    graph = network.graph
    kinds = {product.node.output[0]: product for product in product_kinds(network)}
    for node in graph.nodes:
        if not graph.reads_softmax(node):
            continue
        if graph.source(node.input[0]).op_type == DEQUANTIZE:
            before = graph.source(node.input[0], 3)
            yield from _breaker(node, before, "between the softmax and its quantizer")
        for reader in graph.ahead(node.output[0], _MOVED):
            if reader.op_type in ("Clip", "Sub") and _feeds_quantizer(graph, reader):
                yield from _breaker(node, reader, "between attention and the quantizer behind it")
        first = logits_product(graph, graph.logits(node))
        if first is not None:
            yield from _not_one(network, kinds[first.output[0]], kinds[node.output[0]])


def logits_product(graph: OnnxGraph, logits: str) -> Any:
    """The product that logits come from; None where there is none."""
    node = graph.producer.get(logits)
    if node is None or node.op_type == "MatMul":
        return node
    inputs = node.input if node.op_type in _ON_LOGITS else ()
    found = (logits_product(graph, name) for name in inputs)
    return next((product for product in found if product is not None), None)


def _not_one(network: Network, first: ProductKind, second: ProductKind) -> Iterator[Finding]:
    """Products in one format become one kernel, as two in float do; in FP8 with limits."""
    if first.kind != second.kind:
        bare, other = (first, second) if first.kind == "float" else (second, first)
        what = f"{name_of(other.node)} runs on {other.kind}, {name_of(bare.node)} in {bare.kind}"
        fix = "quantize all operands of both products, or none"
    elif first.kind == "fp8":
        what, fix = _fp8_limit(network, second.node)
    else:
        return
    if what:
        yield warning("attention-not-fused", second.node, what, fix)


def _fp8_limit(network: Network, node: Any) -> tuple[str, str]:
    """Why the kernel for FP8 does not take an attention, and the fix; empty where it does."""
    keys, size = ([0, 0, *(network.shape(node.input[1]) or ())])[-2:]
    if 0 < keys < FP8_KEYS:
        return f"{keys} keys: the FP8 kernel takes {FP8_KEYS} or more", "leave it: two FP8 products remain"
    if size > FP8_HEAD_SIZE:
        return f"head size {size}: the FP8 kernel takes up to {FP8_HEAD_SIZE}", "use more heads"
    wide = network.types.get(node.output[0]) == TensorProto.FLOAT
    readers = list(network.graph.ahead(node.output[0], _MOVED))
    if wide and not any(reader.output[0] in network.pairs for reader in readers):
        return "a float32 output that is not quantized to FP8", "compute attention in float16"
    return "", ""


def _breaker(node: Any, between: Any, where: str) -> Iterator[Finding]:
    if between is not None and between.op_type in ("Clip", "Sub"):
        yield warning(
            "attention-not-fused",
            node,
            f"{between.op_type} {where}",
            "8 bits on a symmetric grid need none; fewer bits cost the fusion",
        )


def _feeds_quantizer(graph: OnnxGraph, node: Any) -> bool:
    return any(reader.op_type == QUANTIZE for reader in graph.ahead(node.output[0], _MOVED))
