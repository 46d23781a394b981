"""Questions about an ONNX graph that linting and plan reading share: who computes, who reads, which shape."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from ospq_export.export.onnx_read import values
from ospq_export.export.onnx_shapes import infer_shapes

PRODUCTS = ("MatMul", "Gemm", "Conv")
# What lies between an operand and its DequantizeLinear without changing values.
MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Identity", "Flatten", "Slice", "Expand")
QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"


class OnnxGraph:
    """Read-only view of an `onnx.ModelProto`.

    Args:
        model: an `onnx.ModelProto`.
        where: the file that it was read from, for errors and for what lies beside it.

    Raises:
        InputError: its shapes or types contradict each other.

    Attributes:
        folder: where its external data lies.
        nodes: in the file's order.
        producer: node by the name of the tensor it computes.
        readers: nodes by the name of a tensor they read.
        constants: initializers by name.
        shapes: inferred dimensions by tensor name; 0 where unknown or symbolic.
        dtypes: inferred element types by tensor name.
    """

    def __init__(self, model: Any, where: Path | None = None) -> None:
        self.folder = Path() if where is None else where.parent
        self.nodes: list[Any] = list(model.graph.node)
        self.producer: dict[str, Any] = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
        self.constants: dict[str, Any] = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.outputs = {value.name for value in model.graph.output}
        inferred = infer_shapes(model, where).graph
        typed = [*inferred.value_info, *inferred.input, *inferred.output]
        self.shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in typed}
        self.shapes |= {name: list(tensor.dims) for name, tensor in self.constants.items()}
        self.dtypes = {v.name: v.type.tensor_type.elem_type for v in typed}
        self.dtypes |= {name: tensor.data_type for name, tensor in self.constants.items()}

    def array(self, name: str) -> Any:
        """A constant's values, or None where the tensor is computed."""
        tensor = self.constants.get(name)
        return None if tensor is None else values(tensor, self.folder)

    def source(self, name: str) -> Any:
        """The node that computes a tensor, past what only moves it; None for an input or a constant."""
        node = self.producer.get(name)
        while node is not None and node.op_type in MOVES:
            node = self.producer.get(node.input[0])
        return node

    def attribute(self, node: Any, name: str, default: Any = None) -> Any:
        """An attribute's value."""
        from onnx import helper

        return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)

    def reads_softmax(self, node: Any) -> bool:
        """Whether a product's left operand is a softmax's output, quantized or not: the second half of an attention."""
        if node.op_type != "MatMul":
            return False
        source = self.source(node.input[0])
        while source is not None and source.op_type in (DEQUANTIZE, QUANTIZE, "Clip", "Sub"):
            source = self.source(source.input[0])
        return source is not None and source.op_type == "Softmax"
