"""The report: a pydantic model with a published schema, and its table for the terminal."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ospq_export.validate.latency import Latency
from ospq_export.validate.locate import Location
from ospq_export.validate.parity import Comparison
from ospq_export.validate.statistics import Rate
from ospq_export.validate.verdict import NoiseFloor, Thresholds, Verdict
from ospq_export.validate.weights import WeightComparison

_SHOWN_FLIPS = 5


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BackendResult(_Record):
    """One execution over all images; accuracies in percent."""

    name: str
    detail: dict[str, str]
    top1: float
    top1_interval: Rate
    top5: float
    top5_interval: Rate
    calibration_error: float
    seconds: float
    images_per_second: float


class _RunIdentity(_Record):
    run: str
    model: str
    recipe: str
    weight_bits: int
    activation_bits: int
    files: dict[str, str]


class Provenance(_RunIdentity):
    """What was compared, and where."""

    file_bytes: dict[str, int]
    versions: dict[str, str]
    machine: str


class BaselineResult(_RunIdentity):
    """Another run on the same images; its executions are the references, this run's are what `deployed` names."""

    comparisons: list[Comparison]


class Report(_Record):
    """The outcome of a validation; `report.json` is its JSON form, docs/report.schema.json its schema."""

    schema_version: Literal[4] = 4
    verdict: Verdict
    thresholds: Thresholds
    images: int
    class_names: list[str] = []
    classes_source: str | None = None
    skipped: list[str]
    passed_over: dict[str, int] = {}
    image_notes: dict[str, int] = {}
    executions_skipped: dict[str, str] = {}
    backends: list[BackendResult]
    comparisons: list[Comparison]
    quantization: Comparison | None
    floor: NoiseFloor | None = None
    locations: list[Location] = []
    latencies: list[Latency] = []
    weights: list[WeightComparison] = []
    baseline: BaselineResult | None = None
    provenance: Provenance


def machine_name() -> str:
    """Processor and core count in words."""
    import os

    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip()
            for line in info.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = names[0] if names else model
    return f"{model}, {os.cpu_count()} cores"


def render(report: Report) -> Group:
    """Table of executions, flipped images, verdict last."""
    references = " and ".join(dict.fromkeys(c.reference for c in report.comparisons))
    table = Table(
        title=f"{report.provenance.model}, {report.provenance.recipe}, {report.images} images",
        caption=f"percent; ± Top-1, agreement and flips: against {references or 'nothing'}",
    )
    for column in ("execution", "Top-1", "Top-5", "± Top-1", "agree", "flips", "img/s"):
        table.add_column(column, justify="left" if column == "execution" else "right", no_wrap=True)
    compared = {c.deployed: c for c in report.comparisons}
    for result in report.backends:
        c = compared.get(result.name)
        numbers = (
            [f"{c.top1_difference:+.2f}", f"{c.agreement:.2f}", str(len(c.flips))] if c else ["", "", ""]
        )
        table.add_row(
            result.name,
            f"{result.top1:.2f}",
            f"{result.top5:.2f}",
            *numbers,
            f"{result.images_per_second:.0f}",
        )
    lines = [
        *_baseline_lines(report),
        *_flip_lines(report),
        *_skipped_lines(report),
        *_criterion_lines(report),
    ]
    return Group(table, *lines, _verdict_line(report))


def _baseline_lines(report: Report) -> list[Text]:
    if report.baseline is None:
        return []
    other, lines = report.baseline, []
    for c in other.comparisons:
        test = c.mcnemar
        lines.append(
            Text(
                f"  {c.deployed}: {c.top1_difference:+.2f} points of Top-1 against {other.run} ({other.recipe}), "
                f"{c.agreement:.2f} % agreement; right here only: {test.only_deployed}, right there only: "
                f"{test.only_reference}, McNemar p = {test.p_value:.3g}"
            )
        )
    return lines


def _flip_lines(report: Report) -> list[Text]:
    lines = []
    for comparison in report.comparisons:
        for flip in comparison.flips[:_SHOWN_FLIPS]:
            lines.append(
                Text(
                    f"  {comparison.deployed} flips {flip.id}: {flip.reference} (margin {flip.reference_margin:.3f}) -> "
                    f"{flip.deployed} (margin {flip.deployed_margin:.3f}), label {flip.label}"
                )
            )
        if len(comparison.flips) > _SHOWN_FLIPS:
            lines.append(Text(f"  ... and {len(comparison.flips) - _SHOWN_FLIPS} more, all in report.json"))
    return lines


def image_lines(report: Report) -> list[str]:
    """What is to be known of the images: where their classes' numbers are from, what was passed over, ignored, assumed."""
    lines = [f"classes: {report.classes_source}"] if report.classes_source else []
    if report.passed_over:
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.passed_over.items())
        lines.append(f"passed over, no images: {kinds}")
    return lines + [f"{count} images {note}" for note, count in report.image_notes.items()]


def _skipped_lines(report: Report) -> list[Text]:
    lines = [Text(f"  {line}", style="yellow") for line in image_lines(report)]
    if report.skipped:
        shown = ", ".join(report.skipped[:_SHOWN_FLIPS])
        lines.append(Text(f"  {len(report.skipped)} images could not be read: {shown}", style="yellow"))
    return lines


def _criterion_lines(report: Report) -> list[Text]:
    notes = [Text(f"  {name} skipped: {why}", style="dim") for name, why in report.executions_skipped.items()]
    criteria = [Text(f"  {c.deployed}, by {c.by}: {c.text}") for c in report.verdict.criteria if c.passed]
    return [*notes, *criteria]


def _verdict_line(report: Report) -> Text:
    if report.verdict:
        return Text("parity: the deployed files predict what was calibrated", style="bold green")
    return Text("no parity: " + "; ".join(report.verdict.reasons), style="bold red")
