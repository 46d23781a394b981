"""Observation: initial ranges of all activations, and round-to-nearest weights, from the float network on calibration images."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ospq_export.errors import InputError
from ospq_export.formats.search import compress
from ospq_export.graph.quantizers import Mode, QuantizedGraph, _Observer
from ospq_export.world.processes import SOLO, World

log = logging.getLogger(__name__)


def observe(
    network: QuantizedGraph,
    images: Tensor,
    *,
    batch_size: int,
    seed: int,
    values_per_tensor: int = 1 << 18,
    advance: Callable[[], None] = lambda: None,
    world: World = SOLO,
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

    Raises:
        InputError: an activation is not finite on these images.
    """
    _collect(network, images, batch_size, seed, values_per_tensor, advance, world)
    constant = []
    for quantizer in network.activations.values():
        assert quantizer.observer is not None
        values = quantizer.observer.values()
        if not bool(torch.isfinite(values).all()):
            raise InputError(
                f"the float network's activation {quantizer.name} is not finite on the calibration images",
                fix="check the checkpoint and the preprocessing",
            )
        found = quantizer.format.search_range(compress(values), may_shift=quantizer.may_shift)
        quantizer.set_range(found)
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


def _collect(
    network: QuantizedGraph,
    images: Tensor,
    batch_size: int,
    seed: int,
    wanted: int,
    advance: Callable[[], None],
    world: World,
) -> None:
    batches = images.split(batch_size)
    device = next(network.module.buffers()).device
    for index, quantizer in enumerate(network.activations.values()):
        quantizer.observer = _Observer(max(1, wanted // len(batches)), seed + index)
    network.set_mode(Mode.OBSERVE)
    try:
        with torch.no_grad():
            for place in range(world.rank, len(batches), world.size):
                _reseed(network, seed, place)
                network.module(batches[place].to(device))
                advance()
    finally:
        network.set_mode(Mode.FLOAT)
    _exchange(network, len(batches), world)


def _observers(network: QuantizedGraph) -> list[_Observer]:
    return [q.observer for q in network.activations.values() if q.observer is not None]


def _reseed(network: QuantizedGraph, seed: int, place: int) -> None:
    """What is kept of a batch depends on its place alone, not on who observes it."""
    for index, observer in enumerate(_observers(network)):
        observer.generator.manual_seed(seed + index + 1_000_003 * place)


def _exchange(network: QuantizedGraph, batches: int, world: World) -> None:
    """Give every process what all of them kept, in the order of the batches."""
    observers = _observers(network)
    places = range(world.rank, batches, world.size)
    mine = {place: [o.kept[k] for o in observers] for k, place in enumerate(places)}
    for observer, kept in zip(observers, zip(*world.gather(mine, batches), strict=True), strict=True):
        observer.kept = list(kept)


def observation_steps(network: QuantizedGraph, images: int, batch_size: int) -> int:
    """How often `observe` calls `advance`."""
    return -(-images // batch_size) + len(network.activations) + len(network.weights)
