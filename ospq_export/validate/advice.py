"""What to do next, after each of the two verdicts: a sentence or two, with settings in backquotes."""

from __future__ import annotations

from collections.abc import Sequence

from ospq_export.tasks.comparison import Comparison
from ospq_export.validate.executions.probes import OPENED
from ospq_export.validate.executions.table import UNOPTIMIZED
from ospq_export.validate.verdict import Criterion, Judgement, Thresholds, Verdict

_FAITHFUL = "Nothing to do: deploy the file that was validated, in the runtime it was validated in."
_OTHERWISE = (
    "Compare with `backends` onnxruntime-unoptimised: if that one agrees, the runtime's optimisations are at fault; try another "
    "version of it."
)
_ON_MORE = "Measure the noise floor on more images (`floor_images`), and try another version of the runtime."
_KEPT = "Nothing to do: the loss is within what is allowed."


def advised(
    verdict: Verdict,
    limits: Thresholds,
    *,
    labelled: bool,
    uses_labels: bool,
    seen: int,
    quantization: Comparison | None,
) -> Verdict:
    """The verdict with what to do next.

    Args:
        verdict: both judgements.
        limits: what was allowed.
        labelled: whether the images had labels.
        uses_labels: whether the task has a use for them.
        seen: how many of the images the run was calibrated on.
        quantization: the fake-quantized network against the float network; None where one of both did not run.
    """
    first = verdict.faithful.model_copy(update={"advice": _on_faithful(verdict.faithful)})
    advice = _on_accuracy(verdict, limits, quantization)
    if verdict.accuracy.outcome == "open" and uses_labels and not labelled:
        advice = (
            f"Give images with labels: without them only the share of changed predictions is known. {advice}"
        )
    if seen:
        advice = f"{advice} Use images that the calibration has not seen: {seen:,} of these it has."
    second = verdict.accuracy.model_copy(update={"advice": advice.strip()})
    return verdict.model_copy(update={"faithful": first, "accuracy": second})


def _on_faithful(judged: Judgement) -> str:
    if judged.outcome == "met":
        return _FAITHFUL
    if judged.outcome == "open":
        return _on_open(judged, "`min_agreement`")
    missed = {c.name for c in judged.criteria if c.outcome == "missed"}
    found = {c.outcome for c in judged.criteria if c.name == "codes"}
    codes = "missed" if "missed" in found else next(iter(found), None)
    if "compared" in missed:
        return (
            "Give it something to be compared with: validate where torch can rebuild the network, or add "
            "`backends` onnxruntime-unoptimised."
        )
    if "finite" in missed:
        return (
            "Do not deploy it. If its float parts are FP16, deploy the file with FP32 parts; if not, the evidence says in which "
            "slice it begins."
        )
    if missed & {"rows", "repeats"}:
        return (
            "Do not deploy it in this runtime: one image has several results there. Build or run it with batch 1, or in another "
            "version of the runtime."
        )
    wrong = [c.deployed for c in judged.criteria if c.name == "codes" and c.outcome == "missed"]
    if wrong and all(name.endswith(OPENED) for name in wrong):
        return (
            "Do not deploy this engine. The file is right; the engine computes something else, from the slice named here on: "
            "build it with another version of the product."
        )
    if codes == "missed":
        return (
            "Do not deploy it. The file itself computes something else, from the slice named here on: export it again, and check "
            "it with lint."
        )
    again = {c.deployed for c in judged.criteria if c.outcome == "missed"}
    if codes == "met":
        return (
            "Do not deploy it in this runtime. The file is right, since its codes agree when inputs are equal; "
            f"what the runtime makes of it is not. {_OTHERWISE if UNOPTIMIZED not in again else _ON_MORE}"
        )
    return f"Do not deploy it. {_OTHERWISE if UNOPTIMIZED not in again else 'Export it again, and check it with lint.'}"


def _on_accuracy(verdict: Verdict, limits: Thresholds, quantization: Comparison | None) -> str:
    judged = verdict.accuracy
    if judged.outcome == "met":
        return _KEPT
    if judged.outcome == "open":
        return _on_open(judged, "`max_drop`")
    if verdict.faithful.outcome == "missed":
        return "First make the deployment faithful, as above; then judge accuracy again."
    if any(c.by == "relative error" for c in judged.criteria):
        return f"{_MORE} If such an error is acceptable, allow it: `max_error`."
    lost = -(quantization.score_difference or 0.0) if quantization is not None else None
    whose = "Quantization itself loses it, not the deployment. " if lost and lost > limits.max_drop else ""
    return f"{whose}{_MORE} If this loss is acceptable, allow it: `max_drop`."


_MORE = "Calibrate again with more bits, more images or more iterations, or leave sensitive layers in float."


def _on_open(judged: Judgement, setting: str) -> str:
    """What would decide what is open: criteria that say how many images, or what else is missing."""
    undecided = [c for c in judged.criteria if c.outcome == "open"]
    if not undecided:
        return "Add what is named, and validate again."
    if any("noise floor was not measured" in c.text for c in undecided):
        return "Measure the noise floor: `floor_images` 1000."
    needed = _images(undecided)
    if needed is None:
        return f"More images would not show it: what was seen is beyond what is allowed. Improve it, or allow more: {setting}."
    return f"Validate on more images: about {needed:,}, if they are like these."


def _images(criteria: Sequence[Criterion]) -> int | None:
    """The most that any of them needs; None where no number would do for one."""
    needed = [c.images_needed for c in criteria]
    return None if None in needed else max(n for n in needed if n is not None)
