"""The network that TensorRT's parser makes of an ONNX graph: which type every tensor has there, and what every Q/DQ is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import TensorProto

from ospq_export.onnx import own
from ospq_export.onnx.lint.known import RTX, Version, find_version
from ospq_export.onnx.names import DYNAMIC_QUANTIZE
from ospq_export.onnx.view import DEQUANTIZE, QUANTIZE, OnnxGraph

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
CODES: dict[int, str] = {
    TensorProto.INT8: "int8",
    TensorProto.INT4: "int4",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.FLOAT4E2M1: "fp4",
}
FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum")


@dataclass(frozen=True)
class Pair:
    """One QuantizeLinear or DequantizeLinear, of ONNX or of TensorRT.

    Attributes:
        node: itself.
        quantizes: whether it is the Q.
        format: element type of its codes in TensorRT, a `TensorProto` value.
    """

    node: Any
    quantizes: bool
    format: int

    @property
    def data(self) -> str:
        """The tensor that it reads."""
        return str(self.node.input[0])

    @property
    def scale(self) -> str:
        """Its scale."""
        return str(self.node.input[1])

    @property
    def zero(self) -> str:
        """Its zero point; empty where it has none."""
        return str(self.node.input[2]) if len(self.node.input) > 2 else ""


class Network:
    """Read-only.

    Args:
        model: an `onnx.ModelProto`.
        where: the file that it was read from.
        targets: what engines are built for, such as "SM89"; none: GPUs that have the file's formats.
        version: the TensorRT that reads it; None: TensorRT-RTX.

    Raises:
        InputError: the file's shapes or types contradict each other.

    Attributes:
        graph: the ONNX graph.
        pairs: every Q and DQ by its output's name, in the file's order.
        types: element type of every tensor in TensorRT, as far as it is known; float64 is float32 there.
        ir_version: of the file.
    """

    def __init__(
        self,
        model: Any,
        where: Path | None = None,
        targets: Sequence[str] = (),
        version: Version | None = None,
    ) -> None:
        self.version = version or find_version(RTX)
        self.graph = OnnxGraph(model, where)
        self.ir_version, self.targets = int(model.ir_version), targets
        self.pairs: dict[str, Pair] = {}
        given = self.graph.dtypes.keys() - self.graph.producer.keys()
        self.types = {name: _as_parsed(self.graph.dtypes[name]) for name in given}
        for node in self.graph.nodes:
            self._propagate(node)

    def _propagate(self, node: Any) -> None:
        dtypes = self.graph.dtypes
        pair = self._pair(node)
        if pair is not None:
            self.pairs[node.output[0]] = pair
            self.types[node.output[0]] = pair.format if pair.quantizes else self._dequantized(pair)
            return
        if node.op_type == DYNAMIC_QUANTIZE:
            self.types.update(zip(node.output, (own.DYNAMIC_CODES, own.BLOCK_SCALES), strict=False))
            return
        first = next((name for name in node.input if name), "")
        for name in node.output:
            kind = dtypes.get(name, TensorProto.UNDEFINED)
            own_type = node.op_type in ("Cast", "Constant")
            keeps = not own_type and kind in (TensorProto.UNDEFINED, dtypes.get(first))
            self.types[name] = self.types.get(first, _as_parsed(kind)) if keeps else _as_parsed(kind)

    def _pair(self, node: Any) -> Pair | None:
        if len(node.input) < 2:
            return None
        # The parser looks at the operator's name only, never at its domain.
        if format_ := own.QUANTIZERS.get(node.op_type) or own.DEQUANTIZERS.get(node.op_type):
            return Pair(node, node.op_type in own.QUANTIZERS, format_)
        if node.op_type not in (QUANTIZE, DEQUANTIZE):
            return None
        quantizes = node.op_type == QUANTIZE
        zero = len(node.input) > 2 and node.input[2]
        if quantizes and not zero:
            return Pair(node, True, self.graph.attribute(node, "output_dtype", 0) or TensorProto.INT8)
        code = self.types.get(zero or node.input[0], 0)
        return Pair(node, quantizes, code if code in CODES else TensorProto.INT8)

    def _dequantized(self, pair: Pair) -> int:
        written = self.graph.attribute(pair.node, "output_dtype", 0)
        return _as_parsed(written) if written else self.types.get(pair.scale, TensorProto.FLOAT)

    def block_scales(self, pair: Pair) -> Pair | None:
        """What dequantizes the block scales of FP4 codes, where they are FP8 with one scale themselves; None where not."""
        inner = self.pairs.get(pair.scale)
        found = inner is not None and not inner.quantizes and inner.format == TensorProto.FLOAT8E4M3FN
        return inner if found and pair.format == TensorProto.FLOAT4E2M1 else None

    def zero_values(self, name: str) -> Any:
        """A zero point's values as the parser finds them: past Identity and Cast too; None where it does not."""
        return self.graph.array(self.graph.behind(name, ("Identity", "Cast")))

    def shape(self, name: str) -> list[int] | None:
        """A tensor's dimensions, 0 where unknown or symbolic; None where not even their number is known."""
        return self.graph.shapes.get(name)

    def ranks(self, node: Any) -> list[int]:
        """How many dimensions a node's first two inputs have; 0 where that is not known."""
        return [len(self.shape(name) or ()) for name in node.input[:2]]

    def axis(self, pair: Pair) -> int:
        """Its axis as the parser reads it, negative ones too."""
        default = 0 if self.graph.opset < 13 else 1
        return int(self.graph.attribute(pair.node, "axis", default))


def shown(kind: int) -> str:
    """An element type's name for people."""
    return TensorProto.DataType.Name(kind).lower()


def _as_parsed(kind: int) -> int:
    return int(TensorProto.FLOAT) if kind == TensorProto.DOUBLE else kind
