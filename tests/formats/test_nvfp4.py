"""NVFP4 against its arithmetic written out as plain loops over blocks, with the conversions of ml_dtypes."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ospq_export.errors import InputError
from ospq_export.formats.base import Role, Scales
from ospq_export.formats.choice import named, read
from ospq_export.formats.search import compress
from ospq_export.graph.quantizers import Mode, WeightQuantizer

WEIGHT, ACTIVATION = (named("nvfp4", weight=weight) for weight in (True, False))
F32 = np.float32


def e4m3(x):
    return F32(np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn))


def e2m1(x):
    return np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(F32)


def block_by_block(x, tensor_scale):
    """(levels, real values) of an activation, as DESIGN section 7 has it; float32 throughout, one block after the other."""
    rows, levels = x.reshape(-1, 16), np.empty_like(x.reshape(-1, 16))
    real = np.empty_like(levels)
    for place, block in enumerate(rows):
        ratio = np.abs(block).max() / (F32(6) * tensor_scale)
        scale = e4m3(np.clip(ratio, F32(2**-9), F32(448))) * tensor_scale
        levels[place] = e2m1(block / scale)
        real[place] = levels[place] * scale
    return levels.reshape(x.shape), real.reshape(x.shape)


def assert_is_the_loop(x, tensor_scale):
    levels, real = block_by_block(x, F32(tensor_scale))
    t, scale = torch.from_numpy(x), torch.tensor(F32(tensor_scale))
    found = ACTIVATION.nearest(t, scale)
    np.testing.assert_array_equal(found.numpy(), levels)
    np.testing.assert_array_equal(ACTIVATION.fake_quantize(t, scale, None, None).numpy(), real)
    spread = ACTIVATION.activation_scales(t, scale)
    assert spread.shape == t.shape
    np.testing.assert_array_equal(ACTIVATION.dequantize(found, spread).numpy(), real)


def tensor_scale_of(x):
    return ACTIVATION.search_range(compress(torch.from_numpy(x)), may_shift=False).scale


elements = st.one_of(st.floats(-100, 100, width=32), st.floats(-(2**-10), 2**-10, width=32), st.just(0.0))
shapes = st.sampled_from([(16,), (2, 32), (2, 3, 16), (1, 2, 2, 48)])


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(F32, shapes, elements=elements), st.floats(2**-20, 4, width=32))
def test_activations_are_the_loop(x, tensor_scale):
    assert_is_the_loop(x, tensor_scale)
    assert_is_the_loop(x, tensor_scale_of(x))


@pytest.mark.parametrize("shape", [(2, 5, 64), (2, 3, 4, 32)])
@pytest.mark.parametrize("kind", ["normal", "outlier", "zeros", "zero block", "tiny beside large"])
def test_activations_with_extremes_are_the_loop(shape, kind):
    x = np.random.default_rng(0).normal(size=shape).astype(F32)
    x.flat[5] = {"outlier": 1e4}.get(kind, x.flat[5])
    if kind == "zeros":
        x[:] = 0
    x.reshape(-1, 16)[2] *= {"zero block": 0, "tiny beside large": F32(1e-9)}.get(kind, 1)
    scale = tensor_scale_of(x)
    assert scale == pytest.approx(np.abs(x).max() / 2688 if x.any() else scale, rel=1e-6)
    assert_is_the_loop(x, scale)
    real = ACTIVATION.fake_quantize(torch.from_numpy(x), torch.tensor(scale), None, None)
    assert bool(torch.isfinite(real).all())
    if kind == "outlier":
        assert float(real.flatten()[5]) == pytest.approx(1e4, rel=1e-6)


def test_large_tensors_and_strides_are_the_loop():
    # More than one part of those that fake quantization takes at a time.
    x = np.random.default_rng(1).normal(size=(3, 1, 96 * 1024)).astype(F32)
    assert_is_the_loop(x, tensor_scale_of(x))
    turned = torch.from_numpy(x[:, 0, :64]).t().contiguous().t()
    expected = block_by_block(x[:, 0, :64].copy(), F32(0.001))[1]
    np.testing.assert_array_equal(
        ACTIVATION.fake_quantize(turned, torch.tensor(0.001), None, None).numpy(), expected
    )


def test_values_beyond_the_range_saturate():
    x = np.linspace(-1, 1, 32, dtype=F32).reshape(2, 16)
    assert_is_the_loop(x * 1000, tensor_scale_of(x))
    real = ACTIVATION.fake_quantize(torch.from_numpy(x * 1000), torch.tensor(tensor_scale_of(x)), None, None)
    assert float(real.abs().max()) == pytest.approx(1, rel=1e-6)


def test_dropped_elements_stay_float_and_the_gradient_passes_through():
    x = torch.randn(2, 3, 4, 32, generator=torch.Generator().manual_seed(0))
    kept = (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5).to(torch.uint8)
    scale, given_ = torch.tensor(0.002, requires_grad=True), torch.randn(x.shape)
    leaf = x.clone().requires_grad_()
    out = ACTIVATION.fake_quantize(leaf, scale, None, kept)
    expected = np.where(kept.numpy() > 0, block_by_block(x.numpy(), F32(0.002))[1], x.numpy())
    np.testing.assert_array_equal(out.detach().numpy(), expected)
    out.backward(given_)
    assert torch.equal(leaf.grad, given_) and scale.grad is None
    assert not ACTIVATION.learns_scale


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 1e3))
def test_own_levels_are_no_step_apart(seed, size):
    x = (np.random.default_rng(seed).normal(size=(4, 64)) * size).astype(F32)
    scale = torch.tensor(F32(tensor_scale_of(x)))
    levels, _ = block_by_block(x, scale.numpy())
    for dtype in (torch.float32, torch.float64):
        t, own = torch.from_numpy(x).to(dtype), torch.from_numpy(levels)
        steps, excess = ACTIVATION.steps_apart(t, scale.to(dtype), None, own)
        # One where a value lies at a rounding edge, and no farther from it than a last digit.
        assert float(steps.max()) <= 1 and float(excess.max()) < 1e-3
        assert int((steps > 0).sum()) <= 2
        unrounded = ACTIVATION.unrounded(t, scale.to(dtype)).numpy()
        at_edge = np.abs(np.abs(unrounded[..., None]) - [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]).min(-1) < 1e-3
        assert bool((steps[~torch.from_numpy(at_edge)] == 0).all())


def test_steps_tell_a_wrong_level_from_an_edge():
    x = np.full((1, 16), 0.1, F32)
    # 5 is the middle between 4 and 6, 0.25 that between 0 and 0.5; the largest value makes the scale 1.
    x[0, :4] = 6, 5, 0.25, 2.9
    t, scale = torch.from_numpy(x), torch.tensor(1.0)
    found = torch.from_numpy(block_by_block(x, F32(1))[0])
    assert found[0, :4].tolist() == [6, 4, 0, 3]
    other = found.clone()
    other[0, 1], other[0, 2] = 6, 0.5
    for levels in (found, other):
        steps, excess = ACTIVATION.steps_apart(t, scale, None, levels)
        assert float(steps.max()) <= 1 and float(excess.max()) < 1e-4
        assert steps[0, [0, 3, *range(4, 16)]].tolist() == [0] * 14
    other[0, 3] = 4
    steps, excess = ACTIVATION.steps_apart(t, scale, None, other)
    assert float(steps[0, 3]) == 1 and float(excess[0, 3]) == pytest.approx(0.6, abs=1e-3)


def test_a_block_scale_at_an_edge_may_be_either():
    # The ratio 17 is the middle between the E4M3 scales 16 and 18.
    x = np.linspace(-1, 1, 16, dtype=F32).reshape(1, 16) * F32(6 * 17)
    for stored in (16, 18):
        levels = torch.from_numpy(e2m1(x / F32(stored)))
        steps, excess = ACTIVATION.steps_apart(torch.from_numpy(x), torch.tensor(1.0), None, levels)
        assert float(steps.max()) <= 1 and float(excess.max()) < 1e-3
    wrong = torch.from_numpy(e2m1(x / F32(13)))
    assert float(ACTIVATION.steps_apart(torch.from_numpy(x), torch.tensor(1.0), None, wrong)[1].max()) > 0.1


def weight_of(kind):
    w = np.random.default_rng(2).normal(size=(6, 64)).astype(F32)
    if kind == "heavy tails":
        w = np.sign(w) * np.abs(w) ** 3
    if kind == "zero block":
        w[1, 16:32] = 0
    if kind == "zeros":
        w[:] = 0
    if kind == "small row":
        w[2] *= F32(1e-7)
    return w * {"tiny": F32(1e-20), "large": F32(1e20)}.get(kind, F32(1))


WEIGHTS = ["normal", "heavy tails", "zero block", "zeros", "small row", "tiny", "large"]


def quantized(w):
    quantizer = WeightQuantizer("w", WEIGHT, "w", torch.from_numpy(w))
    quantizer.round_to_nearest(torch.from_numpy(w))
    quantizer.mode = Mode.QUANTIZE
    return quantizer


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_have_e4m3_scales_and_nearest_codes(kind):
    w = weight_of(kind)
    quantizer = quantized(w)
    tensor_scale, scale = quantizer.tensor_scale.numpy(), quantizer.scale.numpy()
    assert scale.shape == (6, 4) and scale.min() > 0 and tensor_scale > 0
    stored = e4m3(scale / tensor_scale)
    np.testing.assert_array_equal(stored * tensor_scale, scale)
    spread = scale.repeat(16, axis=1)
    levels = e2m1(w / spread)
    np.testing.assert_array_equal(quantizer.codes.numpy(), (2 * levels).astype(np.int8))
    assert WEIGHT.holds(quantizer.codes)
    np.testing.assert_array_equal(quantizer(torch.from_numpy(w)).numpy(), levels * spread)
    if kind in ("zeros", "zero block"):
        assert not quantizer.codes[1, 16:32].any()
    if kind == "small row":
        assert (stored[2] == 2**-9).all() and not quantizer.codes[2].any()


def squared_error(w, stored, tensor_scale):
    """Of each block, in float64."""
    scale = (stored.astype(np.float64) * np.float64(tensor_scale)).repeat(16, axis=1)
    return np.square(e2m1(w / scale) * scale - w).reshape(len(w), -1, 16).sum(-1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 4))
def test_searched_blocks_are_no_worse_than_the_largest_value_over_6(seed, power):
    w = np.random.default_rng(seed).normal(size=(4, 48))
    w = (np.sign(w) * np.abs(w) ** power).astype(F32)
    found = WEIGHT.search_scale(torch.from_numpy(w))
    tensor_scale = found.tensor_scale.numpy()
    assert tensor_scale == pytest.approx(np.abs(w).max() / (6 * 448), rel=1e-6)
    largest = np.abs(w).reshape(4, -1, 16).max(-1) / (F32(6) * tensor_scale)
    plain = squared_error(w, e4m3(np.clip(largest, F32(2**-9), F32(448))), tensor_scale)
    searched = squared_error(w, e4m3(found.scale.numpy() / tensor_scale), tensor_scale)
    assert (searched <= plain * (1 + 1e-5)).all()


def test_a_search_gains():
    w = weight_of("normal")
    found = WEIGHT.search_scale(torch.from_numpy(w))
    tensor_scale = found.tensor_scale.numpy()
    largest = np.abs(w).reshape(6, -1, 16).max(-1) / (F32(6) * tensor_scale)
    plain = squared_error(w, e4m3(largest), tensor_scale).sum()
    assert squared_error(w, e4m3(found.scale.numpy() / tensor_scale), tensor_scale).sum() < 0.95 * plain


def test_codes_are_doubled_levels():
    levels = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(F32)
    codes = WEIGHT.encode(torch.from_numpy(levels))
    assert codes.dtype == torch.int8
    np.testing.assert_array_equal(codes.numpy(), 2 * levels)
    np.testing.assert_array_equal(WEIGHT.decode(codes).numpy(), levels)
    # A file for checking has levels in the place of codes.
    np.testing.assert_array_equal(WEIGHT.decode(torch.from_numpy(levels)).numpy(), levels)
    doubled = {int(2 * v) for v in levels}
    for code in range(-128, 128):
        assert WEIGHT.holds(torch.tensor([0, code], dtype=torch.int8)) == (code in doubled)
    assert WEIGHT.histogram(codes) == [1] * 7 + [2] + [1] * 7
    deployed = torch.tensor([6.0, float("nan"), -0.0])
    assert WEIGHT.histogram(deployed) == [0] * 7 + [1] + [0] * 6 + [1], "NaN is no level"


def test_block_scales_are_counted_by_the_powers_of_two_that_are_stored():
    tensor_scale = torch.tensor(0.3)
    stored = torch.tensor([[2**-9, 3 * 2**-9, 0.9375, 1.0], [1.875, 2.0, 448.0, 256.0]])
    found = WEIGHT.scale_histogram(Scales(stored * tensor_scale, tensor_scale))
    assert found == {-9: 1, -8: 1, -1: 1, 0: 2, 1: 1, 8: 2}
    assert named("fp8", weight=True).scale_histogram(Scales(torch.ones(3))) == {}


def test_neighbours_of_a_weight():
    found = WEIGHT.neighbours(torch.tensor([[0.2, -5.0, 7.0, -0.75]]), torch.tensor([[2.0]]))
    assert found.lower.tolist() == [[0.0, -3.0, 3.0, -0.5]] and found.upper.tolist() == [
        [0.5, -2.0, 4.0, 0.0]
    ]
    torch.testing.assert_close(found.position, torch.tensor([[0.2, 0.5, 0.5, 0.25]]))


def test_refuses_what_has_no_kernel():
    assert WEIGHT.refuses(Role.LINEAR, 64) == ""
    assert "24 is no multiple of 16" in WEIGHT.refuses(Role.LINEAR, 24)
    assert "no FP4 kernel" in WEIGHT.refuses(Role.CONVOLUTION, 64)
    assert "no FP4 kernel" in ACTIVATION.refuses(Role.ATTENTION, 64)


@pytest.mark.parametrize("weight", [True, False])
def test_a_record_brings_it_back(weight):
    record = named("nvfp4", weight=weight).record()
    assert read(record, weight=weight) == named("nvfp4", weight=weight)
    for change in ({"bits": 8}, {"axis": 0}, {"block_size": 32}):
        with pytest.raises(InputError, match="no such format"):
            read({**record, **change}, weight=weight)
