"""Activations at a cut, for all calibration images: selecting images, and running a slice over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from ospq_export.calibrate.reconstruct.store import Store
from ospq_export.graph.quantizers import Mode, set_mode
from ospq_export.graph.slicing import run_slice
from ospq_export.world.processes import SOLO, World

Tensors = tuple[Tensor, ...]
"""What is alive at a cut: the start's tensor first, then what is handed on. A first dimension is a multiple of the images."""

# Forward passes over the cache use a batch of their own, so that resuming gives the same bytes whatever the recipe.
FORWARD_BATCH = 64


@dataclass(frozen=True)
class SliceData:
    """A slice's inputs and target on the calibration images, on any device.

    Attributes:
        float_input: the float network's tensors at the slice's start.
        quantized_input: the quantized prefix's tensors there.
        target: the float network's tensor at the slice's end.
        images: how many images they belong to.
        sides: the float network's outputs on the way to the end, as `extract` has them.
    """

    float_input: Tensors
    quantized_input: Tensors
    target: Tensor
    images: int
    sides: Tensors = ()

    def pairs(self, outputs: Sequence[Tensor]) -> tuple[Tensors, Tensors]:
        """Of what a slice returned, what it is judged by: its end and the sides, and the float network's like."""
        sides = outputs[len(outputs) - len(self.sides) :] if self.sides else ()
        return (outputs[0], *sides), (self.target, *self.sides)

    def select(self, chosen: Tensor | slice) -> SliceData:
        """The same for some of the images."""
        wanted = torch.arange(self.images)[chosen]
        return replace(self.map(lambda t: rows_of(t, wanted, self.images)), images=len(wanted))

    def to(self, device: torch.device, *, non_blocking: bool = False) -> SliceData:
        """The same on another device."""
        return self.map(lambda t: t.to(device, non_blocking=non_blocking))

    def copy_(self, other: SliceData) -> None:
        """Overwrite the tensors with those of data of the same shapes."""
        ours, theirs = ((*d.float_input, *d.quantized_input, d.target, *d.sides) for d in (self, other))
        for held, given in zip(ours, theirs, strict=True):
            held.copy_(given, non_blocking=True)

    def map(self, function: Callable[[Tensor], Tensor]) -> SliceData:
        """The same with every tensor replaced by what a function makes of it."""
        floats, quantized = tuple(map(function, self.float_input)), tuple(map(function, self.quantized_input))
        sides = tuple(map(function, self.sides))
        return SliceData(floats, quantized, function(self.target), self.images, sides)


def rows_of(tensor: Tensor, chosen: Tensor, images: int) -> Tensor:
    """The rows of some images of a tensor whose first dimension holds equally many rows, windows say, per image."""
    chosen = chosen.to(tensor.device)
    per_image = tensor.shape[0] // images
    if per_image == 1:
        return tensor.index_select(0, chosen)
    return tensor.unflatten(0, (images, per_image)).index_select(0, chosen).flatten(0, 1)


def forward(
    piece: fx.GraphModule,
    inputs: Sequence[Tensor],
    mode: Mode,
    device: torch.device,
    images: int,
    store: Store | None = None,
) -> Tensors:
    """A slice's tensors at its end for all images, in batches; they lie where the store has room, or where the inputs lie.

    Args:
        piece: from `extract`.
        inputs: the tensors at its start.
        mode: of the slice's quantizers.
        device: where the slice runs.
        images: how many images the inputs belong to.
        store: allocates the results; None puts them beside the inputs.
    """
    set_mode(piece, mode)
    empty = partial(torch.empty, device=inputs[0].device) if store is None else store.empty
    results: list[Tensor] = []
    with torch.no_grad():
        for start in range(0, images, FORWARD_BATCH):
            chosen = torch.arange(start, min(start + FORWARD_BATCH, images))
            batch = [rows_of(t, chosen, images).to(device) for t in inputs]
            for index, part in enumerate(run_slice(piece, batch, len(chosen))):
                per_image = part.shape[0] // len(chosen)
                if start == 0:
                    results.append(empty((images * per_image, *part.shape[1:]), dtype=part.dtype))
                results[index][start * per_image : (start + len(chosen)) * per_image] = part
            if store is not None:
                store.trim()
    return tuple(results)


class Batches:
    """An endless sequence of random batches, without replacement within a batch.

    Where the data lie in host memory or in files and the slice runs on a GPU, a thread fetches the next batch into pinned
    memory and starts its copy while the present one is worked on. Which images a batch has depends on the seed alone; of
    several processes with one seed, each has its share of the batch.
    """

    def __init__(
        self, data: SliceData, batch_size: int, device: torch.device, seed: int, world: World = SOLO
    ) -> None:
        self.data, self.device, self.world = data, device, world
        self.count = min(batch_size, data.images)
        self.generator = torch.Generator().manual_seed(seed)
        ahead = device.type != "cpu" and data.target.device.type == "cpu"
        self.pool = ThreadPoolExecutor(1, "batches") if ahead else None
        self.pending: Future[SliceData] | None = None

    def next(self) -> SliceData:
        """The next batch."""
        if self.pool is None:
            return self._gather().to(self.device)
        ready = self.pending or self.pool.submit(self._pinned)
        self.pending = self.pool.submit(self._pinned)
        return ready.result().to(self.device, non_blocking=True)

    def close(self) -> None:
        """Stop fetching."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def _gather(self) -> SliceData:
        picks = torch.randperm(self.data.images, generator=self.generator)[: self.count]
        return self.data.select(picks[self.world.rank :: self.world.size])

    def _pinned(self) -> SliceData:
        # A GPU copies from pinned memory while it computes.
        return self._gather().map(Tensor.pin_memory)
