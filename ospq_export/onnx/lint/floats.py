"""Rules about FP8 and FP4: what dynamic quantization takes, block scales, versions of ONNX and of the hardware."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from onnx import TensorProto

from ospq_export.onnx.lint.findings import Finding, refusal, warning
from ospq_export.onnx.lint.network import CODES, FLOATS, Network, shown
from ospq_export.onnx.names import DYNAMIC_QUANTIZE
from ospq_export.onnx.own import BLOCK_SCALES, BLOCK_SIZE, DEFAULT_AXIS
from ospq_export.onnx.view import DEQUANTIZE, QUANTIZE

# First version of ONNX's operators and of its file format, and first compute capability.
_SINCE: dict[int, tuple[int, int, int]] = {
    TensorProto.FLOAT8E4M3FN: (19, 9, 89),
    TensorProto.FLOAT4E2M1: (23, 11, 100),
}


def versions(network: Network) -> Iterator[Finding]:
    """The file's versions and the target's compute capability have the file's formats; one finding per format."""
    formats = {pair.format: pair.node for pair in reversed(network.pairs.values())}
    for kind in sorted(formats.keys() & _SINCE.keys()):
        opset, ir_version, capability = _SINCE[kind]
        # TensorRT's own operators belong to no version of ONNX.
        standard = formats[kind].op_type in (QUANTIZE, DEQUANTIZE)
        if standard and (network.graph.opset < opset or network.ir_version < ir_version):
            yield warning(
                "opset-too-low",
                formats[kind],
                f"{CODES[kind]} in opset {network.graph.opset} and IR {network.ir_version}: TensorRT takes it, "
                f"ONNX has it from opset {opset} and IR {ir_version} on",
                f"write opset {opset} and IR {ir_version}",
            )
        for target in network.targets:
            if int(target.removeprefix("SM")) < capability:
                what, fix = f"{target} has no {CODES[kind]}", f"build for SM{capability} or higher"
                yield refusal("compute-capability", formats[kind], what, fix)


def dynamic_quantization(network: Network) -> Iterator[Finding]:
    """What TensorRT's operator takes that quantizes to FP4 in blocks."""
    for node in network.graph.nodes:
        if node.op_type == DYNAMIC_QUANTIZE:
            for what, fix in _dynamic_problems(network, node):
                yield refusal("dynamic-quantize", node, what, fix)


def _dynamic_problems(network: Network, node: Any) -> Iterator[tuple[str, str]]:
    attribute, types = network.graph.attribute, network.types
    shape, axis = network.shape(node.input[0]), attribute(node, "axis", DEFAULT_AXIS)
    if shape is not None and len(shape) not in (2, 3):
        yield (
            f"quantizes {len(shape)} dimensions: TensorRT takes 2 or 3",
            "put a Reshape before and behind it",
        )
    elif shape is not None and -len(shape) <= axis < len(shape) and shape[axis] % BLOCK_SIZE:
        what = f"axis {axis} of length {shape[axis]} is not a multiple of {BLOCK_SIZE}"
        yield what, "quantize along the axis that the product sums over, or leave it in FP8"
    size = attribute(node, "block_size", BLOCK_SIZE)
    if size != BLOCK_SIZE:
        yield f"blocks of {size}", f"quantize in blocks of {BLOCK_SIZE}"
    kind = attribute(node, "scale_type", BLOCK_SCALES)
    if kind != BLOCK_SCALES:
        yield f"block scales of {shown(kind)}", f"use {shown(BLOCK_SCALES)}"
    scale, values = (types.get(name, 0) for name in (node.input[1], node.input[0]))
    if scale not in (0, TensorProto.FLOAT) and values not in (0, scale):
        yield f"a scale of {shown(scale)} for {shown(values)}", "make the scale float32"


def block_scales(network: Network) -> Iterator[Finding]:
    """No block scale of a constant has rounded to 0 in FP8 while its codes have not."""
    for pair in network.pairs.values():
        inner, codes = network.block_scales(pair), network.graph.array(pair.data)
        scales = None if inner is None else network.graph.array(inner.data)
        if scales is None or codes is None or scales.ndim != codes.ndim:
            continue
        axis = network.axis(pair)
        spread = np.repeat(scales, codes.shape[axis] // max(scales.shape[axis], 1), axis)
        if spread.shape == codes.shape and ((spread == 0) & (codes != 0)).any():
            count = int((scales == 0).sum())
            what = f"{count} of {scales.size} block scales are 0: what they stand for is lost"
            yield warning("scale-zero", pair.node, what, "choose a smaller scale for the block scales")


def subnormal_scales(network: Network) -> Iterator[Finding]:
    """No constant scale is below its type's normal numbers, where few bits of it are left."""
    import ml_dtypes

    for pair in network.pairs.values():
        inner = network.block_scales(pair)
        values = network.graph.array(pair.scale if inner is None else inner.data)
        if values is None or network.types.get(pair.scale) not in FLOATS:
            continue
        least = float(ml_dtypes.finfo(values.dtype).smallest_normal)
        numbers = np.abs(values.astype(np.float64))
        count = int(((numbers > 0) & (numbers < least)).sum())
        if count:
            what = f"{count} of {values.size} scales are subnormal in {values.dtype}, below {least:.2g}"
            fix = "store it as float32" if inner is None else "choose a smaller scale for the block scales"
            yield warning("scale-subnormal", pair.node, what, fix)
