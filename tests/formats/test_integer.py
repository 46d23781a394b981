"""The number semantics against ONNX's own definition: its reference evaluator and ONNX Runtime."""

import helpers as q
import numpy as np
import onnxruntime
import pytest
import torch
from conftest import straight_through
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from ospq_export.errors import InputError
from ospq_export.formats.choice import named, read
from ospq_export.formats.search import compress, search_activation_range, search_weight_scale
from ospq_export.graph.quantizers import Mode, WeightQuantizer

floats = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
scales = st.floats(2**-12, 2**6, width=32)
arrays = hnp.arrays(np.float32, st.integers(1, 40), elements=floats)


def onnx_model(scale: float, clip: tuple[float, float] | None, offset: float | None):
    """[Clip or Sub], QuantizeLinear to int8 with zero_point 0: what the export emits for one activation."""
    constants = {"scale": np.float32(scale), "zero_point": np.int8(0)}
    nodes, x = [], "x"
    if offset is not None:
        constants["offset"] = np.float32(offset)
        nodes.append(helper.make_node("Sub", [x, "offset"], ["shifted"]))
        x = "shifted"
    if clip is not None:
        constants["low"], constants["high"] = np.float32(clip[0]), np.float32(clip[1])
        nodes.append(helper.make_node("Clip", [x, "low", "high"], ["clipped"]))
        x = "clipped"
    nodes.append(helper.make_node("QuantizeLinear", [x, "scale", "zero_point"], ["codes"]))
    nodes.append(helper.make_node("DequantizeLinear", ["codes", "scale", "zero_point"], ["real"]))
    graph = helper.make_graph(
        nodes,
        "q",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [
            helper.make_tensor_value_info("codes", TensorProto.INT8, ["n"]),
            helper.make_tensor_value_info("real", TensorProto.FLOAT, ["n"]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def both_executions(model, x: np.ndarray):
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return ReferenceEvaluator(model).run(None, {"x": x}), session.run(None, {"x": x})


def assert_same(x, scale, levels, clip, offset=None):
    t = torch.from_numpy(x)
    s, k = torch.tensor(np.float32(scale)), None if offset is None else torch.tensor(np.float32(offset))
    codes = q.quantize(t, s, levels, k).numpy()
    assert codes.min() >= levels.lo and codes.max() <= levels.hi
    for deployed_codes, deployed_real in both_executions(onnx_model(scale, clip, offset), x):
        np.testing.assert_array_equal(codes, deployed_codes)
        real = q.dequantize(torch.from_numpy(codes), s).numpy()
        np.testing.assert_array_equal(real, deployed_real)


@settings(max_examples=40, deadline=None)
@given(arrays, scales)
def test_symmetric_8_bits_is_quantize_linear(x, scale):
    assert_same(x, scale, q.symmetric_levels(8), None)


@settings(max_examples=60, deadline=None)
@given(arrays, scales, st.data())
def test_embedded_codes_are_those_of_clip_and_quantize_linear(x, scale, data):
    bits = data.draw(st.integers(2, 7))
    lo = data.draw(st.integers(-127, 127 - (2**bits - 1)))
    levels = q.embedded_levels(bits, lo)
    s = np.float32(scale)
    assert_same(x, scale, levels, (s * np.float32(levels.lo), s * np.float32(levels.hi)))


@settings(max_examples=40, deadline=None)
@given(arrays, scales, st.floats(-100, 100, width=32, allow_subnormal=False))
def test_shifted_is_sub_and_quantize_linear(x, scale, offset):
    assert_same(x, scale, q.symmetric_levels(8), None, offset)


@pytest.mark.parametrize("bits", range(2, 8))
def test_ties_round_to_even_everywhere_in_the_grid(bits):
    scale = 0.25
    halves = np.arange(-140, 141, dtype=np.float32) * scale + np.float32(scale / 2)
    levels = q.embedded_levels(bits, -(2 ** (bits - 1)))
    expected = np.clip(np.rint(halves / np.float32(scale)), levels.lo, levels.hi)
    np.testing.assert_array_equal(
        q.quantize(torch.from_numpy(halves), torch.tensor(scale), levels).numpy(), expected
    )
    assert_same(halves, scale, levels, (scale * levels.lo, scale * levels.hi))


def test_division_not_multiplication_by_the_inverse():
    # At this pair the quotient is a tie and the product with the rounded inverse is not.
    candidates = np.float32([0.1, 0.3, 0.7, 0.011, 0.023]).repeat(126)
    x = ((np.tile(np.arange(126), 5) + 0.5) * candidates.astype(np.float64)).astype(np.float32)
    divided, multiplied = np.rint(x / candidates), np.rint(x * (np.float32(1) / candidates))
    assert (divided != multiplied).any(), "no pair tells the two apart"
    codes = q.quantize(torch.from_numpy(x), torch.from_numpy(candidates), q.symmetric_levels(8))
    np.testing.assert_array_equal(codes.numpy(), divided)


@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("with_kept", [False, True])
def test_gradients_against_an_autograd_chain(with_offset, with_kept):
    generator = torch.Generator().manual_seed(1)
    levels = q.Levels(-3, 12)
    results = []
    for function in (q.fake_quantize, straight_through):
        x = torch.randn(500, generator=generator.manual_seed(1)).requires_grad_()
        scale = torch.tensor(0.11, requires_grad=True)
        offset = torch.tensor(0.3, requires_grad=True) if with_offset else None
        kept = (torch.rand(500, generator=generator) < 0.5).float() if with_kept else None
        out = function(x, scale, levels, offset, kept)
        (out * torch.linspace(-1, 2, 500)).sum().backward()
        results.append([out, x.grad, scale.grad] + ([offset.grad] if offset is not None else []))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


@given(st.floats(0.01, 0.99))
def test_rectified_sigmoid_inverse(h):
    v = q.inverse_rectified_sigmoid(torch.tensor(h, dtype=torch.float64))
    assert float(q.rectified_sigmoid(v)) == pytest.approx(h, abs=1e-9)


def test_rectified_sigmoid_reaches_both_ends():
    assert q.rectified_sigmoid(torch.tensor([-20.0, 20.0])).tolist() == [0.0, 1.0]


def test_soft_weight_starts_at_the_weight_and_hardens_to_codes():
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer("w", named("int4", weight=True), "w", weight)
    quantizer.scale.fill_(0.5)
    v, quantizer.mode = quantizer.start_learning(weight), Mode.LEARN
    torch.testing.assert_close(quantizer(weight), weight, rtol=0, atol=1e-5)
    scale, floor = torch.full((6, 1), 0.5), torch.floor(weight / 0.5)
    soft = q.soft_quantize_weight(floor, v, scale, q.symmetric_levels(4))
    torch.testing.assert_close(quantizer(weight), soft, rtol=0, atol=1e-6)
    with torch.no_grad():
        v.copy_(torch.where(v > 0, 50.0, -50.0))
    torch.testing.assert_close(quantizer(weight), torch.round(weight / scale) * scale)


@pytest.mark.parametrize(
    ("probability", "expected"), [(0.5, 0.5), (0.25, 0.25), (1.0, 1.0), (1 / 256, 1 / 256)]
)
def test_dropped_share(probability, expected):
    torch.manual_seed(0)
    kept = q.random_kept(torch.empty(400_001), probability)
    assert set(kept.unique().tolist()) <= {0, 1}
    # Five standard deviations of a binomial share.
    tolerance = 5 * (expected * (1 - expected) / 400_001) ** 0.5
    assert float(1 - kept.float().mean()) == pytest.approx(expected, abs=tolerance + 1e-9)


def test_dropped_elements_are_the_float_ones_exactly():
    torch.manual_seed(3)
    x = torch.randn(1000)
    kept = q.random_kept(x, 0.5)
    out = q.fake_quantize(x, torch.tensor(0.3), q.symmetric_levels(4), None, kept)
    full = q.fake_quantize(x, torch.tensor(0.3), q.symmetric_levels(4))
    assert torch.equal(out, torch.where(kept > 0, full, x))
    assert q.random_kept(x, 0.0) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: q.symmetric_levels(9),
        lambda: q.symmetric_levels(1),
        lambda: q.embedded_levels(8, -128),
        lambda: q.embedded_levels(4, -128),
        lambda: q.embedded_levels(4, 120),
        lambda: q.Levels(0, 0),
        lambda: q.Levels(-129, 0),
    ],
)
def test_levels_outside_int8_are_refused(make):
    with pytest.raises(ValueError, match=r"bits|levels"):
        make()


def error(x, found):
    offset = torch.tensor(found.offset) if found.grid is q.Grid.SHIFTED else None
    return float((q.fake_quantize(x, torch.tensor(found.scale), found.levels, offset) - x).square().mean())


def heavy_tailed(n=20_000):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, generator=generator)
    x[:20] *= 40
    return x


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("kind", ["tails", "positive", "gelu"])
def test_beats_the_full_range(bits, kind):
    x = heavy_tailed()
    x = {"tails": x, "positive": x.abs(), "gelu": torch.nn.functional.gelu(x)}[kind]
    found = search_activation_range(compress(x), bits, may_shift=False)
    low, high = min(float(x.min()), 0.0), float(x.max())
    if bits == 8:
        lo, scale = -128, max(high / 127, -low / 128)
    else:
        scale = (high - low) / (2**bits - 1)
        lo = round(low / scale)
    full = torch.clamp(torch.round(x / scale), lo, lo + 2**bits - 1) * scale
    assert error(x, found) <= float((full - x).square().mean()) * (1 + 1e-5)
    # What the search believes of its sample holds for the tensor.
    assert found.mse == pytest.approx(error(x, found), rel=0.2)


def test_compress_keeps_mass_mean_and_extremes():
    x = heavy_tailed(50_000)
    sample = compress(x)
    assert float(sample.weights.double().sum()) == pytest.approx(1.0, abs=1e-5)
    assert float((sample.values * sample.weights).sum()) == pytest.approx(float(x.mean()), abs=1e-4)
    assert float(sample.values[0]) == float(x.min()) and float(sample.values[-1]) == float(x.max())
    assert torch.equal(compress(x[:100]).values, x[:100].sort().values)


def test_shifted_only_where_allowed_and_useful():
    one_sided = torch.rand(5000, generator=torch.Generator().manual_seed(0)) + 3.0
    allowed = search_activation_range(compress(one_sided), 8, may_shift=True)
    forbidden = search_activation_range(compress(one_sided), 8, may_shift=False)
    assert allowed.grid is q.Grid.SHIFTED and forbidden.grid is q.Grid.SYMMETRIC
    assert error(one_sided, allowed) < 0.1 * error(one_sided, forbidden)
    centred = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    assert search_activation_range(compress(centred), 8, may_shift=True).grid is q.Grid.SYMMETRIC


def test_constant_tensor_has_a_positive_scale():
    for value in (0.0, 5.0):
        found = search_activation_range(compress(torch.full((100,), value)), 4, may_shift=False)
        assert found.scale > 0 and error(torch.full((100,), value), found) <= 1e-4 * max(value, 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_scale_against_brute_force(bits):
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(bits))
    weight[0, 0] = 12.0
    levels = q.symmetric_levels(bits)

    def row_error(row, scale):
        return float(
            (torch.clamp(torch.round(row / scale), levels.lo, levels.hi) * scale - row).square().sum()
        )

    found = search_weight_scale(weight, levels)
    assert found.shape == (5,) and bool((found > 0).all())
    for row, scale in zip(weight, found, strict=True):
        full = max(float(row.max()) / levels.hi, float(row.min()) / levels.lo)
        brute = min(row_error(row, full * share / 400) for share in range(80, 441))
        assert row_error(row, float(scale)) <= row_error(row, full) + 1e-6
        assert row_error(row, float(scale)) <= 1.5 * brute


@pytest.mark.parametrize("shape", [(64, 96), (7, 3, 5, 5), (1, 1000)])
def test_weights_in_parts_have_the_same_scales(shape, monkeypatch):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    whole = search_weight_scale(weight, q.symmetric_levels(4))
    monkeypatch.setattr("ospq_export.formats.search._ELEMENTS_AT_ONCE", 3 * 96)
    assert torch.equal(search_weight_scale(weight, q.symmetric_levels(4)), whole)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("change", [{"bits": 8}, {"hi": 8}, {"lo": -9}, {"lo": -128, "hi": 127}, {"axis": 1}])
def test_a_record_of_other_levels_is_refused(weight, change):
    record = named("int4", weight=weight).record()
    assert read(record, weight=weight) == named("int4", weight=weight)
    with pytest.raises(InputError, match="no such format"):
        read({**record, **change}, weight=weight)


def test_a_record_of_an_asymmetric_grid_is_read():
    record = named("int4", weight=False).record() | {"grid": "embedded", "lo": -3, "hi": 12}
    assert read(record, weight=False).levels.hi == 12
