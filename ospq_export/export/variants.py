"""Other forms of the exported file, passes over the finished model: INT4 weights, uint8 activations, preprocessing inside."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import numpy as np

from ospq_export.data.config import DataConfig
from ospq_export.onnx.names import constant, drop_unread
from ospq_export.onnx.write import UINT8_ZERO

# 4-bit types of Q/DQ exist from here on.
INT4_OPSET = 21
_WHITE = 255.0


def store_int4(model: Any, weights: Set[str]) -> None:
    """Keep the codes of some weights in INT4, two per byte, in place.

    The values are the same; the file is smaller. TensorRT then dequantizes in a kernel of its own and multiplies in float: this
    form is for storage and for runtimes with 4-bit kernels, not for int8 engines.

    Args:
        model: an onnx_ir model.
        weights: names of the initializers that hold codes within [-8, 7].
    """
    import ml_dtypes
    import onnx_ir as ir

    for node in model.graph:
        if node.op_type != "DequantizeLinear" or node.inputs[0].name not in weights:
            continue
        codes, zero_point = node.inputs[0], node.inputs[2]
        codes.const_value = ir.tensor(codes.const_value.numpy().astype(ml_dtypes.int4), name=codes.name)
        codes.type = ir.TensorType(ir.DataType.INT4)
        zeros = np.zeros(zero_point.const_value.shape.numpy(), ml_dtypes.int4)
        node.replace_input_with(2, constant(model.graph, f"{zero_point.name}.int4", zeros))
    drop_unread(model.graph)
    model.graph.opset_imports[""] = max(model.graph.opset_imports[""], INT4_OPSET)


def shift_activations(model: Any) -> None:
    """Store activations' codes as uint8 with a zero_point of 128 instead of int8 with 0, in place.

    The codes are the same, 128 higher: round(x/s) + 128 saturates in [0, 255] where round(x/s) does in [-128, 127]. Some
    of ONNX Runtime's kernels multiply uint8 by int8 only. TensorRT refuses the zero point.

    Args:
        model: an onnx_ir model whose quantizers all have int8 zero points of 0.
    """
    import onnx_ir as ir

    zero_point = np.array(UINT8_ZERO, np.uint8)
    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        codes = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
        if codes.is_initializer():
            continue
        node.replace_input_with(2, constant(model.graph, "activation.zero_point", zero_point))
        codes.type = ir.TensorType(ir.DataType.UINT8)
    _retype_moves(model.graph)
    drop_unread(model.graph)


def _retype_moves(graph: Any) -> None:
    """Codes that are moved about between Q and DQ have the type they are read with."""
    import onnx_ir as ir

    types = ir.DataType
    for node in graph:
        source = node.inputs[0] if node.inputs else None
        if source is not None and source.dtype == types.UINT8 and node.outputs[0].dtype == types.INT8:
            node.outputs[0].type = ir.TensorType(types.UINT8)


def take_uint8(model: Any, data: DataConfig) -> None:
    """Let a model take decoded, resized images, uint8 (B, H, W, C), and normalise them itself; in place.

    What it computes first is (pixel / 255 - mean) / std per channel, as timm's transform does after resizing and cropping.

    Args:
        model: an onnx_ir model whose first input is float32 (B, C, H, W).
        data: the preprocessing.
    """
    import onnx_ir as ir

    graph = model.graph
    images = graph.inputs[0]
    batch, channels, height, width = images.shape
    name = images.name
    images.name = f"{name}.normalised"
    raw = ir.val(name, ir.DataType.UINT8, [batch, height, width, channels])
    mean, std = (
        (_WHITE * np.array(v)).astype(np.float32).reshape(1, -1, 1, 1) for v in (data.mean, data.std)
    )
    steps: list[tuple[str, list[Any], dict[str, Any]]] = [
        ("Cast", [], {"to": int(ir.DataType.FLOAT)}),
        ("Transpose", [], {"perm": [0, 3, 1, 2]}),
        ("Sub", [constant(graph, "preprocessing.mean", mean)], {}),
        ("Div", [constant(graph, "preprocessing.std", std)], {}),
    ]
    value, first = raw, graph[0]
    for operator, constants, attributes in steps:
        node = ir.node(operator, [value, *constants], attributes, name=f"preprocessing/{operator}")
        graph.insert_before(first, node)
        value = node.outputs[0]
        value.name, value.dtype = f"preprocessing.{operator.lower()}", ir.DataType.FLOAT
        value.shape = raw.shape if operator == "Cast" else images.shape
    images.replace_all_uses_with(value)
    graph.inputs[0] = raw
