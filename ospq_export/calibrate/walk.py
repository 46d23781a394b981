"""The O(L) walk: slice by slice, keeping the float and the quantized activations at the current cut only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ospq_export.calibrate.reconstruct import Reconstructor, SliceData, SliceMetrics
from ospq_export.graph.quantizers import Mode, QuantizedGraph, set_mode
from ospq_export.graph.slicing import Slice, extract

# Forward passes over the cache use a batch of their own, so that resuming gives the same bytes whatever the recipe.
FORWARD_BATCH = 64


@dataclass(frozen=True)
class Step:
    """One slice of the walk, done."""

    index: int
    piece: fx.GraphModule
    metrics: SliceMetrics
    seconds: float


def walk(
    network: QuantizedGraph,
    slices: Sequence[Slice],
    images: Tensor,
    reconstructor: Reconstructor,
    seed: int,
    restore: Callable[[int, fx.GraphModule], bool] = lambda _index, _piece: False,
) -> Iterator[Step]:
    """Reconstruct slice after slice and yield each one when it is done.

    Each slice costs one float and one quantized forward pass over the calibration images besides its iterations; memory holds
    the activations at two neighbouring cuts, float and quantized.

    Args:
        network: observed (ranges searched, nearest codes).
        slices: a slicing of the network, in order.
        images: float32 (N, C, H, W), normalised.
        reconstructor: settings and device.
        seed: slice k uses a generator seeded from it and k, so a resumed walk takes the same steps.
        restore: called first for each slice; returns True after it has put an already finished slice's state back.
    """
    float_input = quantized_input = images
    for index, piece_bounds in enumerate(slices):
        started = time.monotonic()
        piece = extract(network.module, piece_bounds)
        target = forward(piece, float_input, Mode.FLOAT, reconstructor.device)
        if not restore(index, piece):
            data = SliceData(float_input, quantized_input, target)
            metrics = reconstructor.run(piece, data, seed + 1_000_003 * (index + 1))
            yield Step(index, piece, metrics, time.monotonic() - started)
        if index + 1 < len(slices):
            quantized_input = forward(piece, quantized_input, Mode.QUANTIZE, reconstructor.device)
            float_input = target


def forward(piece: fx.GraphModule, inputs: Tensor, mode: Mode, device: torch.device) -> Tensor:
    """A slice's output for all inputs, in batches; it lies where the inputs lie."""
    set_mode(piece, mode)
    outputs: Tensor | None = None
    with torch.no_grad():
        for start in range(0, len(inputs), FORWARD_BATCH):
            batch = inputs[start : start + FORWARD_BATCH].to(device)
            result = piece(batch, len(batch)).to(inputs.device)
            if outputs is None:
                outputs = torch.empty(
                    (len(inputs), *result.shape[1:]), dtype=result.dtype, device=inputs.device
                )
            outputs[start : start + len(batch)] = result
    assert outputs is not None
    return outputs
