"""FP8 against ml_dtypes, ONNX's reference evaluator and ONNX Runtime."""

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from ospq_export.errors import InputError
from ospq_export.formats.choice import named, read
from ospq_export.formats.kernels import whole_backward
from ospq_export.formats.search import compress

WEIGHT, ACTIVATION = (named("fp8", weight=weight) for weight in (True, False))
DTYPE = ml_dtypes.float8_e4m3fn
ALL_BYTES = np.arange(256, dtype=np.uint8)
NUMBERS = ALL_BYTES[(ALL_BYTES & 0x7F) != 0x7F]

scales = st.floats(2**-12, 2**6, width=32)
values = st.one_of(st.floats(-1e4, 1e4, width=32), st.floats(-2, 2, width=32), st.just(np.inf))
arrays = hnp.arrays(np.float32, st.integers(1, 40), elements=values)


def codes_of(levels):
    """The bytes of levels; where torch and NumPy have no common type."""
    return ACTIVATION.encode(levels).view(torch.uint8).numpy()


def saturated(x):
    """Nearest E4M3 as float64, for magnitudes of any size."""
    return np.clip(x, -448, 448).astype(DTYPE).astype(np.float64)


def test_decodes_every_byte():
    found = ACTIVATION.decode(torch.from_numpy(NUMBERS.copy()).view(torch.float8_e4m3fn)).numpy()
    expected = NUMBERS.view(DTYPE).astype(np.float32)
    np.testing.assert_array_equal(found.view(np.int32), expected.view(np.int32))
    # ONNX Runtime's codes arrive as plain bytes.
    assert np.array_equal(ACTIVATION.decode(torch.from_numpy(NUMBERS.copy())).numpy(), expected)
    # Two of the bytes are no numbers, and must not pass for some.
    whole = ACTIVATION.decode(torch.from_numpy(ALL_BYTES.copy()).view(16, 16)).numpy()
    np.testing.assert_array_equal(whole, ALL_BYTES.view(DTYPE).astype(np.float32).reshape(16, 16))
    assert np.isnan(whole).sum() == 2


def test_decoded_levels_take_gradients_whoever_decoded_first():
    with torch.inference_mode():
        ACTIVATION.decode(torch.zeros(2, dtype=torch.uint8))
    scale = torch.ones((), requires_grad=True)
    (ACTIVATION.decode(torch.tensor([0x38, 0xB8, 0x40], dtype=torch.uint8)) * scale).sum().backward()
    assert float(scale.grad) == 2.0


def test_codes_survive_the_round_trip():
    levels = torch.from_numpy(NUMBERS.view(DTYPE).astype(np.float32))
    np.testing.assert_array_equal(codes_of(levels), NUMBERS)
    assert ACTIVATION.encode(levels).dtype == ACTIVATION.storage


def test_holds_numbers_only():
    for byte in ALL_BYTES:
        codes = torch.tensor([0, byte, 5], dtype=torch.uint8)
        assert ACTIVATION.holds(codes) == (byte not in (0x7F, 0xFF))
    assert not ACTIVATION.holds(torch.zeros(3, dtype=torch.int8))


def onnx_model(scale, axis=None):
    """QuantizeLinear to FLOAT8E4M3FN with a zero point, and back, as the export writes it."""
    zeros = np.zeros(np.shape(scale), DTYPE)
    constants = {"scale": np.asarray(scale, np.float32), "zero_point": zeros}
    attributes = {} if axis is None else {"axis": axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["codes"], **attributes),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero_point"], ["real"], **attributes),
    ]
    shape = ["n"] if axis is None else ["n", "m"]
    graph = helper.make_graph(
        nodes,
        "q",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [
            helper.make_tensor_value_info("codes", TensorProto.FLOAT8E4M3FN, shape),
            helper.make_tensor_value_info("real", TensorProto.FLOAT, shape),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def executions(model, x):
    """(bytes, real values) of the reference evaluator, and of ONNX Runtime."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for codes, real in (ReferenceEvaluator(model).run(None, {"x": x}), session.run(None, {"x": x})):
        yield np.asarray(codes).view(np.uint8), real


def assert_same(x, scale, axis=None):
    s = torch.from_numpy(np.asarray(scale, np.float32))
    spread = s if axis is None else WEIGHT.granularity.spread(s, x.shape)
    levels = ACTIVATION.nearest(torch.from_numpy(x), spread)
    real = ACTIVATION.dequantize(levels, spread).numpy()
    for deployed_codes, deployed_real in executions(onnx_model(scale, axis), x):
        np.testing.assert_array_equal(codes_of(levels), deployed_codes)
        np.testing.assert_array_equal(real.view(np.int32), deployed_real.view(np.int32))


@settings(max_examples=40, deadline=None)
@given(arrays, scales)
def test_an_activation_is_quantize_linear(x, scale):
    assert_same(x, scale)


@settings(max_examples=15, deadline=None)
@given(hnp.arrays(np.float32, (3, 8), elements=values), hnp.arrays(np.float32, 3, elements=scales))
def test_a_weight_is_quantize_linear_along_its_outputs(x, scale):
    assert_same(x, scale, axis=0)


def test_edges_of_all_codes_with_a_scale():
    levels = np.unique(NUMBERS.view(DTYPE).astype(np.float32))
    middles = np.concatenate([(levels[1:] + levels[:-1]) / 2, [463, 464, 465, -463, -464, -465]])
    for scale in (np.float32(0.25), np.float32(0.037)):
        x = (middles * scale).astype(np.float32)
        assert_same(np.concatenate([np.nextafter(x, np.float32(s)) for s in (-1e9, 1e9)] + [x]), scale)


def test_divides_by_the_stored_scale():
    # At these pairs the quotient is a tie, and the product with the rounded inverse is not.
    candidates = np.float32([0.1, 0.3, 0.7, 0.011, 0.023]).repeat(100)
    middles = np.tile(8.5 + np.arange(100) % 7, 5)
    x = (middles * candidates.astype(np.float64)).astype(np.float32)
    quotients, products = x / candidates, x * (np.float32(1) / candidates)
    divided, multiplied = saturated(quotients), saturated(products)
    assert (divided != multiplied).any(), "no pair tells the two apart"
    found = ACTIVATION.nearest(torch.from_numpy(x), torch.from_numpy(candidates))
    np.testing.assert_array_equal(found.numpy(), divided)


def error(x, scale):
    return np.square(saturated(x / scale) * scale - x)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 4), st.floats(1e-4, 1e4))
def test_searched_ranges_are_no_worse_than_the_full_one(seed, power, size):
    x = np.random.default_rng(seed).normal(size=3000)
    x = (np.sign(x) * np.abs(x) ** power * size).astype(np.float32)
    found = ACTIVATION.search_range(compress(torch.from_numpy(x)), may_shift=True)
    assert found.format == ACTIVATION and found.offset == 0 and found.scale > 0
    exact = x.astype(np.float64)
    searched, full = error(exact, found.scale).mean(), error(exact, np.abs(exact).max() / 448).mean()
    assert searched <= full * (1 + 1e-5)
    assert found.mse == pytest.approx(searched, rel=1e-3)


def test_a_search_may_clip():
    x = np.full(4000, 0.001, np.float32)
    x[:1000], x[0] = 0.0015, 448.0
    found = ACTIVATION.search_range(compress(torch.from_numpy(x)), may_shift=False)
    assert found.scale <= 1.0
    many = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    assert (
        ACTIVATION.search_range(compress(torch.from_numpy(many)), may_shift=False).scale < np.abs(many).max()
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.3, 3))
def test_weight_scales_are_no_worse_than_the_full_range(seed, power):
    x = np.random.default_rng(seed).normal(size=(5, 64))
    x = (np.sign(x) * np.abs(x) ** power * np.array([[1e-6], [1], [7], [1e4], [0]])).astype(np.float32)
    found = WEIGHT.search_scale(torch.from_numpy(x))
    assert found.tensor_scale is None and found.scale.shape == (5,) and bool((found.scale > 0).all())
    exact, scale = x.astype(np.float64), found.scale.double().numpy()[:, None]
    full = np.abs(exact).max(1, keepdims=True) / 448
    full[4] = 1.0
    assert (error(exact, scale).sum(1) <= error(exact, full).sum(1) * (1 + 1e-4)).all()


def test_zeros_have_a_scale():
    found = ACTIVATION.search_range(compress(torch.zeros(100)), may_shift=False)
    assert found.scale > 0 and found.mse == 0
    assert torch.equal(ACTIVATION.nearest(torch.zeros(3), torch.tensor(found.scale)), torch.zeros(3))


def straight_through(x, scale, kept):
    """The fake-quantizer as autograd would differentiate it: the conversion as the straight-through estimator."""
    scaled = x / scale
    level = torch.from_numpy(saturated(scaled.detach().numpy()))
    # 464 is the middle between 448 and what would come next.
    levels = torch.where(scaled.detach().abs() <= 464, scaled + (level - scaled).detach(), level)
    real = levels * scale
    return real if kept is None else torch.where(kept > 0, real, x)


@pytest.mark.parametrize("with_kept", [False, True])
def test_gradients_against_an_autograd_chain(with_kept):
    generator = torch.Generator().manual_seed(1)
    # A seventh of the values lies outside.
    data = torch.randn(600, generator=generator, dtype=torch.float64) * 300
    kept = (torch.rand(600, generator=generator) < 0.5).to(torch.uint8) if with_kept else None
    given_ = torch.linspace(-1, 2, 600, dtype=torch.float64)
    results = []
    for function in (
        lambda x, s: ACTIVATION.fake_quantize(x, s, None, kept),
        lambda x, s: straight_through(x, s, kept),
    ):
        x, scale = data.clone().requires_grad_(), torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
        out = function(x, scale)
        out.backward(given_)
        results.append((out.detach(), x.grad, scale.grad))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)
    assert 0 < int((results[0][1] == 0).sum()) < 300
    scale = torch.tensor(0.9, dtype=torch.float64)
    on_gpu = whole_backward(given_, data, scale, None, kept, ACTIVATION.levels)
    for ours, reference in zip(on_gpu, results[1][1:], strict=False):
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)


def test_dropped_elements_are_the_float_ones_exactly():
    x, scale = torch.randn(1000, generator=torch.Generator().manual_seed(3)), torch.tensor(0.013)
    kept = (torch.arange(1000) % 3 > 0).to(torch.uint8)
    out = ACTIVATION.fake_quantize(x, scale, None, kept).numpy()
    quantized = (saturated((x / scale).numpy()).astype(np.float32)) * scale.numpy()
    np.testing.assert_array_equal(out, np.where(kept.numpy() > 0, quantized, x.numpy()))


def test_steps_between_codes_count_levels():
    scale = torch.tensor(0.5)
    x = torch.tensor([0.0, 8.0, -224.0, 1e6, 0.5 * 17.0])
    own = ACTIVATION.nearest(x, scale)
    steps, excess = ACTIVATION.steps_apart(x, scale, None, own)
    assert steps.tolist() == [0] * 5 and float(excess.max()) <= 0
    next_down = torch.from_numpy(np.float32([-(2**-9), 15, -480 + 64, 416, 18]))
    steps, excess = ACTIVATION.steps_apart(x, scale, None, next_down)
    assert steps.tolist() == [1] * 5
    # 17 is the middle between 16 and 18: both are right.
    assert excess.tolist() == [0.5, 0.5, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("weight", [True, False])
def test_a_record_brings_it_back(weight):
    format_ = named("fp8", weight=weight)
    record = format_.record()
    assert read(record, weight=weight) == format_
    assert format_.granularity.axis == (0 if weight else None)
    for change in ({"bits": 4}, {"axis": 1}):
        with pytest.raises(InputError, match="no such format"):
            read({**record, **change}, weight=weight)
    with pytest.raises(InputError):
        read({"format": "fp8"}, weight=weight)
