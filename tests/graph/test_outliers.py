"""Twins: the same float function, on which per-tensor quantization collapses and equalization recovers."""

import copy

import numpy as np
import pytest
import torch
from conftest import small_spec
from lib.twins import inject_outliers, twin_state_dict
from safetensors.torch import save_file
from scipy.stats import kurtosis

from ospq_export.calibrate.equalize import equalize
from ospq_export.calibrate.observe import observe, outlier_profile
from ospq_export.data import resolve_data_config
from ospq_export.demo import demo_data_overrides, demo_images
from ospq_export.errors import InputError
from ospq_export.formats.choice import integers
from ospq_export.graph.capture import capture, fingerprint
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model

SIZE = (1, 28, 28)


@pytest.fixture(scope="module", params=["vit", "swin"])
def twins(request, tmp_path_factory):
    """A packaged network's first blocks, their spec, and their twin by way of a checkpoint file, with its graph."""
    folder = tmp_path_factory.mktemp("twins")
    spec = small_spec(request.param, folder / "weights.safetensors")
    model = create_model(spec)
    save_file(twin_state_dict(model, SIZE), folder / "twin.safetensors")
    other = create_model(spec.model_copy(update={"checkpoint": str(folder / "twin.safetensors")}))
    return spec, model, other, capture(other, SIZE)


@pytest.mark.slow
def test_a_twin_is_the_same_function_with_outliers(twins):
    _, model, other, captured = twins
    images = torch.randn(8, *SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = model(images), other(images)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    norms = [
        (a.detach(), b.detach())
        for (path, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True)
        if path.endswith(("norm1.weight", "norm2.weight"))
    ]
    assert norms and all(7 < float((b / a).abs().max()) <= 65 for a, b in norms)
    assert fingerprint(capture(model, SIZE)) == fingerprint(captured)


def test_bad_input(small_vit):
    with pytest.raises(ValueError, match="share"):
        inject_outliers(small_vit, share=0.0)
    with pytest.raises(ValueError, match="factor"):
        inject_outliers(small_vit, factor=0.5)


@pytest.mark.slow
def test_a_network_without_layer_norms_has_no_twin():
    levit = create_model(ModelSpec(name="levit_128s", kwargs={"num_classes": 3, "depth": (1, 1, 1)}))
    with pytest.raises(InputError, match="no channels"):
        twin_state_dict(levit, (3, 224, 224))


@pytest.mark.slow
def test_round_to_nearest_collapses_and_equalization_recovers(twins):
    spec, _, model, captured = twins
    config = resolve_data_config(model, spec, demo_data_overrides())
    calibration = demo_images("calibration", config).sample(128, seed=0).images
    test = demo_images("test", config).sample(1000, seed=0)

    def accuracy(module):
        with torch.inference_mode():
            logits = torch.cat([module(x) for x in test.images.split(100)])
        return float((logits.argmax(1) == test.labels).float().mean() * 100)

    def top1(equalized):
        network = copy.deepcopy(captured)
        if equalized:
            equalize(network, calibration[:32], integers(4, 4), "shift")
        quantized = insert_quantizers(network, integers(4, 4))
        observe(quantized, calibration, batch_size=64, seed=0)
        quantized.set_mode(Mode.QUANTIZE)
        return accuracy(quantized.module)

    exact, collapsed, recovered = accuracy(model), top1(equalized=False), top1(equalized=True)
    assert collapsed < exact - 10
    assert recovered - collapsed > 0.7 * (exact - collapsed)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return capture(
        create_model(small_spec("swin", tmp_path_factory.mktemp("network") / "weights.safetensors")), SIZE
    )


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
    twin = copy.deepcopy(network)
    inject_outliers(twin)
    name = "layers.1.blocks.0.mlp.fc1.input"
    found = {r.name: r for r in outlier_profile(twin, IMAGES)}
    assert found[name].channel_share > 2 * plain[name].channel_share
    assert found[name].kurtosis > 3 * plain[name].kurtosis
