"""The two verdicts: each criterion, each way to meet it, to miss it, and to leave it open."""

import numpy as np
import pytest

from ospq_export.tasks.accuracy import accuracy_change
from ospq_export.tasks.comparison import compare, margin_change, two_classes
from ospq_export.validate.codes.records import Location
from ospq_export.validate.criteria import faithful_criteria
from ospq_export.validate.floor import FloorVariation, NoiseFloor
from ospq_export.validate.kept import accuracy_criteria
from ospq_export.validate.verdict import Thresholds, conclude

IMAGES = 1000


def comparison(flips, harmful=None, images=IMAGES, margin=1.0, labelled=True):
    """`flips` images change class; the first `harmful` of them from right to wrong, the others the other way round."""
    harmful = flips if harmful is None else harmful
    reference = np.zeros((images, 3), np.float32)
    reference[:, 0] = margin
    deployed = reference.copy()
    deployed[:flips] = [0, 2, 0]
    labels = np.zeros(images, np.int64)
    labels[harmful:flips] = 1
    ids = [str(i) for i in range(images)]
    labels = labels if labelled else np.full(images, -1)
    return compare(("fake_quant", reference), ("onnxruntime", deployed), labels, ids)


def floor(flips, images=IMAGES, reach=0.0):
    calm = FloorVariation(name="batch split", images=images, flips=0, mean_logit_difference=0.0)
    worst = FloorVariation(
        name="float64", images=images, flips=flips, mean_logit_difference=0.1, margin_change=reach
    )
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


def faithful(c, noise=None, locations=(), **limits):
    return faithful_criteria([c], [], [], Thresholds(**limits), noise, locations)


def outcomes(found):
    return {c.name: c.outcome for c in found}


def accuracy(c, **limits):
    limits = Thresholds(**limits)
    (found,) = accuracy_criteria([accuracy_change(c, limits.confidence)], limits)
    return found


@pytest.mark.parametrize("images", [300, 1000, 10_000])
def test_flips_inside_the_noise_are_no_failure(images):
    # Two flips whose margins the floor moves by more: whatever the size, nothing is refuted.
    found = faithful(comparison(2, 1, images, margin=0.1), floor(0, images, reach=0.5))
    assert outcomes(found)["agreement"] in ("met", "open") and outcomes(found)["top1"] == "met"
    if images >= 1000:
        assert outcomes(found)["agreement"] == "met"


@pytest.mark.parametrize("images", [1, 5, 60, 150])
def test_few_images_show_nothing(images):
    found = faithful(comparison(0, images=images), floor(0, images))
    assert outcomes(found)["agreement"] == "open" and found[0].images_needed == pytest.approx(300, abs=10)
    kept = accuracy(comparison(0, images=images))
    assert kept.outcome == "open" and kept.images_needed == pytest.approx(300, abs=10)
    assert conclude(found, [kept]).exit_status == 3
    bare = faithful(comparison(0, images=images), floor(0, images), confidence=0.5)
    assert conclude(bare, [accuracy(comparison(0, images=images), confidence=0.5)]).exit_status == 0


@pytest.mark.parametrize(
    ("flips", "images", "outcome"), [(0, 400, "met"), (12, 1000, "missed"), (6, 1000, "open")]
)
def test_flips_beyond_the_noise(flips, images, outcome):
    found = faithful(comparison(flips, flips // 2, images, margin=1.0), floor(0, images, reach=0.5))
    assert outcomes(found)["agreement"] == outcome


def test_a_chaotic_network_is_held_to_its_floor():
    found = faithful(comparison(20, harmful=10), floor(20, reach=2.0))
    assert outcomes(found) == {"agreement": "met", "top1": "met"}
    assert found[0].by == "noise floor" and "float64" in found[0].text


def test_more_flips_than_the_floor():
    found = faithful(comparison(60, harmful=30), floor(20, reach=2.0))
    assert outcomes(found)["agreement"] == "missed" and "60 flips" in found[0].text


def test_every_reference_has_its_own_floor():
    chaotic = FloorVariation(
        name="other",
        reference="fake_quant-fp16",
        images=IMAGES,
        flips=20,
        mean_logit_difference=0.1,
        margin_change=2.0,
    )
    noise = NoiseFloor(variations=[*floor(0).variations, chaotic])
    single = comparison(20, harmful=10)
    half = single.model_copy(update={"reference": "fake_quant-fp16"})
    assert outcomes(faithful(half, noise))["agreement"] == "met"
    assert outcomes(faithful(single, noise))["agreement"] == "missed"
    assert outcomes(faithful(half, floor(20, reach=2.0)))["agreement"] == "missed", (
        "float32 says nothing of FP16"
    )


def test_logits_count_where_nobody_can_look_inside():
    """Twice the floor's 0.1 is noise; what moves a few images only is a rounding edge."""

    def judged(shift, images, closed=("onnxruntime",)):
        reference = np.zeros((IMAGES, 3), np.float32)
        reference[:, 0] = 9
        deployed = reference.copy()
        deployed[:images] += shift
        ids = [str(i) for i in range(IMAGES)]
        c = compare(("fake_quant", reference), ("onnxruntime", deployed), np.zeros(IMAGES, np.int64), ids)
        return outcomes(faithful_criteria([c], [], [], Thresholds(), floor(0), (), closed)).get("logits")

    assert judged(0.19, IMAGES) == "met" and judged(0.21, IMAGES) == "missed"
    assert judged(50, IMAGES // 3) == "met"
    assert judged(50, IMAGES, closed=()) is None


def test_significance_moves_the_line():
    # Fisher's exact test of 34 against 20 of 1,000: p is about 0.03.
    case = comparison(34, harmful=17), floor(20, reach=2.0)
    assert outcomes(faithful(*case, significance=0.01))["agreement"] == "met"
    assert outcomes(faithful(*case, significance=0.1))["agreement"] == "missed"


def test_top1_can_only_refute():
    assert outcomes(faithful(comparison(4, harmful=3), floor(4, reach=2.0)))["top1"] == "met"
    assert outcomes(faithful(comparison(20, harmful=20), floor(20, reach=2.0)))["top1"] == "missed"
    assert outcomes(faithful(comparison(20, harmful=0), floor(20, reach=2.0)))["top1"] == "missed", (
        "better counts"
    )


def test_codes_decide_alone():
    found = faithful(comparison(0), floor(0), [location(["slice blocks.3: 1 % other codes"])])
    verdict = conclude(found, [accuracy(comparison(0))])
    assert verdict.exit_status == 1 and verdict.text[0].startswith("the deployment is not faithful: ")
    assert "blocks.3" in verdict.text[0] and verdict.accuracy
    assert conclude(faithful(comparison(0), floor(0), [location()]), [accuracy(comparison(0))])


@pytest.mark.parametrize(
    ("flips", "harmful", "images", "outcome"),
    [
        (0, 0, 1000, "met"),
        (30, 15, 4000, "met"),
        (2, 2, 300, "open"),
        (12, 12, 1000, "open"),
        (40, 40, 1000, "missed"),
        (40, 40, 100, "missed"),
        (350, 350, 1000, "missed"),
        (350, 0, 1000, "met"),
    ],
)
def test_accuracy(flips, harmful, images, outcome):
    found = accuracy(comparison(flips, harmful, images))
    assert found.outcome == outcome, found.text
    points = (flips - 2 * harmful) / images * 100
    assert f"{abs(points):.2f} points {'lost' if points <= 0 else 'gained'}" in found.text
    assert ("would tell" in found.text) is (outcome == "open")


def test_the_allowed_drop_is_the_users():
    c = comparison(40, 40)
    assert accuracy(c, max_drop=10).outcome == "met" and accuracy(c, max_drop=1).outcome == "missed"
    assert accuracy(c, max_drop=100).outcome == "met"
    assert accuracy(comparison(12, 12), confidence=0.5).outcome == "missed", "1.2 points as they are"
    assert accuracy(comparison(9, 9), confidence=0.5).outcome == "met"


def test_without_labels_only_kept_can_be_shown():
    few, many = comparison(2, labelled=False), comparison(400, labelled=False)
    assert accuracy(few).outcome == "met" and "without labels" in accuracy(few).text
    found = accuracy(many)
    assert found.outcome == "open" and "only labels would tell" in found.text
    assert few.score_difference is None and few.mcnemar is None and few.classes == []
    assert set(outcomes(faithful(few, floor(0)))) == {"agreement"}


def test_what_was_not_finite_or_not_compared_refutes():
    found = faithful_criteria([comparison(0)], ["onnxruntime"], ["tensorrt"], Thresholds(), floor(0))
    assert [c.name for c in found if c.outcome == "missed"] == ["finite", "compared"]
    assert conclude(found, [accuracy(comparison(0))]).exit_status == 1


def test_no_evidence_shows_nothing():
    verdict = conclude([], [])
    assert (
        verdict.exit_status == 3
        and not verdict
        and "no deployed execution was compared; run one" in verdict.text[0]
    )


def test_the_words_of_the_verdict():
    good, bad = accuracy(comparison(0)), accuracy(comparison(350, 350))
    sound = faithful(comparison(0), floor(0))
    assert conclude(sound, [good]).text[0].startswith("the deployment is faithful: onnxruntime agrees")
    assert conclude(sound, [good]).text[1].startswith("accuracy is kept: onnxruntime has a Top-1 of 100.00 %")
    lost = conclude(sound, [bad], ["a note"]).text
    assert lost[1].startswith("accuracy is not kept: ") and "65.00 %" in lost[1] and "100.00 %" in lost[1]
    assert lost[2] == "a note"


def test_margin_change_by_loops():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 30, 6)).astype(np.float32)
    slow = 0.0
    for ours, theirs in zip(a.astype(float), b.astype(float), strict=True):
        top = int(np.argmax(ours))
        for k in range(6):
            slow = max(slow, abs((ours[top] - ours[k]) - (theirs[top] - theirs[k])))
    assert margin_change(a, b) == pytest.approx(slow)


def test_a_single_logit_is_two_classes():
    from ospq_export.errors import InputError
    from ospq_export.tasks.classify import Logits
    from ospq_export.tasks.comparison import margins, predictions

    logits = np.array([[-1.0], [0.4], [0.6], [np.nan]], np.float32)
    both = two_classes(logits, 0.5)
    assert predictions(both).tolist() == [0, 0, 1, 0]
    np.testing.assert_allclose(margins(both)[:3], [1.5, 0.1, 0.1], rtol=1e-6)
    measure = Logits([], 4, 0.5)
    assert measure.decision_threshold is None
    assert measure.logits({"x": logits}).shape == (4, 2) and measure.decision_threshold == 0.5
    assert Logits([], 4).logits({"x": both}) is both
    with pytest.raises(InputError, match="2 logits"):
        Logits([], 4, 0.5).logits({"x": both})


@pytest.mark.parametrize(
    "values",
    [{"significance": 0}, {"significance": 1}, {"min_agreement": 101}, {"confidence": 1}, {"max_drop": -1}],
)
def test_impossible_thresholds(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        Thresholds(**values)
