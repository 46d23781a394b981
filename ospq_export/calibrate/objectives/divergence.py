"""The task's own divergence, for the last slice: its output is the network's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from ospq_export.calibrate.objectives.base import Context, Objective, weight_quantizers


class Divergence(Objective):
    """How far the network's output is from the float network's: of a classifier the KL divergence. Costs nothing beforehand."""

    def __init__(self, context: Context, piece: fx.GraphModule) -> None:
        super().__init__(context.settings, weight_quantizers(piece))
        self.task = context.task

    @classmethod
    def of_slice(
        cls, context: Context, prepared: Any, index: int, piece: fx.GraphModule, target: Tensor
    ) -> Objective:
        """The last slice's."""
        return cls(context, piece)

    def unit(self, target: Tensor) -> float:
        """A divergence has no unit."""
        return 1.0

    def raw(self, output: Tensor, target: Tensor) -> Tensor:
        """See `Task.divergence`."""
        return self.task.divergence(output, target)
