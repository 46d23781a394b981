"""Lint of any QDQ ONNX file: what TensorRT refuses, reinterprets or runs in float, and what ONNX Runtime does not fuse.

Every rule was seen in NVIDIA's parser and builder (TensorRT-RTX 1.7) or in ONNX Runtime; the tests hold them to both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from ospq_export.export.onnx_graph import DEQUANTIZE, PRODUCTS, QUANTIZE, OnnxGraph
from ospq_export.export.onnx_read import read_model


class Severity(StrEnum):
    """What a finding costs."""

    ERROR = "error"
    WARNING = "warning"


class Finding(BaseModel):
    """One place where a rule is broken.

    Attributes:
        rule: its name.
        severity: `error`: TensorRT refuses the file or computes something else; `warning`: it runs in float or is not fused.
        node: the node's name, or its output's where it has none.
        what: what is wrong there.
        mend: what to do about it.
    """

    model_config = ConfigDict(frozen=True)

    rule: str
    severity: Severity
    node: str
    what: str
    mend: str


Rule = Callable[[OnnxGraph], Iterator[Finding]]


def lint(path: Path) -> list[Finding]:
    """All findings in a file, in the file's order within each rule.

    Raises:
        InputError: the file cannot be read as ONNX, or contradicts itself.
    """
    graph = OnnxGraph(read_model(path), path)
    return [finding for rule in RULES for finding in rule(graph)]


def _name(node: Any) -> str:
    return str(node.name or node.output[0])


def _pairs(graph: OnnxGraph) -> Iterator[Any]:
    return (node for node in graph.nodes if node.op_type in (QUANTIZE, DEQUANTIZE))


def _error(rule: str, node: Any, what: str, mend: str) -> Finding:
    return Finding(rule=rule, severity=Severity.ERROR, node=_name(node), what=what, mend=mend)


def _warning(rule: str, node: Any, what: str, mend: str) -> Finding:
    return Finding(rule=rule, severity=Severity.WARNING, node=_name(node), what=what, mend=mend)


def zero_points(graph: OnnxGraph) -> Iterator[Finding]:
    """TensorRT takes zero points of 0 only; ONNX Runtime builds integer kernels only where they are written out."""
    for node in _pairs(graph):
        if len(node.input) < 3 or not node.input[2]:
            yield _warning(
                "zero-point-missing",
                node,
                "no zero_point: ONNX Runtime takes uint8 and fuses nothing",
                "write out an int8 zero_point of 0",
            )
            continue
        values = graph.array(node.input[2])
        if values is None:
            yield _error("zero-point-computed", node, "the zero_point is computed", "make it a constant 0")
        elif values.astype(np.float64).any():
            yield _error(
                "zero-point-nonzero",
                node,
                f"zero_point {values.astype(np.int64).ravel()[values.astype(bool).argmax()]}",
                "use a symmetric grid, or subtract the offset first",
            )


def datatypes(graph: OnnxGraph) -> Iterator[Finding]:
    """int8 and int4 are taken; uint8 is silently read as int8, everything else refused."""
    from onnx import TensorProto

    taken = {TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1}
    for node in _pairs(graph):
        codes = node.input[0] if node.op_type == DEQUANTIZE else node.output[0]
        kind = graph.dtypes.get(codes)
        if kind is None and len(node.input) > 2:
            kind = graph.dtypes.get(node.input[2])
        if kind is None or kind in taken:
            continue
        shown = TensorProto.DataType.Name(kind).lower()
        what = (
            "uint8 codes: TensorRT silently reads them as int8"
            if kind == TensorProto.UINT8
            else f"{shown} codes"
        )
        yield _error("datatype", node, what, "use int8 with a zero_point of 0")


def scales(graph: OnnxGraph) -> Iterator[Finding]:
    """A scale is a positive constant; one per tensor for activations."""
    for node in _pairs(graph):
        values = graph.array(node.input[1])
        if values is None:
            yield _warning(
                "scale-computed",
                node,
                "the scale is computed: the product runs in float",
                "make it a constant",
            )
            continue
        numbers = values.astype(np.float64)
        if not np.isfinite(numbers).all() or (numbers <= 0).any():
            yield _error(
                "scale-not-positive", node, "a scale is zero, negative or not finite", "calibrate again"
            )
        if numbers.size > 1 and node.op_type == QUANTIZE and graph.array(node.input[0]) is None:
            yield _warning(
                "activation-per-channel",
                node,
                f"{numbers.size} scales on an activation: the product runs in float",
                "use one scale per tensor",
            )


def chains(graph: OnnxGraph) -> Iterator[Finding]:
    """Q is followed by DQ, an activation's DQ follows a Q, and no pair directly follows another."""
    for node in _pairs(graph):
        if node.op_type == QUANTIZE:
            readers = graph.readers[node.output[0]]
            if (not readers and node.output[0] not in graph.outputs) or any(
                r.op_type not in (DEQUANTIZE, "Reshape", "Transpose") for r in readers
            ):
                yield _error(
                    "dangling",
                    node,
                    "its codes are not read by a DequantizeLinear",
                    "add it, or drop this one",
                )
            source = graph.producer.get(node.input[0])
            if source is not None and source.op_type == DEQUANTIZE:
                yield _warning(
                    "doubled", node, f"requantizes what {_name(source)} dequantized", "keep one pair"
                )
        elif graph.array(node.input[0]) is None:
            source = graph.source(node.input[0])
            if source is None or source.op_type != QUANTIZE:
                yield _error(
                    "dangling", node, "it dequantizes what no QuantizeLinear gave", "quantize its input"
                )


def products(graph: OnnxGraph) -> Iterator[Finding]:
    """Both operands of every product are quantized; otherwise it runs in float."""
    for node in graph.nodes:
        if node.op_type not in PRODUCTS:
            continue
        sources = [graph.source(name) for name in node.input[:2]]
        bare = [i for i, s in enumerate(sources) if s is None or s.op_type != DEQUANTIZE]
        if bare:
            which = " and ".join(f"operand {i}" for i in bare)
            yield _warning(
                "product-in-float", node, f"{which} not quantized", "put Q and DQ on both operands"
            )


def weight_axes(graph: OnnxGraph) -> Iterator[Finding]:
    """A weight's scales run along its output axis; along the input axis the product runs in float."""
    for node in graph.nodes:
        if node.op_type not in PRODUCTS or len(node.input) < 2:
            continue
        source = graph.producer.get(node.input[1])
        transposed = graph.attribute(node, "transB", 0) == 1
        while source is not None and source.op_type == "Transpose":
            transposed, source = not transposed, graph.producer.get(source.input[0])
        if source is None or source.op_type != DEQUANTIZE or graph.attribute(source, "block_size", 0):
            continue
        values, shape = graph.array(source.input[1]), graph.shapes.get(source.input[0], [])
        if values is None or values.size < 2 or not shape:
            continue
        axis = graph.attribute(source, "axis", 1) % len(shape)
        wanted = 0 if node.op_type == "Conv" or transposed else len(shape) - 1
        if axis != wanted:
            yield _warning(
                "weight-axis",
                source,
                f"scales along axis {axis} of a {shape} weight, its outputs are axis {wanted}",
                "use one scale per output channel",
            )


def int4_weights(graph: OnnxGraph) -> Iterator[Finding]:
    """4-bit weights beside a quantized activation: blocks break the build or the result, channels cost a kernel of their own."""
    from onnx import TensorProto

    for node in graph.nodes:
        if node.op_type not in PRODUCTS:
            continue
        activation, weight = (graph.source(name) for name in node.input[:2])
        if weight is None or weight.op_type != DEQUANTIZE:
            continue
        if graph.dtypes.get(weight.input[0]) not in (TensorProto.INT4, TensorProto.UINT4):
            continue
        if activation is None or activation.op_type != DEQUANTIZE:
            continue
        if graph.attribute(weight, "block_size", 0):
            yield _error(
                "int4-blocks",
                weight,
                "4-bit blocks beside a quantized activation: the build fails, or applies the scales after the sum",
                "leave the activation float, or store the codes as int8 per channel",
            )
        else:
            yield _warning(
                "int4-beside-int8",
                weight,
                "4-bit weight beside an int8 activation: unpacked in a kernel of its own, the product may run in float",
                "store the codes as int8",
            )


def attention(graph: OnnxGraph) -> Iterator[Finding]:
    """What keeps an attention from becoming one Int8 kernel."""
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
        yield _warning(
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


def key_transpose(graph: OnnxGraph) -> Iterator[Finding]:
    """K is quantized before its transpose: quantized after it, the product that made it drops to half precision."""
    for node in graph.nodes:
        if node.op_type != "MatMul":
            continue
        dequantizer = graph.producer.get(node.input[1])
        if dequantizer is None or dequantizer.op_type != DEQUANTIZE:
            continue
        quantizer = graph.producer.get(dequantizer.input[0])
        if quantizer is None or quantizer.op_type != QUANTIZE:
            continue
        source = graph.producer.get(quantizer.input[0])
        if source is None or source.op_type != "Transpose":
            continue
        permutation = list(graph.attribute(source, "perm", []))
        if permutation and permutation[-1] != len(permutation) - 1:
            yield _warning(
                "key-transposed-first",
                quantizer,
                f"quantizes what {_name(source)} transposed",
                "put Q and DQ before the transpose",
            )


RULES: tuple[Rule, ...] = (
    zero_points,
    datatypes,
    scales,
    chains,
    products,
    weight_axes,
    int4_weights,
    attention,
    key_transpose,
)
