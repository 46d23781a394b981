"""The words of the report that are no everyday ones."""

from __future__ import annotations

from ospq_export.validate.report.model import Report

_ALWAYS = {
    "agreement": ("Agreement", "Share of images for which two executions predict the same class."),
    "bound": (
        "Bound, confidence",
        "Images are a sample, so a loss is known within bounds only. With 95 % confidence, the true loss is not above the upper "
        "bound. A verdict is open when what is allowed lies between the bounds: more images narrow them.",
    ),
    "codes": (
        "Codes",
        "The small integers, or FP8 or FP4 numbers, that a file stores and multiplies in place of float numbers.",
    ),
    "execution": ("Execution", "One way to run a network: a file or graph, a runtime, and its settings."),
    "fake-quantized": (
        "Fake-quantized network",
        "The calibrated network, simulated in torch: every value is rounded as the deployed file will round it.",
    ),
    "faithful": (
        "Faithful",
        "The deployed file gives what the fake-quantized network gives, but for rounding noise.",
    ),
    "kept": ("Accuracy kept", "The deployed file loses no more against the float network than is allowed."),
    "flip": ("Flip", "An image for which two executions predict different classes."),
    "margin": (
        "Margin",
        "The largest logit minus the second largest. Rounding flips images whose margin is small.",
    ),
    "noise-floor": (
        "Noise floor",
        "How far the fake-quantized network is from itself, computed in another order or type. Such differences are no fault.",
    ),
    "point": (
        "Point, Δ",
        "A percentage point: from 80 % to 79 % is one point lost. Δ is deployed minus reference.",
    ),
    "qdq": (
        "Q/DQ",
        "QuantizeLinear and DequantizeLinear: the pairs of ONNX operators that say where values are quantized.",
    ),
    "slice": ("Slice", "A part of the network that was calibrated as one piece."),
    "sqnr": (
        "SQNR",
        "Signal-to-quantization-noise ratio in decibels: how much larger a value is than its error. 10 dB more is an error "
        "ten times smaller in power.",
    ),
}
_BY_SCORE = {
    "Top-1": (
        "top1",
        "Top-1, Top-5",
        "Share of images whose right class has the largest logit, or is among the five largest.",
    ),
    "expected calibration error (ECE)": (
        "ece",
        "Expected calibration error (ECE)",
        "How far the network's confidence is from its accuracy, on average, in percent. It has nothing to do with calibration "
        "before quantization.",
    ),
    "k-NN Top-1": (
        "knn",
        "k-NN Top-1",
        "Share of images whose class their nearest neighbours among the other embeddings give.",
    ),
    "mIoU": (
        "miou",
        "mIoU",
        "Mean intersection over union: how far predicted and labelled pixels overlap, class by class.",
    ),
}
_ERROR = (
    "Relative error",
    "The norm of an output's difference over the norm of the reference's output, image by image.",
)
_INTERVAL = (
    "95 % interval",
    "Wilson's interval: where the true score lies, as far as so many images can tell.",
)
_MCNEMAR = (
    "McNemar p",
    "The chance of a split at least this uneven if neither execution were better. Small: the difference is real.",
)


def terms(report: Report) -> dict[str, tuple[str, str]]:
    """Anchor -> (term, what it means), of those that this report can use, by the alphabet."""
    found = dict(_ALWAYS)
    for score in {score for b in report.backends for score in b.scores} & set(_BY_SCORE):
        anchor, term, meaning = _BY_SCORE[score]
        found[anchor] = (term, meaning)
    if any(b.intervals for b in report.backends):
        found["interval"] = _INTERVAL
    pairs = [*report.comparisons, *(report.baseline.comparisons if report.baseline else ())]
    if any(c.mcnemar is not None for c in pairs):
        found["mcnemar"] = _MCNEMAR
    if any(c.outputs for c in report.comparisons):
        found["error"] = _ERROR
    return dict(sorted(found.items(), key=lambda item: item[1][0].lower()))
