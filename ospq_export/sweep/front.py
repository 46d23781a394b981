"""Pareto fronts."""

from __future__ import annotations

from collections.abc import Sequence


def front_of(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points than which no other is at most as large in both values and smaller in one."""

    def beaten(x: float, y: float) -> bool:
        return any(a <= x and b <= y and (a < x or b < y) for a, b in points)

    return [place for place, point in enumerate(points) if not beaten(*point)]
