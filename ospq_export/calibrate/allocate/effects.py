"""What each operand costs the network's output, as records; and which operators to leave in float."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from ospq_export.tasks.statistics import Record

# In a folder of its own, which is no run.
SENSITIVITY, SENSITIVITY_PLOT = "sensitivity.json", "sensitivity.png"


class Operand(Record):
    """One operand in one format.

    Attributes:
        name: of its quantizer, such as "blocks.0.attn.qkv.weight".
        operator: whose it is; of an activation that several read, the first.
        kind: "weight" or "activation".
        wanted: the format that was asked for.
        format: the one that it has: what takes over where that refuses.
        estimate: of the divergence that it causes, to second order.
        measured: the same, measured; None where it was not.
    """

    name: str
    operator: str
    kind: str
    wanted: str
    format: str
    estimate: float
    measured: float | None = None


class Sensitivity(Record):
    """All operands of a network.

    Attributes:
        task: whose divergence it is.
        images: how many it was measured on.
        operators: names, in graph order.
        operands: in graph order, format by format.
        scale: the median of measured over estimated.
        passes: forward passes of an image that it took, but for the observation.
        passes_of_measuring: those that measuring every operand in every format would have taken.
    """

    task: str
    images: int
    operators: list[str]
    operands: list[Operand] = Field(default_factory=list)
    scale: float = 1.0
    passes: int = 0
    passes_of_measuring: int = 0

    def loss(self, operand: Operand) -> float:
        """The divergence that an operand causes: as measured, or as estimated on that scale."""
        return self.scale * operand.estimate if operand.measured is None else operand.measured

    def by_operator(self, wanted: str) -> dict[str, float]:
        """The losses of each operator's operands together in a format, the largest first."""
        found = dict.fromkeys(self.operators, 0.0)
        for operand in self.operands:
            if operand.wanted == wanted:
                found[operand.operator] += self.loss(operand)
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def to_leave(self, wanted: str, share: float = 0.5) -> list[str]:
        """The fewest operators that cause a share of the loss in a format, as patterns for a recipe's overrides."""
        losses = self.by_operator(wanted)
        chosen: list[str] = []
        while losses and sum(losses[n] for n in chosen) < share * sum(losses.values()):
            chosen.append(next(n for n in losses if n not in chosen))
        return globs(chosen, self.operators)


def globs(chosen: Sequence[str], operators: Sequence[str]) -> list[str]:
    """Patterns that fit the chosen operators and no other: "blocks.3.*" where all of that block are chosen."""
    left, found = list(chosen), []
    while left:
        parts = left[0].split(".")
        heads = (".".join(parts[:n]) for n in range(1, len(parts)))
        whole = ((head, [o for o in operators if o.startswith(f"{head}.")]) for head in heads)
        fitting = next(((head, inside) for head, inside in whole if set(inside) <= set(chosen)), None)
        pattern, covered = (left[0], left[:1]) if fitting is None else (f"{fitting[0]}.*", fitting[1])
        if len(covered) == 1:
            pattern = left[0]
        found.append(pattern)
        left = [name for name in left if name not in covered]
    return found
