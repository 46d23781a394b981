"""Twins: the same float function, on which per-tensor quantization collapses and equalization recovers."""

import pytest
import torch
from lib.twins import inject_outliers, twin_state_dict
from safetensors.torch import save_file

from ospq_export.calibrate.equalize import equalize
from ospq_export.calibrate.observe import observe
from ospq_export.data import resolve_data_config
from ospq_export.demo import demo_data_overrides, demo_images, demo_spec
from ospq_export.errors import InputError
from ospq_export.formats.choice import integers
from ospq_export.graph.capture import capture, fingerprint
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model

SIZE = (1, 28, 28)


def twin(name, folder):
    """A packaged network's twin, by way of a checkpoint file."""
    spec = demo_spec(name)
    save_file(twin_state_dict(create_model(spec), SIZE), folder / "twin.safetensors")
    return create_model(spec.model_copy(update={"checkpoint": str(folder / "twin.safetensors")}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_a_twin_is_the_same_function_with_outliers(name, tmp_path):
    model = create_model(demo_spec(name))
    other = twin(name, tmp_path)
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
    assert fingerprint(capture(model, SIZE)) == fingerprint(capture(other, SIZE))


def test_bad_input(small_vit):
    with pytest.raises(ValueError, match="share"):
        inject_outliers(small_vit, share=0.0)
    with pytest.raises(ValueError, match="factor"):
        inject_outliers(small_vit, factor=0.5)


@pytest.mark.slow
def test_a_network_without_layer_norms_has_no_twin():
    levit = create_model(ModelSpec(name="levit_128s", kwargs={"num_classes": 3}))
    with pytest.raises(InputError, match="no channels"):
        twin_state_dict(levit, (3, 224, 224))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_round_to_nearest_collapses_and_equalization_recovers(name, tmp_path):
    spec = demo_spec(name)
    model = twin(name, tmp_path)
    config = resolve_data_config(model, spec, demo_data_overrides())
    calibration = demo_images("calibration", config).sample(128, seed=0).images
    test = demo_images("test", config).sample(2000, seed=0)

    def top1(equalized):
        network = capture(model, SIZE)
        if equalized:
            equalize(network, calibration[:32], integers(4, 4), "shift")
        quantized = insert_quantizers(network, integers(4, 4))
        observe(quantized, calibration, batch_size=64, seed=0)
        with torch.inference_mode():
            floats = torch.cat([quantized.module(x) for x in test.images.split(100)])
            quantized.set_mode(Mode.QUANTIZE)
            logits = torch.cat([quantized.module(x) for x in test.images.split(100)])
        return [float((y.argmax(1) == test.labels).float().mean() * 100) for y in (floats, logits)]

    exact, collapsed = top1(equalized=False)
    _, recovered = top1(equalized=True)
    assert collapsed < exact - 10
    assert recovered - collapsed > 0.7 * (exact - collapsed)
