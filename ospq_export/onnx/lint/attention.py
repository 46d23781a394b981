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
# What the fused Int8 kernel was seen to take.
MAX_SEQUENCE, HEAD_SIZES = 512, (16, 32, 64)
# What is computed on logits before the softmax.
_ON_LOGITS = (*MOVES, "Add", "Sub", "Mul", "Div", "Where")
# What lies between an attention and the quantizer behind it, and only moves values.
_MOVED = ("Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze")


def fuses(engine_type: str, bits: int, keys: int, head_size: int) -> bool:
    """Whether an attention whose two products have one type becomes one kernel, as far as that was seen.

    Args:
        engine_type: as `Format.engine_type` has it; of what is left in float, "Half".
        bits: of the format. Below 8 of them a Clip lies between the softmax and its quantizer.
        keys: of each head.
        head_size: elements of a query.
    """
    if engine_type == "Int8":
        return bits == 8 and keys <= MAX_SEQUENCE and head_size in HEAD_SIZES
    return engine_type != "FP8" or (keys >= FP8_KEYS and head_size <= FP8_HEAD_SIZE)


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
