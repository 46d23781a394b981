"""Products of uint8 and int8 codes that can saturate where a processor adds pairs of them in 16 bits (VPMADDUBSW).

The kernel takes the codes of a column of weights in pairs, the first with the second, the third with the fourth. A pair's sum
a0 * w0 + a1 * w1 leaves [-32768, 32767] for some activations exactly when its extremes do: with activations' codes in
[low, high], the largest is high * (w0+ + w1+) + low * (w0- + w1-). With codes in 0..255, weights within [-64, 63] never do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ospq_export.onnx.view import MOVES

LOWEST, HIGHEST = -(1 << 15), (1 << 15) - 1
# Where a kernel's operands are: activations, their zero point, weights.
_OPERANDS = {
    "QLinearMatMul": (0, 2, 3),
    "QGemm": (0, 2, 3),
    "QLinearConv": (0, 2, 3),
    "MatMulIntegerToFloat": (0, 4, 1),
    "MatMulInteger": (0, 2, 1),
}


def saturable_pairs(weights: NDArray[np.int8], low: int = 0, high: int = 255) -> int:
    """How many pairs of codes have a sum of products that 16 bits cannot hold, for some activations.

    Args:
        weights: int8 (K, N): a column is what one output sums over, in the order in which the kernel takes it.
        low: least code of an activation, 0 or more.
        high: largest code of an activation, at most 255.
    """
    codes = np.pad(weights.astype(np.int64), ((0, len(weights) % 2), (0, 0)))
    positive = np.maximum(codes, 0)
    sums = [part[0::2] + part[1::2] for part in (positive, codes - positive)]
    largest, least = high * sums[0] + low * sums[1], low * sums[0] + high * sums[1]
    return int(((largest > HIGHEST) | (least < LOWEST)).sum())


def saturable(model: Any, folder: Path) -> dict[str, int]:
    """Integer products of a graph that can saturate, with how many pairs of codes do it.

    Args:
        model: an `onnx.ModelProto`, as ONNX Runtime optimised it.
        folder: where its external data lies.

    Returns:
        By node name. Left out are products of two activations, of int8 or uint8 by uint8, and depthwise convolutions: their
        kernels add in 32 bits.
    """
    from onnx import TensorProto, numpy_helper

    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for node in model.graph.node:
        if node.op_type not in _OPERANDS:
            continue
        activation, zero, weight = (
            node.input[i] if i < len(node.input) else "" for i in _OPERANDS[node.op_type]
        )
        codes, offset = tensors.get(weight), tensors.get(zero)
        unsigned = offset is None or offset.data_type == TensorProto.UINT8
        if codes is None or codes.data_type != TensorProto.INT8 or not unsigned:
            continue
        limits = _limits(activation, producers, tensors)
        columns = _columns(node, np.asarray(numpy_helper.to_array(codes, str(folder))))
        pairs = max((saturable_pairs(c, *limits) for c in columns), default=0)
        if pairs:
            found[node.name] = pairs
    return found


def _columns(node: Any, weights: NDArray[np.int8]) -> list[NDArray[np.int8]]:
    """The weights as (K, N), in each order in which a kernel may sum them."""
    if node.op_type == "QLinearConv":
        if weights.shape[1] == 1:
            return []
        # Channels last, as its kernel for that layout takes them, or as the file has them.
        orders = (np.moveaxis(weights, 1, -1), weights)
        return [order.reshape(len(order), -1).T for order in orders]
    if node.op_type == "QGemm" and any(a.name == "transB" and a.i for a in node.attribute):
        return [weights.T]
    # A stack of matrices has its columns side by side.
    return [np.moveaxis(weights, -2, 0).reshape(weights.shape[-2], -1)] if weights.ndim > 1 else []


def _limits(name: str, producers: dict[str, Any], tensors: dict[str, Any]) -> tuple[int, int]:
    """Codes that an activation may have: what a Clip in front of its quantizer leaves, and what padding adds."""
    source = _source(name, producers)
    if source is None or source.op_type != "QuantizeLinear":
        return 0, 255
    clip = _source(source.input[0], producers)
    scale, zero = (_scalar(tensors.get(name)) for name in source.input[1:3])
    if clip is None or clip.op_type != "Clip" or scale is None or zero is None:
        return 0, 255
    low, high = (_scalar(tensors.get(name)) for name in [*clip.input[1:3], "", ""][:2])
    codes = [None if bound is None else round(bound / scale + zero) for bound in (low, high)]
    # Padding has the code of zero.
    least = 0 if codes[0] is None else min(max(codes[0], 0), int(zero))
    return least, 255 if codes[1] is None else max(min(codes[1], 255), int(zero))


def _source(name: str, producers: dict[str, Any]) -> Any:
    node = producers.get(name)
    while node is not None and node.op_type in MOVES and node.op_type != "Cast":
        node = producers.get(node.input[0])
    return node


def _scalar(tensor: Any) -> float | None:
    from onnx import numpy_helper

    if tensor is None or int(np.prod(tensor.dims)) != 1:
        return None
    return float(numpy_helper.to_array(tensor).reshape(()))
