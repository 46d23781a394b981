"""The verdict: each criterion, each way to meet it, and each way to miss it."""

import numpy as np
import pytest

from ospq_export.validate.locate import Location
from ospq_export.validate.parity import compare
from ospq_export.validate.verdict import FloorVariation, NoiseFloor, Thresholds, judge

IMAGES = 1000


def comparison(flips, harmful=None, images=IMAGES):
    """`flips` images change class; the first `harmful` of them from right to wrong, the next as many the other way round."""
    harmful = flips if harmful is None else harmful
    reference = np.zeros((images, 3), np.float32)
    reference[:, 0] = 1
    deployed = reference.copy()
    deployed[:flips] = [0, 2, 0]
    labels = np.zeros(images, np.int64)
    labels[harmful:flips] = 1
    ids = [str(i) for i in range(images)]
    return compare(("fake_quant", reference), ("onnxruntime", deployed), labels, ids)


def floor(flips, images=IMAGES):
    calm = FloorVariation(name="batch split", images=images, flips=0, mean_logit_difference=0.0)
    worst = FloorVariation(name="float64", images=images, flips=flips, mean_logit_difference=0.1)
    left = FloorVariation(name="thread count", images=0, flips=0, mean_logit_difference=0.0, skipped="a GPU")
    return NoiseFloor(variations=[calm, worst, left])


def location(faults=()):
    return Location(
        deployed="model.onnx",
        images=8,
        max_excess=0.01,
        min_sqnr=90,
        first_diverging="blocks.3" if faults else None,
        faults=list(faults),
        unknown=[],
        quantizers=[],
        slices=[],
    )


def verdict(c, noise=None, locations=(), thresholds=None):
    return judge([c], [], thresholds or Thresholds(), noise, locations, IMAGES)


def by_name(found):
    return {c.name: c for c in found.criteria}


def test_a_quiet_network_is_held_to_the_threshold():
    # 6 flips of 1,000 are below 99.5 %, and a floor of 2 flips is not: the floor does not excuse them.
    found = verdict(comparison(6, harmful=3), floor(2))
    assert not found and not by_name(found)["agreement"].passed
    assert by_name(found)["agreement"].by == "threshold"


def test_a_chaotic_network_is_held_to_its_floor():
    found = verdict(comparison(20, harmful=10), floor(20))
    assert found, found.reasons
    assert by_name(found)["agreement"].by == "noise floor" and "float64" in by_name(found)["agreement"].text


def test_more_flips_than_the_floor():
    found = verdict(comparison(60, harmful=30), floor(20))
    assert not found and "worse than the floor's 98.00 %" in found.reasons[0]


def test_every_reference_has_its_own_floor():
    chaotic = FloorVariation(
        name="other", reference="fake_quant-fp16", images=IMAGES, flips=20, mean_logit_difference=0.1
    )
    noise = NoiseFloor(variations=[*floor(0).variations, chaotic])
    single = comparison(20, harmful=10)
    half = single.model_copy(update={"reference": "fake_quant-fp16"})
    assert verdict(half, noise) and not verdict(single, noise)
    assert not verdict(half, floor(20)), "what float32 may do says nothing about FP16"


def test_significance_moves_the_line():
    # Fisher's exact test of 34 against 20 of 1,000: p is about 0.03.
    assert verdict(comparison(34, harmful=17), floor(20), thresholds=Thresholds(significance=0.01))
    assert not verdict(comparison(34, harmful=17), floor(20), thresholds=Thresholds(significance=0.1))


def test_top1_by_mcnemar_only_with_flips_like_the_floor():
    chance = verdict(comparison(4, harmful=3), floor(4))
    assert chance and by_name(chance)["top1"].by == "McNemar"
    without_floor = verdict(comparison(4, harmful=3))
    assert not without_floor and by_name(without_floor)["top1"].by == "threshold"


def test_top1_that_is_not_chance():
    found = verdict(comparison(20, harmful=20), floor(20))
    assert not found and "not chance" in by_name(found)["top1"].text


def test_codes_decide_alone():
    assert verdict(comparison(0), floor(0), [location()])
    found = verdict(comparison(0), floor(0), [location(["slice blocks.3: 1 % other codes"])])
    assert not found and "first diverging slice blocks.3" in found.reasons[0]


def test_a_small_floor_sample_proves_little():
    # 1 of 50 is 2 %, as 20 of 1,000 are: the flips are within it, and so are some more.
    assert verdict(comparison(40, harmful=20), floor(1, images=50))


@pytest.mark.parametrize("values", [{"significance": 0}, {"significance": 1}, {"min_agreement": 101}])
def test_impossible_thresholds(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Thresholds(**values)
