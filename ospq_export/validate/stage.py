"""The validate stage: one pass over the images, every execution eats the same tensors; writes report.json."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING

import numpy as np
from rich.progress import Progress

from ospq_export.artifact import write_json
from ospq_export.errors import InputError
from ospq_export.progress import stepper
from ospq_export.validate.backends import Backend, FloatArray
from ospq_export.validate.executions import (
    ALL_BACKENDS,
    DEFAULT_BACKENDS,
    DEPLOYED,
    FAKE_QUANT,
    FAKE_QUANT_FP16,
    FLOAT,
    OPTIMIZED,
    QUANTIZED_ONNX,
    UNOPTIMIZED,
    Executions,
    check_preprocessing,
    open_executions,
)
from ospq_export.validate.floor import FloorMeter
from ospq_export.validate.latency import measure
from ospq_export.validate.locate import Location, Locator, Reference
from ospq_export.validate.parity import Collector, Comparison, compare, topk_accuracy
from ospq_export.validate.probes import open_probed
from ospq_export.validate.report import BackendResult, Provenance, Report, machine_name
from ospq_export.validate.statistics import expected_calibration_error, wilson
from ospq_export.validate.verdict import Thresholds, default_thresholds, judge

if TYPE_CHECKING:
    from ospq_export.data import Batch, ImageSet
    from ospq_export.run import Run

log = logging.getLogger(__name__)

__all__ = ["ALL_BACKENDS", "DEFAULT_BACKENDS", "FAKE_QUANT", "FLOAT", "OPTIMIZED", "UNOPTIMIZED", "validate"]

_LOCATION_BATCH = 8


def validate(
    run: Run,
    images: ImageSet,
    *,
    backends: Sequence[str] | None = None,
    batch_size: int = 100,
    limit: int | None = None,
    device: str = "cpu",
    workers: int = 0,
    thresholds: Thresholds | None = None,
    floor_images: int = 1000,
    code_images: int = 32,
    latency_batches: Sequence[int] = (),
    float_type: str = "fp32",
    progress: Progress | None = None,
) -> Report:
    """Run every execution over the same preprocessed tensors and judge the deployed ones against the fake-quantized network.

    Args:
        run: exported.
        images: labelled validation images with the run's preprocessing.
        backends: names out of `ALL_BACKENDS`; None takes every default one that this machine has. A reference ("fake_quant") and
            a deployed one are needed for a verdict.
        batch_size: images per forward pass.
        limit: use the first `limit` images only.
        device: torch device of the torch executions; a CUDA device makes ONNX Runtime use its CUDA provider.
        workers: processes that decode.
        thresholds: what counts as parity; None takes the defaults for the recipe's bits.
        floor_images: images on which the noise floor is measured, spread over all; 0 leaves it out.
        code_images: images on which codes are compared, spread over all; 0 leaves that out.
        latency_batches: batch sizes to time every execution at.
        float_type: "fp32" or "fp16": the float parts of the fake-quantized network that is the reference.
        progress: where to show a progress bar.

    Returns:
        The report, also written to report.json in the run directory.

    Raises:
        InputError: the run is not exported, an execution is not available, the images have no labels or too many classes.
    """
    recipe = run.manifest.recipe
    limits = thresholds or default_thresholds(recipe.activation_bits, recipe.weight_bits)
    check_preprocessing(run, images.config)
    executions = open_executions(run, backends, device, float_type)
    reference = executions.reference(float_type)
    count = len(images) if limit is None else min(limit, len(images))
    samples = _Samples(executions, reference, device, count, batch_size, floor_images, code_images)
    collector, seconds = _collect(executions.backends, images, batch_size, count, workers, progress, samples)
    locations = _locate(run, executions, reference, samples.kept, device)
    report = _report(run, images, executions, reference, collector, seconds, limits, samples, locations)
    sizes = [(e, size) for e in executions.backends for size in latency_batches]
    timed = [measure(e, samples.first, size) for e, size in sizes if samples.first is not None]
    report = report.model_copy(update={"latencies": timed})
    write_json(run.path / "report.json", report.model_dump(mode="json"))
    return report


class _Samples:
    """Parts of every batch, spread over all images: for the noise floor at once, for the codes kept."""

    def __init__(
        self,
        executions: Executions,
        reference: str | None,
        device: str,
        count: int,
        batch_size: int,
        floor_images: int,
        code_images: int,
    ) -> None:
        batches = max(1, -(-count // batch_size))
        self.per_batch = -(-floor_images // batches)
        self.reference, self.wanted = reference, code_images
        self.every = max(1, batches // max(1, code_images))
        self.codes_per_batch = max(1, -(-code_images // batches))
        self.kept: list[FloatArray] = []
        self.first: FloatArray | None = None
        self.batches = 0
        self.meter: FloorMeter | None = None
        if reference == FAKE_QUANT and floor_images:
            backend = next(e for e in executions.backends if e.name == FAKE_QUANT)
            self.meter = FloorMeter(backend.module, device)  # type: ignore[attr-defined]

    def add(self, images: FloatArray, logits: dict[str, FloatArray]) -> None:
        """Take what is needed of a batch (B, C, H, W) and its logits by execution."""
        if self.first is None:
            self.first = images[:8].copy()
        if self.meter is not None:
            self.meter.add(images[: self.per_batch], logits[FAKE_QUANT][: self.per_batch])
        room = self.wanted - sum(map(len, self.kept))
        if self.batches % self.every == 0 and room > 0:
            self.kept.append(images[: min(room, self.codes_per_batch)].copy())
        self.batches += 1


def _locate(
    run: Run, executions: Executions, reference: str | None, kept: list[FloatArray], device: str
) -> list[Location]:
    """Codes of model.onnx, once per provider: graph optimisations do not change what the file says."""
    names = [n for n in executions.names if n in DEPLOYED and n.startswith("onnxruntime")]
    if reference not in (FAKE_QUANT, FAKE_QUANT_FP16) or not names or not kept:
        return []
    graph, slices = run.quantized_graph(), run.manifest.slices
    torch_side = Reference(
        network=graph.module,
        exact=copy.deepcopy(graph.module).double(),
        original=run.captured(),
        slices=[(s.name, s.end) for s in slices],
        slice_of={q.name: slices[q.slice].name for q in run.manifest.quantizers},
    )
    provider = "cuda" if device.startswith("cuda") else "cpu"
    probed = open_probed(run.file(QUANTIZED_ONNX), torch_side.wanted, optimize=False, provider=provider)
    locator, sample = Locator(torch_side, probed, QUANTIZED_ONNX), np.concatenate(kept)
    size = probed.batch_size or _LOCATION_BATCH
    for start in range(0, max(len(sample) - size + 1, 1), size):
        part = sample[start : start + size]
        if len(part) < size and probed.batch_size:
            part = part[np.arange(size) % len(part)]
        locator.add(part)
    return [locator.result()]


def _collect(
    executions: Sequence[Backend],
    images: ImageSet,
    batch_size: int,
    count: int,
    workers: int,
    progress: Progress | None,
    samples: _Samples | None = None,
) -> tuple[Collector, dict[str, float]]:
    advance = stepper(progress, "validate", -(-count // batch_size))
    collector = Collector()
    seconds = {execution.name: 0.0 for execution in executions}
    for batch in images.batches(batch_size, range(count), workers):
        tensors = np.ascontiguousarray(batch.images.numpy())
        logits = {}
        for execution in executions:
            started = time.perf_counter()
            logits[execution.name] = execution(tensors)
            seconds[execution.name] += time.perf_counter() - started
        _check_labels(batch, next(iter(logits.values())).shape[1])
        collector.add(logits, batch.labels.numpy(), batch.ids)
        if samples is not None:
            samples.add(tensors, logits)
        advance()
    return collector, seconds


def _check_labels(batch: Batch, classes: int) -> None:
    labels = batch.labels
    if bool((labels < 0).any()):
        raise InputError(
            "the images have no labels", where="--data", mend="give a folder with one sub-folder per class"
        )
    if int(labels.max()) >= classes:
        raise InputError(
            f"label {int(labels.max())}, but the network has {classes} classes",
            where="--data",
            mend="give this network's own data",
        )


def _report(
    run: Run,
    images: ImageSet,
    executions: Executions,
    reference_name: str | None,
    collector: Collector,
    seconds: dict[str, float],
    thresholds: Thresholds,
    samples: _Samples,
    locations: list[Location],
) -> Report:
    labels, names = collector.labels(), executions.names
    classes = collector.logits(names[0]).shape[1]
    if len(images.class_to_idx) != classes:
        log.warning(
            "the folder has %d classes and the network %d: Top-1 means something only if folder i is class i",
            len(images.class_to_idx),
            classes,
        )

    def pair(reference: str, deployed: str) -> Comparison:
        return compare(
            (reference, collector.logits(reference)),
            (deployed, collector.logits(deployed)),
            labels,
            collector.ids,
        )

    deployed = [name for name in names if name in DEPLOYED and name != reference_name]
    comparisons = [] if reference_name is None else [pair(reference_name, name) for name in deployed]
    floor = None if samples.meter is None else samples.meter.result()
    not_finite = [name for name in names if not np.isfinite(collector.logits(name)).all()]
    return Report(
        verdict=judge(comparisons, not_finite, thresholds, floor, locations, len(labels)),
        thresholds=thresholds,
        images=len(labels),
        skipped=images.skipped,
        executions_skipped=executions.skipped,
        backends=[_result(e, collector, seconds[e.name]) for e in executions.backends],
        floor=floor,
        locations=locations,
        comparisons=comparisons,
        quantization=pair(FLOAT, FAKE_QUANT) if {FLOAT, FAKE_QUANT} <= set(names) else None,
        provenance=_provenance(run),
    )


def _result(execution: Backend, collector: Collector, seconds: float) -> BackendResult:
    logits, labels = collector.logits(execution.name), collector.labels()
    return BackendResult(
        name=execution.name,
        detail=execution.detail,
        top1=topk_accuracy(logits, labels, 1),
        top1_interval=wilson(round(topk_accuracy(logits, labels, 1) * len(labels) / 100), len(labels)),
        top5=topk_accuracy(logits, labels, 5),
        top5_interval=wilson(round(topk_accuracy(logits, labels, 5) * len(labels) / 100), len(labels)),
        calibration_error=expected_calibration_error(logits, labels),
        seconds=round(seconds, 3),
        images_per_second=round(len(labels) / max(seconds, 1e-9), 1),
    )


def _provenance(run: Run) -> Provenance:
    manifest = run.manifest
    names = ("ospq-export", "torch", "timm", "onnx", "numpy")
    return Provenance(
        run=run.path.name,
        model=manifest.model.name,
        recipe=manifest.recipe.name,
        weight_bits=manifest.recipe.weight_bits,
        activation_bits=manifest.recipe.activation_bits,
        files=manifest.files,
        versions={name: metadata.version(name) for name in names},
        machine=machine_name(),
    )
