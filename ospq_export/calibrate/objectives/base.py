"""What a slice is optimised for: one class for each loss, with its formula, its cost and its source."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ospq_export.graph.quantizers import QuantizedGraph, WeightQuantizer, own_quantizers
from ospq_export.graph.slicing import Slice
from ospq_export.recipes import Reconstruction
from ospq_export.tasks.base import Task
from ospq_export.tasks.classify import CLASSIFY

if TYPE_CHECKING:
    from ospq_export.calibrate.reconstruct.activations import SliceData


@dataclass(frozen=True)
class Context:
    """What the objectives of a network's slices may look at before the first slice is learned.

    Attributes:
        network: observed.
        slices: its slicing.
        images: float32 (N, C, H, W), normalised.
        settings: the recipe's.
        device: where the network lies.
        seed: of what is drawn.
        task: what the network's output is.
    """

    network: QuantizedGraph
    slices: Sequence[Slice]
    images: Tensor
    settings: Reconstruction
    device: torch.device
    seed: int
    task: Task = CLASSIFY


class Objective(ABC):
    """Reconstruction loss of one slice, and the weight of its rounding term, in the recipe's normalisation.

    Attributes:
        keeps_worse: whether a learned state is kept although the loss has not fallen.
        preparation: passes over all images, forward and backward, that `prepare` costs.
        rounding_weight: of the rounding term summed over all weights of the slice.
        before: the reconstruction loss with nearest rounding, before learning; 0 until `normalise_by` has said.
    """

    keeps_worse: ClassVar[bool] = False
    preparation: ClassVar[float] = 0.0

    def __init__(self, settings: Reconstruction, weights: Sequence[WeightQuantizer]) -> None:
        self.normaliser = 1.0
        self.side_weights: list[float] = []
        self.before = 0.0
        # Mean instead of sum: the balance of both terms then depends neither on a slice's size nor on a layout.
        self.rounding_weight = settings.rounding_weight / max(sum(w.codes.numel() for w in weights), 1)

    @classmethod
    def prepare(cls, context: Context) -> Any:
        """What all slices share, found once; None where nothing is needed."""
        return None

    @classmethod
    @abstractmethod
    def of_slice(
        cls, context: Context, prepared: Any, index: int, piece: fx.GraphModule, target: Tensor
    ) -> Objective:
        """The objective of one slice.

        Args:
            context: of the network.
            prepared: what `prepare` gave.
            index: the slice's place.
            piece: the slice.
            target: the float network's tensor at its end, on all calibration images.
        """

    def normalise_by(self, initial: float) -> None:
        """Divide the reconstruction loss by its value before learning (APHQ-ViT)."""
        self.normaliser = max(initial, 1e-12)
        self.before = initial / self.normaliser

    @abstractmethod
    def raw(self, output: Tensor, target: Tensor) -> Tensor:
        """The reconstruction loss of a batch, not normalised; scalar, a mean over the images."""

    def weigh_sides(self, data: SliceData) -> None:
        """Let every output of the network on the slice's way count as much as its end, relative to their variances (ours)."""
        unit = self.unit(data.target) if data.sides else 0.0
        self.side_weights = [unit / max(float(side.float().var()), 1e-12) for side in data.sides]

    def unit(self, target: Tensor) -> float:
        """The loss of an output as wrong as its mean: the target's variance."""
        return float(target.float().var())

    def of(self, outputs: Sequence[Tensor], data: SliceData) -> Tensor:
        """The loss of a batch, not normalised: of the slice's end, and the squared error of the outputs on its way.

        Args:
            outputs: what the slice returned.
            data: its targets.
        """
        (end, *sides), (target, *targets) = data.pairs(outputs)
        loss = self.raw(end, target)
        for weight, side, wanted in zip(self.side_weights, sides, targets, strict=True):
            loss = loss + weight * F.mse_loss(side, wanted)
        return loss

    def reconstruction(self, outputs: Sequence[Tensor], data: SliceData) -> Tensor:
        """The loss of a batch, normalised; arguments as `of` has them."""
        return self.of(outputs, data) / self.normaliser


MakeObjective = Callable[[int, fx.GraphModule, Tensor], Objective]
"""Slice's place, slice, target on all calibration images -> what it is optimised for."""


def weight_quantizers(piece: fx.GraphModule) -> list[WeightQuantizer]:
    """The weight quantizers that a slice owns."""
    return [m for m in own_quantizers(piece) if isinstance(m, WeightQuantizer)]
