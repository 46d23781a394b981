"""The report: a pydantic model with a published schema."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from ospq_export.tasks.comparison import Comparison
from ospq_export.tasks.statistics import Rate, Record
from ospq_export.validate.codes.records import Location, WeightComparison
from ospq_export.validate.criteria import AccuracyChange
from ospq_export.validate.floor import NoiseFloor
from ospq_export.validate.latency import Latency
from ospq_export.validate.verdict import Thresholds, Verdict
from ospq_export.world.processor import Processor
from ospq_export.world.processor import machine_name as machine_name


class BackendResult(Record):
    """One execution over all images; accuracies in percent, none without labels."""

    name: str
    detail: dict[str, str]
    top1: float | None = None
    top1_interval: Rate | None = None
    top5: float | None = None
    top5_interval: Rate | None = None
    calibration_error: float | None = None
    seconds: float
    images_per_second: float


class _RunIdentity(Record):
    run: str
    model: str
    recipe: str
    formats: str
    files: dict[str, str]


class Provenance(_RunIdentity):
    """What was compared, and where."""

    file_bytes: dict[str, int]
    versions: dict[str, str]
    machine: str
    processor: Processor | None = None
    threads: int | None = None


class BaselineResult(_RunIdentity):
    """Another run on the same images; its executions are the references, this run's are what `deployed` names."""

    comparisons: list[Comparison]


class Report(BaseModel):
    """The outcome of a validation; `report.json` is its JSON form, docs/report.schema.json its schema.

    Attributes:
        calibration_images_seen: how many of the images the run was calibrated on, by content.
        not_executed: networks and engines in the run directory that were not executed.
        decision_threshold: of a network with a single logit; None for all others.
        accuracy: every deployed execution against the float network.
        comparisons: every deployed execution against the fake-quantized network.
        quantization: the fake-quantized network against the float network.
    """

    model_config = Record.model_config

    verdict: Verdict
    schema_version: Literal[5] = 5
    thresholds: Thresholds
    images: int
    labelled: bool = True
    decision_threshold: float | None = None
    calibration_images_seen: int = 0
    not_executed: list[str] = []
    accuracy: list[AccuracyChange] = []
    class_names: list[str] = []
    classes_source: str | None = None
    skipped: list[str]
    passed_over: dict[str, int] = {}
    image_notes: dict[str, int] = {}
    executions_skipped: dict[str, str] = {}
    findings: list[str] = []
    backends: list[BackendResult]
    comparisons: list[Comparison]
    quantization: Comparison | None
    floor: NoiseFloor | None = None
    locations: list[Location] = []
    latencies: list[Latency] = []
    weights: list[WeightComparison] = []
    baseline: BaselineResult | None = None
    provenance: Provenance


def number(value: float | None, form: str = "%.2f") -> str:
    """A figure as tables show it: nothing where there is none."""
    return "" if value is None else form % value


def image_lines(report: Report) -> list[str]:
    """What is to be known of the images: where their classes' numbers are from, what was passed over, ignored, assumed."""
    lines = [f"classes: {report.classes_source}"] if report.classes_source else []
    if report.passed_over:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.passed_over.items())
        lines.append(f"passed over, no images: {kinds}")
    return lines + [f"{count} images {note}" for note, count in report.image_notes.items()]
