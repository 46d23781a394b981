"""Rules about what costs a fused kernel, or does work twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ospq_export.onnx.lint.findings import Finding, name_of, warning
from ospq_export.onnx.lint.network import Network
from ospq_export.onnx.view import DEQUANTIZE, QUANTIZE, OnnxGraph


def doubled(network: Network) -> Iterator[Finding]:
    """No pair directly follows another."""
    for pair in network.pairs.values():
        source = network.graph.producer.get(pair.data)
        if pair.quantizes and source is not None and source.op_type == DEQUANTIZE:
            yield warning(
                "doubled", pair.node, f"requantizes what {name_of(source)} dequantized", "keep one pair"
            )


def attention(network: Network) -> Iterator[Finding]:
    """What keeps an attention from becoming one Int8 kernel."""
    graph = network.graph
    for node in graph.nodes:
        if not graph.reads_softmax(node):
            continue
        probabilities = graph.source(node.input[0])
        if probabilities is not None and probabilities.op_type == DEQUANTIZE:
            quantizer = graph.source(probabilities.input[0])
            before = None if quantizer is None else graph.source(quantizer.input[0])
            yield from _breaker(node, before, "between the softmax and its quantizer")
        for reader in _after(graph, node.output[0]):
            if reader.op_type in ("Clip", "Sub") and _feeds_quantizer(graph, reader):
                yield from _breaker(node, reader, "between attention and the quantizer behind it")


def _breaker(node: Any, between: Any, where: str) -> Iterator[Finding]:
    if between is not None and between.op_type in ("Clip", "Sub"):
        yield warning(
            "attention-not-fused",
            node,
            f"{between.op_type} {where}",
            "8 bits on a symmetric grid need none; fewer bits cost the fusion",
        )


def _after(graph: OnnxGraph, tensor: str) -> Iterator[Any]:
    """The nodes that read a tensor, past what only moves it."""
    for reader in graph.readers[tensor]:
        if reader.op_type in ("Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze"):
            yield from _after(graph, reader.output[0])
        else:
            yield reader


def _feeds_quantizer(graph: OnnxGraph, node: Any) -> bool:
    return any(reader.op_type == QUANTIZE for reader in _after(graph, node.output[0]))


def key_transpose(network: Network) -> Iterator[Finding]:
    """K is quantized before its transpose: quantized after it, the product that made it drops to half precision."""
    graph = network.graph
    for node in graph.nodes:
        if node.op_type != "MatMul":
            continue
        dequantizer = graph.producer.get(node.input[1])
        if dequantizer is None or dequantizer.op_type != DEQUANTIZE:
            continue
        quantizer = graph.producer.get(dequantizer.input[0])
        if quantizer is None or quantizer.op_type != QUANTIZE or graph.is_constant(quantizer.input[0]):
            continue
        source = graph.producer.get(quantizer.input[0])
        if source is None or source.op_type != "Transpose":
            continue
        permutation = list(graph.attribute(source, "perm", []))
        if permutation and permutation[-1] != len(permutation) - 1:
            yield warning(
                "key-transposed-first",
                quantizer,
                f"quantizes what {name_of(source)} transposed",
                "put Q and DQ before the transpose",
            )
