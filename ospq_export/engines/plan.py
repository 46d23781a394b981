"""What a builder compiled: the layers of an engine with the datatype of every tensor, from its log or from the inspector.

TensorRT and TensorRT-RTX write the compiled plan into a verbose log, in a message that starts with "Layers:", also where no GPU
is at hand; the engine inspector gives the same as JSON where there is one. Both are read into the same records.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from ospq_export.formats.choice import engine_types
from ospq_export.onnx.lint.attention import FP8_KEYS, HEAD_SIZES, MAX_SEQUENCE
from ospq_export.onnx.lint.precision import FP8_KERNEL
from ospq_export.onnx.own import BLOCK_SCALES as FP8
from ospq_export.onnx.view import DEQUANTIZE, PRODUCTS, OnnxGraph

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>.*)$", re.MULTILINE)
_DATATYPE = re.compile(r"Datatype: ([A-Za-z0-9]+)")
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_IN_BLOCKS, _BLOCK_SCALES = "FP4E2M1", "FP8"
_PRODUCTS = ("gemm", "correlation", "convolution", "conv", "matrix_multiply", "fc")


class PlanLayer(BaseModel):
    """One compiled layer.

    Attributes:
        name: the builder's name.
        kind: its type: "gemm", "correlation" (a convolution), "kgen" (a generated kernel), ...
        inputs, constants, outputs: datatypes ("Int8", "Half", "Float", ...), in order.
        onnx: names of the ONNX nodes that the builder says it came from.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    onnx: tuple[str, ...]

    @property
    def is_attention(self) -> bool:
        """Whether this is one fused attention kernel: both products and the softmax."""
        return "mha" in self.name.lower()

    @property
    def multiplies(self) -> bool:
        """Whether this layer holds a matrix product or a convolution."""
        return self.is_attention or self.kind.lower() in _PRODUCTS

    @property
    def format(self) -> str | None:
        """The number format of everything it multiplies, as the builder calls it; None where it multiplies in float."""
        operands = set(self._operands())
        return operands.pop() if len(operands) == 1 and operands <= engine_types() else None

    def _operands(self) -> Sequence[str]:
        if self.is_attention:
            return self.inputs[:3]
        if self.inputs[:1] == (_IN_BLOCKS,):
            # The scales of its blocks are inputs or constants of their own, behind it or behind the other operand.
            others = (*self.inputs[1:], *self.constants[:1])
            return (_IN_BLOCKS, next((kind for kind in others if kind != _BLOCK_SCALES), ""))
        # A product with a constant has its weight first among the constants; scales and biases come after it.
        return self.inputs[:2] if len(self.inputs) > 1 else (*self.inputs[:1], *self.constants[:1])


def layers_from_log(messages: Iterable[str]) -> list[PlanLayer]:
    """The compiled layers, from a builder's verbose log.

    Args:
        messages: the log, one entry per message.

    Returns:
        The layers in execution order; empty where no message lists any.
    """
    listing = next((m for m in reversed(list(messages)) if m.startswith("Layers:")), "")
    return [_from_text(match) for match in _LAYER.finditer(listing)]


def _from_text(match: re.Match[str]) -> PlanLayer:
    tensors, _, tail = match["rest"].partition(", TacticName:")
    before, _, outputs = tensors.partition("Outputs: [")
    inputs, _, constants = before.partition("Constants: [")
    return PlanLayer(
        name=match["name"],
        kind=match["kind"],
        inputs=tuple(_DATATYPE.findall(inputs)),
        constants=tuple(_DATATYPE.findall(constants)),
        outputs=tuple(_DATATYPE.findall(outputs)),
        onnx=_onnx_names(tail),
    )


def layers_from_inspector(text: str) -> list[PlanLayer]:
    """The compiled layers, from the engine inspector's JSON (`get_engine_information`); it needs a GPU.

    Args:
        text: the JSON; layers are under "Layers", each an object where the engine was built with detailed verbosity.
    """
    layers = json.loads(text).get("Layers", [])
    return [_from_json(layer) for layer in layers if isinstance(layer, dict)]


def _from_json(layer: dict[str, Any]) -> PlanLayer:
    def datatypes(key: str) -> tuple[str, ...]:
        # The inspector writes "Datatype": "Int8" or, in older versions, only "Format/Datatype": "Int8 NC/32HW32".
        tensors = [tensor for tensor in layer.get(key, []) if isinstance(tensor, dict)]
        names = [str(t.get("Datatype") or t.get("Format/Datatype") or "?").split() for t in tensors]
        return tuple(words[0] for words in names)

    return PlanLayer(
        name=str(layer.get("Name", "")),
        kind=str(layer.get("LayerType", "")),
        inputs=datatypes("Inputs"),
        constants=datatypes("Constants"),
        outputs=datatypes("Outputs"),
        onnx=_onnx_names(str(layer.get("Metadata", ""))),
    )


def _onnx_names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(_ONNX_LAYER.findall(text)))


_UNKNOWN = "the builder chose separate kernels"


class Fusion(BaseModel):
    """What became of an ONNX file's products.

    Attributes:
        gemms: how many products (MatMul, Gemm, Conv) the file has.
        quantized_gemms: how many of them multiply quantized operands, inside attention kernels too.
        attentions: how many pairs of products around a Softmax the file has.
        fused_attentions: how many are one quantized kernel.
        formats: how many products multiply in each number format, as the builder calls it.
        not_quantized: the other products, by node name, with the reason.
        not_fused: the other attentions, by the name of the product after their Softmax, with the reason.
    """

    model_config = ConfigDict(frozen=True)

    gemms: int
    quantized_gemms: int
    attentions: int
    fused_attentions: int
    formats: dict[str, int] = {}
    not_quantized: dict[str, str]
    not_fused: dict[str, str]


def analyse(model: Any, layers: Sequence[PlanLayer]) -> Fusion:
    """Hold a compiled plan against the file it was built from.

    Args:
        model: an `onnx.ModelProto`, its node names unique.
        layers: of the plan.
    """
    graph = OnnxGraph(model)
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    ran = {name: layer for layer in layers if layer.multiplies for name in layer.onnx}
    not_quantized = {
        node.name: _why_float(graph, node, ran.get(node.name))
        for node in products
        if node.name not in ran or ran[node.name].format is None
    }
    formats = Counter(str(ran[n.name].format) for n in products if n.name not in not_quantized)
    attentions = [node for node in products if graph.reads_softmax(node)]
    fused = {name for layer in layers if layer.is_attention and layer.format for name in layer.onnx}
    not_fused = {n.name: _why_not_fused(graph, n, ran.get(n.name)) for n in attentions if n.name not in fused}
    return Fusion(
        gemms=len(products),
        quantized_gemms=len(products) - len(not_quantized),
        attentions=len(attentions),
        fused_attentions=len(attentions) - len(not_fused),
        formats=dict(sorted(formats.items())),
        not_quantized=not_quantized,
        not_fused=not_fused,
    )


def _why_float(graph: OnnxGraph, node: Any, layer: PlanLayer | None) -> str:
    if bare := graph.unquantized(node):
        return bare
    shape, kernel = (graph.shapes.get(name, []) for name in node.input[:2])
    codes = graph.source(node.input[1]).input[0]
    if node.op_type == "Conv" and graph.dtypes.get(codes) == FP8 and math.prod(kernel[2:]) > FP8_KERNEL:
        return f"a kernel of {math.prod(kernel[2:])} elements: a convolution takes up to {FP8_KERNEL} on FP8"
    if node.op_type == "Conv" and len(shape) > 1 and shape[1] % 4:
        return f"a convolution over {shape[1]} channels: the builder takes multiples of 4"
    ran = "no layer of its own" if layer is None else f"{layer.kind} on {', '.join(layer.inputs[:2])}"
    return f"the builder chose {ran}"


def _why_not_fused(graph: OnnxGraph, node: Any, layer: PlanLayer | None) -> str:
    value = graph.shapes.get(node.input[1], [])
    if layer is not None and layer.format == "FP8":
        few = len(value) >= 2 and 0 < value[-2] < FP8_KEYS
        return f"{value[-2]} keys: the FP8 kernel takes {FP8_KEYS} or more" if few else _UNKNOWN
    if len(value) >= 2 and value[-1] not in (0, *HEAD_SIZES):
        return f"head size {value[-1]}: the kernel takes {', '.join(map(str, HEAD_SIZES))}"
    if len(value) >= 2 and value[-2] > MAX_SEQUENCE:
        return f"{value[-2]} keys: the kernel takes up to {MAX_SEQUENCE}"
    if graph.source(node.input[0]).op_type != DEQUANTIZE:
        return "the softmax's output is not quantized"
    before = graph.source(node.input[0], 3)
    if before is not None and before.op_type in ("Clip", "Sub"):
        return f"{before.op_type} between the softmax and its quantizer (fewer than 8 bits)"
    return _UNKNOWN
