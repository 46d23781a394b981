"""What a bundle's script found on a device, as a report: the device is one more deployed execution."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from ospq_export.data import ImagesRecord
from ospq_export.errors import InputError, reason_of, refusal_of
from ospq_export.runs.files import QUANTIZED_TENSORS, REPORT, write_json
from ospq_export.tasks.choice import TASKS
from ospq_export.tasks.measure import Collector, Measure, Outputs
from ospq_export.tasks.statistics import FloatArray
from ospq_export.validate.executions.chosen import Executions, pairs_of
from ospq_export.validate.executions.table import DEVICE, FAKE_QUANT, FAKE_QUANT_FP16, FLOAT, not_here
from ospq_export.validate.floor import NoiseFloor
from ospq_export.validate.latency import Latency
from ospq_export.validate.report.assemble import Evidence, Subject, assemble, subject_of
from ospq_export.validate.report.model import Report, stamped
from ospq_export.validate.verdict import Thresholds, allowed
from ospq_export.world.room import check_folder

if TYPE_CHECKING:
    from ospq_export.runs.run import Run

_BATCH = 256


class _Record(BaseModel):
    # The script of a later version may say more.
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Array(_Record):
    """A tensor as JSON has it: little-endian."""

    dtype: Literal["float32", "int64"]
    shape: tuple[int, ...]
    base64: str

    def values(self) -> NDArray[Any]:
        kind = np.dtype(self.dtype).newbyteorder("<")
        return np.frombuffer(base64.b64decode(self.base64, validate=True), kind).reshape(self.shape).copy()


class _Images(_Record):
    floor: NoiseFloor
    seen: int
    unreadable: list[str]
    class_to_idx: dict[str, int]
    images: ImagesRecord


class _Bundle(_Record):
    run: str
    task: str
    quantized_sha256: str
    network: str
    files: dict[str, str]
    ids: list[str]
    report: _Images


class DeviceResult(_Record):
    """What the script wrote; `seconds` are those of the device over all images."""

    schema_version: Literal[1]
    bundle: _Bundle
    device: dict[str, str]
    reference: Literal["fake_quant", "fake_quant-fp16"]
    seconds: float
    outputs: dict[str, dict[str, _Array]]
    labels: _Array
    latency: list[Latency]
    findings: list[str]


class RecordedBackend:
    """An execution whose outputs are known already."""

    fixed_batch: int | None = None

    def __init__(self, name: str, outputs: Outputs, detail: Mapping[str, str]) -> None:
        self.name, self.outputs, self.detail = name, outputs, dict(detail)

    def __call__(self, images: FloatArray) -> Outputs:
        """Nothing runs here.

        Raises:
            InputError: always.
        """
        raise not_here(self.name)


def read_result(run: Run, path: Path) -> DeviceResult:
    """Read what the script wrote, and hold it to the run.

    Raises:
        InputError: it cannot be read, is incomplete, or is of another run or another export.
    """
    fix = "run the bundle's script again"
    try:
        result = DeviceResult.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path, fix=fix) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "JSON"
        raise InputError(
            f"no result of a device: {place}: {refusal_of(first)}", where=path, fix=fix
        ) from error
    bundle, files = result.bundle, run.manifest.files
    if bundle.quantized_sha256 != files[QUANTIZED_TENSORS] or bundle.task != run.manifest.task:
        raise InputError(f"the result is of another run ({bundle.run})", where=path, fix="give that run")
    if bundle.files.get(bundle.network) != files.get(bundle.network):
        what = f"the device had another {bundle.network} than the run has"
        raise InputError(what, where=path, fix="make the bundle again, and run its script")
    return result


def report_device(
    run: Run,
    path: Path,
    *,
    thresholds: Thresholds | None = None,
    decision_threshold: float | None = None,
    provenance: bool = False,
) -> Report:
    """Judge what a device returned as any other deployed execution.

    Args:
        run: what the bundle was made of.
        path: result.json of the bundle's script.
        thresholds: what is allowed; None takes the defaults.
        decision_threshold: of a network with one logit; None is 0.
        provenance: whether date and host of this machine are recorded.

    Returns:
        The report, also written to report.json in the run directory.

    Raises:
        InputError: as `read_result`, or the report cannot be written.
    """
    check_folder(run.path, "RUN")
    result = read_result(run, path)
    labels, outputs = _arrays(result, path)
    executions = Executions(backends=_recorded(result, outputs), asked=(DEVICE,))
    float_type = "fp16" if result.reference == FAKE_QUANT_FP16 else "fp32"
    references = executions.references(float_type)
    pairs = pairs_of(executions, references, float_type, [])
    measured = TASKS[result.bundle.task].measure(pairs, len(labels), decision_threshold)
    said = result.bundle.report
    evidence = Evidence(
        collector=_collected(result, measured, labels, outputs),
        seconds={name: result.seconds if name == DEVICE else 0.0 for name in executions.names},
        backends=executions.backends,
        executions=executions,
        unreadable=said.unreadable,
        images=said.images,
        class_to_idx=said.class_to_idx,
        references=references,
        uncompared=executions.uncompared(float_type),
        floor=said.floor,
        locations=[],
        seen=said.seen,
        measure=measured,
    )
    report = assemble(_subject(run, result, evidence), evidence, thresholds or allowed(run.manifest.recipe))
    report = report.model_copy(update={"latencies": result.latency})
    report = stamped(report) if provenance else report
    write_json(run.path / REPORT, report.model_dump(mode="json"))
    return report


def _recorded(result: DeviceResult, outputs: Mapping[str, Outputs]) -> list[Any]:
    here = {"runtime": "as the bundle has it"}
    details = {name: result.device if name == DEVICE else here for name in outputs}
    return [RecordedBackend(name, outputs[name], details[name]) for name in outputs]


def _subject(run: Run, result: DeviceResult, evidence: Evidence) -> Subject:
    """The run as it ran on the device: that is the machine of its latencies."""
    subject = subject_of(run, evidence)
    device = f"{result.device.get('device', 'a device')}, {result.device.get('runtime', 'unknown')}"
    where = {"machine": device, "processor": None, "threads": None}
    return dataclasses.replace(
        subject,
        provenance=subject.provenance.model_copy(update=where),
        findings=[*subject.findings, *(f"{DEVICE}: {finding}" for finding in result.findings)],
    )


def _arrays(result: DeviceResult, path: Path) -> tuple[NDArray[np.int64], dict[str, dict[str, FloatArray]]]:
    """Labels, and the outputs of every execution.

    Raises:
        InputError: an execution, an output or an image is missing.
    """
    order = [FLOAT, FAKE_QUANT, FAKE_QUANT_FP16, DEVICE]
    try:
        labels = result.labels.values()
        outputs = {e: {n: a.values() for n, a in result.outputs[e].items()} for e in order}
    except (ValueError, KeyError) as error:
        raise InputError(f"no result of a device: {reason_of(error)}", where=path) from error
    shapes = {e: {n: v.shape for n, v in held.items()} for e, held in outputs.items()}
    counts = {len(labels), len(result.bundle.ids), *(s[0] for held in shapes.values() for s in held.values())}
    if any(held != shapes[FLOAT] for held in shapes.values()) or len(counts) != 1:
        raise InputError("no result of a device: its executions have other outputs or images", where=path)
    return labels, outputs


def _collected(
    result: DeviceResult, measured: Measure, labels: NDArray[np.int64], outputs: Mapping[str, Outputs]
) -> Collector:
    collector = Collector(len(labels))
    for start in range(0, len(labels), _BATCH):
        part = slice(start, start + _BATCH)
        found = {e: {n: v[part] for n, v in held.items()} for e, held in outputs.items()}
        ids = result.bundle.ids[part]
        collector.add(measured.columns(found, labels[part], ids), measured.label_of(labels[part]), ids)
    return collector
