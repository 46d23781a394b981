"""From an operand of a product back to its DequantizeLinear, past what TensorRT moves it across."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import TensorProto

from ospq_export.onnx.lint.network import CODES, FLOATS, Network, Pair

# What only moves values or picks some of them.
MOVES = {
    *("Identity", "Dropout", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split"),
    *("Gather", "GatherND", "GatherElements", "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "TopK"),
}
# What vanishes where it leaves the shape as it is.
_SHAPES_ONLY = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Slice", "Tile"}
# What is the same on codes as on the values that they stand for.
SAME_ON_CODES = {"MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "Neg", "Abs"}
_CHOICES = {"Where": slice(1, 3), "Max": slice(None), "Min": slice(None)}


@dataclass(frozen=True)
class Operand:
    """One operand of a product that is quantized.

    Attributes:
        pair: the DequantizeLinear that its codes come from.
        format: "int8", "int4", "fp8" or "fp4".
        axes: of the operand, along which its scale varies.
        blocked: whether the scale varies in blocks.
        constant: whether the codes are known when the engine is built.
        joined: whether constant codes are concatenated to it, which the builder cannot do.
        outside: whether it is dequantized outside of the If whose branch multiplies it, and no layer in the branch changes it.
        computed: whether its scale is.
        block: how many codes share a scale that is an FP8 number with a scale of its own; 0 where none is.
        scaled: whether it is multiplied by a constant of several elements after it is dequantized.
    """

    pair: Pair
    format: str
    axes: frozenset[int] = frozenset()
    blocked: bool = False
    constant: bool = False
    joined: bool = False
    outside: bool = False
    block: int = 0
    scaled: bool = False
    computed: bool = False


@dataclass(frozen=True)
class InFloat:
    """Why an operand is not quantized; `culprit` is the node that is in the way, None where there is no Q/DQ at all."""

    reason: str
    culprit: Any = None


_UNKNOWN = InFloat("is not quantized")


class Tracer:
    """Walks from an operand back to its DequantizeLinear.

    A tensor is looked at once, and after those that it is computed from: a network in float has more paths than can be walked,
    and longer ones than Python can recurse along.

    Args:
        network: what the products lie in.
        scope: their scope.
        spatial: how many axes a convolution moves along; 0 for another product.
    """

    def __init__(self, network: Network, scope: tuple[str, ...], spatial: int) -> None:
        self.network, self.scope, self.spatial = network, scope, spatial
        self.known: dict[str, Operand | InFloat] = {}

    def trace(self, name: str) -> Operand | InFloat:
        """What is known of the tensor `name` as an operand."""
        waiting = [] if name in self.known else [name]
        while waiting:
            last = waiting[-1]
            missing = [] if last in self.known else [n for n in self._sources(last) if n not in self.known]
            if missing:
                # Replaced when they are known.
                self.known[last] = _UNKNOWN
                waiting.extend(missing)
            else:
                self.known[last] = self._traced(waiting.pop())
        return self.known[name]

    def _sources(self, name: str) -> list[str]:
        """What a tensor is computed from, unless it is where the walk ends."""
        pair, node = self.network.pairs.get(name), self.network.graph.producer.get(name)
        return [] if node is None or (pair is not None and not pair.quantizes) else list(node.input)

    def _traced(self, name: str) -> Operand | InFloat:
        found = self._found(name)
        if isinstance(found, Operand) and found.outside:
            node = self.network.graph.producer[name]
            changed = self.network.graph.scope(node) == self.scope and is_layer(self.network, node)
            return replace(found, outside=not changed)
        return found

    def _found(self, name: str) -> Operand | InFloat:
        node = self.network.graph.producer.get(name)
        pair = self.network.pairs.get(name)
        if pair is not None and not pair.quantizes:
            return self._dequantized(pair)
        if node is None or not node.input:
            return _UNKNOWN
        if node.op_type in MOVES or self._keeps_codes(node) or self._pads(node):
            return self._moved(node)
        if node.op_type in SAME_ON_CODES:
            return self._same_on_codes(node)
        if node.op_type == "Concat":
            return self._concatenated(node)
        if node.op_type in ("Mul", "Div"):
            return self._scaled(node)
        if node.op_type in _CHOICES:
            return self._chosen(node)
        return self._stopped(node)

    def _dequantized(self, pair: Pair) -> Operand | InFloat:
        graph = self.network.graph
        crossed = self.scope[len(graph.scope(pair.node)) :]
        scale, data = self.network.shape(pair.scale) or [], self.network.shape(pair.data) or []
        axes = frozenset(i for i, size in enumerate(scale) if size != 1)
        if len(scale) == 1 and axes:
            axes = frozenset({self.network.axis(pair) % len(data)} if data else ())
        block = 0
        if data and len(scale) == len(data) and self.network.block_scales(pair) is not None:
            axis = self.network.axis(pair) % len(data)
            axes = frozenset({axis})
            block = graph.attribute(pair.node, "block_size", 0) or data[axis] // max(scale[axis], 1)
        return Operand(
            pair,
            CODES.get(pair.format, "int8"),
            axes,
            blocked=len(scale) > 1,
            constant=graph.is_constant(pair.data),
            outside=any(level.startswith("If:") for level in crossed),
            block=block,
            computed=not block and not graph.is_constant(pair.scale),
        )

    def _stopped(self, node: Any) -> InFloat:
        if any(isinstance(self.trace(name), Operand) for name in node.input if name):
            return InFloat(f"is quantized, but {node.op_type} lies between", node)
        return _UNKNOWN

    def _keeps_codes(self, node: Any) -> bool:
        """Whether a Cast changes nothing, or rounds float32 to 16 bits: TensorRT gives that type to the product instead."""
        before, after = (self.network.types.get(name) for name in (node.input[0], node.output[0]))
        narrows = before == TensorProto.FLOAT and after in FLOATS
        return node.op_type == "Cast" and (narrows or before == after)

    def _pads(self, node: Any) -> bool:
        """Whether a Pad adds nothing, or only copies of what is there."""
        if node.op_type != "Pad":
            return False
        mode = self.network.graph.attribute(node, "mode", b"constant")
        pads = self.network.graph.array(node.input[1]) if len(node.input) > 1 else None
        if mode != b"constant" or (pads is not None and not pads.any()):
            return True
        return self._convolution_takes(node, pads)

    def _convolution_takes(self, node: Any, pads: Any) -> bool:
        """Whether a Pad of zeros becomes the padding of the convolution behind it."""
        value = node.input[2] if len(node.input) > 2 and node.input[2] else None
        filled = self.network.graph.array(value) if value else np.zeros(())
        if self.spatial < 2 or pads is None or filled is None or filled.any() or len(node.input) > 3:
            return False
        half = len(pads) // 2
        return not (pads[:2].any() or pads[half : half + 2].any() or (pads < 0).any())

    def _moved(self, node: Any) -> Operand | InFloat:
        found = self.trace(node.input[0])
        if isinstance(found, InFloat) or not found.axes:
            return found
        axes = self._axes_after(node, found.axes)
        if axes is None:
            return InFloat(f"has scales that {node.op_type} does not keep apart", found.pair.node)
        # A scaling along rows that a transposition made one along columns joins the scale; one along columns does not.
        turned = node.op_type == "Transpose" and len(self.network.shape(node.input[0]) or ()) == 2
        return replace(found, axes=axes, scaled=found.scaled and not turned)

    def _axes_after(self, node: Any, axes: frozenset[int]) -> frozenset[int] | None:
        before, after = self.network.shape(node.input[0]), self.network.shape(node.output[0])
        if before is None or after is None:
            return None
        if node.op_type == "Transpose":
            order = list(self.network.graph.attribute(node, "perm", range(len(before))[::-1]))
            return frozenset(order.index(axis) for axis in axes)
        if node.op_type in ("Reshape", "Squeeze", "Unsqueeze", "Flatten"):
            return _regrouped(before, after, axes)
        if node.op_type == "Expand":
            return frozenset(axis + len(after) - len(before) for axis in axes)
        return axes if len(before) == len(after) else None

    def _same_on_codes(self, node: Any) -> Operand | InFloat:
        found = self.trace(node.input[0])
        if isinstance(found, Operand) and ((found.format != "int8" and "Pool" in node.op_type) or found.axes):
            return InFloat(f"is {found.format}, and {node.op_type} lies between", node)
        return found

    def _concatenated(self, node: Any) -> Operand | InFloat:
        found = [self.trace(name) for name in node.input]
        bare = [part for part in found if isinstance(part, InFloat)]
        parts = [part for part in found if isinstance(part, Operand)]
        if bare:
            return InFloat("is quantized in part only", node) if parts else bare[0]
        if len({part.format for part in parts}) > 1:
            return InFloat("joins codes of several formats", node)
        rank = len(self.network.shape(node.output[0]) or [0])
        axis = self.network.graph.attribute(node, "axis", 0) % rank
        axes = frozenset[int]().union(*(part.axes for part in parts))
        if len({self._scale_key(part) for part in parts}) > 1:
            axes |= {axis}
        joined = any(part.constant or part.joined for part in parts)
        return replace(parts[0], axes=axes, blocked=any(p.blocked for p in parts), joined=joined)

    def _scale_key(self, operand: Operand) -> Any:
        values = self.network.graph.array(operand.pair.scale)
        return operand.pair.scale if values is None else values.astype(np.float64).tobytes()

    def _scaled(self, node: Any) -> Operand | InFloat:
        """Past a product with a constant, which joins the scale."""
        for index in (0, 1) if node.op_type == "Mul" else (0,):
            factor = node.input[1 - index]
            found = self.trace(node.input[index])
            if isinstance(found, InFloat) or not self.network.graph.is_constant(factor):
                continue
            if isinstance(self.trace(factor), Operand):
                continue
            if found.computed:
                return InFloat("is multiplied by a constant behind a computed scale", node)
            shape, rank = self.network.shape(factor), len(self.network.shape(node.output[0]) or [])
            if shape is None or len(self.network.shape(node.input[index]) or []) != rank:
                continue
            axes = frozenset(rank - len(shape) + i for i, size in enumerate(shape) if size != 1)
            return replace(found, axes=found.axes | axes, scaled=found.scaled or bool(axes))
        return self._stopped(node)

    def _chosen(self, node: Any) -> Operand | InFloat:
        """Past a choice among parts of one tensor."""
        found = [self.trace(name) for name in node.input[_CHOICES[node.op_type]]]
        parts = [part for part in found if isinstance(part, Operand)]
        if len(parts) == len(found) and len({part.pair.node.output[0] for part in parts}) == 1:
            return parts[0]
        return self._stopped(node)


def is_layer(network: Network, node: Any) -> bool:
    """Whether TensorRT keeps a layer of an operator in front of a product: not of a scaling, nor of a reshape to the same."""
    if node.op_type in ("Identity", "Dropout", "Cast", "Mul", "Div"):
        return False
    return node.op_type not in _SHAPES_ONLY or network.shape(node.input[0]) != network.shape(node.output[0])


def _regrouped(before: list[int], after: list[int], axes: frozenset[int]) -> frozenset[int] | None:
    """Where axes are after a reshape: an axis stays one if as many elements precede it; None where one does not."""
    result = set()
    for axis in axes:
        ahead = int(np.prod(before[:axis]))
        matches = [
            i for i, size in enumerate(after) if size == before[axis] and int(np.prod(after[:i])) == ahead
        ]
        if not matches or not before[axis]:
            return None
        result.add(matches[-1])
    return frozenset(result)
