"""Refinement of scales: what is shared between its passes changes nothing, and the slice's error only falls."""

import copy

import pytest
import torch

from ospq_export.calibrate.objectives.squared import Squared
from ospq_export.calibrate.reconstruct.activations import SliceData, forward
from ospq_export.calibrate.reconstruct.refinement import refine_scales, refinement_images
from ospq_export.graph.granularity import slicing_of
from ospq_export.graph.quantizers import ActivationQuantizer, Mode, own_quantizers, set_mode
from ospq_export.graph.slicing import extract, run_slice
from ospq_export.recipes import load_recipe

CPU = torch.device("cpu")
MULTIPLES = (0.25, 0.35, 0.5, 0.65, 0.8, 0.9, 1.1, 1.25)


def sliced(vit, graph, images, granularity, index):
    """A slice behind quantized ones, with its data."""
    floats = quantized = (images,)
    slices = slicing_of(vit.graph, granularity)
    for bounds in slices[:index]:
        piece = extract(graph.module, bounds)
        floats = forward(piece, floats, Mode.FLOAT, CPU, len(images))
        quantized = forward(piece, quantized, Mode.QUANTIZE, CPU, len(images))
    piece = extract(graph.module, slices[index])
    target = forward(piece, floats, Mode.FLOAT, CPU, len(images))[0]
    return piece, SliceData(floats, quantized, target, len(images))


def activation_quantizers(piece):
    return [m for m in own_quantizers(piece) if isinstance(m, ActivationQuantizer)]


def error(piece, data):
    set_mode(piece, Mode.QUANTIZE)
    with torch.no_grad():
        output = run_slice(piece, data.quantized_input, data.images)[0]
    return float((output - data.target).square().mean())


def refine_by_whole_passes(piece, data):
    """The same search by nothing but calls of the slice."""
    order = [n.target for n in piece.graph.nodes if n.op == "call_module"]
    chosen = {m.name: m for m in activation_quantizers(piece)}
    best = error(piece, data)
    for path in order:
        quantizer = chosen.pop(getattr(piece.get_submodule(path), "name", ""), None)
        if quantizer is None:
            continue
        start = quantizer.scale.clone()
        keep = start
        for multiple in MULTIPLES:
            quantizer.scale.copy_(start * multiple)
            found = error(piece, data)
            if found < best:
                best, keep = found, start * multiple
        quantizer.scale.copy_(keep)
    assert not chosen


@pytest.mark.parametrize(("granularity", "index"), [("block", 1), ("layer", 4), ("layer", 6), ("model", 0)])
def test_shared_passes_choose_what_whole_passes_choose(small_vit, observed_vit, noise, granularity, index):
    first, data = sliced(small_vit, observed_vit, noise[:8], granularity, index)
    second = copy.deepcopy(first)
    refine_scales(first, data, Squared(load_recipe("w4a4", []).reconstruction, []))
    refine_by_whole_passes(second, data)
    ours, theirs = ([m.scale for m in activation_quantizers(p)] for p in (first, second))
    assert len(ours) > 0 and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_the_error_falls(small_vit, observed_vit, noise):
    piece, data = sliced(small_vit, observed_vit, noise, "block", 1)
    for quantizer in activation_quantizers(piece):
        quantizer.scale.mul_(2.0)
    before = error(piece, data)
    refine_scales(piece, data, Squared(load_recipe("w4a4", []).reconstruction, []))
    assert error(piece, data) < 0.6 * before


def test_large_slices_are_refined_on_fewer_images(small_vit, observed_vit, noise):
    block, _ = sliced(small_vit, observed_vit, noise[:2], "block", 1)
    model, _ = sliced(small_vit, observed_vit, noise[:2], "model", 0)
    assert refinement_images(model, 64) < refinement_images(block, 64) <= 64
    assert refinement_images(model, 1) == 4
