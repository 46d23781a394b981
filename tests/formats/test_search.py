"""Range search against plain minimum and maximum, and against brute force."""

import arithmetic as q
import pytest
import torch

from ospq_export.formats.search import compress, search_activation_range, search_weight_scale


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
