"""Reconstruction of slices: it lowers the error, is reproducible, and its terms are the papers'."""

import copy
import math

import pytest
import torch

from ospq_export.calibrate.objectives.squared import Squared, literal_loss
from ospq_export.calibrate.observe import observe
from ospq_export.calibrate.reconstruct.activations import SliceData, forward
from ospq_export.calibrate.reconstruct.reconstructor import Reconstructor, walk
from ospq_export.calibrate.reconstruct.refinement import refine_scales, refinement_images
from ospq_export.calibrate.reconstruct.rounding import annealed_beta, rounding_regularizer
from ospq_export.formats.choice import integers
from ospq_export.graph.granularity import block_slicing, slicing_of
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import (
    ActivationQuantizer,
    Mode,
    WeightQuantizer,
    own_quantizers,
    quantizers_of,
    set_mode,
)
from ospq_export.graph.slicing import extract, run_slice
from ospq_export.recipes import load_recipe
from ospq_export.runs.quantizers import quantizer_tensors

CPU = torch.device("cpu")


def settings(*overrides):
    return load_recipe(
        "w4a4", [f"reconstruction.{o}" for o in ("iterations=40", "batch_size=8", *overrides)]
    ).reconstruction


def block(small_vit, observed_vit, noise, index=1):
    slices = block_slicing(small_vit.graph)
    x = (noise,)
    for bounds in slices[:index]:
        x = forward(extract(observed_vit.module, bounds), x, Mode.FLOAT, CPU, len(noise))
    piece = extract(observed_vit.module, slices[index])
    return piece, SliceData(x, x, forward(piece, x, Mode.FLOAT, CPU, len(noise))[0], len(noise))


def test_learning_lowers_the_error(small_vit, observed_vit, noise):
    piece, data = block(small_vit, observed_vit, noise)
    weights = [m for m in quantizers_of(piece) if isinstance(m, WeightQuantizer)]
    scales = {m.name: float(m.scale) for m in quantizers_of(piece) if isinstance(m, ActivationQuantizer)}
    nearest = {w.name: w.codes.clone() for w in weights}
    metrics = Reconstructor(settings("iterations=120"), CPU).run(piece, data, seed=0)
    assert metrics.kept and metrics.error_after < 0.8 * metrics.error_before
    assert Reconstructor(settings(), CPU).error(piece, data)[0] == pytest.approx(
        metrics.error_after, rel=1e-6
    )
    assert any(not torch.equal(w.codes, nearest[w.name]) for w in weights)
    for weight in weights:
        floor = torch.floor(piece.get_buffer(weight.constant) / weight.scale[:, None])
        off = weight.codes - floor.clamp(weight.format.levels.lo, weight.format.levels.hi)
        assert off.min() >= 0 and off.max() <= 1, "AdaRound rounds down or up, never further"
        assert weight.v is None
    moved = [
        m
        for m in quantizers_of(piece)
        if isinstance(m, ActivationQuantizer) and float(m.scale) != scales[m.name]
    ]
    assert len(moved) == len(scales)


def test_reproducible_for_a_seed_only(small_vit, noise):
    states = []
    for seed in (5, 5, 6):
        graph = insert_quantizers(small_vit, integers(3, 3))
        observe(graph, noise, batch_size=16, seed=0)
        piece, data = block(small_vit, graph, noise)
        torch.manual_seed(seed * 100)  # the caller's generator must not matter
        before = torch.get_rng_state()
        Reconstructor(settings(), CPU).run(piece, data, seed)
        assert torch.equal(torch.get_rng_state(), before)
        states.append({k: v.clone() for k, v in quantizer_tensors(list(quantizers_of(piece))).items()})
    same = [
        all(torch.equal(a[k], b[k]) for k in a) for a, b in ((states[0], states[1]), (states[0], states[2]))
    ]
    assert same == [True, False]


def test_a_result_worse_than_nearest_is_not_kept(small_vit, observed_vit, noise):
    piece, data = block(small_vit, observed_vit, noise)
    before = {k: v.clone() for k, v in quantizer_tensors(list(quantizers_of(piece))).items()}
    wild = settings("learning_rate_scale=30.0", "learning_rate_rounding=50.0")
    metrics = Reconstructor(wild, CPU).run(piece, data, seed=0)
    assert not metrics.kept and metrics.error_after == metrics.error_before
    after = quantizer_tensors(list(quantizers_of(piece)))
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_zero_iterations_is_round_to_nearest(small_vit, observed_vit, noise):
    piece, data = block(small_vit, observed_vit, noise)
    before = {k: v.clone() for k, v in quantizer_tensors(list(quantizers_of(piece))).items()}
    metrics = Reconstructor(settings("iterations=0", "refinement_images=0"), CPU).run(piece, data, seed=0)
    assert metrics.error_after == metrics.error_before and metrics.losses == []
    assert all(torch.equal(before[k], v) for k, v in quantizer_tensors(list(quantizers_of(piece))).items())


def tensors_of(graph):
    return {
        k: v.clone()
        for k, v in quantizer_tensors([*graph.activations.values(), *graph.weights.values()]).items()
    }


def test_a_resumed_walk_ends_in_the_same_bytes(small_vit, noise):
    slices = block_slicing(small_vit.graph)
    reconstructor = Reconstructor(settings("iterations=5"), CPU)

    def run(restored):
        graph = insert_quantizers(small_vit, integers(3, 3))
        observe(graph, noise, batch_size=16, seed=0)

        def restore(index, piece):
            if index not in restored:
                return False
            for quantizer in quantizers_of(piece):
                for name, value in quantizer_tensors([quantizer]).items():
                    value.copy_(restored[index][name])
            return True

        steps = {}
        for step in walk(graph, slices, noise, reconstructor, 0, restore):
            steps[step.index] = {
                k: v.clone() for k, v in quantizer_tensors(list(quantizers_of(step.piece))).items()
            }
        return graph, steps

    whole, steps = run({})
    assert sorted(steps) == list(range(len(slices)))
    resumed, again = run({0: steps[0], 1: steps[1]})
    assert sorted(again) == list(range(2, len(slices)))
    first, second = tensors_of(whole), tensors_of(resumed)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_rounding_term_is_adarounds():
    v = torch.linspace(-4, 4, 33, dtype=torch.float64)
    for beta in (20.0, 2.0):
        expected = 0.0
        for value in v.tolist():
            h = min(1.0, max(0.0, 1.2 / (1 + math.exp(-value)) - 0.1))
            expected += 1 - abs(2 * h - 1) ** beta
        assert float(rounding_regularizer(v, beta)) == pytest.approx(expected, rel=1e-9)
    assert float(rounding_regularizer(torch.tensor([-30.0, 30.0]), 2.0)) == 0.0


def test_beta_waits_a_fifth_and_falls_from_20_to_2():
    paper = replace_iterations(1000)
    assert [annealed_beta(step, paper) for step in (0, 199)] == [None, None]
    assert annealed_beta(200, paper) == 20.0
    assert annealed_beta(600, paper) == pytest.approx(11.0)
    assert annealed_beta(999, paper) == pytest.approx(2.0, abs=0.03)


def replace_iterations(count):
    return load_recipe("paper-w4a4", [f"reconstruction.iterations={count}"]).reconstruction


def test_literal_loss_sums_dimension_one():
    output, target = torch.zeros(2, 3, 5), torch.ones(2, 3, 5)
    assert float(literal_loss(output, target)) == pytest.approx(3.0), "tokens of (B, N, C)"
    output, target = torch.zeros(2, 4, 5, 5), torch.full((2, 4, 5, 5), 2.0)
    assert float(literal_loss(output, target)) == pytest.approx(16.0), "channels of NCHW"


def test_literal_recipe_runs(small_vit, observed_vit, noise):
    piece, data = block(small_vit, observed_vit, noise)
    literal = load_recipe(
        "paper-w4a4", ["reconstruction.iterations=5", "reconstruction.batch_size=8"]
    ).reconstruction
    metrics = Reconstructor(literal, CPU).run(piece, data, seed=0)
    assert metrics.iterations == 5 and len(metrics.losses) == 5 and math.isfinite(metrics.error_after)


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
