"""The report: a pydantic model with a published schema."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from ospq_export.tasks.accuracy import TOP1, AccuracyChange
from ospq_export.tasks.comparison import Comparison
from ospq_export.tasks.statistics import Rate, Record
from ospq_export.validate.codes.records import Location, WeightComparison
from ospq_export.validate.floor import NoiseFloor
from ospq_export.validate.latency import Latency
from ospq_export.validate.verdict import Outcome, Thresholds, Verdict
from ospq_export.world.processor import Processor
from ospq_export.world.processor import machine_name as machine_name


class BackendResult(Record):
    """One execution over all images.

    Attributes:
        scores: in percent, by name: "Top-1", "Top-5", "expected calibration error (ECE)", "k-NN Top-1", "mIoU"; none
            without labels.
        intervals: of those that are shares of the images.
    """

    name: str
    detail: dict[str, str]
    scores: dict[str, float] = Field(default_factory=dict)
    intervals: dict[str, Rate] = Field(default_factory=dict)
    seconds: float
    images_per_second: float

    @property
    def top1(self) -> float | None:
        """Top-1 of a classifier, percent; None without labels."""
        return self.scores.get(TOP1)


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
    schema_version: Literal[6] = 6
    task: str = "classify"
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

    @property
    def faithful(self) -> bool | None:
        """Whether the deployed network is the fake-quantized one; None where the images are too few to tell."""
        return _held(self.verdict.faithful.outcome)

    @property
    def accuracy_kept(self) -> bool | None:
        """Whether accuracy is kept against the float network; None where the images are too few to tell."""
        return _held(self.verdict.accuracy.outcome)

    def __bool__(self) -> bool:
        return bool(self.verdict)


def _held(outcome: Outcome) -> bool | None:
    return None if outcome == "open" else outcome == "met"


def number(value: float | None, form: str = "%.2f") -> str:
    """A figure as tables show it: nothing where there is none."""
    return "" if value is None else form % value


def score_names(report: Report) -> list[str]:
    """Names of all scores, in the order of the first execution's."""
    return list(dict.fromkeys(name for b in report.backends for name in b.scores))


def parity_cells(c: Comparison | None) -> dict[str, str]:
    """What a comparison says in a row of a table, by column: how outputs agree, and how far they are apart."""
    if c is None:
        return {}
    cells = {"Δ score": number(c.score_difference, "%+.2f"), "agree": number(c.agreement)}
    if c.outputs:
        return {**cells, "error %": "%.3g" % (100 * max(o.mean_error for o in c.outputs))}
    return {**cells, "flips": str(len(c.flips))}


def image_lines(report: Report) -> list[str]:
    """What is to be known of the images: where their classes' numbers are from, what was passed over, ignored, assumed."""
    lines = [f"classes: {report.classes_source}"] if report.classes_source else []
    if report.passed_over:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.passed_over.items())
        lines.append(f"passed over, no images: {kinds}")
    return lines + [f"{count} images {note}" for note, count in report.image_notes.items()]
