"""The O(L) walk: slice by slice, keeping the float and the quantized activations at the current cut only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from ospq_export.calibrate.objectives.base import MakeObjective
from ospq_export.calibrate.reconstruct.activations import SliceData, Tensors, forward
from ospq_export.calibrate.reconstruct.reconstructor import Reconstructor, SliceMetrics
from ospq_export.calibrate.reconstruct.store import Store
from ospq_export.graph.quantizers import Mode, QuantizedGraph
from ospq_export.graph.slicing import Slice, extract


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
    make_objective: MakeObjective | None = None,
    store: Store | None = None,
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
        make_objective: what each slice is optimised for; None takes the recipe's loss without weights.
        store: holds the activations; None keeps them where the images lie.
    """
    count, device = len(images), reconstructor.device
    float_input: Tensors = (images,)
    quantized_input: Tensors = (images,)
    for index, bounds in enumerate(slices):
        started = time.monotonic()
        piece = extract(network.module, bounds)
        float_output = forward(piece, float_input, Mode.FLOAT, device, count, store)
        if not restore(index, piece):
            data = SliceData(float_input, quantized_input, float_output[0], count)
            objective = None if make_objective is None else make_objective(index, piece, float_output[0])
            metrics = reconstructor.run(piece, data, seed + 1_000_003 * (index + 1), objective)
            yield Step(index, piece, metrics, time.monotonic() - started)
            del data, objective
        if index + 1 < len(slices):
            quantized_input = forward(piece, quantized_input, Mode.QUANTIZE, device, count, store)
            float_input = float_output
