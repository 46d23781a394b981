"""FP16 around the quantized operators: the form that TensorRT fuses.

TensorRT's networks are strongly typed, so the file itself says what runs in which precision. Everything moves to FP16 but what
needs FP32 for its range or its sums (normalisations and means, Softmax, powers and roots) and Q/DQ, whose scales stay bit for bit
the calibrated ones: in FP16 a scale would change by up to 2**-11, and codes with it. The casts fuse into other kernels.

BF16 in its place has FP32's range and three digits less: for networks whose values end FP16 at 65504.

An operator with a constant that FP16 cannot hold stays in FP32, and so does the first arithmetic behind it: the 1e-12 that
keeps a norm from being 0 is 0 in FP16, a factor of 1e5 would end at 65504.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ospq_export.onnx.names import DYNAMIC_QUANTIZE, drop_unread

FP16_MAX = 65504.0
# FP16 rounds by 2**-11; an error of a constant, over its largest magnitude, above this is lost range, not rounding.
_ROUNDING = 2.0**-10
MOVES = frozenset({"Expand", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Identity", "Flatten"})
# Sums over many values, exponentials, and squares of outliers: what overflows or loses its small terms in FP16. Resize and the
# pools are here because their FP16 form is missing in some runtimes.
KEEPS_FLOAT32 = frozenset(
    {
        *("LayerNormalization", "GroupNormalization", "InstanceNormalization", "BatchNormalization"),
        *("RMSNormalization", "LpNormalization", "Softmax", "LogSoftmax", "CumSum", "Resize"),
        *("ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare", "GlobalAveragePool", "AveragePool"),
        *("Pow", "Sqrt", "Exp", "Log", "Reciprocal", "QuantizeLinear", "DequantizeLinear"),
        DYNAMIC_QUANTIZE,
    }
)


def to_half(model: Any) -> None:
    """Move a model to FP16 in place; its input and its outputs stay float32.

    Args:
        model: an onnx_ir model in float32, with a type on every value.
    """
    import onnx_ir as ir

    _Half(model, ir.DataType.FLOAT16).run()


def to_brain(model: Any) -> None:
    """Move a model to BF16 in place, as `to_half` does to FP16."""
    import onnx_ir as ir

    _Half(model, ir.DataType.BFLOAT16).run()


class _Half:
    def __init__(self, model: Any, half: Any) -> None:
        import onnx_ir as ir

        self.ir, self.graph = ir, model.graph
        self.opset = model.graph.opset_imports.get("", 1)
        self.float, self.half = ir.DataType.FLOAT, half
        self.is_brain = half == ir.DataType.BFLOAT16
        self.suffix = "bf16" if self.is_brain else "fp16"
        self.converted: dict[tuple[str, Any], Any] = {}
        self.wide: set[str] = set()

    def run(self) -> None:
        outputs = list(self.graph.outputs)
        for node in list(self.graph):
            self._node(node)
        for index, value in enumerate(outputs):
            if value.dtype == self.half:
                self.graph.outputs[index] = self._restored(value)
        drop_unread(self.graph)

    def _is_real(self, value: Any) -> bool:
        return value is not None and value.dtype in (self.float, self.half)

    def _node(self, node: Any) -> None:
        target = node.attributes["to"].as_int() if node.op_type == "Cast" else None
        if target == int(self.float) and not self._is_real(node.inputs[0]):
            # Integers or truth values become real numbers here: they may as well become FP16.
            node.attributes["to"] = self.ir.AttrInt64("to", int(self.half))
            node.outputs[0].type = self.ir.TensorType(self.half)
            return
        keeps = self._keeps_float(node) or self._needs_range(node) or self._makes_float(node)
        wanted = self.float if keeps or target is not None else self.half
        for index, value in enumerate(node.inputs):
            if self._is_real(value):
                node.replace_input_with(index, self._as(value, wanted, node))
        for value in node.outputs:
            if value.dtype == self.float:
                value.type = self.ir.TensorType(wanted)
        self._constant(node, wanted)

    def _keeps_float(self, node: Any) -> bool:
        # A quantizer's own clip and offset are part of its scale.
        part_of_quantizer = node.op_type in ("Clip", "Sub") and any(
            user.op_type == "QuantizeLinear" for user in node.outputs[0].consumers()
        )
        lacks_brain = self.is_brain and not _takes_bf16(node.op_type, node.domain, self.opset)
        return node.op_type in KEEPS_FLOAT32 or part_of_quantizer or lacks_brain

    def _makes_float(self, node: Any) -> bool:
        """Whether real numbers begin here whose type is the operator's own: a ConstantOfShape without a value, an EyeLike."""
        return not any(map(self._is_real, node.inputs)) and not self._holds_tensor(node)

    def _holds_tensor(self, node: Any) -> bool:
        attribute = node.attributes.get("value")
        return attribute is not None and attribute.type == self.ir.AttributeType.TENSOR

    def _needs_range(self, node: Any) -> bool:
        """Whether a constant, or what was computed with one just before, needs FP32's range, which BF16 has."""
        if self.is_brain:
            return False
        inputs = [value for value in node.inputs if value is not None]
        widened = any(value.name in self.wide for value in inputs)
        constants = [(index, self._real_constant(value)) for index, value in enumerate(inputs)]
        loses = any(
            not fits_fp16(array, tiny=_is_bias(node, index, array))
            for index, array in constants
            if array is not None
        )
        if loses or (widened and node.op_type in MOVES):
            self.wide.update(value.name for value in node.outputs)
        return loses or widened

    def _real_constant(self, value: Any) -> Any:
        producer = value.producer()
        constant = value.const_value
        if constant is None and producer is not None and producer.op_type == "Constant":
            constant = producer.attributes["value"].value if "value" in producer.attributes else None
        return None if constant is None or value.dtype != self.float else constant.numpy()

    def _constant(self, node: Any, wanted: Any) -> None:
        if not self._holds_tensor(node):
            return
        attribute = node.attributes["value"]
        if wanted == self.half and attribute.value.dtype == self.float:
            node.attributes["value"] = self.ir.AttrTensor("value", self._rounded(attribute.value, None))

    def _rounded(self, tensor: Any, name: str | None) -> Any:
        values = tensor.numpy()
        rounded = values.astype(self.half.numpy()) if self.is_brain else _to_fp16(values)
        return self.ir.tensor(rounded, name=name)

    def _as(self, value: Any, dtype: Any, reader: Any) -> Any:
        if value.dtype == dtype:
            return value
        key = (value.name, dtype)
        if key not in self.converted:
            self.converted[key] = self._convert(value, dtype, reader)
        return self.converted[key]

    def _convert(self, value: Any, dtype: Any, reader: Any) -> Any:
        name = f"{value.name}.{self.suffix if dtype == self.half else 'fp32'}"
        if value.is_initializer():
            tensor = self._rounded(value.const_value, name)
            kind = self.ir.TensorType(dtype)
            copy = self.ir.Value(name=name, const_value=tensor, type=kind, shape=value.shape)
            self.graph.register_initializer(copy)
            return copy
        node = self._cast(value, dtype, name)
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(reader, node)
        else:
            self.graph.insert_after(producer, node)
        return node.outputs[0]

    def _cast(self, value: Any, dtype: Any, name: str) -> Any:
        node = self.ir.node("Cast", [value], {"to": int(dtype)}, name=f"{name}/Cast")
        result = node.outputs[0]
        result.name, result.dtype, result.shape = name, dtype, value.shape
        return node

    def _restored(self, value: Any) -> Any:
        name = value.name
        value.name = f"{name}.{self.suffix}"
        node = self._cast(value, self.float, name)
        self.graph.insert_after(value.producer(), node)
        return node.outputs[0]


@functools.cache
def _takes_bf16(operator: str, domain: str, opset: int) -> bool:
    """Whether ONNX has an operator in BF16; Conv since opset 22."""
    import onnx

    if not onnx.defs.has(operator, domain=domain, max_inclusive_version=opset):
        return False
    schema = onnx.defs.get_schema(operator, opset, domain)
    return any("tensor(bfloat16)" in constraint.allowed_type_strs for constraint in schema.type_constraints)


def _is_bias(node: Any, index: int, array: Any) -> bool:
    """Whether a constant is added to values of FP16's own resolution; a single number may be what keeps a divisor from 0."""
    return (
        node.op_type in ("Conv", "Gemm", "Add", "Sub") and array.size > 1 and (array.ndim == 1 or index == 2)
    )


def fits_fp16(array: Any, *, tiny: bool = False) -> bool:
    """Whether FP16 holds a float array but for rounding, judged by its largest finite magnitude; infinities pass.

    Args:
        array: any shape.
        tiny: whether values below FP16's smallest steps may be lost, because they are added to larger ones.
    """
    values = np.asarray(array, np.float32)
    values = values[np.isfinite(values)]
    if values.size == 0:
        return True
    largest, error = np.abs(values).max(), np.abs(values - _to_fp16(values).astype(np.float32)).max()
    return bool(error <= _ROUNDING * (max(largest, 1.0) if tiny else largest))


def _to_fp16(array: Any) -> Any:
    return np.clip(array, -FP16_MAX, FP16_MAX).astype(np.float16)
