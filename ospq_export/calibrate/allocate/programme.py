"""Which format every group of operators gets: an integer programme, solved by scipy's `milp` (HiGHS).

A group takes one of its formats. The loss is the sum of the groups' losses, as if they did not depend on each other; the cost the
sum of their costs, and of the conversions between groups of other kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from ospq_export.engines.rates import HALF

Floats = NDArray[np.float64]
# By so much, as a share, sums of the same numbers in another order may exceed a limit that one of them is.
_ROUNDING = 1e-9


def converts(made: str, read: str) -> bool:
    """Whether a result of one kind is converted for an operand of another; what is read in float is read as it was written."""
    return read not in (made, HALF)


@dataclass(frozen=True)
class Border:
    """Two groups, the first of which writes what the second reads.

    Attributes:
        producer, reader: indices of groups.
        made, read: (F,) kinds of the result and of the operand, by the format of the own group.
        cost: added where there is a conversion between the two.
    """

    producer: int
    reader: int
    made: Sequence[str]
    read: Sequence[str]
    cost: float

    def converts(self, its: int, own: int) -> bool:
        """Whether there is a conversion with these formats."""
        return converts(self.made[its], self.read[own])


@dataclass(frozen=True)
class Programme:
    """What there is to choose from.

    Attributes:
        losses, costs: (G, F) of every group in every format; not finite where the group cannot have the format.
        borders: where there may be conversions.
    """

    losses: Floats
    costs: Floats
    borders: Sequence[Border] = ()

    def loss(self, chosen: Sequence[int]) -> float:
        """Of a choice: a format for each group."""
        return float(sum(self.losses[g, f] for g, f in enumerate(chosen)))

    def cost(self, chosen: Sequence[int]) -> float:
        """Of a choice, with its conversions."""
        converted = (b for b in self.borders if b.converts(chosen[b.producer], chosen[b.reader]))
        return float(sum(self.costs[g, f] for g, f in enumerate(chosen))) + sum(b.cost for b in converted)

    def least_loss(self, cost: float) -> list[int] | None:
        """The choice with the least loss that costs no more; None where there is none."""
        return self._solve(self._row(self.losses, 0.0), self._row(self.costs, 1.0), self.cost, cost)

    def least_cost(self, loss: float) -> list[int] | None:
        """The cheapest choice that loses no more; None where there is none."""
        return self._solve(self._row(self.costs, 1.0), self._row(self.losses, 0.0), self.loss, loss)

    def front(self, points: int) -> list[list[int]]:
        """Choices that no other beats in both, from the cheapest to the one that loses least.

        Args:
            points: bounds of the cost that are tried, evenly spaced.
        """
        cheapest, best = self.least_cost(np.inf), self._point(np.inf)
        assert cheapest is not None and best is not None
        bounds = np.linspace(self.cost(cheapest), self.cost(best), max(points, 2))
        found: list[list[int]] = []
        for choice in [c for c in map(self._point, bounds) if c is not None] + [best]:
            if not found or self.loss(choice) < self.loss(found[-1]):
                found.append(choice)
        return found

    def _point(self, cost: float) -> list[int] | None:
        """The cheapest of the choices that lose least within a cost."""
        found = self.least_loss(float(cost))
        return None if found is None else self.least_cost(self.loss(found))

    def _row(self, values: Floats, borders: float) -> Floats:
        """Coefficients of the variables: a group's formats one after the other, and then the borders."""
        own = np.where(self._possible, values, 0.0).ravel()
        return np.concatenate([own, [borders * b.cost for b in self.borders]])

    @property
    def _possible(self) -> NDArray[np.bool_]:
        return np.isfinite(self.losses) & np.isfinite(self.costs)

    def _solve(
        self, objective: Floats, limited: Floats, value: Callable[[Sequence[int]], float], limit: float
    ) -> list[int] | None:
        """The choice with the least objective whose value keeps to the limit, but for rounding; None where there is none."""
        groups, formats = self.losses.shape
        constraints = self._constraints(limited, limit)
        upper = np.concatenate([self._possible.ravel().astype(float), np.ones(len(self.borders))])
        integrality = np.concatenate([np.ones(groups * formats), np.zeros(len(self.borders))])
        while True:
            found = milp(
                objective / (float(np.abs(objective).max()) or 1.0),
                constraints=constraints,
                bounds=Bounds(0, upper),
                integrality=integrality,
                options={"mip_rel_gap": 0.0},
            )
            if found.x is None:
                return None
            chosen = [int(i) for i in found.x[: groups * formats].reshape(groups, formats).argmax(1)]
            if value(chosen) <= limit * (1 + _ROUNDING):
                return chosen
            # HiGHS takes what is a millionth above a limit for as large: this choice is not to come again.
            taken = np.zeros(len(objective))
            taken[[g * formats + f for g, f in enumerate(chosen)]] = 1
            constraints.append(LinearConstraint(taken[None], -np.inf, groups - 1))

    def _constraints(self, limited: Floats, limit: float) -> list[LinearConstraint]:
        """One format for each group, the limit, and where there are conversions."""
        groups, formats = self.losses.shape
        each = np.zeros((groups, len(limited)))
        for g in range(groups):
            each[g, g * formats : (g + 1) * formats] = 1
        constraints = [LinearConstraint(each, 1, 1)]
        if np.isfinite(limit):
            scale = float(np.abs(limited).max()) or 1.0
            bound = limit * (1 + _ROUNDING) / scale
            constraints.append(LinearConstraint(limited[None] / scale, -np.inf, bound))
        conversions = self._conversions(len(limited))
        if conversions is not None:
            constraints.append(LinearConstraint(conversions, -np.inf, 0))
        return constraints

    def _conversions(self, count: int) -> csr_array | None:
        """A border's variable is 1 where the producer has a kind that the reader has not, and the reader is not free."""
        groups, formats = self.losses.shape
        rows = []
        for index, border in enumerate(self.borders):
            for kind in sorted(set(border.made)):
                row = np.zeros(count)
                row[groups * formats + index] = -1
                for f in range(formats):
                    row[border.producer * formats + f] += border.made[f] == kind
                    row[border.reader * formats + f] -= not converts(kind, border.read[f])
                rows.append(csr_array(row[None]))
        return vstack(rows) if rows else None
