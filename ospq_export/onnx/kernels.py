"""Which products of an exported file ONNX Runtime computes in integers: read from the graph that it really runs."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from ospq_export.errors import InputError
from ospq_export.onnx.saturation import saturable
from ospq_export.onnx.view import DEQUANTIZE, PRODUCTS, OnnxGraph
from ospq_export.world.processor import PRECISE_KERNELS, Processor

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


class Kernels(BaseModel):
    """What became of a file's products (MatMul, Gemm, Conv) in ONNX Runtime on the CPU, all graph optimisations on.

    Attributes:
        version: of ONNX Runtime.
        products: how many there are.
        integer_products: how many run on integers.
        operators: every operator of the optimised graph with its count.
        in_float: the other products by node name, with the reason.
        saturable: products of uint8 by int8 that can saturate on a processor which adds pairs in 16 bits, by node name, with the
            number of pairs of codes that do it; see `export.saturation`.
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
            pairs = saturable(model, Path(folder))
        except Exception as error:
            # ONNX Runtime raises a dozen unrelated types, some of them bare Exception subclasses.
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"ONNX Runtime cannot load the file: {reason}", where=path) from error
    original = onnx.load(str(path), load_external_data=False)
    return _compare(original, model, onnxruntime.__version__).model_copy(update={"saturable": pairs})


def _compare(original: Any, model: Any, version: str) -> Kernels:
    names = [node.name for node in original.graph.node if node.op_type in PRODUCTS]
    integer = {node.name for node in model.graph.node if node.op_type in INTEGER_KERNELS}
    graph = OnnxGraph(model)
    ran = {node.name: node for node in graph.nodes}
    in_float = {name: _why_float(graph, ran.get(name)) for name in names if name not in integer}
    return Kernels(
        version=version,
        products=len(names),
        integer_products=len(names) - len(in_float),
        operators=dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        in_float=in_float,
    )


def _why_float(graph: OnnxGraph, node: Any) -> str:
    if node is None:
        return "joined with its neighbours into a float kernel"
    sources = [graph.source(name) for name in node.input[:2]]
    bare = [
        f"operand {i} is not quantized"
        for i, source in enumerate(sources)
        if source is None or source.op_type != DEQUANTIZE
    ]
    if bare:
        return ", ".join(bare)
    if node.op_type.endswith("Conv"):
        return "a convolution's integer kernel gives integers, and nothing quantizes this one's output"
    if node.op_type.endswith("Gemm"):
        return "joined with its float bias into one Gemm, whose integer kernel takes an int32 bias"
    return f"ONNX Runtime has no integer form of this {node.op_type}"
