"""From the logits of all executions to the report."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch

from ospq_export.data import ImagesRecord
from ospq_export.runs.files import stored_bytes
from ospq_export.tasks.accuracy import AccuracyChange
from ospq_export.tasks.comparison import Comparison, has_labels
from ospq_export.tasks.measure import Collector, Measure
from ospq_export.tasks.statistics import Rate
from ospq_export.validate.advice import advised
from ospq_export.validate.codes.records import Location, WeightComparison, weight_comparisons
from ospq_export.validate.criteria import faithful_criteria
from ospq_export.validate.executions.backends import Backend
from ospq_export.validate.executions.chosen import PREFIX, Executions, not_executed
from ospq_export.validate.executions.openvino import openvino_findings
from ospq_export.validate.executions.table import CLOSED, FAKE_QUANT, FAKE_QUANT_FP16, FLOAT
from ospq_export.validate.findings import (
    engine_findings,
    processor_findings,
    size_findings,
    stand_in_findings,
)
from ospq_export.validate.floor import FloorVariation, NoiseFloor
from ospq_export.validate.kept import accuracy_criteria
from ospq_export.validate.report.model import BackendResult, BaselineResult, Provenance, Report
from ospq_export.validate.steadiness import Steadiness, steady_criteria
from ospq_export.validate.verdict import Thresholds, conclude
from ospq_export.world.processor import examine_processor, machine_name

if TYPE_CHECKING:
    from ospq_export.runs.run import Run

log = logging.getLogger(__name__)


@dataclass
class Evidence:
    """What one pass over the images found.

    Attributes:
        collector: what was kept of every execution's outputs, labels and ids.
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
        measure: what compares outputs.
        steadiness: executions held against themselves.
    """

    collector: Collector
    seconds: dict[str, float]
    backends: Sequence[Backend]
    executions: Executions
    unreadable: list[str]
    references: dict[str, str]
    uncompared: list[str]
    floor: NoiseFloor | None
    images: ImagesRecord
    class_to_idx: Mapping[str, int]
    locations: list[Location]
    seen: int
    measure: Measure
    steadiness: list[Steadiness] = field(default_factory=list)

    def names(self, *, baseline: bool) -> list[str]:
        """Executions of the baseline, or of the run itself."""
        return [b.name for b in self.backends if b.name.startswith(PREFIX) is baseline]

    def pair(self, reference: str, deployed: str, floor: NoiseFloor | None = None) -> Comparison:
        """One execution against another, and against the noise floor where that is given."""
        noise = None if floor is None else floor.errors(reference)
        return self.measure.compare(self.collector, reference, deployed, noise)


@dataclass(frozen=True)
class Subject:
    """What is validated: a run, or files.

    Attributes:
        task: name of the task.
        class_to_idx: its classes, where it knows them.
        provenance: what it is, and where it was validated.
        left: networks and engines beside it that were not executed.
        findings: what a reader has to know of it.
        weights: comparisons of its weights.
    """

    task: str
    class_to_idx: Mapping[str, int]
    provenance: Provenance
    left: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    weights: list[WeightComparison] = field(default_factory=list)


def subject_of(run: Run, evidence: Evidence, findings: Sequence[str] = ()) -> Subject:
    """A run as what is validated; `findings` are those of its float files."""
    return Subject(
        task=run.manifest.task,
        class_to_idx=run.manifest.class_to_idx,
        provenance=_provenance(run),
        left=not_executed(run, evidence.backends),
        findings=[
            *stand_in_findings(evidence.backends),
            *size_findings(run),
            *processor_findings(run, evidence.names(baseline=False)),
            *findings,
        ],
        weights=weight_comparisons(run),
    )


def assemble(
    subject: Subject, evidence: Evidence, thresholds: Thresholds, other: Run | None = None
) -> Report:
    """All statistics, and the verdicts.

    Args:
        subject: what was validated.
        evidence: what the pass over the images found.
        thresholds: what is allowed.
        other: the baseline.
    """
    names, labels = evidence.names(baseline=False), evidence.collector.labels()
    known = evidence.class_to_idx or subject.class_to_idx
    class_names = sorted(known, key=known.__getitem__)
    if has_labels(labels) and subject.task == "classify":
        _warn_about_classes(class_names, evidence.collector.column(names[0]).shape[1])
    floor, changes = _whole_floor(evidence), _changes(evidence, thresholds)
    comparisons = [evidence.pair(reference, name, floor) for name, reference in evidence.references.items()]
    not_finite = [name for name in names if not evidence.measure.is_finite(evidence.collector, name)]
    faithful = faithful_criteria(
        comparisons, not_finite, evidence.uncompared, thresholds, floor, evidence.locations, CLOSED
    )
    faithful += steady_criteria(evidence.steadiness, evidence.references, floor)
    findings = [
        *subject.findings,
        *openvino_findings(evidence.backends),
        *engine_findings(faithful, evidence.locations),
    ]
    notes = [*_notes(evidence, subject.left), *findings]
    quantization = evidence.pair(FLOAT, FAKE_QUANT) if {FLOAT, FAKE_QUANT} <= set(names) else None
    verdict = conclude(faithful, accuracy_criteria(changes, thresholds), notes)
    verdict = advised(
        verdict,
        thresholds,
        labelled=has_labels(labels),
        uses_labels=evidence.measure.uses_labels,
        seen=evidence.seen,
        quantization=quantization,
    )
    return Report(
        verdict=verdict,
        task=subject.task,
        thresholds=thresholds,
        images=len(labels),
        labelled=has_labels(labels),
        decision_threshold=evidence.measure.decision_threshold,
        calibration_images_seen=evidence.seen,
        not_executed=subject.left,
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
        steadiness=evidence.steadiness,
        comparisons=comparisons,
        quantization=quantization,
        baseline=None if other is None else _baseline(other, evidence),
        weights=subject.weights,
        provenance=subject.provenance,
    )


def _changes(evidence: Evidence, limits: Thresholds) -> list[AccuracyChange]:
    """Every deployed execution against the float network."""
    reference = evidence.executions.float_reference
    if reference is None:
        return []
    deployed = [*evidence.references, *evidence.uncompared]
    accuracy, collector = evidence.measure.accuracy, evidence.collector
    return [accuracy(collector, reference, name, limits.confidence) for name in deployed]


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
    threshold = evidence.measure.decision_threshold
    if threshold is not None:
        notes.append(f"one logit, so two classes: the second one where the logit exceeds {threshold:g}")
    if evidence.measure.uses_labels and not has_labels(evidence.collector.labels()):
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
    found = evidence.measure.spread(evidence.collector, FAKE_QUANT_FP16, FAKE_QUANT)
    variation = FloorVariation(
        name="float32 between quantizers",
        reference=FAKE_QUANT_FP16,
        images=len(evidence.collector.ids),
        flips=found.flips,
        mean_logit_difference=found.difference,
        margin_change=found.margin,
        errors=dict(found.errors),
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
    seconds, images = evidence.seconds[execution.name], len(evidence.collector.ids)
    scores = evidence.measure.scores(evidence.collector, execution.name)
    return BackendResult(
        name=execution.name,
        detail=execution.detail,
        scores={name: s.percent if isinstance(s, Rate) else s for name, s in scores.items()},
        intervals={name: s for name, s in scores.items() if isinstance(s, Rate)},
        seconds=round(seconds, 3),
        images_per_second=round(images / max(seconds, 1e-9), 1),
    )


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
        file_bytes={name: stored_bytes(run.path / name) for name in run.manifest.files},
        versions={name: metadata.version(name) for name in names},
        machine=machine_name(),
        processor=examine_processor(),
        threads=torch.get_num_threads(),
    )
