"""What a calibration will cost, said before it starts: slices, iterations, time, memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from ospq_export.errors import InputError
from ospq_export.graph.slicing import Slice, nodes_between
from ospq_export.recipes import Reconstruction

# A learning step costs a fake-quantized forward pass and a backward pass of about twice its work; a float forward pass over
# the same images is taken for a fifth of both together: a rule of thumb, good for an order of magnitude.
_STEP_IN_PASSES = 5.0
# Passes over all images per slice besides the steps: float, quantized, and three of the error.
_FIXED_PASSES = 5.0


@dataclass(frozen=True)
class Cost:
    """Of one calibration.

    Attributes:
        slices: how many are to be learned.
        iterations: steps in all of them together.
        seconds: estimated from the time of the observation; None where nothing was timed.
        activation_bytes: the most that the activations at two neighbouring cuts take, with the images.
        batch_bytes: the most that one batch of a slice's data takes.
    """

    slices: int
    iterations: int
    seconds: float | None
    activation_bytes: int
    batch_bytes: int

    def summary(self, budget: int) -> str:
        """One line for people."""
        time = "" if self.seconds is None else f", about {_duration(self.seconds)}"
        spilled = self.activation_bytes - budget
        where = f"{self.activation_bytes / 1e9:.2f} GB of activations"
        disk = f", of which {spilled / 1e9:.2f} GB go to disk" if spilled > 0 else ""
        return f"{self.slices} slices, {self.iterations} iterations{time}; {where}{disk}"


def _duration(seconds: float) -> str:
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def kept_bytes_per_image(graph: fx.Graph, piece: Slice | None = None) -> int:
    """float32 bytes that a forward pass keeps for the backward pass, for one image.

    Args:
        graph: captured.
        piece: the part that is run; None means the whole network.

    Returns:
        Every operator's result counts once, but those that share the memory of what they were made from.
    """
    nodes = list(graph.nodes) if piece is None else nodes_between(graph, piece.start, piece.end)
    results = (n for n in nodes if isinstance(n.target, OpOverload) and not n.target.is_view)
    return _image_bytes(graph, [n for n in results if isinstance(n.meta.get("val"), Tensor)])


def step_bytes(graph: fx.Graph, slices: Sequence[Slice], batch_size: int) -> int:
    """About what the largest slice's optimisation step takes: what autograd keeps, and as much in fake-quantized copies."""
    return 2 * batch_size * max(kept_bytes_per_image(graph, s) for s in slices)


def _image_bytes(graph: fx.Graph, nodes: Sequence[fx.Node]) -> int:
    batch = next(n for n in graph.nodes if n.op == "placeholder").meta["val"].shape[0]
    return sum(4 * int(n.meta["val"].numel() // batch) for n in nodes)


def cost_of(
    graph: fx.Graph,
    slices: Sequence[Slice],
    todo: int,
    images: int,
    settings: Reconstruction,
    seconds_per_image: float | None,
) -> Cost:
    """Estimate a calibration.

    Args:
        graph: captured.
        slices: its slicing.
        todo: how many of the slices are still to be learned.
        images: calibration images.
        settings: from the recipe.
        seconds_per_image: measured time of the whole float network per image.
    """
    nodes = {n.name: n for n in graph.nodes}
    starts = [_image_bytes(graph, [nodes[n] for n in (s.start, *s.received)]) for s in slices]
    ends = [_image_bytes(graph, [nodes[n] for n in (s.end, *s.carried)]) for s in slices]
    pairs = list(zip(starts, ends, strict=True))
    seconds = None
    if seconds_per_image is not None:
        share = todo / len(slices)
        linears = len(graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default))
        # Once in float and once quantized, half of a slice on average.
        fitted = min(settings.compensation_images, images) * linears / len(slices)
        steps = settings.iterations * min(settings.batch_size, images) * _STEP_IN_PASSES
        seconds = share * seconds_per_image * (steps + _FIXED_PASSES * images + fitted)
    return Cost(
        slices=todo,
        iterations=todo * settings.iterations,
        seconds=seconds,
        activation_bytes=images * (starts[0] + max(2 * (a + b) for a, b in pairs)),
        batch_bytes=settings.batch_size * max(2 * a + b for a, b in pairs),
    )


def check_budget(cost: Cost, budget: int) -> None:
    """Refuse a budget that cannot even hold one batch.

    Raises:
        InputError: it cannot.
    """
    if cost.batch_bytes > budget:
        raise InputError(
            f"one batch of a slice's activations takes {cost.batch_bytes / 1e6:.1f} MB, the budget is {budget / 1e6:.1f} MB",
            where="`memory_budget`",
            fix="give a larger budget, or lower reconstruction.batch_size",
        )
