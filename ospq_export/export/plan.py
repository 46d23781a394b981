"""What a builder compiled: the layers of an engine with the datatype of every tensor, from its log or from the inspector.

TensorRT and TensorRT-RTX write the compiled plan into a verbose log, in a message that starts with "Layers:", also where no GPU is
at hand; the engine inspector gives the same as JSON where there is one. Both are read into the same records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), (?P<rest>.*)$", re.MULTILINE)
_DATATYPE = re.compile(r"(?:Datatype|DataType): ([A-Za-z0-9]+)")
_ONNX_LAYER = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
# Bookkeeping of the runtime, without work on tensors.
_NO_WORK = ("shape_call", "Signal", "Wait", "signal", "wait")


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
        return "_mha" in self.name or "fmha" in self.name.lower()

    @property
    def multiplies(self) -> bool:
        """Whether this layer holds a matrix product or a convolution."""
        return self.is_attention or self.kind in ("gemm", "correlation", "convolution", "conv", "Convolution")

    @property
    def is_int8(self) -> bool:
        """Whether what it multiplies is Int8: every tensor input, and the first constant where there is one input only."""
        return bool(self.inputs) and all(kind == "Int8" for kind in self._operands())

    def _operands(self) -> Sequence[str]:
        if self.is_attention:
            return self.inputs[:3]
        return self.inputs[:2] if len(self.inputs) > 1 else (*self.inputs[:1], *self.constants[:1])


def layers_from_log(messages: Iterable[str]) -> list[PlanLayer]:
    """The compiled layers, from a builder's verbose log.

    Args:
        messages: the log, one entry per message.

    Returns:
        The layers in execution order; empty where no message lists any.
    """
    listing = next((m for m in reversed(list(messages)) if m.startswith("Layers:")), "")
    return [_from_text(match) for match in _LAYER.finditer(listing.split("\n\nI/O Tensors", 1)[0])]


def _from_text(match: re.Match[str]) -> PlanLayer:
    rest, _, tail = match["rest"].partition(", TacticName:")
    inputs, _, others = rest.partition("Constants: [")
    if not others:
        inputs, _, outputs = rest.partition("Outputs: [")
        constants = ""
    else:
        constants, _, outputs = others.partition("Outputs: [")
    return PlanLayer(
        name=match["name"],
        kind=match["kind"],
        inputs=tuple(_DATATYPE.findall(inputs)),
        constants=tuple(_DATATYPE.findall(constants)),
        outputs=tuple(_DATATYPE.findall(outputs)),
        onnx=tuple(dict.fromkeys(_ONNX_LAYER.findall(tail))),
    )
