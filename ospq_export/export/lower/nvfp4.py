"""NVFP4 as ONNX: FLOAT4E2M1 codes in blocks of 16, with scales that are themselves FLOAT8E4M3FN and dequantized first.

Activations are quantized by an operator of TensorRT's, the form that it documents. Written in ONNX's own operators, its builder
was seen to compile one form and to refuse another.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ospq_export.export.lower import Builder
from ospq_export.formats.minifloat import E4M3
from ospq_export.formats.nvfp4 import BLOCK_SIZE
from ospq_export.graph.quantizers import ActivationQuantizer, WeightQuantizer
from ospq_export.onnx.names import DYNAMIC_QUANTIZE, TENSORRT_DOMAIN

_ONNX_E4M3, _IR_VERSION = 17, 11
_BLOCKS: dict[str, Any] = {"axis": -1, "block_size": BLOCK_SIZE}
_symbolic = torch.onnx.ops.symbolic


def quantize_dynamically(x: Tensor, tensor_scale: Tensor) -> tuple[Tensor, Tensor]:
    """TensorRT's operator, for the exporter to write: codes, and block scales as stored; it computes nothing in torch.

    The codes have the type of `WeightQuantizer.codes` until `finish` gives them theirs.
    """
    codes, scales = torch.onnx.ops.symbolic_multi_out(
        f"{TENSORRT_DOMAIN}::{DYNAMIC_QUANTIZE}",
        (x, tensor_scale),
        {**_BLOCKS, "scale_type": _ONNX_E4M3},
        dtypes=(torch.int8, torch.float8_e4m3fn),
        shapes=(x.shape, (*x.shape[:-1], x.shape[-1] // BLOCK_SIZE)),
        version=1,
    )
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, tensor_scale: Tensor) -> Tensor:
    """Two of ONNX's operators: the scales' real values, then the codes'; they compute nothing in torch."""
    real = torch.float32
    scale = _symbolic("DequantizeLinear", (scales, tensor_scale), dtype=real, shape=scales.shape)
    return _symbolic("DequantizeLinear", (codes, scale), _BLOCKS, dtype=real, shape=codes.shape)


def three_dimensions(x: Tensor) -> Tensor:
    """(B, ..., C) as (B, N, C), the only form that TensorRT's parser takes."""
    return x if x.dim() == 3 else x.reshape(x.shape[0], -1, x.shape[-1])


def restored(values: Tensor, x: Tensor) -> Tensor:
    """The values in the shape of x again."""
    return values if x.dim() == 3 else values.reshape(x.shape)


def activation(build: Builder, x: fx.Node, quantizer: ActivationQuantizer) -> tuple[fx.Node, fx.Node]:
    """Dynamic quantization, DQ of the scales and of the codes; around it the shape that the parser takes."""
    tensor_scale = build.attribute(f"{quantizer.name}.scale", quantizer.scale)
    both = build.call(quantize_dynamically, build.call(three_dimensions, x), tensor_scale)
    codes, scales = (build.call(operator.getitem, both, index) for index in (0, 1))
    values = build.call(dequantize, codes, scales, tensor_scale)
    return codes, build.call(restored, values, x)


def weight(build: Builder, quantizer: WeightQuantizer, *, transposed: bool) -> fx.Node:
    """Codes (out, in) with blocks along the inputs, and what transposes their values where that is wanted."""
    assert quantizer.tensor_scale is not None
    stored = E4M3.rounded(quantizer.scale / quantizer.tensor_scale).to(torch.float8_e4m3fn)
    tensor_scale = build.attribute(f"{quantizer.name}.tensor_scale", quantizer.tensor_scale)
    scales = build.attribute(f"{quantizer.name}.scale", stored)
    codes = build.attribute(f"{quantizer.name}.codes", quantizer.codes)
    values = build.call(dequantize, codes, scales, tensor_scale)
    return build.call(torch.ops.aten.t.default, values) if transposed else values


def convolves(_shape: torch.Size) -> bool:
    """Whether a convolution has a kernel: none is asked for."""
    return True


def sums(quantizer: WeightQuantizer) -> Tensor:
    """W^ summed over an output channel's inputs, float64 (out_channels,)."""
    levels = quantizer.format.decode(quantizer.codes).double()
    return (levels * quantizer.spread_scale().double()).sum(1)


def finish(model: Any) -> None:
    """Give the codes of a translated graph the type FLOAT4E2M1, which torch's exporter cannot write; in place.

    Args:
        model: an onnx_ir model.
    """
    import ml_dtypes
    import numpy as np
    import onnx_ir as ir

    for node in model.graph:
        scales = node.inputs[1].producer() if node.op_type == "DequantizeLinear" else None
        if scales is None or scales.op_type != "DequantizeLinear":
            continue
        codes = node.inputs[0]
        codes.type = ir.TensorType(ir.DataType.FLOAT4E2M1)
        if codes.const_value is not None and codes.const_value.dtype == ir.DataType.INT8:
            levels = codes.const_value.numpy().astype(np.float32) / 2
            codes.const_value = ir.tensor(levels.astype(ml_dtypes.float4_e2m1fn), name=codes.name)
    model.ir_version = max(model.ir_version, _IR_VERSION)
