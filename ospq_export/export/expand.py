"""A file that ONNX Runtime can run in place of one with 4-bit floating-point operands, which it does not implement.

It is made from the bytes of that file, and computes the same numbers in float operators: what lies in E2M1 and E4M3 becomes
float32, and TensorRT's dynamic quantization is written out. It is for checking only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ospq_export.formats.minifloat import E2M1, E4M3
from ospq_export.onnx import serialize
from ospq_export.onnx.names import DYNAMIC_QUANTIZE, TENSORRT_DOMAIN, constant, drop_unread

PURPOSE = {"purpose": "for checking only: what the file beside it computes, in float operators"}
_F32 = np.float32


def needs_expansion(model: Any) -> bool:
    """Whether a model (onnx_ir) has operands that ONNX Runtime cannot run."""
    import onnx_ir as ir

    types = (value.dtype for node in model.graph for value in node.inputs if value is not None)
    return ir.DataType.FLOAT4E2M1 in types or any(node.domain == TENSORRT_DOMAIN for node in model.graph)


def write_expanded(source: Path, target: Path) -> None:
    """Write the expanded form of a file.

    Args:
        source: as exported; its weights may lie beside it.
        target: where the expanded file goes.

    Raises:
        InputError: it cannot be written.
    """
    import onnx_ir as ir

    model = ir.load(source)
    _Expansion(model).run()
    model.metadata_props.update(PURPOSE)
    proto, tensors = serialize.split(model)
    serialize.check(proto, tensors, target)
    serialize.save(proto, tensors, target)


class _Expansion:
    def __init__(self, model: Any) -> None:
        import onnx_ir as ir

        self.ir, self.graph, self.model = ir, model.graph, model
        self.made = 0

    def run(self) -> None:
        for node in list(self.graph):
            if node.op_type == DYNAMIC_QUANTIZE:
                self._dynamic(node)
            elif node.op_type == "DequantizeLinear" and self._in_smaller_type(node):
                self._constant(node) if node.inputs[0].is_initializer() else self._dequantize(node)
        self.model.opset_imports.pop(TENSORRT_DOMAIN, None)
        drop_unread(self.graph)

    def _in_smaller_type(self, node: Any) -> bool:
        """Whether a DequantizeLinear belongs to a block: its codes, or the scales of the codes."""
        readers = [user for user, index in node.outputs[0].uses() if index == 1]
        scales = any(user.op_type == "DequantizeLinear" for user in readers)
        return scales or node.attributes.get_int("block_size", 0) > 0

    def _constant(self, node: Any) -> None:
        """Dequantize an initializer here and now."""
        codes, scale = (np.asarray(v.const_value.numpy()).astype(_F32) for v in node.inputs[:2])
        size = node.attributes.get_int("block_size", 0)
        if size:
            axis = node.attributes.get_int("axis", 1)
            scale = np.repeat(scale, size, axis=axis).take(range(codes.shape[axis]), axis=axis)
        self._replace(node, constant(self.graph, f"{node.outputs[0].name}.real", codes * scale))

    def _dynamic(self, node: Any) -> None:
        """Blocks' largest magnitude, their scale rounded to E4M3, the values over it rounded to E2M1."""
        x, tensor_scale = node.inputs
        size = node.attributes.get_int("block_size", 16)
        self.place, self.prefix = node, node.outputs[0].name
        grouped = self._call("Reshape", x, self._shape(0, 0, -1, size))
        largest = self._call("ReduceMax", self._call("Abs", grouped), self._shape(-1), keepdims=1)
        ratio = self._call("Div", largest, self._call("Mul", tensor_scale, self._number(E2M1.largest)))
        clipped = self._call("Clip", ratio, self._number(E4M3.smallest), self._number(E4M3.largest))
        e4m3 = self._call("Cast", clipped, to=int(self.ir.DataType.FLOAT8E4M3FN))
        stored = self._call("Cast", e4m3, to=int(self.ir.DataType.FLOAT))
        # A comparison of codes goes on with the scales that were really computed.
        stored.name = f"{self.prefix.removesuffix('.codes')}.block_scales"
        rounded = self._rounded(self._call("Div", grouped, self._call("Mul", stored, tensor_scale)))
        flat = self._call("Reshape", rounded, self._shape(0, 0, -1))
        scales = self._call("Squeeze", stored, self._shape(-1))
        self._replace(node, flat, scales)

    def _rounded(self, x: Any) -> Any:
        """E2M1: multiples of 0.5 below 2, of 1 below 4, of 2 up to 6; Round takes ties to the even multiple."""
        magnitude = self._call("Abs", x)
        above = self._call(
            "Where", self._call("Less", magnitude, self._number(4.0)), self._number(1.0), self._number(2.0)
        )
        below = self._call("Less", magnitude, self._number(2.0))
        step = self._call("Where", below, self._number(0.5), above)
        multiple = self._call("Mul", self._call("Round", self._call("Div", x, step)), step)
        return self._call("Clip", multiple, self._number(E2M1.lo), self._number(E2M1.hi))

    def _dequantize(self, node: Any) -> None:
        """Codes that are float by now, times their scale."""
        codes, scale = node.inputs[:2]
        size = node.attributes.get_int("block_size", 0)
        self.place, self.prefix = node, node.outputs[0].name
        if not size:
            self._replace(node, self._call("Mul", codes, scale))
            return
        grouped = self._call("Reshape", codes, self._shape(0, 0, -1, size))
        real = self._call("Mul", grouped, self._call("Unsqueeze", scale, self._shape(-1)))
        self._replace(node, self._call("Reshape", real, self._shape(0, 0, -1)))

    def _call(self, operator: str, *inputs: Any, **attributes: int) -> Any:
        node = self.ir.node(operator, inputs, attributes)
        self.graph.insert_before(self.place, node)
        self.made += 1
        node.name = f"{self.prefix}/{operator}_{self.made}"
        return node.outputs[0]

    def _number(self, value: float) -> Any:
        return constant(self.graph, f"expanded.number_{value:g}", np.array(value, _F32))

    def _shape(self, *sizes: int) -> Any:
        """A shape, or a list of axes."""
        return constant(self.graph, f"expanded.sizes_{'_'.join(map(str, sizes))}", np.array(sizes))

    def _replace(self, node: Any, *values: Any) -> None:
        for old, new in zip(node.outputs, values, strict=True):
            if not new.is_initializer():
                # Probes are found by the tensor's name.
                old.name, new.name = None, old.name
                new.dtype, new.shape = self.ir.DataType.FLOAT, old.shape
            old.replace_all_uses_with(new)
        self.graph.remove(node, safe=True)
