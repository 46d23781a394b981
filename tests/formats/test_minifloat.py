"""E4M3 and E2M1 against the conversions of ml_dtypes, and against exact fractions where those do not reach."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ospq_export.formats.choice import named
from ospq_export.formats.minifloat import E2M1, E4M3

KINDS = {"E4M3": (E4M3, ml_dtypes.float8_e4m3fn, 8), "E2M1": (E2M1, ml_dtypes.float4_e2m1fn, 4)}
kinds = pytest.mark.parametrize("name", KINDS)
names = st.sampled_from(sorted(KINDS))


def grid(name):
    """Every finite value of the type once, ascending, by the conversion of all of its bytes."""
    _, dtype, bits = KINDS[name]
    values = np.arange(2**bits, dtype=np.uint8).view(dtype).astype(np.float64)
    return np.unique(values[np.isfinite(values)] + 0.0)


def converted(x, name):
    """Float32 as ml_dtypes rounds it, saturated as QuantizeLinear does it."""
    _, dtype, _ = KINDS[name]
    largest = np.float32(grid(name)[-1])
    return np.clip(x, -largest, largest).astype(dtype).astype(np.float32)


def by_fractions(value, levels):
    """The nearest level; of two the one with the even mantissa, which lies at an even place from zero."""
    if np.isinf(value):
        return float(np.copysign(levels[-1], value))
    zero, place = len(levels) // 2, int(np.searchsorted(levels, value))
    return min(
        (float(level) for level in levels[max(place - 2, 0) : place + 2]),
        key=lambda v: (
            abs(Fraction(float(value)) - Fraction(v)),
            (int(np.searchsorted(levels, v)) - zero) % 2,
        ),
    )


def around(name):
    """Values at and near every level and every middle between two, and beyond the ends; float32."""
    levels = grid(name).astype(np.float32)
    places = np.concatenate([levels, (levels[1:] + levels[:-1]) / 2, levels[[0, -1]] * np.float32(1.03)])
    more = [np.nextafter(places, np.float32(side)) for side in (-np.inf, np.inf)]
    thirds = levels[:-1] + (levels[1:] - levels[:-1]) / np.float32(3)
    return np.concatenate([places, *more, thirds])


def bits(x):
    return np.asarray(x, np.float32).view(np.int32)


@kinds
def test_levels_are_those_of_the_type(name):
    kind, _, _ = KINDS[name]
    np.testing.assert_array_equal(kind.all, grid(name))
    assert kind.top == len(grid(name)) // 2
    assert (kind.lo, kind.hi, kind.smallest) == (grid(name)[0], grid(name)[-1], grid(name)[kind.top + 1])


@settings(max_examples=100, deadline=None)
@given(names, hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32, allow_nan=False)))
def test_rounds_like_the_conversion(name, x):
    np.testing.assert_array_equal(bits(KINDS[name][0].rounded(torch.from_numpy(x))), bits(converted(x, name)))


@settings(max_examples=100, deadline=None)
@given(names, st.data())
def test_rounds_small_values_like_the_conversion(name, data):
    reach = float(grid(name)[-1]) * 1.125
    elements = st.one_of(st.floats(-reach, reach, width=32), st.floats(-0.0625, 0.0625, width=32))
    x = data.draw(hnp.arrays(np.float32, st.integers(1, 40), elements=elements))
    np.testing.assert_array_equal(bits(KINDS[name][0].rounded(torch.from_numpy(x))), bits(converted(x, name)))


@settings(max_examples=100, deadline=None)
@given(names, st.sampled_from([16, 64]), st.data())
def test_other_widths_round_exactly(name, width, data):
    kind, levels = KINDS[name][0], grid(name)
    near = st.floats(-8, 8, width=width) if name == "E2M1" else st.floats(-500, 500, width=width)
    ties = st.sampled_from(((levels[1:] + levels[:-1]) / 2).tolist())
    value = data.draw(st.one_of(st.floats(width=width, allow_nan=False), near, ties))
    if width == 64 and data.draw(st.booleans()):
        value = float(np.nextafter(value, data.draw(st.sampled_from([-np.inf, np.inf]))))
    x = torch.tensor([value], dtype={16: torch.float16, 64: torch.float64}[width])
    out = kind.round_(x.clone())
    assert out.dtype == x.dtype and float(out) == by_fractions(value, levels)
    assert np.signbit(float(out)) == np.signbit(value)


@kinds
def test_edges_between_all_levels(name):
    x = around(name)
    np.testing.assert_array_equal(bits(KINDS[name][0].rounded(torch.from_numpy(x))), bits(converted(x, name)))
    exact = [by_fractions(v, grid(name)) for v in x]
    np.testing.assert_array_equal(KINDS[name][0].rounded(torch.from_numpy(x)).numpy(), exact)


@pytest.mark.parametrize(
    ("name", "inside", "beyond"),
    [
        ("E4M3", {431.9: 416, 432: 448}, (448, 450, 463.9, 464, 464.1, 480, 512, 1e30, float("inf"))),
        ("E2M1", {4.9: 4, 5: 4, 5.1: 6}, (6, 6.5, 7, 7.1, 8, 1e30, float("inf"))),
    ],
)
def test_saturates(name, inside, beyond):
    kind = KINDS[name][0]
    expected = {**inside, **dict.fromkeys(beyond, kind.largest)}
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor(list(expected), dtype=dtype)
        for sign in (1, -1):
            found = kind.round_(sign * x)
            assert found.tolist() == [sign * v for v in expected.values()]


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_zeros_keep_their_sign_and_nan_stays(name, dtype):
    found = KINDS[name][0].round_(torch.tensor([0.0, -0.0, -1e-7, float("nan"), 1.0], dtype=dtype)).numpy()
    assert found[[0, 1, 2, 4]].tolist() == [0, 0, 0, 1] and np.isnan(found[3])
    assert np.signbit(found[:3]).tolist() == [False, True, True]


def test_in_place_or_new_and_any_strides():
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)) * 100
    before = x.clone()
    expected = converted(x.numpy(), "E4M3")
    np.testing.assert_array_equal(E4M3.rounded(x.t()).numpy(), expected.T)
    assert torch.equal(x, before), "`rounded` is new"
    view = x.t()[1:5, ::2]
    assert E4M3.round_(view) is view
    np.testing.assert_array_equal(x.numpy()[::2, 1:5], expected[::2, 1:5])


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neighbours_are_the_levels_next_to_a_value(name, dtype):
    kind, levels = KINDS[name][0], grid(name)
    x = np.concatenate(
        [around(name).astype(np.float64), [0.0, -0.0, 1e-30, -1e-30, 3e4, -3e4, 3e38, np.inf, -np.inf]]
    )
    found = kind.neighbours(torch.from_numpy(x).to(dtype))
    below = np.searchsorted(levels, x, side="right") - 1
    lower = levels[np.clip(below, 0, None)]
    upper = levels[np.clip(below + 1, 0, len(levels) - 1)]
    np.testing.assert_array_equal(found.lower.numpy(), lower)
    np.testing.assert_array_equal(found.upper.numpy(), upper)
    position = found.position.numpy()
    assert position.min() >= 0 and position.max() <= 1
    within = lower < upper
    expected = (x[within] - lower[within]) / (upper - lower)[within]
    np.testing.assert_allclose(position[within], expected, rtol=1e-6, atol=1e-7)


@settings(max_examples=100, deadline=None)
@given(names, st.floats(-1000, 1000, width=32))
def test_the_nearest_level_is_a_neighbour(name, value):
    x = torch.tensor([value])
    around_, nearest = KINDS[name][0].neighbours(x), float(converted(np.float32([value]), name)[0])
    assert nearest in (float(around_.lower), float(around_.upper))
    if float(around_.position) not in (0.0, 0.5, 1.0) and float(around_.lower) < float(around_.upper):
        assert nearest == float(around_.upper if around_.position > 0.5 else around_.lower)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_count_the_levels(name, dtype):
    kind, levels = KINDS[name][0], grid(name)
    places = np.arange(len(levels)) - kind.top
    np.testing.assert_array_equal(kind.ranks(torch.from_numpy(levels).to(dtype)).numpy(), places)
    middles = (levels[1:] + levels[:-1]) / 2
    np.testing.assert_array_equal(kind.ranks(torch.from_numpy(middles).to(dtype)).numpy(), places[:-1] + 0.5)
    x = around(name).astype(np.float64)
    found = kind.ranks(torch.from_numpy(x).to(dtype)).numpy()
    np.testing.assert_allclose(found, np.interp(x, levels, places), rtol=1e-6, atol=1e-6)
    assert kind.ranks(torch.tensor([1e9, -1e9, float("inf")])).tolist() == [kind.top, -kind.top, kind.top]


@kinds
def test_beyond_the_edge_rounding_would_give_a_level_that_does_not_exist(name):
    kind, levels = KINDS[name][0], grid(name)
    assert kind.edge == (levels[-1] - levels[-2]) / 2


@kinds
def test_histogram_counts_every_level(name):
    kind, levels = KINDS[name][0], grid(name)
    x = np.repeat(levels, np.arange(len(levels)) % 3).astype(np.float32)
    x[x == 0] = -0.0
    format_ = named({"E4M3": "fp8", "E2M1": "nvfp4"}[name], weight=False)
    assert format_.levels == kind
    codes = format_.encode(torch.from_numpy(x))
    assert format_.histogram(codes) == (np.arange(len(levels)) % 3).tolist()
