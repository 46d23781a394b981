"""Draw small quantized ONNX graphs.

Drawn are the placement of Q/DQ, operators between, types, axes, shapes, subgraphs, ways to write a constant. `draw(seed)` gives a
valid ONNX file whose nodes that multiply are named `product<k>`. Most graphs have no fault; the others have one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
FORMATS: dict[str, Any] = {
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
    "int4": ml_dtypes.int4,
    "uint4": ml_dtypes.uint4,
    "fp8": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
FLOATS: dict[int, Any] = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.BFLOAT16: ml_dtypes.bfloat16,
    TensorProto.DOUBLE: np.float64,
}
FAULTS = (
    *(
        "zero_point",
        "zero_size",
        "zero_computed",
        "scale_sign",
        "scale_length",
        "scale_rank",
        "scale_computed",
    ),
    *("datatype", "axis", "twice", "operator", "activation_channels", "weight_axis", "scalar_constant"),
    *("codes_constant", "mixed_formats", "output_dtype", "weight_kind", "unread", "no_quantizer"),
)


@dataclass
class Tensor:
    """A tensor under construction: its name and shape."""

    name: str
    shape: list[int]


@dataclass
class Draw:
    """One graph under construction."""

    rng: np.random.Generator
    opset: int
    float_type: int
    format: str
    fault: str
    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    functions: list[Any] = field(default_factory=list)
    count: int = 0
    products: int = 0

    def pick(self, *options: Any) -> Any:
        """One of the options."""
        return options[int(self.rng.integers(len(options)))]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return bool(self.rng.random() < probability)

    def fails(self, fault: str) -> bool:
        """Whether this fault is the graph's, and its turn is now; it happens once."""
        if self.fault != fault or self.chance(0.3):
            return False
        self.fault = ""
        return True

    def name(self, prefix: str) -> str:
        """A new name."""
        self.count += 1
        return f"{prefix}{self.count}"

    def node(self, op: str, *inputs: str, outputs: int = 1, name: str = "", **attributes: Any) -> str:
        """Adds a node and gives its first output's name."""
        names = [self.name(op.lower()) for _ in range(outputs)]
        label = name or self.name(f"n_{op.lower()}")
        self.nodes.append(helper.make_node(op, list(inputs), names, name=label, **attributes))
        return names[0]

    def plain(self, value: Any) -> str:
        """An initializer."""
        name = self.name("c")
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def constant(self, value: Any) -> str:
        """A constant, written in one of the ways that there are."""
        array = np.asarray(value)
        way = self.pick(
            "plain", "plain", "plain", "node", "value", "identity", "cast", "input", "squeeze", "math"
        )
        if way == "node":
            return self._constant_node(value=numpy_helper.from_array(array))
        if way == "value" and array.dtype == np.float32 and array.ndim < 2 and self.opset >= 12:
            return self._constant_node(**self._value(array))
        if array.dtype != np.float32:
            return self.plain(array)
        if way == "identity":
            return self.node("Identity", self.plain(array))
        if way == "cast":
            return self.node("Cast", self.plain(array.astype(np.float64)), to=TensorProto.FLOAT)
        if way == "squeeze":
            return self.squeeze(self.plain(array[None]), 0)
        if way == "math":
            return self.node("Mul", self.plain(array), self.plain(np.float32(1)))
        name = self.plain(array)
        if way == "input" and array.ndim == 0:
            self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, []))
        return name

    def _constant_node(self, **attributes: Any) -> str:
        return self.node("Constant", **attributes)

    def _value(self, array: Array) -> dict[str, Any]:
        return {"value_float": float(array)} if not array.ndim else {"value_floats": array.tolist()}

    def axes(self, op: str, name: str, axis: int) -> str:
        """Squeeze or Unsqueeze in the opset's spelling."""
        if self.opset < 13:
            return self.node(op, name, axes=[axis])
        return self.node(op, name, self.plain(np.array([axis])))

    def squeeze(self, name: str, axis: int) -> str:
        """Without one axis."""
        return self.axes("Squeeze", name, axis)

    def number(self, value: Any) -> Array:
        """In the graph's float type."""
        return np.asarray(value, FLOATS[self.float_type])


def pair_inputs(
    d: Draw, shape: list[int], axis: int | None, format_: str
) -> tuple[list[str], dict[str, Any]]:
    """Scale and zero point of a pair, and its attributes; with the graph's fault where it has one of these."""
    length = 1 if axis is None else shape[axis]
    flat = () if axis is None and d.chance(0.8) else (length,)
    if axis is None and d.fails("scale_rank"):
        flat = d.pick((1, 1), (1,) * len(shape), (1, 1, 1))
    values = d.rng.uniform(0.02, 0.2, flat)
    if axis is not None and d.fails("scale_length"):
        values = d.rng.uniform(0.02, 0.2, length + d.pick(-1, 1)) if length > 2 else values
    if d.fails("scale_sign"):
        values = values * d.pick(0, -1)
        scale = d.plain(d.number(values))
    elif d.fails("scale_computed"):
        scale = d.node("ReduceMax", "x", keepdims=0)
        values = np.zeros(())
    else:
        scale = d.constant(d.number(values))
    attributes = {} if axis is None or d.opset < 13 else {"axis": axis - (len(shape) if d.chance(0.2) else 0)}
    if axis is not None and d.fails("axis"):
        attributes["axis"] = d.pick(len(shape), -len(shape) - 1, len(shape) + 3)
    return [scale, *zero_input(d, values, format_)], attributes


def zero_input(d: Draw, values: Array, format_: str) -> list[str]:
    """The zero point, if it is written."""
    dtype = FORMATS[format_]
    if d.fails("datatype"):
        dtype = FORMATS[d.pick("uint8", "int16", "uint4", "e5m2")]
    zero = np.zeros(np.shape(values), dtype)
    if d.fails("zero_point"):
        zero = np.ones(np.shape(values), dtype)
    elif d.fails("zero_size"):
        zero = np.zeros(() if np.size(values) > 1 else 2, dtype)
    elif d.fails("zero_computed"):
        return [
            d.pick(d.squeeze, lambda n, _: d.node("Cast", d.node("ReduceMax", "x", keepdims=0), to=3))(
                d.plain(zero[None]), 0
            )
        ]
    elif format_ == "int8" and d.chance(0.1):
        return []
    if d.chance(0.1):
        return [d.node("Identity", d.plain(zero))]
    return [d.constant(zero)]


def quantize(
    d: Draw, source: Tensor, format_: str, axis: int | None = None
) -> tuple[Tensor, list[str], dict[str, Any]]:
    """Codes of a tensor, and what its DequantizeLinear reads besides them."""
    if axis is None and d.fails("activation_channels"):
        axis = int(d.rng.integers(len(source.shape)))
    inputs, attributes = pair_inputs(d, source.shape, axis, format_)
    written = dict(attributes)
    if len(inputs) == 1 and d.opset >= 21 and d.chance(0.5):
        written["output_dtype"] = TensorProto.INT8
    if d.opset >= 21 and d.fails("output_dtype"):
        written["output_dtype"] = d.pick(TensorProto.UINT8, TensorProto.INT16, TensorProto.FLOAT8E4M3FN)
    codes = d.node("QuantizeLinear", source.name, *inputs, **written)
    return Tensor(codes, source.shape), inputs, attributes


def dequantize(d: Draw, codes: Tensor, inputs: list[str], attributes: dict[str, Any]) -> Tensor:
    """The values of codes."""
    twice = d.nodes[-1].name if d.fails("twice") and d.nodes else ""
    return Tensor(d.node("DequantizeLinear", codes.name, *inputs, name=twice, **attributes), codes.shape)


Between = Callable[[Draw, Tensor, bool], Tensor | None]


def _unary(op: str, **attributes: Any) -> Between:
    return lambda d, t, _: Tensor(d.node(op, t.name, **attributes), t.shape)


def _transpose(d: Draw, t: Tensor, _: bool) -> Tensor:
    order = [int(i) for i in d.rng.permutation(len(t.shape))]
    return Tensor(d.node("Transpose", t.name, perm=order), [t.shape[i] for i in order])


def _reshape(d: Draw, t: Tensor, _: bool) -> Tensor:
    shape = d.pick(
        [*t.shape[:-1], 2, t.shape[-1] // 2] if t.shape[-1] % 2 == 0 else t.shape, [1, *t.shape], [*t.shape]
    )
    return Tensor(d.node("Reshape", t.name, d.plain(np.array(shape))), shape)


def _round_trip(d: Draw, t: Tensor, _: bool) -> Tensor:
    return Tensor(d.squeeze(d.axes("Unsqueeze", t.name, 0), 0), t.shape)


def _slice(d: Draw, t: Tensor, _: bool) -> Tensor:
    axis = int(d.rng.integers(len(t.shape)))
    end = max(1, t.shape[axis] - 1)
    ends = [d.plain(np.array([v])) for v in (0, end, axis)]
    return Tensor(d.node("Slice", t.name, *ends), [end if i == axis else s for i, s in enumerate(t.shape)])


def _concat(d: Draw, t: Tensor, _: bool) -> Tensor:
    axis = int(d.rng.integers(len(t.shape)))
    shape = [2 * s if i == axis else s for i, s in enumerate(t.shape)]
    return Tensor(d.node("Concat", t.name, t.name, axis=axis), shape)


def _gather(d: Draw, t: Tensor, _: bool) -> Tensor:
    index = np.arange(t.shape[0])[::-1].copy()
    return Tensor(d.node("Gather", t.name, d.plain(index), axis=0), t.shape)


def _expand(d: Draw, t: Tensor, _: bool) -> Tensor:
    return Tensor(d.node("Expand", t.name, d.plain(np.array([2, *t.shape]))), [2, *t.shape])


def _tile(d: Draw, t: Tensor, _: bool) -> Tensor:
    return Tensor(
        d.node("Tile", t.name, d.plain(np.array([2] + [1] * (len(t.shape) - 1)))),
        [2 * t.shape[0], *t.shape[1:]],
    )


def _split(d: Draw, t: Tensor, _: bool) -> Tensor | None:
    if t.shape[-1] % 2:
        return None
    parts: dict[str, Any] = {"num_outputs": 2} if d.opset >= 18 else {}
    return Tensor(d.node("Split", t.name, outputs=2, axis=-1, **parts), [*t.shape[:-1], t.shape[-1] // 2])


def _flatten(d: Draw, t: Tensor, _: bool) -> Tensor:
    return Tensor(d.node("Flatten", t.name, axis=1), [t.shape[0], int(np.prod(t.shape[1:]))])


def _pad(d: Draw, t: Tensor, codes: bool) -> Tensor | None:
    if d.opset < 11:
        return None
    pads = np.zeros(2 * len(t.shape), np.int64)
    pads[-1] = d.pick(0, 1, 1)
    mode = d.pick("constant", "reflect", "edge") if t.shape[-1] > 2 else "constant"
    value = [d.plain(np.int8(0) if codes else d.number(0))] if d.chance(0.3) and mode == "constant" else []
    return Tensor(
        d.node("Pad", t.name, d.plain(pads), *value, mode=mode), [*t.shape[:-1], t.shape[-1] + int(pads[-1])]
    )


def _clip(d: Draw, t: Tensor, codes: bool) -> Tensor | None:
    if d.opset < 12:
        return None
    limits = [np.int8(-8), np.int8(7)] if codes else [d.number(-1), d.number(1)]
    return Tensor(d.node("Clip", t.name, *(d.plain(v) for v in limits)), t.shape)


def _pool(d: Draw, t: Tensor, codes: bool) -> Tensor | None:
    if len(t.shape) != 4 or min(t.shape[2:]) < 4:
        return None
    op = d.pick("MaxPool", "MaxPool", "AveragePool")
    shape = [*t.shape[:2], t.shape[2] // 2, t.shape[3] // 2]
    return Tensor(d.node(op, t.name, kernel_shape=[2, 2], strides=[2, 2]), shape)


def _resize(d: Draw, t: Tensor, _: bool) -> Tensor | None:
    if len(t.shape) != 4 or d.opset < 13:
        return None
    mode = d.pick("nearest", "linear")
    name = d.node("Resize", t.name, "", d.plain(np.array([1, 1, 2, 2], np.float32)), mode=mode)
    return Tensor(name, [*t.shape[:2], 2 * t.shape[2], 2 * t.shape[3]])


def _depth(d: Draw, t: Tensor, _: bool) -> Tensor | None:
    if len(t.shape) != 4 or t.shape[2] % 2 or t.shape[3] % 2:
        return None
    shape = [t.shape[0], 4 * t.shape[1], t.shape[2] // 2, t.shape[3] // 2]
    return Tensor(d.node("SpaceToDepth", t.name, blocksize=2), shape)


def _scaled(d: Draw, t: Tensor, codes: bool) -> Tensor | None:
    if codes:
        return None
    shape = d.pick([], [], [t.shape[-1]], [t.shape[-2], 1]) if len(t.shape) > 1 else []
    factor = d.constant(d.number(d.rng.uniform(0.5, 2, shape)))
    return Tensor(d.node(d.pick("Mul", "Mul", "Div"), t.name, factor), t.shape)


def _added(d: Draw, t: Tensor, codes: bool) -> Tensor | None:
    if codes:
        return None
    return Tensor(d.node(d.pick("Add", "Sub"), t.name, d.plain(d.number(1))), t.shape)


def _reduced(d: Draw, t: Tensor, codes: bool) -> Tensor | None:
    if d.opset >= 18:
        name = d.node(d.pick("ReduceMax", "ReduceMin"), t.name, d.plain(np.array([0])), keepdims=1)
    else:
        name = d.node(d.pick("ReduceMax", "ReduceMin"), t.name, axes=[0], keepdims=1)
    return Tensor(name, [1, *t.shape[1:]])


BETWEEN: tuple[Between, ...] = (
    *(
        _unary("Identity"),
        _unary("Dropout"),
        _unary("Relu"),
        _unary("Neg"),
        _unary("Abs"),
        _unary("LeakyRelu"),
    ),
    *(
        _transpose,
        _transpose,
        _reshape,
        _reshape,
        _round_trip,
        _slice,
        _concat,
        _gather,
        _expand,
        _tile,
        _split,
    ),
    *(_flatten, _pad, _clip, _pool, _pool, _resize, _depth, _scaled, _scaled, _added, _reduced),
)
FLOAT_ONLY: tuple[Between, ...] = (_unary("Softmax"), _unary("Sigmoid"), _unary("Tanh"))


def between(d: Draw, tensor: Tensor, codes: bool) -> Tensor:
    """Zero to two operators on a tensor."""
    choices = BETWEEN if codes and not d.chance(0.03) else (*BETWEEN, *FLOAT_ONLY)
    for _ in range(d.pick(0, 0, 0, 1, 1, 2)):
        found = d.pick(*choices)(d, tensor, codes)
        tensor = (
            found
            if found is not None and int(np.prod(found.shape)) < 4096 and len(found.shape) < 6
            else tensor
        )
    return tensor


def activation(d: Draw, tensor: Tensor) -> Tensor:
    """A quantized operand that is computed: operators may lie between Q and DQ and behind them; some are left in float."""
    if d.chance(0.06) or (d.fails("no_quantizer") and len(tensor.shape) < 4):
        return tensor
    codes, inputs, attributes = quantize(d, tensor, d.format)
    whole = not attributes.get("axis") and d.format == "int8"
    moved = between(d, codes, True) if whole and d.chance(0.4) else codes
    return between(d, dequantize(d, moved, inputs, attributes), False)


def weight(d: Draw, shape: list[int], axis: int) -> Tensor:
    """A quantized constant of this shape; `axis` is the one that scales may lie along."""
    format_ = d.format
    if d.fails("mixed_formats"):
        format_ = d.pick("int4", "fp8" if format_ == "int8" else "int8")
    elif d.fails("weight_kind"):
        format_ = d.pick("uint8", "int16", "uint4", "e5m2")
    along: int | None = axis if d.chance(0.6) else None
    if d.fails("weight_axis"):
        along = int(d.rng.integers(len(shape)))
    if d.chance(0.05):
        return Tensor(d.plain(d.number(d.rng.normal(size=shape))), shape)
    turned = d.chance(0.2)
    stored = shape[::-1] if turned else shape
    if along is not None and turned:
        along = len(shape) - 1 - along
    result = _weight_values(d, stored, along, format_)
    if turned:
        result = Tensor(d.node("Transpose", result.name, perm=list(range(len(shape)))[::-1]), shape)
    return result


def _weight_values(d: Draw, shape: list[int], axis: int | None, format_: str) -> Tensor:
    if d.chance(0.25):
        source = Tensor(d.constant(d.number(d.rng.normal(size=shape))), shape)
        codes, inputs, attributes = quantize(d, source, format_, axis if axis is not None else None)
        return dequantize(d, codes, inputs, attributes)
    values = d.rng.integers(0, 7, shape) if format_ in ("int4", "uint4") else d.rng.integers(0, 100, shape)
    name = d.plain(values.astype(FORMATS[format_]))
    if d.fails("codes_constant"):
        name = d.node(d.pick("Identity", "Relu"), name)
    inputs, attributes = pair_inputs(d, shape, axis, format_)
    return dequantize(d, Tensor(name, shape), inputs, attributes)


def product(d: Draw, tensor: Tensor) -> Tensor:
    """One product of an activation by a weight or by another activation."""
    a = activation(d, tensor)
    d.products += 1
    name, rank = f"product{d.products}", len(a.shape)
    if rank == 1:
        a = Tensor(d.axes("Unsqueeze", a.name, 0), [1, *a.shape])
    if rank in (3, 4) and d.chance(0.75) and min(a.shape[2:]) >= 2:
        return _convolution(d, a, name)
    if d.chance(0.12):
        b = activation(d, tensor) if d.chance(0.3) else a
        order = [*range(len(b.shape) - 2), len(b.shape) - 1, len(b.shape) - 2]
        turned = Tensor(d.node("Transpose", b.name, perm=order), [b.shape[i] for i in order])
        if (
            turned.shape[:-2] == a.shape[:-2]
            and turned.shape[-2] == a.shape[-1]
            and len(turned.shape) == len(a.shape)
        ):
            return Tensor(d.node("MatMul", a.name, turned.name, name=name), [*a.shape[:-1], turned.shape[-1]])
    return _matrix_product(d, a, name)


def _convolution(d: Draw, a: Tensor, name: str) -> Tensor:
    channels, spatial = a.shape[1], len(a.shape) - 2
    groups = d.pick(1, 1, 1, channels, 2 if channels % 2 == 0 else 1)
    size = d.pick(1, 2, min(3, *a.shape[2:]))
    out = groups * d.pick(1, 2, 4) if groups > 1 else d.pick(3, 4, 6, 8)
    if d.chance(0.1) and spatial == 2 and d.opset >= 11:
        w = weight(d, [channels, out // groups, size, size], 1 if groups == 1 else 0)
        y = d.node("ConvTranspose", a.name, w.name, name=name, group=groups)
        return Tensor(y, [a.shape[0], out, *(s + size - 1 for s in a.shape[2:])])
    w = weight(d, [out, channels // groups, *[size] * spatial], 0)
    bias = [d.plain(d.number(np.ones(out)))] if d.chance(0.4) else []
    y = d.node("Conv", a.name, w.name, *bias, name=name, group=groups)
    return Tensor(y, [a.shape[0], out, *(s - size + 1 for s in a.shape[2:])])


def _matrix_product(d: Draw, a: Tensor, name: str) -> Tensor:
    inner, out, rank = a.shape[-1], d.pick(3, 4, 6, 8), len(a.shape)
    kind = d.pick("MatMul", "MatMul", "Gemm", "Einsum", "first")
    if kind == "Gemm" and rank == 2:
        turned = d.chance(0.5)
        w = weight(d, [out, inner] if turned else [inner, out], 0 if turned else 1)
        bias = [d.plain(d.number(np.ones(out)))] if d.chance(0.5) or d.opset < 11 else []
        attributes = d.pick({}, {}, {"alpha": 0.5}, {"beta": 2.0}) if bias else {}
        y = d.node("Gemm", a.name, w.name, *bias, name=name, transB=int(turned), **attributes)
        return Tensor(y, [a.shape[0], out])
    if kind == "Einsum" and rank in (2, 3) and d.opset >= 12:
        equation = "ij,jk->ik" if rank == 2 else "bij,jk->bik"
        y = d.node("Einsum", a.name, weight(d, [inner, out], 1).name, name=name, equation=equation)
    elif kind == "first":
        w = weight(d, [*[1] * (rank - 2), out, a.shape[-2]], rank - 2)
        return Tensor(d.node("MatMul", w.name, a.name, name=name), [*a.shape[:-2], out, inner])
    else:
        batch = a.shape[:-2] if rank > 2 and d.chance(0.2) else []
        w = weight(d, [*batch, inner, out], len(batch) + 1)
        y = d.node("MatMul", a.name, w.name, name=name)
    return Tensor(y, [*a.shape[:-1], out])


def draw(seed: int) -> onnx.ModelProto:
    """The graph of a seed."""
    rng = np.random.default_rng(seed)
    opset = int(rng.choice([10, 11, 12, 13, 14, 16, 17, 18, 19, 20, 21, 22, 23]))
    format_ = "fp8" if opset >= 19 and rng.random() < 0.25 else "int8"
    types = list(FLOATS) if opset >= 19 else [TensorProto.FLOAT]
    float_type = int(rng.choice(types)) if rng.random() < 0.3 else int(TensorProto.FLOAT)
    fault = str(rng.choice(FAULTS)) if rng.random() < 0.4 else ""
    d = Draw(rng, opset, float_type, format_, fault)
    shape = d.pick([2, 8], [3, 4], [2, 3, 8], [2, 4, 6], [1, 4, 8, 8], [2, 3, 8, 8], [1, 8, 6, 6], [4, 16])
    d.inputs.append(helper.make_tensor_value_info("x", float_type, shape))
    tensor = Tensor("x", list(shape))
    if d.chance(0.3):
        tensor = Tensor(d.node("Relu", "x"), tensor.shape)
    for _ in range(d.pick(1, 1, 1, 2)):
        tensor = product(d, tensor)
        if d.chance(0.3):
            tensor = Tensor(d.node(d.pick("Relu", "Sigmoid"), tensor.name), tensor.shape)
    return _finish(d, tensor)


def _finish(d: Draw, tensor: Tensor) -> onnx.ModelProto:
    domains: dict[str, int] = {}
    if d.fails("unread"):
        quantize(d, tensor, d.format)
    if d.fails("scalar_constant") and d.opset >= 13:
        value = d.node("DequantizeLinear", d.plain(np.int8(5)), d.plain(d.number(0.5)))
        tensor = Tensor(d.node("Mul", tensor.name, value), tensor.shape)
    if d.fails("operator"):
        domain, op = d.pick(
            ("com.microsoft", "QuickGelu"), ("com.microsoft", "Gelu"), ("ai.example", "Odd"), ("", "Det")
        )
        domains[domain] = 1
        tensor = Tensor(d.node(op, tensor.name, domain=domain), tensor.shape)
    wrap = d.pick(*[_main] * 12, _branches, _branches, _function, _loop)
    nodes, outputs = wrap(d, tensor)
    # A domain of a drawn operator that ONNX knows nothing of has no shapes.
    graph = helper.make_graph(nodes, "drawn", d.inputs, outputs, d.constants)
    opsets = [helper.make_opsetid("", d.opset), *(helper.make_opsetid(k, v) for k, v in domains.items() if k)]
    if d.functions:
        opsets.append(helper.make_opsetid("local", 1))
    ir = 11 if d.opset >= 23 else 10 if d.opset >= 21 else 9
    return helper.make_model(graph, opset_imports=opsets, functions=d.functions, ir_version=ir)


def _value(d: Draw, name: str, shape: list[int] | None) -> Any:
    return helper.make_tensor_value_info(name, d.float_type, shape)


Wrapped = tuple[list[Any], list[Any]]


def _main(d: Draw, tensor: Tensor) -> Wrapped:
    rank = [f"d{i}" for i in range(len(tensor.shape))]
    return d.nodes, [_value(d, tensor.name, d.pick(tensor.shape, rank))]


def _branches(d: Draw, tensor: Tensor) -> Wrapped:
    """The graph's tail in one branch of an If, something simple in the other."""
    cut = int(d.rng.integers(len(d.nodes)))
    then = helper.make_graph(d.nodes[cut:], "then", [], [_value(d, tensor.name, tensor.shape)])
    zero = numpy_helper.from_array(d.number(np.zeros(tensor.shape)), "other")
    other = helper.make_node("Relu", ["other"], ["else_output"], "n_else")
    otherwise = helper.make_graph([other], "else", [], [_value(d, "else_output", tensor.shape)], [zero])
    d.inputs.append(helper.make_tensor_value_info("condition", TensorProto.BOOL, []))
    node = helper.make_node("If", ["condition"], ["result"], "n_if", then_branch=then, else_branch=otherwise)
    return [*d.nodes[:cut], node], [_value(d, "result", tensor.shape)]


def _function(d: Draw, tensor: Tensor) -> Wrapped:
    """The whole graph in a local function, called once."""
    names = [c.name for c in d.constants]
    inputs = ["x", *names]
    imports = [helper.make_opsetid("", d.opset)]
    if any(node.domain for node in d.nodes):
        return _main(d, tensor)
    d.functions.append(helper.make_function("local", "Block", inputs, [tensor.name], d.nodes, imports))
    call = helper.make_node("Block", inputs, ["result"], "n_call", domain="local")
    return [call], [_value(d, "result", tensor.shape)]


def _loop(d: Draw, tensor: Tensor) -> Wrapped:
    """The graph's tail in the body of a Loop that runs twice and gives its last result as a scan output."""
    cut = int(d.rng.integers(len(d.nodes)))
    inputs = [
        helper.make_tensor_value_info(n, t, [])
        for n, t in (("i", TensorProto.INT64), ("go", TensorProto.BOOL))
    ]
    outputs = [
        helper.make_tensor_value_info("goes", TensorProto.BOOL, []),
        _value(d, tensor.name, tensor.shape),
    ]
    onward = helper.make_node("Identity", ["go"], ["goes"], "n_goes")
    body = helper.make_graph([*d.nodes[cut:], onward], "body", inputs, outputs)
    trips, true = d.plain(np.int64(2)), d.plain(np.bool_(True))
    node = helper.make_node("Loop", [trips, true], ["result"], "n_loop", body=body)
    return [*d.nodes[:cut], node], [_value(d, "result", [2, *tensor.shape])]
