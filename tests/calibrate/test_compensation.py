"""Weights fitted to quantized inputs: the closed form, what it leaves alone, and that a slice gains by it."""

import numpy as np
import pytest
import torch
from torch import nn

from ospq_export.calibrate.observe import observe
from ospq_export.calibrate.reconstruct.activations import SliceData, forward
from ospq_export.calibrate.reconstruct.compensation import _RIDGES, _Fit, compensate, forget
from ospq_export.calibrate.reconstruct.reconstructor import Reconstructor
from ospq_export.formats.choice import Choice
from ospq_export.graph.capture import capture
from ospq_export.graph.granularity import slicing_of
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode
from ospq_export.graph.slicing import extract
from ospq_export.recipes import load_recipe

NVFP4 = Choice("nvfp4", "nvfp4", "fp8", "nvfp4")


class Mixed(nn.Module):
    """Two linears whose inputs vary in a few directions only."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(4, 32) / 2, requires_grad=False)
        self.fc1, self.fc2 = nn.Linear(32, 48), nn.Linear(48, 16, bias=False)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x.flatten(1)[:, :4] @ self.mix)))


@pytest.fixture
def slice_and_data():
    torch.manual_seed(0)
    captured = capture(Mixed().eval(), (1, 2, 2))
    images = torch.randn(600, 1, 2, 2)
    network = insert_quantizers(captured, NVFP4)
    observe(network, images[:64], batch_size=64, seed=0)
    piece = extract(network.module, slicing_of(captured.graph, "model")[0])
    target = forward(piece, (images,), Mode.FLOAT, torch.device("cpu"), len(images))[0]
    return network, piece, SliceData((images,), (images,), target, len(images))


def errors(piece, data):
    with torch.no_grad():
        found = forward(piece, data.quantized_input, Mode.QUANTIZE, torch.device("cpu"), data.images)[0]
    return (found - data.target).square().mean()


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_fit_is_the_least_squares_solution(with_bias):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(500, 6, generator=generator)
    noisy = x + 0.3 * torch.randn(500, 6, generator=generator) + 0.1
    weight, bias = torch.randn(3, 6, generator=generator), torch.randn(3, generator=generator)
    fit = _Fit(weight, bias)
    for index, (rows, quantized) in enumerate(zip(x.split(100), noisy.split(100), strict=True)):
        fit.add(rows, quantized, held_out=index == 4)
    found, found_bias = fit.solve(with_bias=with_bias)
    # The ridge as so many more rows, in numpy's own solver.
    a = np.asarray(noisy, np.float64)
    y = np.asarray(x @ weight.T + bias, np.float64) - (0 if with_bias else np.asarray(bias))
    columns = slice(None) if with_bias else slice(6)

    def solution(parts, ridge):
        kept = np.concatenate([np.r_[0:500].reshape(5, 100)[p] for p in parts])
        strength = np.sqrt(ridge * (a[kept] ** 2).sum(0).mean())
        rows = np.concatenate([np.c_[a[kept], np.ones(len(kept))], strength * np.c_[np.eye(6), np.zeros(6)]])
        targets = np.concatenate([y[kept], strength * np.asarray(weight, np.float64).T])
        return np.linalg.lstsq(rows[:, columns], targets, rcond=None)[0]

    def held_out(ridge):
        return ((np.c_[a, np.ones(500)][400:, columns] @ solution(range(4), ridge) - y[400:]) ** 2).sum()

    expected = solution(range(5), min(_RIDGES, key=held_out))
    np.testing.assert_allclose(found.numpy(), expected[:6].T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found_bias.numpy(), expected[6] if with_bias else bias.numpy(), rtol=1e-4)


def test_what_does_not_help_images_held_out_is_left_alone():
    generator = torch.Generator().manual_seed(2)
    x, weight = torch.randn(24, 40, generator=generator), torch.randn(4, 40, generator=generator)
    fit = _Fit(weight, None)
    fit.add(x[:12], x[:12] + torch.randn(12, 40, generator=generator), held_out=False)
    fit.add(x[12:], x[12:], held_out=True)
    assert fit.solve(with_bias=False) is None


def test_inputs_that_are_not_finite_have_no_solution():
    fit = _Fit(torch.randn(4, 8), None)
    for held_out in (True, False):
        fit.add(torch.full((10, 8), torch.inf), torch.randn(10, 8), held_out=held_out)
    assert fit.solve(with_bias=False) is None


def test_a_slice_gains_by_it(slice_and_data):
    network, piece, data = slice_and_data
    constants = {k: v.clone() for k, v in network.module.named_buffers() if "quantizers" not in k}
    plain = errors(piece, data)
    compensate(piece, data.select(slice(0, 400)), torch.device("cpu"))
    assert errors(piece, data) < 0.7 * plain
    weight = network.weights["fc1.weight"]
    assert weight.fitted is not None and weight.format.holds(weight.codes)
    assert weight.format.stores(weight.format.search_scale(weight.fitted))
    for name, value in constants.items():
        torch.testing.assert_close(network.module.get_buffer(name), value, rtol=0, atol=0)
    forget(piece)
    assert weight.fitted is None


def test_learned_rounding_starts_from_the_fit(slice_and_data):
    network, piece, data = slice_and_data
    compensate(piece, data.select(slice(0, 400)), torch.device("cpu"))
    weight = network.weights["fc2.weight"]
    weight.start_learning(piece.get_buffer(weight.constant))
    weight.mode = Mode.LEARN
    inside = weight.fitted.abs() < 6 * weight.spread_scale()
    torch.testing.assert_close(
        weight(piece.get_buffer(weight.constant))[inside], weight.fitted[inside], rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("iterations", [0, 60])
def test_the_reconstruction_with_and_without(slice_and_data, iterations):
    network, piece, data = slice_and_data
    state, found = network.state(), []
    for images in (0, 400):
        network.load_state(state)
        changes = {"iterations": iterations, "batch_size": 64, "compensation_images": images}
        changes["loss"] = "{kind = 'normalized'}"
        settings = load_recipe(
            "nvfp4", [f"reconstruction.{k}={v}" for k, v in changes.items()]
        ).reconstruction
        metrics = Reconstructor(settings, torch.device("cpu")).run(piece, data, seed=0)
        assert all(w.fitted is None for w in network.weights.values())
        found.append(metrics.error_after)
    assert found[1] < 0.9 * found[0]
