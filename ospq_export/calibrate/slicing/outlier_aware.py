"""A slicing that cuts where outliers do not dominate the reconstruction loss (ours; the paper gives no such rule)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from torch import fx

from ospq_export.graph.granularity import block_slicing, join
from ospq_export.graph.slicing import Slice, atoms
from ospq_export.runs.manifest import OutlierRecord

_WEIGHT = 0.25
_MOST_EXCESS = 8.0


def cut_dominance(profile: Sequence[OutlierRecord]) -> dict[str, float]:
    """Dominance of outliers at every cut point: the share of the squared norm that the largest 0.1 % of the elements hold.

    In [0, 1], by the cut point's name; a Gaussian has about 0.013.
    """
    return {record.name: record.largest_share for record in profile if record.kind == "cut"}


def outlier_aware_slicing(graph: fx.Graph, dominances: Mapping[str, float]) -> list[Slice]:
    """The slicing of least cost, by dynamic programming over the cut points; O(A^2) for A atoms.

    The cost of a slice of n atoms that ends at cut point e is

        0.25 * min(8, max(0, dominance(e) / median(dominance) - 1)) + 0.25 * ((n - n0) / n0) ** 2

    where n0 is the mean number of atoms per block: without outliers slices are as long as blocks, and outliers stretch them,
    to at most four times that. The last slice ends at the logits whatever they are like, so there the first term is left out.

    Args:
        graph: captured.
        dominances: of the cut points at the atoms' ends.
    """
    pieces = atoms(graph)
    costs = _end_costs([dominances[p.end] for p in pieces])
    ideal = len(pieces) / len(block_slicing(graph))
    best, origin = [0.0], [0]
    for end in range(1, len(pieces) + 1):
        options = [
            best[start] + costs[end - 1] + _WEIGHT * ((end - start - ideal) / ideal) ** 2
            for start in range(end)
        ]
        origin.append(min(range(end), key=options.__getitem__))
        best.append(options[origin[end]])
    groups: list[Sequence[Slice]] = []
    end = len(pieces)
    while end > 0:
        groups.insert(0, pieces[origin[end] : end])
        end = origin[end]
    return join(graph, groups)


def _end_costs(dominances: Sequence[float]) -> list[float]:
    usual = max(statistics.median(dominances), 1e-12)
    excess = [min(_MOST_EXCESS, max(0.0, d / usual - 1.0)) for d in dominances[:-1]]
    return [*(_WEIGHT * e for e in excess), 0.0]
