"""What slices are optimised for: the recipe's loss, a class for each."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from ospq_export.calibrate.objectives.base import Context, MakeObjective, Objective
from ospq_export.calibrate.objectives.channel import PerChannel
from ospq_export.calibrate.objectives.divergence import Divergence
from ospq_export.calibrate.objectives.fisher import Fisher
from ospq_export.calibrate.objectives.squared import Literal, Squared
from ospq_export.recipes import Reconstruction

OBJECTIVES: dict[str, type[Squared]] = {
    "normalized": Squared,
    "channel": PerChannel,
    "fisher": Fisher,
    "literal": Literal,
}


def objective_class(settings: Reconstruction) -> type[Squared]:
    """The class of a recipe's loss."""
    return OBJECTIVES[settings.loss.kind]


def objectives(context: Context, prepared: Any = None) -> MakeObjective:
    """What `walk` asks for each slice's objective.

    Args:
        context: of the network.
        prepared: what the class's `prepare` gave, where it is at hand already.
    """
    chosen = objective_class(context.settings)
    shared = chosen.prepare(context) if prepared is None else prepared

    def make(index: int, piece: fx.GraphModule, target: Tensor) -> Objective:
        last = index == len(context.slices) - 1
        kind = Divergence if last and context.settings.final_loss == "kl" else chosen
        return kind.of_slice(context, shared, index, piece, target)

    return make
