"""Rules about one QuantizeLinear or DequantizeLinear: zero point, type, scale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import TensorProto

from ospq_export.onnx.lint.findings import Finding, different, refusal, warning
from ospq_export.onnx.lint.network import CODES, FLOATS, Network, Pair, shown
from ospq_export.onnx.names import DYNAMIC_QUANTIZE
from ospq_export.onnx.view import QUANTIZE

_RESHAPES = {"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "SpaceToDepth", "DepthToSpace"}
_NO_LAYERS = {"Identity", "Dropout"}
ELEMENTWISE = {
    *("Relu", "LeakyRelu", "Elu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish", "Gelu", "Neg", "Abs", "Exp"),
    *("Log", "Sqrt", "Erf", "Clip", "Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "Cast"),
}


def reshaped_into_branch(network: Network) -> Iterator[Finding]:
    """No elementwise operator of a branch is the first to read what was reshaped outside, by an operator or for a product."""
    graph = network.graph
    readers: dict[tuple[tuple[str, ...], str], list[Any]] = defaultdict(list)
    for node in graph.nodes:
        scope = graph.scope(node)
        if scope and scope[-1].startswith("If:") and node.op_type not in _NO_LAYERS:
            for name in (graph.behind(name, _NO_LAYERS) for name in node.input):
                maker = graph.producer.get(name)
                if maker is not None and graph.scope(maker) != scope:
                    readers[scope, name].append(node)
    for (_, name), nodes in readers.items():
        source = graph.producer.get(graph.behind(name, ELEMENTWISE | _NO_LAYERS))
        if source is None or graph.is_constant(name):
            continue
        # Behind a convolution in 1-D, elementwise operators on both sides become one; a QuantizeLinear is one of them.
        joins = source.op_type == "Conv" and graph.producer[name] is not source
        first = ELEMENTWISE | {QUANTIZE} if joins else ELEMENTWISE
        if all(node.op_type in first for node in nodes) and _ends_in_reshape(network, source):
            yield refusal(
                "reshaped-into-branch",
                nodes[0],
                f"an elementwise operator in the branch of an If reads what {source.op_type} reshaped outside",
                "put the reshape into the branch, or the elementwise operator outside",
            )


def _ends_in_reshape(network: Network, node: Any) -> bool:
    """Whether a layer's last step is a reshape: TensorRT flattens the rows of products, and makes 1-D convolutions 2-D.

    A reshape of dequantized values goes where the DequantizeLinear goes, and does no harm.
    """
    ranks = network.ranks(node)
    if node.op_type in ("MatMul", "Einsum"):
        return max(ranks) > 3 or (ranks[0] > 2 and ranks[1] == 2)
    if node.op_type in _RESHAPES:
        return network.graph.behind(node.input[0], ELEMENTWISE | _RESHAPES | _NO_LAYERS) not in network.pairs
    return bool(node.op_type == "Conv" and ranks[0] == 3)


_INT8 = "use int8 with a zero_point of 0"


def zero_points(network: Network) -> Iterator[Finding]:
    """TensorRT takes constant zero points of 0, as many as there are scales; of FP8 it does not look at them."""
    for pair in network.pairs.values():
        standard = pair.node.op_type == QUANTIZE
        if pair.zero and pair.format != TensorProto.FLOAT8E4M3FN:
            yield from _zero_point(network, pair)
        elif not pair.zero and standard and not network.graph.attribute(pair.node, "output_dtype", 0):
            yield warning(
                "zero-point-missing",
                pair.node,
                "no zero_point: ONNX and ONNX Runtime take uint8 here, TensorRT int8",
                "write out an int8 zero_point of 0",
            )


def _zero_point(network: Network, pair: Pair) -> Iterator[Finding]:
    values = network.zero_values(pair.zero)
    if values is None:
        yield refusal(
            "zero-point-computed", pair.node, "the zero_point is computed", "make it an initializer of 0"
        )
        return
    if values.astype(np.float64).any():
        first = values.ravel()[values.astype(bool).argmax()]
        yield refusal(
            "zero-point-nonzero",
            pair.node,
            f"zero_point {first}",
            "use a symmetric grid, or subtract the offset first",
        )
    shape = network.shape(pair.scale)
    if shape is not None and 0 not in shape and values.size != int(np.prod(shape)):
        yield refusal(
            "zero-point-shape",
            pair.node,
            f"{values.size} zero_points beside {int(np.prod(shape))} scales",
            "give the zero_point the scale's shape",
        )


def datatypes(network: Network) -> Iterator[Finding]:
    """int8, int4, FP8 (E4M3FN) and FP4 are taken; what else a zero_point says is silently read as int8."""
    for pair in network.pairs.values():
        zero = network.types.get(pair.zero, 0) if pair.zero else 0
        written = network.graph.attribute(pair.node, "output_dtype", 0)
        if zero and zero not in CODES:
            yield different(
                "datatype", pair.node, f"{shown(zero)} codes: TensorRT silently reads them as int8", _INT8
            )
        if written and pair.quantizes:
            if (written not in CODES and not zero) or (written not in (*CODES, TensorProto.UINT8)):
                yield refusal("datatype", pair.node, f"{shown(written)} codes", _INT8)
            elif zero and zero != written:
                what = f"output_dtype {shown(written)} beside a {shown(zero)} zero_point"
                yield refusal("datatype", pair.node, what, "make them one type")
        if not pair.quantizes:
            yield from _read_codes(network, pair)


def _read_codes(network: Network, pair: Pair) -> Iterator[Finding]:
    given = network.types.get(pair.data, 0)
    if given and given not in CODES:
        yield refusal("datatype", pair.node, f"dequantizes {shown(given)}", _INT8)
    elif given and given != pair.format:
        what = f"dequantizes {shown(given)} codes as {shown(pair.format)}"
        yield refusal("datatype", pair.node, what, "give the zero_point the codes' type")


def scales(network: Network) -> Iterator[Finding]:
    """Scales are positive and of a shape that fits: one, one per index of the axis, or one per block along it."""
    for pair in network.pairs.values():
        yield from _scale_values(network, pair)
        yield from _scale_shape(network, pair)
        yield from _packing(network, pair)


def _scale_values(network: Network, pair: Pair) -> Iterator[Finding]:
    values = network.graph.array(pair.scale)
    if values is None:
        if not network.graph.is_constant(pair.scale) and network.block_scales(pair) is None:
            yield warning(
                "scale-computed",
                pair.node,
                "the scale is computed: the product runs in float",
                "make it a constant",
            )
        return
    numbers = values.astype(np.float64)
    if not (numbers > 0).all():
        # The parser does not look at the scale of scales that the engine computes.
        report = different if network.graph.operator(pair.data) == DYNAMIC_QUANTIZE else refusal
        what = "a scale is zero, negative or not a number"
        yield report("scale-not-positive", pair.node, what, "calibrate again")
    elif not np.isfinite(numbers).all():
        yield warning("scale-not-finite", pair.node, "a scale is infinite", "calibrate again")
    if network.types.get(pair.scale) not in (*FLOATS, *CODES):
        yield refusal("scale-type", pair.node, "the scale is not floating point", "make it float32")


def _scale_shape(network: Network, pair: Pair) -> Iterator[Finding]:
    shape, data = network.shape(pair.scale), network.shape(pair.data)
    if shape is None or data is None or 0 in shape:
        return
    if problem := _scale_problem(shape, data, network.axis(pair)):
        fix = "one scale per tensor, per index of the axis, or per block"
        yield refusal("scale-shape", pair.node, problem, fix)


def _scale_problem(shape: list[int], data: list[int], axis: int) -> str:
    """What the parser has against a scale's shape for data of a shape, 0 where unknown; empty where nothing."""
    if int(np.prod(shape)) == 1:
        return f"one scale written with rank {len(shape)}" if len(shape) > 1 else ""
    if not -len(data) <= axis < len(data):
        return f"axis {axis} of a tensor of rank {len(data)}"
    axis %= len(data)
    if len(shape) == 1:
        fits = data[axis] in (0, shape[0])
        return "" if fits else f"{shape[0]} scales along axis {axis} of length {data[axis]}"
    if len(shape) != len(data):
        return f"scales of rank {len(shape)} for a tensor of rank {len(data)}"
    if any(d and s != d for i, (s, d) in enumerate(zip(shape, data, strict=True)) if i != axis):
        return f"scales {shape} for {data}: only axis {axis} may have blocks"
    if data[axis] % shape[axis]:
        return f"{shape[axis]} blocks do not divide axis {axis} of length {data[axis]}"
    return "a scale for every element" if data[axis] == shape[axis] and 0 not in data else ""


def _packing(network: Network, pair: Pair) -> Iterator[Finding]:
    shape = network.shape(pair.data)
    four = pair.format in (TensorProto.INT4, TensorProto.FLOAT4E2M1)
    if four and shape is not None and 0 not in shape and int(np.prod(shape)) % 2:
        yield refusal("odd-elements", pair.node, "an odd number of 4-bit codes", "pad them to an even number")
