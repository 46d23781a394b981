"""The report: a pydantic model with a published schema."""

from __future__ import annotations

import datetime
import platform
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from ospq_export.tasks.accuracy import TOP1, AccuracyChange
from ospq_export.tasks.classify import ECE
from ospq_export.tasks.comparison import Comparison
from ospq_export.tasks.statistics import Rate, Record
from ospq_export.validate.codes.records import Location, WeightComparison
from ospq_export.validate.floor import NoiseFloor
from ospq_export.validate.latency import Latency
from ospq_export.validate.steadiness import Steadiness
from ospq_export.validate.verdict import Outcome, Thresholds, Verdict
from ospq_export.world.processor import Processor
from ospq_export.world.processor import machine_name as machine_name

_FORMER, _RENAMED = 6, {"calibration error": ECE}


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
    """What was compared, and where.

    Attributes:
        file_bytes: sizes of the files, with the weights that lie beside an ONNX file.
        machine: the processor's name and its cores.
        date: when, ISO 8601 in UTC; only where it was asked for, like the next one.
        host: the machine's name in its network.
    """

    file_bytes: dict[str, int]
    versions: dict[str, str]
    machine: str
    processor: Processor | None = None
    threads: int | None = None
    date: str | None = None
    host: str | None = None


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
    schema_version: Literal[7] = 7
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
    steadiness: list[Steadiness] = []
    latencies: list[Latency] = []
    weights: list[WeightComparison] = []
    baseline: BaselineResult | None = None
    provenance: Provenance

    @model_validator(mode="before")
    @classmethod
    def _upgraded(cls, values: Any) -> Any:
        """A report of version 6, which called a score otherwise."""
        if not isinstance(values, dict) or values.get("schema_version") != _FORMER:
            return values
        renamed = [
            {**b, "scores": {_RENAMED.get(name, name): x for name, x in b.get("scores", {}).items()}}
            for b in values.get("backends", [])
        ]
        return {**values, "schema_version": _FORMER + 1, "backends": renamed}

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


def points(count: float) -> str:
    """Percentage points in words."""
    return f"{count:g} point{'' if count == 1 else 's'}"


def score_names(report: Report) -> list[str]:
    """Names of all scores, in the order of the first execution's."""
    return list(dict.fromkeys(name for b in report.backends for name in b.scores))


def parity_cells(c: Comparison | None, score: str = TOP1) -> dict[str, str]:
    """What a comparison says in a row of a table, by column: how outputs agree, and how far they are apart.

    Args:
        c: None for an execution that was compared with nothing.
        score: what the task's first score is called.
    """
    if c is None:
        return {}
    cells = {} if c.score_difference is None else {f"Δ {score}": number(c.score_difference, "%+.2f")}
    if c.agreement is not None:
        cells["agree"] = number(c.agreement)
    if c.outputs:
        return {**cells, "error %": "%.3g" % (100 * max(o.mean_error for o in c.outputs))}
    return {**cells, "flips": str(len(c.flips))}


def parity_of(report: Report) -> dict[str, dict[str, str]]:
    """Those cells of every deployed execution."""
    score = next(iter(score_names(report)), TOP1)
    return {c.deployed: parity_cells(c, score) for c in report.comparisons}


def stamped(report: Report) -> Report:
    """The report with date and host, which are left out where nobody asks: two validations of one run then give one report."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    update = {"date": now, "host": platform.node()}
    return report.model_copy(update={"provenance": report.provenance.model_copy(update=update)})


def image_lines(report: Report) -> list[str]:
    """What is to be known of the images: where their classes' numbers are from, what was passed over, ignored, assumed."""
    lines = [f"classes: {report.classes_source}"] if report.classes_source else []
    if report.passed_over:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.passed_over.items())
        lines.append(f"passed over, no images: {kinds}")
    return lines + [f"{count} images {note}" for note, count in report.image_notes.items()]
