"""Integers of 2 to 8 bits as ONNX: int8 codes between QuantizeLinear and DequantizeLinear, with a zero_point of 0."""

from __future__ import annotations

import torch

# Importing the module registers the quantized_decomposed operators with the dispatcher.
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx

from ospq_export.export.lower import Builder
from ospq_export.formats.integer import Integer
from ospq_export.formats.search import INT8_MAX, INT8_MIN
from ospq_export.graph.quantizers import ActivationQuantizer, WeightQuantizer

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed
_INT8 = (INT8_MIN, INT8_MAX, torch.int8)


def activation(build: Builder, x: fx.Node, quantizer: ActivationQuantizer) -> tuple[fx.Node, fx.Node]:
    """Clip(s*lo, s*hi) where int8 does not saturate by itself, or Sub(k) on a `shifted` grid; then Q and DQ.

    Returns:
        The codes and the dequantized values; the latter without the offset, which `graph` gives to the bias.
    """
    format_, scale = quantizer.format, float(quantizer.scale)
    assert isinstance(format_, Integer)
    levels = format_.levels
    if format_.has_offset:
        x = build.call(aten.sub.Tensor, x, float(quantizer.offset))
    elif not levels.saturates_int8:
        low, high = (float(quantizer.scale * limit) for limit in (levels.lo, levels.hi))
        x = build.call(aten.clamp.default, x, low, high)
    codes = build.call(qd.quantize_per_tensor.default, x, scale, 0, *_INT8)
    return codes, build.call(qd.dequantize_per_tensor.default, codes, scale, 0, *_INT8)


def weight(build: Builder, quantizer: WeightQuantizer, *, transposed: bool) -> fx.Node:
    """Codes and DQ per output channel, which is the last axis of a transposed weight."""
    scale = build.attribute(f"{quantizer.name}.scale", quantizer.scale)
    zeros = torch.zeros_like(quantizer.scale, dtype=torch.int8)
    zero_point = build.attribute(f"{quantizer.name}.zero_point", zeros)
    codes = build.attribute(f"{quantizer.name}.codes", quantizer.codes.t() if transposed else quantizer.codes)
    return build.call(qd.dequantize_per_channel.default, codes, scale, zero_point, int(transposed), *_INT8)


def convolves(_shape: torch.Size) -> bool:
    """Whether a convolution has a kernel: any has."""
    return True


def sums(quantizer: WeightQuantizer) -> Tensor:
    """W^ summed over an output channel's inputs, float64 (out_channels,); the sums of the codes are exact."""
    return quantizer.codes.double().flatten(1).sum(1) * quantizer.scale.double()
