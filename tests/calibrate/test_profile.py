"""Outlier profile: its statistics are scipy's and numpy's, and injected outliers show."""

import numpy as np
import pytest
import torch
from lib.twins import inject_outliers
from scipy.stats import kurtosis

from ospq_export.calibrate.observe import outlier_profile
from ospq_export.demo import demo_spec
from ospq_export.graph.capture import capture
from ospq_export.models.timm import create_model


@pytest.fixture(scope="module")
def network():
    return capture(create_model(demo_spec("swin")), (1, 28, 28))


IMAGES = torch.randn(12, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def test_statistics_are_those_of_numpy_and_scipy(network):
    records = {r.name: r for r in outlier_profile(network, IMAGES, batch_size=5)}
    kept = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n):
            kept[n.name] = super().run_node(n)
            return kept[n.name]

    with torch.no_grad():
        Keep(network, garbage_collect_values=False).run(IMAGES)
    x = kept["layer_norm_1"].double().numpy()
    r = records["layers.0.blocks.0.attn.qkv.input"]
    assert r.max_over_std == pytest.approx(np.abs(x).max() / x.std(), rel=1e-5)
    assert r.kurtosis == pytest.approx(kurtosis(x.ravel(), fisher=False), rel=1e-5)
    per_channel = np.square(x).reshape(-1, x.shape[-1]).sum(0)
    assert r.channel_share == pytest.approx(per_channel.max() / per_channel.sum(), rel=1e-5)
    assert {r.kind for r in records.values()} == {"cut", "quantizer"}


def test_the_largest_share_counts_the_largest_elements(network):
    squares = np.sort(np.square(IMAGES.numpy().ravel()))[::-1]
    images = {r.name: r for r in outlier_profile(network, IMAGES)}["patch_embed.proj.input"]
    expected = squares[: round(0.001 * squares.size)].sum() / squares.sum()
    assert images.largest_share == pytest.approx(expected, rel=1e-4)


def test_injected_outliers_show(network):
    plain = {r.name: r for r in outlier_profile(network, IMAGES)}
    twin = capture(create_model(demo_spec("swin")), (1, 28, 28))
    inject_outliers(twin)
    name = "layers.1.blocks.0.mlp.fc1.input"
    found = {r.name: r for r in outlier_profile(twin, IMAGES)}
    assert found[name].channel_share > 2 * plain[name].channel_share
    assert found[name].kurtosis > 3 * plain[name].kurtosis
