"""What to do next: every way to miss a verdict or to leave it open has its own advice."""

import pytest

from ospq_export.tasks.comparison import Comparison, MarginHistogram
from ospq_export.validate.advice import advised
from ospq_export.validate.verdict import Criterion, Thresholds, conclude


def criterion(name, outcome, deployed="onnxruntime", **more):
    return Criterion(deployed=deployed, name=name, outcome=outcome, **{"by": name, "text": name, **more})


def advice(faithful, accuracy, *, quantized=None, **seen):
    verdict = conclude(faithful, accuracy)
    known = {"labelled": True, "uses_labels": True, "seen": 0, **seen}
    change = None if quantized is None else comparison(quantized)
    said = advised(verdict, Thresholds(), quantization=change, **known)
    assert said.text == verdict.text and said.exit_status == verdict.exit_status, "advice changes no verdict"
    return said.faithful.advice, said.accuracy.advice


def comparison(change):
    empty = dict.fromkeys(("agreement_interval", "mcnemar"))
    return Comparison(
        reference="float", deployed="fake_quant", images=100, reference_score=90.0, deployed_score=90.0 + change,
        score_difference=change, agreement=90.0, max_logit_difference=0.0, mean_logit_difference=0.0, flips=[],
        margins=MarginHistogram(edges=[], images=[], flips=[]), classes=[], **empty,
    )  # fmt: skip


MET, KEPT = criterion("agreement", "met"), criterion("accuracy", "met")


@pytest.mark.parametrize(
    ("faithful", "said"),
    [
        ([MET], "Nothing to do"),
        ([criterion("agreement", "missed")], "onnxruntime-unoptimised"),
        ([criterion("agreement", "missed", "onnxruntime-unoptimised")], "Export it again"),
        ([criterion("agreement", "missed"), criterion("codes", "missed")], "The file itself"),
        ([criterion("agreement", "missed"), criterion("codes", "met")], "The file is right"),
        ([MET, criterion("finite", "missed")], "FP16"),
        ([criterion("compared", "missed")], "to be compared with"),
        (
            [
                criterion("agreement", "open", images_needed=660),
                criterion("outputs", "open", images_needed=70),
            ],
            "about 660",
        ),
        ([criterion("agreement", "open")], "`min_agreement`"),
        ([criterion("outputs", "open", text="x; the noise floor was not measured")], "`floor_images`"),
        ([], "Add what is named"),
    ],
)
def test_on_the_deployment(faithful, said):
    found, _ = advice(faithful, [KEPT])
    assert said in found


@pytest.mark.parametrize(
    ("accuracy", "seen", "said"),
    [
        (KEPT, {}, "Nothing to do"),
        (KEPT, {"seen": 12}, "12 of these"),
        (criterion("accuracy", "missed"), {"quantized": -3.0}, "Quantization itself loses it"),
        (criterion("accuracy", "missed"), {"quantized": -0.5}, "more bits"),
        (criterion("accuracy", "missed", by="relative error"), {}, "`max_error`"),
        (criterion("accuracy", "open", images_needed=3000), {}, "about 3,000"),
        (criterion("accuracy", "open"), {}, "`max_drop`"),
        (criterion("accuracy", "open", images_needed=300), {"labelled": False}, "Give images with labels"),
    ],
)
def test_on_accuracy(accuracy, seen, said):
    _, found = advice([MET], [accuracy], **seen)
    assert said in found
    assert ("Quantization itself" in found) is (seen.get("quantized") == -3.0)


def test_what_is_not_faithful_is_repaired_first():
    _, found = advice([criterion("agreement", "missed")], [criterion("accuracy", "missed")], quantized=-3.0)
    assert found.startswith("First make the deployment faithful")


def test_outputs_without_labels_need_none():
    _, found = advice(
        [MET], [criterion("accuracy", "open", images_needed=50)], labelled=False, uses_labels=False
    )
    assert "labels" not in found


def test_no_verdict_says_what_to_add():
    verdict = conclude([], [])
    assert [
        line.startswith("no verdict on whether") and ("add" in line or "run one" in line)
        for line in verdict.text
    ] == [
        True,
        True,
    ]
    assert verdict.exit_status == 3 and "too few images" not in "".join(verdict.text)
