"""A slicing that cuts where outliers do not dominate the reconstruction loss (ours; the paper gives no such rule)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from ospq_export.calibrate.activations import forward
from ospq_export.graph.granularity import block_slicing, join
from ospq_export.graph.quantizers import Mode, QuantizedGraph
from ospq_export.graph.slicing import Slice, atoms, extract

_WEIGHT = 0.25
_MOST_EXCESS = 8.0
_LARGEST = 1e-3


def dominance(tensor: Tensor) -> float:
    """Share of the squared norm that the largest 0.1 % of the elements hold, in [0, 1]; a Gaussian has about 0.013."""
    squared = tensor.detach().float().square().flatten()
    count = max(1, round(_LARGEST * squared.numel()))
    return float(squared.topk(count).values.sum() / squared.sum().clamp_min(1e-30))


def cut_dominance(
    network: QuantizedGraph, graph: fx.Graph, images: Tensor, device: torch.device
) -> dict[str, float]:
    """Dominance of outliers in the float activation at the end of every atom, by the name of its cut point.

    Args:
        network: any mode.
        graph: captured, without quantizers.
        images: float32 (N, C, H, W).
        device: where the network lies.
    """
    tensors: tuple[Tensor, ...] = (images,)
    found = {}
    for atom in atoms(graph):
        tensors = forward(extract(network.module, atom), tensors, Mode.FLOAT, device, len(images))
        found[atom.end] = dominance(tensors[0])
    return found


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
