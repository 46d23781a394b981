"""Bias correction: what quantization shifts on average is given back by the biases, which stay float (ours).

The idea is that of data-free quantization's bias correction (Nagel et al. 2019), with both means measured on the slice's own
calibration inputs instead of derived from BatchNorm.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, fx

from ospq_export.calibrate.reconstruct.activations import FORWARD_BATCH, SliceData
from ospq_export.graph.quantizers import CorrectedBias, Mode, own_quantizers, set_mode
from ospq_export.graph.rewrite import Tap
from ospq_export.runs.quantizers import quantizer_tensors

aten = torch.ops.aten


def _means(
    piece: fx.GraphModule, data: SliceData, nodes: set[fx.Node], mode: Mode, device: torch.device
) -> dict[fx.Node, Tensor]:
    """Mean per output channel of chosen linear and conv2d nodes, float64."""
    sums: dict[fx.Node, Tensor] = {}
    counts: Counter[fx.Node] = Counter()

    def add(_tap: Tap, n: fx.Node, value: Tensor) -> None:
        axis = 1 if n.target is aten.conv2d.default else -1
        channels_last = value.movedim(axis, -1).flatten(0, -2)
        sums[n] = sums.get(n, 0.0) + channels_last.sum(0, dtype=torch.float64)
        counts[n] += len(channels_last)

    set_mode(piece, mode)
    tap = Tap(piece, dict.fromkeys(nodes, add))
    with torch.no_grad():
        for start in range(0, data.images, FORWARD_BATCH):
            part = data.select(slice(start, start + FORWARD_BATCH)).to(device)
            inputs = part.float_input if mode is Mode.FLOAT else part.quantized_input
            tap.run(inputs[0], part.images, *inputs[1:])
    return {node: total / counts[node] for node, total in sums.items()}


def corrected_biases(piece: fx.GraphModule) -> dict[fx.Node, CorrectedBias]:
    """The linear and conv2d nodes of a slice whose bias can be corrected, in topological order, with their bias modules."""
    modules = dict(piece.named_modules())
    result = {}
    for node in piece.graph.nodes:
        if node.op != "call_function" or node.target not in (aten.linear.default, aten.conv2d.default):
            continue
        source = node.args[2] if len(node.args) > 2 else None
        module = modules.get(str(source.target)) if isinstance(source, fx.Node) else None
        if isinstance(module, CorrectedBias):
            result[node] = module
    return result


def learned_tensors(piece: fx.GraphModule) -> dict[str, Tensor]:
    """All that calibration changes in a slice's own parts, by name: its quantizers' tensors and its biases."""
    biases = {bias.name: bias.value for bias in corrected_biases(piece).values()}
    return quantizer_tensors(own_quantizers(piece)) | biases


def correct_biases(piece: fx.GraphModule, data: SliceData, device: torch.device) -> None:
    """Give every linear and conv2d of a slice the float network's mean output per channel, one operator after the other.

    Args:
        piece: from `extract`; its quantizers are settled.
        data: some calibration images.
        device: where the slice runs.
    """
    biases = corrected_biases(piece)
    if not biases:
        return
    wanted = _means(piece, data, set(biases), Mode.FLOAT, device)
    for node, bias in biases.items():
        # Measured anew each time: correcting one operator changes the mean of those behind it.
        found = _means(piece, data, {node}, Mode.QUANTIZE, device)
        bias.value.add_((wanted[node] - found[node]).to(bias.value.dtype))
