"""What a finished run says in the tables of its sweep, and where it is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError
from safetensors import safe_open

from ospq_export.errors import InputError
from ospq_export.runs.files import QUANTIZED_ONNX, QUANTIZED_TENSORS, replacing, stored_bytes, write_json
from ospq_export.runs.run import Run
from ospq_export.sweep.plan import Section
from ospq_export.tasks.accuracy import AccuracyChange
from ospq_export.validate.report.model import Report

RUNS, RESULTS, LOGS, CELLS = "runs", "results", "logs", "cells.json"


class Outcome(Section):
    """One run of a sweep.

    Attributes:
        name: of the cell.
        status: "waiting" where it has not been tried to the end.
        reason: why it failed, in one line.
        formats: of weights and activations, in short.
        measure: what is compared with the float network.
        images: that it was validated on.
        float_score: of the float network, in percent; None where there are no labels.
        scores: of the deployed executions; without labels, what differs or the error, in percent.
        lost: points that the worst of them lost; without labels, what differs or the error, in percent.
        faithful: the report's verdict, as is `kept`; None where the images are too few.
        bits: of a weight and of an activation, on average, added up.
        file_bytes: of the deployed file.
        weight_bytes: of all weights, were every code stored in its own bits.
        seconds: that it took; of an interrupted run, since it was resumed.
    """

    name: str
    status: Literal["done", "failed", "waiting"] = "done"
    reason: str = ""
    formats: str = ""
    measure: str = ""
    images: int = 0
    float_score: float | None = None
    scores: dict[str, float] = Field(default_factory=dict)
    lost: float | None = None
    faithful: bool | None = None
    kept: bool | None = None
    bits: float = 0.0
    file_bytes: int = 0
    weight_bytes: int = 0
    seconds: float = 0.0

    @property
    def score(self) -> float | None:
        """Of the deployed execution that lost most; None without labels."""
        return None if self.float_score is None or self.lost is None else self.float_score - self.lost


def outcome_of(name: str, run: Run, report: Report, seconds: float) -> Outcome:
    """What the tables need of a validated run."""
    lost = {change.deployed: _lost(change) for change in report.accuracy}
    first = next(iter(report.accuracy), None)
    scores = {
        c.deployed: lost[c.deployed] if c.deployed_score is None else c.deployed_score
        for c in report.accuracy
    }
    bits, weight_bytes = _bits(run)
    return Outcome(
        name=name,
        formats=run.manifest.recipe.summary(),
        measure="" if first is None else first.measure,
        images=report.images,
        float_score=None if first is None else first.reference_score,
        scores=scores,
        lost=max(lost.values(), default=None),
        faithful=report.faithful,
        kept=report.accuracy_kept,
        bits=bits,
        file_bytes=stored_bytes(run.path / QUANTIZED_ONNX),
        weight_bytes=weight_bytes,
        seconds=round(seconds, 1),
    )


def _lost(change: AccuracyChange) -> float:
    return change.share if change.drop is None else change.drop


def _bits(run: Run) -> tuple[float, int]:
    """Bits per weight and per activation, added up; bytes of all weights with codes in their own bits."""
    formats = {record.name: record.read_format() for record in run.manifest.quantizers}
    path = run.path / QUANTIZED_TENSORS
    with safe_open(path, framework="np") as file:
        shapes = {name: file.get_slice(f"{name}.codes").get_shape() for name in _weights(run)}
    counts = {name: _product(shape) for name, shape in shapes.items()}
    total = sum(counts.values())
    coded = sum(count * formats[name].bits for name, count in counts.items())
    activations = [formats[r.name].bits for r in run.manifest.quantizers if r.kind == "activation"]
    mean = (coded / total if total else 0.0) + (sum(activations) / len(activations) if activations else 0.0)
    # A code is stored in a byte.
    return mean, path.stat().st_size - total + -(-coded // 8)


def _weights(run: Run) -> list[str]:
    return [record.name for record in run.manifest.quantizers if record.kind == "weight"]


def _product(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def result_file(out: Path, name: str) -> Path:
    """Where the outcome of a finished cell is kept; there is none of an unfinished one."""
    return out / RESULTS / f"{name}.json"


def write_outcome(out: Path, outcome: Outcome) -> None:
    """Keep the outcome of a finished cell."""
    write_json(result_file(out, outcome.name), outcome.model_dump(mode="json"))


def read_outcome(out: Path, name: str) -> Outcome | None:
    """The outcome of a finished cell; None where it is not finished.

    Raises:
        InputError: the file is damaged.
    """
    path = result_file(out, name)
    if not path.is_file():
        return None
    try:
        return Outcome.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError("the result is damaged", where=path, fix="delete this file and run again") from error


def read_cells(out: Path) -> dict[str, Any]:
    """Identities of all cells that were ever planned in a folder, by name.

    Raises:
        InputError: the file is damaged.
    """
    path = out / CELLS
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError("the file is damaged", where=path, fix="choose another `out`") from error
    return found


def write_text(path: Path, text: str) -> None:
    """Write a text under a temporary name, then rename it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
