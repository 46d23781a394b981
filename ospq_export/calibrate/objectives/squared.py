"""Squared error: all elements alike, weighed, or summed as BRECQ's code sums it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx

from ospq_export.calibrate.objectives.base import Context, Objective, weight_quantizers
from ospq_export.graph.quantizers import WeightQuantizer
from ospq_export.recipes import Reconstruction


class Squared(Objective):
    """Mean squared error, with or without weights: mean(w (output - target)^2). Costs nothing beforehand.

    Attributes:
        weight: float32 that broadcasts with the slice's output; None where all elements count alike.
    """

    def __init__(
        self, settings: Reconstruction, weights: Sequence[WeightQuantizer], weight: Tensor | None = None
    ) -> None:
        super().__init__(settings, weights)
        self.weight = weight

    @classmethod
    def of_slice(
        cls, context: Context, prepared: Any, index: int, piece: fx.GraphModule, target: Tensor
    ) -> Objective:
        """Plain; a subclass finds weights for every slice but the last, whose elements are the network's outputs."""
        last = index == len(context.slices) - 1
        weight = None if last else cls.weight_of(context, prepared, index, target)
        return cls(context.settings, weight_quantizers(piece), weight)

    @classmethod
    def weight_of(cls, context: Context, prepared: Any, index: int, target: Tensor) -> Tensor | None:
        """The weight of every element of a slice's output; None where all count alike."""
        return None

    def raw(self, output: Tensor, target: Tensor) -> Tensor:
        """mean((output - target)^2), weighed."""
        if self.weight is None:
            return F.mse_loss(output, target)
        return ((output - target).square() * self.weight).mean()


class Literal(Squared):
    """The loss of BRECQ's and QDrop's code, to the letter: squared error summed over dimension 1, averaged over the rest.

    Neither term is normalised, and what was learned is kept whatever its error.
    """

    keeps_worse = True

    def __init__(
        self, settings: Reconstruction, weights: Sequence[WeightQuantizer], weight: Tensor | None = None
    ) -> None:
        super().__init__(settings, weights, weight)
        self.rounding_weight = settings.rounding_weight

    def normalise_by(self, initial: float) -> None:
        """Nothing is divided."""
        self.before = initial

    def raw(self, output: Tensor, target: Tensor) -> Tensor:
        """Sum over dimension 1 of (output - target)^2, averaged over the rest."""
        return literal_loss(output, target)


def literal_loss(output: Tensor, target: Tensor) -> Tensor:
    """The loss of BRECQ's and QDrop's code: squared error summed over dimension 1, averaged over the rest."""
    return (output - target).square().sum(1).mean()
