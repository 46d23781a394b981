"""The whole path over timm's families at reduced size: capture, round to nearest at W8A8, export, ONNX Runtime, TensorRT-RTX."""

import models
import pytest
from families import FAMILIES

# The largest graphs take as long as all others, and some families have a sibling here; benchmarks/models.py has them all.
LARGE = {"MaxViT", "CoAtNet", "MobileViT", "MobileViT v2", "GC ViT", "CrossViT", "MViT v2"}
LEFT_OUT = LARGE | {"DeiT, distilled", "DeiT-3", "FlexiViT", "CLIP", "BEiT v2", "ConvNeXt"}
pytestmark = pytest.mark.slow

NAMES = [name for name in FAMILIES if name not in LEFT_OUT]


def test_enough_families():
    assert len(NAMES) >= 25


@pytest.mark.parametrize("label", NAMES)
def test_family(label):
    family = FAMILIES[label]
    images = models.random_images(2, (3, family.side, family.side))
    quantized = models.quantized_family(family, models.BITS["W8A8"], images)
    seen = models.compare(quantized, images)
    # Given equal inputs, a code is the fake-quantizer's or, at a rounding edge, its neighbour.
    assert seen.max_step <= 1 and seen.excess < 5e-3 and seen.share < 0.5, seen
    # Free-running, random weights let differences grow up to quantization's own error, and no further.
    assert seen.deployed < 2 + 4 * seen.floor, seen
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    fusion = models.compiled(quantized)
    assert fusion.gemms >= len(quantized.network.weights) > 5
    # A product that is not on Int8 has a reason: nothing is lost in silence, and most are.
    assert fusion.quantized_gemms + len(fusion.not_quantized) == fusion.gemms and all(
        fusion.not_quantized.values()
    )
    assert fusion.quantized_gemms >= 0.5 * fusion.gemms, fusion.not_quantized
    assert fusion.fused_attentions + len(fusion.not_fused) == fusion.attentions
