"""The engine's closed forms against autograd through the papers' formulas, and its step against a plain loop of such formulas."""

import itertools
import math

import helpers as q
import pytest
import torch
from conftest import straight_through
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from ospq_export.calibrate.reconstruct.rounding import SoftRounding, rounding_regularizer
from ospq_export.formats.choice import named
from ospq_export.formats.kernels import BLOCK, blocks, lerp_mask
from ospq_export.graph.quantizers import WeightQuantizer


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([1, 7, 1000, BLOCK - 1, BLOCK, BLOCK + 3]),
    scale=st.floats(2**-6, 4.0),
    offset=st.none() | st.floats(-2.0, 2.0),
    bits=st.integers(2, 8),
    drop=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_blocks_give_the_chains_values_and_gradients(size, scale, offset, bits, drop, seed):
    torch.manual_seed(seed)
    # float64: what is compared is the formula, not the order of a float32 sum.
    source, weight = torch.randn(size, dtype=torch.float64), torch.randn(size, dtype=torch.float64)
    kept = q.random_kept(source, drop)
    results = []
    for function in (q.fake_quantize, straight_through):
        x = source.clone().requires_grad_()
        s = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
        k = None if offset is None else torch.tensor(offset, dtype=torch.float64, requires_grad=True)
        out = function(x, s, q.symmetric_levels(bits), k, kept)
        (out * weight).sum().backward()
        grads = [t.grad for t in (x, s, k) if t is not None]
        results.append([out.detach(), *(torch.zeros(()) if g is None else g for g in grads)])
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-12, atol=1e-12)
    for ours, reference in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(ours.double(), reference.double(), rtol=1e-9, atol=1e-9)


def test_views_that_are_not_contiguous():
    x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0)).transpose(0, 2)
    x = x.detach().requires_grad_()
    out = q.fake_quantize(x, torch.tensor(0.2), q.symmetric_levels(4))
    out.backward(torch.ones_like(out).transpose(0, 1).contiguous().transpose(0, 1))
    codes = torch.clamp(torch.round(x / 0.2), -8, 7)
    assert torch.equal(out, codes * torch.tensor(0.2)) and x.grad.shape == x.shape
    assert torch.equal(x.grad > 0, (x / torch.tensor(0.2)).clamp(-8.5, 7.5) == x / torch.tensor(0.2))


@given(st.integers(0, 3 * BLOCK + 1))
def test_blocks_cover_everything_once(size):
    covered = list(blocks(torch.empty(size, dtype=torch.int8)))
    assert sum(min(b.stop, size) - b.start for b in covered) == size
    assert all(first.stop == second.start for first, second in itertools.pairwise(covered))


def test_mixing_takes_each_element_from_its_side():
    torch.manual_seed(0)
    a, b = torch.randn(3, BLOCK // 2 + 5), torch.randn(3, BLOCK // 2 + 5)
    kept = q.random_kept(a, 0.5)
    assert torch.equal(lerp_mask(a, b, kept), torch.where(kept > 0, b, a))


class Weights(nn.Module):
    def __init__(self, tensors):
        super().__init__()
        for index, tensor in enumerate(tensors):
            self.register_buffer(f"w{index}", tensor)


def soft_rounding(tensors, bits):
    piece = fx.GraphModule(Weights(tensors), fx.Graph())
    quantizers = []
    for index, tensor in enumerate(tensors):
        piece.register_buffer(f"w{index}", tensor)
        quantizer = WeightQuantizer(f"w{index}", named(f"int{bits[index]}", weight=True), f"w{index}", tensor)
        quantizer.round_to_nearest(tensor)
        # A scale smaller than the search's, so that some weights lie beyond the levels on both sides.
        quantizer.scale.mul_(0.6)
        quantizers.append(quantizer)
    return SoftRounding(piece, quantizers), quantizers


@settings(max_examples=25, deadline=None)
@given(
    beta=st.sampled_from([2.0, 3.5, 20.0]),
    strength=st.sampled_from([0.0, 0.1, 3.0]),
    spread=st.floats(0.1, 8.0),
    seed=st.integers(0, 2**31),
)
def test_gradient_of_v_is_autograds(beta, strength, spread, seed):
    torch.manual_seed(seed)
    tensors = [torch.randn(5, 7), torch.randn(4, 3, 2, 2)]
    rounding, quantizers = soft_rounding(tensors, (3, 8))
    with torch.no_grad():
        rounding.v.add_(spread * torch.randn_like(rounding.v))
    rounding.refresh()
    factors = [torch.randn_like(t) for t in tensors]
    sum((w.soft * f).sum() for w, f in zip(quantizers, factors, strict=True)).backward()
    rounding.collect(torch.tensor(strength), torch.tensor(beta))
    held = rounding.v.grad.clone()
    rounding.collect(strength, beta)
    torch.testing.assert_close(held, rounding.v.grad, rtol=1e-5, atol=1e-6)

    v = rounding.v.detach().double().requires_grad_()
    total, start = torch.zeros((), dtype=torch.float64), 0
    for quantizer, tensor, factor in zip(quantizers, tensors, factors, strict=True):
        part = v[start : start + factor.numel()].view(factor.shape)
        scale = q.per_channel(quantizer.scale.double(), factor.dim())
        floor = torch.floor(tensor / q.per_channel(quantizer.scale, tensor.dim()))
        soft = q.soft_quantize_weight(floor.double(), part, scale, quantizer.format.levels)
        torch.testing.assert_close(quantizer.soft.double(), soft, rtol=1e-5, atol=1e-6)
        total = total + (soft * factor).sum() + strength * rounding_regularizer(part, beta)
        start += factor.numel()
    total.backward()
    torch.testing.assert_close(rounding.v.grad.double(), v.grad, rtol=2e-4, atol=2e-5)


def test_settling_hardens_every_part_of_v():
    tensors = [torch.randn(5, 7), torch.randn(6, 2)]
    rounding, quantizers = soft_rounding(tensors, (4, 4))
    with torch.no_grad():
        rounding.v.copy_(torch.where(torch.arange(47) % 2 == 0, 9.0, -9.0))
    rounding.refresh()
    rounding.collect(0.1, 2.0)
    floors = [torch.floor(t / w.scale[:, None]) for t, w in zip(tensors, quantizers, strict=True)]
    ups = torch.cat([torch.zeros(0)])
    for quantizer, floor in zip(quantizers, floors, strict=True):
        quantizer.settle()
        assert quantizer.soft is None and quantizer.v is None
        ups = torch.cat([ups, (quantizer.codes - floor).flatten()])
    inside = torch.cat([((f >= -8) & (f < 7)).flatten() for f in floors])
    assert torch.equal(ups[inside], (torch.arange(47) % 2 == 0).float()[inside])


@pytest.mark.parametrize("weight_of_term", [0.0, 0.5])
def test_no_gradient_where_nothing_reads_the_weight(weight_of_term):
    rounding, _ = soft_rounding([torch.randn(5, 7)], (4,))
    rounding.refresh()
    rounding.collect(weight_of_term, 2.0)
    assert math.isfinite(float(rounding.v.grad.abs().sum()))
    assert bool((rounding.v.grad != 0).any()) == (weight_of_term > 0)
