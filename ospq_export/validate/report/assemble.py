"""From the logits of all executions to the report."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ospq_export.data import ImagesRecord
from ospq_export.tasks.base import Task
from ospq_export.tasks.comparison import (
    Collector,
    Comparison,
    finite,
    has_labels,
    margin_change,
    predictions,
    topk_accuracy,
)
from ospq_export.tasks.statistics import FloatArray, IntArray, expected_calibration_error, wilson
from ospq_export.validate.codes.records import Location, weight_comparisons
from ospq_export.validate.criteria import (
    AccuracyChange,
    accuracy_change,
    accuracy_criteria,
    faithful_criteria,
)
from ospq_export.validate.executions.backends import Backend
from ospq_export.validate.executions.chosen import PREFIX, Executions, not_executed
from ospq_export.validate.executions.openvino import openvino_findings
from ospq_export.validate.executions.table import FAKE_QUANT, FAKE_QUANT_FP16, FLOAT
from ospq_export.validate.findings import processor_findings
from ospq_export.validate.floor import FloorVariation, NoiseFloor
from ospq_export.validate.report.model import BackendResult, BaselineResult, Provenance, Report
from ospq_export.validate.verdict import Thresholds, conclude
from ospq_export.world.processor import examine_processor, machine_name

if TYPE_CHECKING:
    from ospq_export.runs.run import Run

log = logging.getLogger(__name__)


@dataclass
class Evidence:
    """What one pass over the images found.

    Attributes:
        collector: logits of every execution, labels and ids.
        seconds: spent in each execution.
        backends: all executions, this run's and the baseline's.
        executions: of this run.
        unreadable: images that could not be read.
        references: deployed execution -> what it is compared with.
        uncompared: deployed executions that nothing here can be compared with.
        floor: the noise floor; None where it was not measured.
        images: where the images came from, and what was noted on them.
        class_to_idx: classes of the images.
        locations: comparisons of codes.
        seen: how many of the images the run was calibrated on, by content.
        decision_threshold: of a network with a single logit; None for all others.
        task: what the network's output is.
    """

    collector: Collector
    seconds: dict[str, float]
    backends: list[Backend]
    executions: Executions
    unreadable: list[str]
    references: dict[str, str]
    uncompared: list[str]
    floor: NoiseFloor | None
    images: ImagesRecord
    class_to_idx: Mapping[str, int]
    locations: list[Location]
    seen: int
    decision_threshold: float | None
    task: Task

    def names(self, *, baseline: bool) -> list[str]:
        """Executions of the baseline, or of the run itself."""
        return [b.name for b in self.backends if b.name.startswith(PREFIX) is baseline]

    def pair(self, reference: str, deployed: str) -> Comparison:
        """One execution against another."""
        logits = self.collector.logits
        return self.task.compare(
            (reference, logits(reference)),
            (deployed, logits(deployed)),
            self.collector.labels(),
            self.collector.ids,
        )


def assemble(run: Run, evidence: Evidence, thresholds: Thresholds, other: Run | None = None) -> Report:
    """All statistics, and the verdicts.

    Args:
        run: what was validated.
        evidence: what the pass over the images found.
        thresholds: what is allowed.
        other: the baseline.
    """
    names, logits = evidence.names(baseline=False), evidence.collector.logits
    labels = evidence.collector.labels()
    known = evidence.class_to_idx or run.manifest.class_to_idx
    class_names = sorted(known, key=known.__getitem__)
    if has_labels(labels):
        _warn_about_classes(class_names, logits(names[0]).shape[1])
    comparisons = [evidence.pair(reference, name) for name, reference in evidence.references.items()]
    floor, changes = _whole_floor(evidence), _changes(evidence, thresholds)
    left = not_executed(run, evidence.backends)
    findings = [*processor_findings(run, names), *openvino_findings(evidence.backends)]
    not_finite = [name for name in names if not np.isfinite(logits(name)).all()]
    faithful = faithful_criteria(
        comparisons, not_finite, evidence.uncompared, thresholds, floor, evidence.locations
    )
    notes = [*_notes(evidence, left), *findings]
    return Report(
        verdict=conclude(faithful, accuracy_criteria(changes, thresholds), notes),
        thresholds=thresholds,
        images=len(labels),
        labelled=has_labels(labels),
        decision_threshold=evidence.decision_threshold,
        calibration_images_seen=evidence.seen,
        not_executed=left,
        accuracy=changes,
        class_names=class_names,
        classes_source=evidence.images.classes_source,
        skipped=evidence.unreadable,
        passed_over=evidence.images.passed_over,
        image_notes=evidence.images.notes,
        executions_skipped=evidence.executions.skipped,
        findings=findings,
        backends=[_result(b, evidence) for b in evidence.backends],
        floor=floor,
        locations=evidence.locations,
        comparisons=comparisons,
        quantization=evidence.pair(FLOAT, FAKE_QUANT) if {FLOAT, FAKE_QUANT} <= set(names) else None,
        baseline=None if other is None else _baseline(other, evidence),
        weights=weight_comparisons(run),
        provenance=_provenance(run),
    )


def _changes(evidence: Evidence, limits: Thresholds) -> list[AccuracyChange]:
    """Every deployed execution against the float network."""
    reference = evidence.executions.float_reference
    if reference is None:
        return []
    deployed = [*evidence.references, *evidence.uncompared]
    return [accuracy_change(evidence.pair(reference, name), limits.confidence) for name in deployed]


def _notes(evidence: Evidence, left: list[str]) -> list[str]:
    """What has to be known beside the verdict."""
    images, notes = len(evidence.collector.ids), []
    if left:
        notes.append(f"not executed, so not judged: {', '.join(left)}")
    if evidence.seen:
        notes.append(
            f"{evidence.seen:,} of the {images:,} images are calibration images by content: "
            "accuracy on them says little about new ones"
        )
    if evidence.unreadable:
        notes.append(f"{len(evidence.unreadable):,} images could not be read and are not judged")
    if evidence.decision_threshold is not None:
        notes.append(
            f"one logit, so two classes: the second one where the logit exceeds {evidence.decision_threshold:g}"
        )
    if not has_labels(evidence.collector.labels()):
        notes.append(
            "the images have no labels: accuracy is judged by the predictions that differ from float's"
        )
    return notes


def _whole_floor(evidence: Evidence) -> NoiseFloor | None:
    """The noise floor, with that of FP16 float parts where they ran.

    How many values between two quantizers are rounded to FP16 is up to whoever executes a file, from every one to none at all:
    the two ends of that, both at hand on every image, are as far apart as legitimate executions get.
    """
    if evidence.floor is None or not {FAKE_QUANT, FAKE_QUANT_FP16} <= set(evidence.names(baseline=False)):
        return evidence.floor
    pair, logits = evidence.pair(FAKE_QUANT_FP16, FAKE_QUANT), evidence.collector.logits
    variation = FloorVariation(
        name="float32 between quantizers",
        reference=FAKE_QUANT_FP16,
        images=len(evidence.collector.ids),
        flips=len(pair.flips),
        mean_logit_difference=pair.mean_logit_difference,
        margin_change=finite(margin_change(logits(FAKE_QUANT_FP16), logits(FAKE_QUANT))),
    )
    return NoiseFloor(variations=[*evidence.floor.variations, variation])


def _warn_about_classes(names: list[str], classes: int) -> None:
    # One output tells two classes apart.
    if len(names) != max(classes, 2):
        log.warning(
            "%d classes are known and the network has %d: Top-1 means something only if label i is class i",
            len(names),
            classes,
        )


def _baseline(other: Run, evidence: Evidence) -> BaselineResult:
    pairs = [evidence.pair(name, name.removeprefix(PREFIX)) for name in evidence.names(baseline=True)]
    return BaselineResult(**_identity(other), comparisons=pairs)


def _result(execution: Backend, evidence: Evidence) -> BackendResult:
    logits, labels = evidence.collector.logits(execution.name), evidence.collector.labels()
    seconds = evidence.seconds[execution.name]
    return BackendResult(
        name=execution.name,
        detail=execution.detail,
        **(_scores(logits, labels) if has_labels(labels) else {}),
        seconds=round(seconds, 3),
        images_per_second=round(len(labels) / max(seconds, 1e-9), 1),
    )


def _scores(logits: FloatArray, labels: IntArray) -> dict[str, Any]:
    hits, top5 = int((predictions(logits) == labels).sum()), topk_accuracy(logits, labels, 5)
    return {
        "top1": topk_accuracy(logits, labels, 1),
        "top1_interval": wilson(hits, len(labels)),
        "top5": top5,
        "top5_interval": wilson(round(top5 * len(labels) / 100), len(labels)),
        "calibration_error": expected_calibration_error(logits, labels),
    }


def _identity(run: Run) -> dict[str, Any]:
    """What a report says of every run in it."""
    recipe = run.manifest.recipe
    return {
        "run": run.path.name,
        "model": run.manifest.model.name,
        "recipe": recipe.name,
        "formats": recipe.summary(),
        "files": run.manifest.files,
    }


def _provenance(run: Run) -> Provenance:
    names = ("ospq-export", "torch", "timm", "onnx", "numpy")
    return Provenance(
        **_identity(run),
        file_bytes={name: (run.path / name).stat().st_size for name in run.manifest.files},
        versions={name: metadata.version(name) for name in names},
        machine=machine_name(),
        processor=examine_processor(),
        threads=torch.get_num_threads(),
    )
