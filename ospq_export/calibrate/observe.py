"""What is measured of the float network: initial ranges, nearest weights, and where its outliers are."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ospq_export.calibrate.checkpoints import Events, Pieces, no_events
from ospq_export.errors import InputError
from ospq_export.formats.choice import integers
from ospq_export.formats.search import compress
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode, QuantizedGraph, _Observer
from ospq_export.graph.rewrite import Tap
from ospq_export.graph.slicing import cut_points
from ospq_export.runs.manifest import OutlierRecord
from ospq_export.world.processes import SOLO, World

log = logging.getLogger(__name__)
# Seconds: a batch that takes less is sooner observed again than read from the disk.
_WORTH_KEEPING = 2.0


def observe(
    network: QuantizedGraph,
    images: Tensor,
    *,
    batch_size: int,
    seed: int,
    values_per_tensor: int = 1 << 18,
    advance: Callable[[], None] = lambda: None,
    world: World = SOLO,
    pieces: Pieces | None = None,
    events: Events = no_events,
) -> None:
    """Set every activation range by minimum MSE over the images, and every weight to its nearest codes.

    Args:
        network: quantizers in any mode; left in Mode.FLOAT.
        images: float32 (N, C, H, W), normalised.
        batch_size: images per forward pass.
        seed: of the random choice of values.
        values_per_tensor: how many values of each tensor are kept for the search, besides the extremes.
        advance: called after each batch and after each quantizer, for a progress bar.
        world: who shares the batches; all end with the same ranges, whatever their number.
        pieces: where each process keeps what its batches gave, if they take long; a batch that is found there is not run.
        events: told of every batch that was run.

    Raises:
        InputError: an activation is not finite on these images, or a checkpoint is damaged or cannot be written.
    """
    _Collection(network, images.split(batch_size), seed, values_per_tensor, pieces, events).run(
        world, advance
    )
    constant = []
    for quantizer in network.activations.values():
        assert quantizer.observer is not None
        values = quantizer.observer.values()
        if not bool(torch.isfinite(values).all()):
            raise InputError(
                f"the float network's activation {quantizer.name} is not finite on the calibration images",
                fix="check the checkpoint and the preprocessing",
            )
        quantizer.set_range(quantizer.format.search_range(compress(values), may_shift=quantizer.may_shift))
        if bool(values.min() == values.max()):
            constant.append(quantizer.name)
        quantizer.observer = None
        advance()
    if constant:
        log.warning(
            "%d activations have one and the same value on all calibration images, so no range fits another one: %s%s",
            len(constant),
            ", ".join(constant[:5]),
            ", ..." if len(constant) > 5 else "",
        )
    for weight in network.weights.values():
        weight.round_to_nearest(network.module.get_buffer(weight.constant))
        advance()


class _Collection:
    """What the float network's activations are like, batch by batch.

    Args:
        network: its quantizers get observers.
        batches: (N, C, H, W) each, normalised.
        seed: of the choice of values.
        wanted: how many values of a tensor are kept, over all batches.
        pieces, events: as `observe` has them.
    """

    def __init__(
        self,
        network: QuantizedGraph,
        batches: Sequence[Tensor],
        seed: int,
        wanted: int,
        pieces: Pieces | None,
        events: Events,
    ) -> None:
        self.network, self.batches, self.seed = network, batches, seed
        self.pieces, self.events = pieces, events
        self.device = next(network.module.buffers()).device
        self.observers = [_Observer(max(1, wanted // len(batches)), seed) for _ in network.activations]

    def run(self, world: World, advance: Callable[[], None]) -> None:
        """Run the float network; every process ends with what all of them kept, in the order of the batches."""
        for quantizer, observer in zip(self.network.activations.values(), self.observers, strict=True):
            quantizer.observer = observer
        places = range(world.rank, len(self.batches), world.size)
        self.network.set_mode(Mode.OBSERVE)
        try:
            with torch.no_grad():
                for place in places:
                    if not self._restored(place):
                        self._observed(place)
                    advance()
        finally:
            self.network.set_mode(Mode.FLOAT)
        mine = {place: [o.kept[k] for o in self.observers] for k, place in enumerate(places)}
        gathered = zip(*world.gather(mine, len(self.batches)), strict=True)
        for observer, kept in zip(self.observers, gathered, strict=True):
            observer.kept = list(kept)

    def _observed(self, place: int) -> None:
        started = time.monotonic()
        # What is kept of a batch depends on its place alone, not on who observes it.
        for index, observer in enumerate(self.observers):
            observer.generator.manual_seed(self.seed + index + 1_000_003 * place)
        self.network.module(self.batches[place].to(self.device))
        seconds = time.monotonic() - started
        if self.pieces is not None and seconds >= _WORTH_KEEPING:
            self.pieces.write(place, {str(i): o.kept[-1] for i, o in enumerate(self.observers)})
        facts = {"batch": place, "batches": len(self.batches), "images": len(self.batches[place])}
        self.events("observe", {**facts, "seconds": round(seconds, 3)})

    def _restored(self, place: int) -> bool:
        """Take over what an interrupted observation kept of a batch."""
        found = None if self.pieces is None else self.pieces.read(place)
        if found is None:
            return False
        for index, observer in enumerate(self.observers):
            observer.kept.append(found[0][str(index)])
        return True


def observation_steps(network: QuantizedGraph, images: int, batch_size: int) -> int:
    """How often `observe` calls `advance`."""
    return -(-images // batch_size) + len(network.activations) + len(network.weights)


_LARGEST, _WORST = 0.001, 0.01


class _Moments:
    """Sums over batches, float64."""

    def __init__(self) -> None:
        self.count, self.largest, self.top = 0, 0.0, 0.0
        self.sums = torch.zeros(4, dtype=torch.float64)
        self.channels: Tensor | None = None

    def add(self, x: Tensor, axis: int) -> None:
        values = x.detach().double().flatten()
        self.count += values.numel()
        self.largest = max(self.largest, float(values.abs().max()))
        self.sums += torch.stack([values.pow(k).sum() for k in (1, 2, 3, 4)]).cpu()
        # The largest elements are taken batch by batch: exact needs every value at once, and batches are alike.
        share = max(1, round(_LARGEST * values.numel()))
        self.top += float(values.square().topk(share).values.sum())
        squares = x.detach().double().movedim(axis, -1).flatten(0, -2).square().sum(0).cpu()
        self.channels = squares if self.channels is None else self.channels + squares

    def record(self, name: str, kind: Any) -> OutlierRecord:
        assert self.channels is not None
        m1, m2, m3, m4 = (self.sums / self.count).tolist()
        variance = max(m2 - m1 * m1, 1e-24)
        fourth = m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4
        total = max(float(self.sums[1]), 1e-24)
        worst = max(1, round(_WORST * len(self.channels)))
        return OutlierRecord(
            name=name,
            kind=kind,
            max_over_std=self.largest / variance**0.5,
            kurtosis=fourth / variance**2,
            largest_share=self.top / total,
            channel_share=float(self.channels.topk(worst).values.sum()) / total,
            largest=self.largest,
        )


def _is_image(node: fx.Node) -> bool:
    near = [node, *node.users, *node.all_input_nodes]
    return any(n.target is torch.ops.aten.conv2d.default for n in near)


def outlier_profile(
    captured: fx.GraphModule,
    images: Tensor,
    *,
    batch_size: int = 32,
    advance: Callable[[], None] = lambda: None,
) -> list[OutlierRecord]:
    """Outlier statistics at every cut point and at the tensor of every activation quantizer, in graph order.

    Args:
        captured: from `capture`, equalized or not.
        images: float32 (N, C, H, W), normalised.
        batch_size: images per forward pass.
        advance: called after each batch.
    """
    network = insert_quantizers(captured, integers(8, 8))
    points = {n.name for n in cut_points(captured.graph)}
    names = {f"quantizers.{name.replace('.', '__')}": name for name in network.activations}
    labels: dict[fx.Node, tuple[str, str]] = {}
    for node in network.module.graph.nodes:
        if node.name in points and node.op != "placeholder":
            labels[node] = (node.name, "cut")
        elif node.op == "call_module" and str(node.target) in names:
            labels[node] = (names[str(node.target)], "quantizer")
    watched = {node: _Moments() for node in labels}

    def add(_tap: Tap, n: fx.Node, value: Tensor) -> None:
        # Channels lie second in what a convolution works on, last elsewhere.
        watched[n].add(value, 1 if value.dim() == 4 and _is_image(n) else -1)

    tap = Tap(network.module, dict.fromkeys(watched, add))
    device = next(network.module.buffers()).device
    with torch.no_grad():
        for batch in images.split(batch_size):
            tap.run(batch.to(device))
            advance()
    return [watched[node].record(name, kind) for node, (name, kind) in labels.items()]
