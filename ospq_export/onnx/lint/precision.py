"""In which precision TensorRT multiplies: from every product back to the DequantizeLinear of each operand.

A product runs on integers (or FP8) where both operands come from a DequantizeLinear, past operators that TensorRT moves it
across, and where no scale varies along what the product sums over. Seen in plans for SM89, not documented.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import TensorProto

from ospq_export.onnx.lint.network import PRODUCTS, Network
from ospq_export.onnx.lint.trace import InFloat, Operand, Tracer, is_layer
from ospq_export.onnx.own import BLOCK_SIZE

QUANTIZED = ("int8", "fp8", "fp4")
# Elements of a kernel, without its channels, up to which a convolution was seen to run on FP8; those on int8 have no limit.
FP8_KERNEL = 32
_Operands = tuple[Operand, ...]
_Axes = tuple[frozenset[int], frozenset[int]]


@dataclass(frozen=True)
class ProductKind:
    """What becomes of one product.

    Attributes:
        node: the product.
        kind: "int8", "fp8", "fp4" or "float".
        operands: what was found of its two operands.
        refused: why the builder refuses the product; empty where it does not.
        rule: the rule's name for that.
        reason: why it runs in float.
        fix: what to do about that; empty where the general advice holds.
        culprit: the node that is to blame, if there is one.
        miscomputed: whether scales in blocks are applied after the sum, or to other codes than theirs.
    """

    node: Any
    kind: str
    operands: tuple[Operand | InFloat, ...]
    refused: str = ""
    rule: str = "formats-mixed"
    reason: str = ""
    fix: str = ""
    culprit: Any = None
    miscomputed: bool = False


def product_kinds(network: Network) -> list[ProductKind]:
    """What becomes of every product (MatMul, Gemm, Conv, ConvTranspose, Einsum), in the file's order."""

    @functools.cache
    def tracer(scope: tuple[str, ...], spatial: int) -> Tracer:
        return Tracer(network, scope, spatial)

    return [_kind(network, node, tracer) for node in network.graph.nodes if node.op_type in PRODUCTS]


def _kind(network: Network, node: Any, tracer_of: Callable[[tuple[str, ...], int], Tracer]) -> ProductKind:
    spatial = len(network.shape(node.input[0]) or ()) - 2 if node.op_type.startswith("Conv") else 0
    tracer = tracer_of(network.graph.scope(node), spatial)
    operands = tuple(tracer.trace(name) for name in node.input[:2])
    in_float = {i: o for i, o in enumerate(operands) if isinstance(o, InFloat)}
    if node.op_type == "ConvTranspose" and not in_float:
        return ProductKind(node, "float", operands, reason="ConvTranspose runs in float")
    if in_float or len(operands) != 2:
        reason = "; ".join(f"operand {i} {o.reason}" for i, o in in_float.items())
        culprit = next((o.culprit for o in in_float.values() if o.culprit is not None), None)
        reason = reason or "it has not two operands"
        return ProductKind(node, "float", operands, reason=reason, culprit=culprit)
    return _both_quantized(network, node, tuple(o for o in operands if isinstance(o, Operand)))


def _both_quantized(network: Network, node: Any, operands: _Operands) -> ProductKind:
    allowed = _free_axes(network, node, operands)
    reason, culprit = _kept_in_float(network, node, operands, allowed)
    if reason:
        return ProductKind(node, "float", operands, reason=reason, culprit=culprit)
    wrong = any(o.blocked and not o.block and o.axes - allowed[i] for i, o in enumerate(operands))
    rule, refused = _unbuildable(network, node, operands, wrong)
    if refused:
        return ProductKind(node, "float", operands, refused=refused, rule=rule)
    formats = {o.format for o in operands}
    if len(formats) > 1:
        return _mixed(node, operands)
    format_ = formats.pop()
    if format_ not in QUANTIZED:
        return ProductKind(node, "float", operands, reason=f"there is no product of {format_} by {format_}")
    if kernel := _large_kernel(network, node, format_):
        what = f"a kernel of {kernel} elements: a convolution takes up to {FP8_KERNEL} on fp8"
        return ProductKind(node, "float", operands, reason=what, fix="leave both operands float, or use int8")
    misread = any(o.block not in (0, BLOCK_SIZE) for o in operands)
    return ProductKind(node, format_, operands, miscomputed=wrong or misread)


def _large_kernel(network: Network, node: Any, format_: str) -> int:
    """How many elements the kernel of a convolution on FP8 has, where these are too many; else 0."""
    if node.op_type != "Conv" or format_ != "fp8":
        return 0
    size = int(np.prod((network.shape(node.input[1]) or ())[2:]))
    return size if size > FP8_KERNEL else 0


def _kept_in_float(network: Network, node: Any, operands: _Operands, allowed: _Axes) -> tuple[str, Any]:
    """Why two quantized operands are multiplied in float, and the node to blame; an empty reason where they are not."""
    computed = [index for index, operand in enumerate(operands) if not operand.constant]
    entering = computed and all(_enters_unchanged(network, node, operands, index) for index in computed)
    if entering and not _reads_more(network, node):
        return "dequantized outside of the If that multiplies it, with no operator between", None
    if node.op_type == "Conv" and network.shape(operands[0].pair.scale) == [1]:
        what = (
            "operand 0: its one scale is written with shape [1], which a convolution takes for one of several"
        )
        return what, operands[0].pair.node
    if any(o.format == "fp4" and o.blocked for o in operands):
        return _not_in_blocks(network, node, operands), None
    for index, operand in enumerate(operands):
        stray = operand.axes - allowed[index]
        if stray and not operand.blocked:
            what = (
                f"operand {index}: scales along its axis {min(stray)}, which is not one of the output's own"
            )
            return what, operand.pair.node
        if operand.computed and node.op_type != "Conv":
            return f"operand {index} has a computed scale", operand.pair.node
    return "", None


def _not_in_blocks(network: Network, node: Any, operands: _Operands) -> str:
    """Why FP4 codes in blocks are multiplied in float; empty where both operands are such and sum over their blocks."""
    summed = _summed_axes(network, node, operands)
    for index, operand in enumerate(operands):
        if operand.format != "fp4" or not operand.blocked:
            return f"operand {index} is not fp4 in blocks, as the other one is"
        if not operand.block:
            return f"operand {index} has block scales that are not FP8 numbers with one scale of their own"
        if not operand.axes <= summed[index]:
            return f"operand {index} has blocks along an axis that the product does not sum over"
    return ""


def _summed_axes(network: Network, node: Any, operands: _Operands) -> _Axes:
    ranks = network.ranks(node)
    if node.op_type == "MatMul":
        return frozenset({ranks[0] - 1}), frozenset({max(ranks[1] - 2, 0)})
    free = _free_axes(network, node, operands)
    return frozenset(range(ranks[0])) - free[0], frozenset(range(ranks[1])) - free[1]


def _enters_unchanged(network: Network, node: Any, operands: _Operands, index: int) -> bool:
    """Whether an operand comes into the branch of an If dequantized, and no layer lies before the product there.

    TensorRT moves a DequantizeLinear into the branch together with such a layer; some products bring one, a reshape.
    """
    graph = network.graph
    if not operands[index].outside:
        return False
    mine, other = (network.shape(node.input[i]) or [] for i in (index, 1 - index))
    if node.op_type == "Conv":
        return len(mine) != 3
    if node.op_type == "Gemm":
        return not any(graph.attribute(node, name, 0) for name in ("transA", "transB"))
    flattened = index == 0 and len(mine) > 2 and int(np.prod(other[:-2])) == 1
    return len(other) <= len(mine) < 4 and not flattened


def _reads_more(network: Network, node: Any) -> bool:
    """Whether the branch of an If that a product lies in reads more from outside than its operands, or quantizes for others.

    TensorRT moves a DequantizeLinear into such a branch without any layer, too.
    """
    graph, scope = network.graph, network.graph.scope(node)
    operands = {_entry(network, name, scope) for name in node.input[:2]}
    inside = [other for other in graph.nodes if graph.scope(other) == scope]
    pairs = [pair for pair in network.pairs.values() if graph.scope(pair.node) == scope]
    own = graph.ancestors(node.input)
    if any(pair.quantizes and pair.node.output[0] not in own for pair in pairs):
        return True
    scales = {pair.scale for pair in pairs}
    for name in {name for other in inside for name in other.input} - operands:
        maker = graph.producer.get(name)
        if name in graph.constants:
            if name in scales and any(graph.scope(reader) != scope for reader in graph.readers[name]):
                return True
        elif maker is not None and graph.scope(maker) != scope:
            return True
    return False


def _entry(network: Network, name: str, scope: tuple[str, ...]) -> str:
    """The tensor from outside of a branch that becomes `name` in it, past operators that are no layers."""
    maker = network.graph.producer.get(name)
    while maker is not None and network.graph.scope(maker) == scope and not is_layer(network, maker):
        name = maker.input[0]
        maker = network.graph.producer.get(name)
    return name


def _unbuildable(network: Network, node: Any, operands: _Operands, wrong: bool) -> tuple[str, str]:
    """The rule and the reason by which the builder refuses two quantized operands; an empty reason where it does not."""
    if any(o.computed for o in operands):
        return "scale-computed", "a computed scale: it ends the builder's process"
    if any(o.joined for o in operands):
        return "codes-joined", "Concat joins dequantized constants to an operand"
    half = network.types.get(node.input[0]) in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    if node.op_type == "Conv" and half and network.shape(operands[1].pair.scale) == [1]:
        what = "a convolution in 16 bits whose weight's one scale is written with shape [1], not []"
        return "scale-shape", what
    if all(o.format == "fp4" and not o.blocked for o in operands):
        return "blocks", "fp4 codes that are not in blocks: they end the builder's process"
    if wrong and len(set(network.ranks(node))) > 1:
        return "blocks", "scales in blocks beside an operand of another rank"
    return "", ""


def _mixed(node: Any, operands: _Operands) -> ProductKind:
    """int4 beside int8 is unpacked to int8 first, but not a constant of one scale; no other two formats are multiplied."""
    formats = {o.format for o in operands}
    if formats == {"int8", "int4"} and node.op_type != "Conv":
        four = next(o for o in operands if o.format == "int4")
        if not four.constant or four.axes:
            return ProductKind(node, "int8", operands, miscomputed=four.blocked)
    shown = " by ".join(o.format for o in operands)
    return ProductKind(node, "float", operands, refused=f"it multiplies {shown}")


def _free_axes(network: Network, node: Any, operands: _Operands) -> _Axes:
    """Axes of both operands that the product does not sum over and that it does not share: scales may vary along them."""
    attribute = network.graph.attribute
    ranks = network.ranks(node)
    if node.op_type == "MatMul":
        # Rows of a batch are scaled apart only where no operand is broadcast, and never by a constant behind the DQ.
        rows = ranks[0] == 2 or (ranks[0] > 2 and ranks[0] == ranks[1] and not operands[0].scaled)
        columns = ranks[1] > 1 and (not operands[1].scaled or (ranks[1] == 2 and operands[1].constant))
        return frozenset({ranks[0] - 2} if rows else ()), frozenset({ranks[1] - 1} if columns else ())
    if node.op_type == "Gemm":
        turned = attribute(node, "transA", 0), attribute(node, "transB", 0)
        return frozenset({1 if turned[0] else 0}), frozenset({0 if turned[1] else 1})
    if node.op_type == "Conv":
        return frozenset(), frozenset({0})
    equation = attribute(node, "equation", b"").decode().replace(" ", "")
    sides, _, output = equation.partition("->")
    first, second = [*sides.split(","), ""][:2]
    return _letters(first, second, output), _letters(second, first, output)


def _letters(own: str, other: str, output: str) -> frozenset[int]:
    return frozenset(i for i, letter in enumerate(own) if letter in output and letter not in other)
