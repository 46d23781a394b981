"""TensorRT's own quantizers, as functions of ONNX's operators that give the same shapes and element types.

Shape inference stops at an operator that it does not know, and a file from another tool may say nothing of what lies behind.
"""

from __future__ import annotations

from typing import Any

from onnx import TensorProto, helper

from ospq_export.onnx.names import DYNAMIC_QUANTIZE

QUANTIZERS: dict[str, int] = {
    "TRT_FP8QuantizeLinear": TensorProto.FLOAT8E4M3FN,
    "TRT_INT4QuantizeLinear": TensorProto.INT4,
}
"""Element type of their codes, by operator."""
DEQUANTIZERS: dict[str, int] = {
    "TRT_FP8DequantizeLinear": TensorProto.FLOAT8E4M3FN,
    "TRT_INT4DequantizeLinear": TensorProto.INT4,
}
DYNAMIC_CODES, BLOCK_SCALES = TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN
"""What the operator gives that quantizes in blocks of `BLOCK_SIZE`."""
BLOCK_SIZE, DEFAULT_AXIS = 16, 1
_OPSET = helper.make_opsetid("", 23)


def describe(model: Any) -> None:
    """Replace these operators by such functions in an `onnx.ModelProto`, in place, and forget what it says of their outputs.

    nvidia-modelopt calls FP8 codes uint8 there.
    """
    outputs = set()
    for node in model.graph.node:
        if node.op_type in (*QUANTIZERS, *DEQUANTIZERS, DYNAMIC_QUANTIZE):
            function = _function(node)
            node.domain, node.op_type = function.domain, function.name
            outputs.update(node.output)
            if function not in model.functions:
                model.functions.append(function)
    if outputs:
        described = [value for value in model.graph.value_info if value.name not in outputs]
        del model.graph.value_info[:]
        model.graph.value_info.extend(described)
        model.opset_import.append(helper.make_opsetid(_DOMAIN, 1))


_DOMAIN = "tensorrt"


def _function(node: Any) -> Any:
    inputs, outputs, name = ["x", "scale"], ["y"], node.op_type
    if name in DEQUANTIZERS:
        body = [helper.make_node("CastLike", inputs, outputs)]
    else:
        body = [helper.make_node("Cast", ["x"], outputs, to=QUANTIZERS.get(name, DYNAMIC_CODES))]
    if name == DYNAMIC_QUANTIZE:
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), DEFAULT_AXIS)
        outputs, name = ["y", "scales"], f"{name}_{axis}"
        body += _block_scales(axis)
    return helper.make_function(_DOMAIN, name, inputs, outputs, body, [_OPSET])


def _block_scales(axis: int) -> list[Any]:
    """One element of each block along an axis."""
    values = {"start": 0, "end": 2**31, "axis": axis, "step": BLOCK_SIZE}
    numbers = [helper.make_node("Constant", [], [name], value_ints=[value]) for name, value in values.items()]
    first = helper.make_node("Slice", ["x", *values], ["first"])
    return [*numbers, first, helper.make_node("Cast", ["first"], ["scales"], to=BLOCK_SCALES)]
