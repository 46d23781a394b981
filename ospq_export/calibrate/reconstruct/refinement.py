"""Refinement of a slice's activation scales by the slice's output error, before anything is learned (ours)."""

from __future__ import annotations

import torch
from torch import fx

from ospq_export.calibrate.objectives.base import Objective
from ospq_export.calibrate.reconstruct.activations import SliceData
from ospq_export.calibrate.reconstruct.passes import Passes
from ospq_export.graph.quantizers import ActivationQuantizer, Mode, own_quantizers, set_mode

# Multiples of the scale that refinement tries; below one it clips more, above one it rounds more coarsely.
_MULTIPLES = (0.25, 0.35, 0.5, 0.65, 0.8, 0.9, 1.1, 1.25)
# A large slice has many scales, and each trial runs much of it: there fewer images keep the cost proportional to its size.
_FULL_REFINEMENT = 8
REFINEMENT_TRIALS = _FULL_REFINEMENT * len(_MULTIPLES)
"""Forward passes of the whole network per refinement image, at most."""
_FEWEST_IMAGES = 4


def refinement_images(piece: fx.GraphModule, wanted: int) -> int:
    """How many images a slice's scales are refined on.

    Args:
        piece: from `extract`.
        wanted: the recipe's number, at most.
    """
    scales = sum(isinstance(m, ActivationQuantizer) for m in own_quantizers(piece))
    return max(_FEWEST_IMAGES, min(wanted, wanted * _FULL_REFINEMENT // max(scales, 1)))


def refine_scales(piece: fx.GraphModule, data: SliceData, objective: Objective) -> None:
    """Choose each activation scale of a slice by the slice's output error, one after the other in graph order (ours).

    The mean squared error of a tensor says little about tensors whose small values matter together, such as attention
    probabilities: there the error of what is computed from them has to decide. What lies before a scale is computed once for
    all its multiples.

    Args:
        piece: from `extract`; its quantizers hold searched ranges and nearest codes.
        data: a few images, where the slice runs.
        objective: what is to be small.
    """
    set_mode(piece, Mode.QUANTIZE)
    with torch.no_grad():
        passes = Passes(piece, data.quantized_input, data.images)
        best = float(objective.of(passes.finish(), data))
        for node, quantizer in _in_graph_order(piece):
            passes.advance(node)
            searched = quantizer.scale.clone()
            chosen = searched.clone()
            for multiple in _MULTIPLES:
                quantizer.scale.copy_(searched * multiple)
                found = float(objective.of(passes.finish(), data))
                if found < best:
                    best, chosen = found, quantizer.scale.clone()
            quantizer.scale.copy_(chosen)


def _in_graph_order(piece: fx.GraphModule) -> list[tuple[fx.Node, ActivationQuantizer]]:
    """The activation quantizers that the slice owns, each with the first node that calls it."""
    own = {id(m) for m in own_quantizers(piece)}
    found: dict[int, tuple[fx.Node, ActivationQuantizer]] = {}
    for node in piece.graph.nodes:
        if node.op != "call_module":
            continue
        module = piece.get_submodule(str(node.target))
        if isinstance(module, ActivationQuantizer) and module.format.learns_scale and id(module) in own:
            found.setdefault(id(module), (node, module))
    return list(found.values())
