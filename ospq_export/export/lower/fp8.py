"""FP8 as ONNX: FLOAT8E4M3FN codes between QuantizeLinear and DequantizeLinear, which saturate and have a zero_point of 0."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ospq_export.export.lower import Builder
from ospq_export.graph.quantizers import ActivationQuantizer, WeightQuantizer
from ospq_export.onnx.lint.precision import FP8_KERNEL

_symbolic = torch.onnx.ops.symbolic
_E4M3 = torch.float8_e4m3fn


def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """ONNX's operator, for the exporter to write; it computes nothing in torch."""
    return _symbolic("QuantizeLinear", (x, scale, zero_point), dtype=_E4M3, shape=x.shape)


def dequantize_linear(codes: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """ONNX's operator, for the exporter to write; it computes nothing in torch."""
    inputs = (codes, scale, zero_point)
    attributes: dict[str, Any] = {"axis": axis} if scale.dim() else {}
    return _symbolic("DequantizeLinear", inputs, attributes, dtype=torch.float32, shape=codes.shape)


def activation(build: Builder, x: fx.Node, quantizer: ActivationQuantizer) -> tuple[fx.Node, fx.Node]:
    """Q and DQ."""
    scale = build.attribute(f"{quantizer.name}.scale", quantizer.scale)
    zero_point = build.attribute(f"{quantizer.name}.zero_point", torch.zeros((), dtype=_E4M3))
    codes = build.call(quantize_linear, x, scale, zero_point)
    return codes, build.call(dequantize_linear, codes, scale, zero_point, 0)


def weight(build: Builder, quantizer: WeightQuantizer, *, transposed: bool) -> fx.Node:
    """Codes and DQ per output channel, which is the last axis of a transposed weight."""
    scale = build.attribute(f"{quantizer.name}.scale", quantizer.scale)
    zeros = torch.zeros_like(quantizer.scale, dtype=_E4M3)
    zero_point = build.attribute(f"{quantizer.name}.zero_point", zeros)
    stored = quantizer.codes.view(_E4M3)
    codes = build.attribute(f"{quantizer.name}.codes", stored.t() if transposed else stored)
    return build.call(dequantize_linear, codes, scale, zero_point, int(transposed))


def convolves(shape: torch.Size) -> bool:
    """Whether the kernel is small enough; TensorRT-RTX 1.7 was seen to compute others in float."""
    return shape[2:].numel() <= FP8_KERNEL


def sums(quantizer: WeightQuantizer) -> Tensor:
    """W^ summed over an output channel's inputs, float64 (out_channels,)."""
    levels = quantizer.format.decode(quantizer.codes).double()
    return levels.flatten(1).sum(1) * quantizer.scale.double()
