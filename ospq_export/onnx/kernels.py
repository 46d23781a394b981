"""Which products of an exported file ONNX Runtime computes in integers, and which of these can saturate.

The former is read from the graph that it really runs; the latter from the codes: where a processor adds pairs of products in
16 bits (VPMADDUBSW), uint8 by int8 can.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from ospq_export.errors import InputError, reason_of
from ospq_export.onnx.view import MOVES, PRODUCTS, QUANTIZE, OnnxGraph
from ospq_export.world.processor import PRECISE_KERNELS, Processor

_SAME_TYPE = frozenset(MOVES) - {"Cast"}
LOWEST, HIGHEST = -(1 << 15), (1 << 15) - 1
# Where a kernel's operands are: activations, their zero point, weights.
_OPERANDS = {
    "QLinearMatMul": (0, 2, 3),
    "QGemm": (0, 2, 3),
    "QLinearConv": (0, 2, 3),
    "MatMulIntegerToFloat": (0, 4, 1),
    "MatMulInteger": (0, 2, 1),
}
# Kernels on integers that stand for a product, with float or integer results.
INTEGER_KERNELS = frozenset(
    {
        *("QLinearMatMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "MatMulInteger", "QGemm"),
        *("QLinearConv", "ConvInteger", "QAttention", "MatMulNBits"),
    }
)
_ERRORS_ONLY = 3
# Nothing is computed: the weights need not be rearranged for it, nor be part of what is read back.
_FRUGAL = {
    "session.disable_prepacking": "1",
    "session.optimized_model_external_initializers_file_name": "weights.bin",
    "session.optimized_model_external_initializers_min_size_in_bytes": "4096",
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


def _saturable(graph: OnnxGraph) -> dict[str, int]:
    """Integer products of a graph that can saturate, by node name, with how many pairs of codes do it.

    Left out are products of two activations, of int8 or uint8 by uint8, and depthwise convolutions: their kernels add in 32 bits.
    """
    from onnx import TensorProto

    found = {}
    for node in graph.nodes:
        if node.op_type not in _OPERANDS or graph.scope(node):
            continue
        activation, zero, weight = (
            node.input[i] if i < len(node.input) else "" for i in _OPERANDS[node.op_type]
        )
        codes, offset = graph.constants.get(weight), graph.constants.get(zero)
        unsigned = offset is None or offset.data_type == TensorProto.UINT8
        if codes is None or codes.data_type != TensorProto.INT8 or not unsigned:
            continue
        limits = _limits(graph, activation)
        pairs = max((saturable_pairs(c, *limits) for c in _columns(node, graph.array(weight))), default=0)
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


def _limits(graph: OnnxGraph, name: str) -> tuple[int, int]:
    """Codes that an activation may have: what a Clip in front of its quantizer leaves, and what padding adds."""
    codes = graph.behind(name, _SAME_TYPE)
    if graph.operator(codes) != QUANTIZE:
        return 0, 255
    quantized, *parameters = [*graph.producer[codes].input, ""][:3]
    clipped = graph.behind(quantized, _SAME_TYPE)
    scale, zero = (_scalar(graph, name) for name in parameters)
    if graph.operator(clipped) != "Clip" or scale is None or zero is None:
        return 0, 255
    low, high = (_scalar(graph, name) for name in [*graph.producer[clipped].input, "", ""][1:3])
    # Padding has the code of zero.
    least = 0 if low is None else min(max(round(low / scale + zero), 0), int(zero))
    return least, 255 if high is None else max(min(round(high / scale + zero), 255), int(zero))


def _scalar(graph: OnnxGraph, name: str) -> float | None:
    array = graph.array(name)
    return None if array is None or array.size != 1 else float(array.reshape(()))


class Kernels(BaseModel):
    """What became of a file's products (MatMul, Gemm, Conv) in ONNX Runtime on the CPU, all graph optimisations on.

    Attributes:
        version: of ONNX Runtime.
        products: how many there are.
        integer_products: how many run on integers.
        operators: every operator of the optimised graph with its count.
        in_float: the other products by node name, with the reason.
        saturable: products of uint8 by int8 that can saturate on a processor which adds pairs in 16 bits, by node name, with the
            number of pairs of codes that do it.
    """

    model_config = ConfigDict(frozen=True)

    version: str
    products: int
    integer_products: int
    operators: dict[str, int]
    in_float: dict[str, str]
    saturable: dict[str, int] = {}

    def warning(self, file: str, processor: Processor) -> str:
        """What is to be said of a file whose products can saturate on a processor; empty where none can."""
        if not processor.saturates or not self.saturable:
            return ""
        return (
            f"{file}: {len(self.saturable)} of {self.products} products can saturate on this processor ({processor}): "
            f"ONNX Runtime adds pairs of their uint8 x int8 products in 16 bits; set its session option "
            f"{PRECISE_KERNELS}=1, use a processor with VNNI, or calibrate with weight_bits=7 or fewer"
        )


def integer_kernels(path: Path) -> Kernels:
    """Let ONNX Runtime optimise a file, and read what it made of the products.

    Args:
        path: an ONNX file whose node names are unique.

    Raises:
        InputError: ONNX Runtime cannot load the file.
    """
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(optimised)
        options.log_severity_level = _ERRORS_ONLY
        for key, value in _FRUGAL.items():
            options.add_session_config_entry(key, value)
        try:
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            model = onnx.load(str(optimised), load_external_data=False)
        except Exception as error:
            # ONNX Runtime raises a dozen unrelated types, some of them bare Exception subclasses.
            raise InputError(f"ONNX Runtime cannot load the file: {reason_of(error)}", where=path) from error
        graph = OnnxGraph(model, optimised)
        pairs = _saturable(graph)
    original = onnx.load(str(path), load_external_data=False)
    names = [node.name for node in original.graph.node if node.op_type in PRODUCTS]
    integer = {node.name for node in model.graph.node if node.op_type in INTEGER_KERNELS}
    ran = {node.name: node for node in graph.nodes}
    in_float = {name: _why_float(graph, ran.get(name)) for name in names if name not in integer}
    return Kernels(
        version=onnxruntime.__version__,
        products=len(names),
        integer_products=len(names) - len(in_float),
        operators=dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        in_float=in_float,
        saturable=pairs,
    )


def _why_float(graph: OnnxGraph, node: Any) -> str:
    if node is None:
        return "joined with its neighbours into a float kernel"
    if bare := graph.unquantized(node):
        return bare
    if node.op_type.endswith("Conv"):
        return "a convolution's integer kernel gives integers, and nothing quantizes this one's output"
    if node.op_type.endswith("Gemm"):
        return "joined with its float bias into one Gemm, whose integer kernel takes an int32 bias"
    return f"ONNX Runtime has no integer form of this {node.op_type}"
