"""The validate stage: one pass over the images, every execution eats the same tensors; writes report.json."""

from __future__ import annotations

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
from ospq_export.validate.backends import Backend, OnnxRuntimeBackend, TorchBackend
from ospq_export.validate.parity import (
    Collector,
    Comparison,
    Thresholds,
    compare,
    default_thresholds,
    judge,
    topk_accuracy,
)
from ospq_export.validate.report import BackendResult, Provenance, Report, machine_name

if TYPE_CHECKING:
    from ospq_export.data import Batch, ImageSet
    from ospq_export.run import Run

log = logging.getLogger(__name__)

FLOAT, FAKE_QUANT = "float", "fake_quant"
OPTIMIZED, UNOPTIMIZED, FP32 = "onnxruntime", "onnxruntime-unoptimised", "onnxruntime-fp32"
DEFAULT_BACKENDS = (FLOAT, FAKE_QUANT, UNOPTIMIZED, OPTIMIZED)
ALL_BACKENDS = (*DEFAULT_BACKENDS, FP32)
_DEPLOYED = (UNOPTIMIZED, OPTIMIZED)


def validate(
    run: Run,
    images: ImageSet,
    *,
    backends: Sequence[str] = DEFAULT_BACKENDS,
    batch_size: int = 100,
    limit: int | None = None,
    device: str = "cpu",
    workers: int = 0,
    thresholds: Thresholds | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run every execution over the same preprocessed tensors and judge the deployed ones against the fake-quantized network.

    Args:
        run: exported.
        images: labelled validation images with the run's preprocessing.
        backends: names out of `ALL_BACKENDS`; "fake_quant" and a deployed one are needed for a verdict.
        batch_size: images per forward pass.
        limit: use the first `limit` images only.
        device: torch device of the torch executions; a CUDA device makes ONNX Runtime use its CUDA provider.
        workers: processes that decode.
        thresholds: what counts as parity; None takes the defaults for the recipe's bits.
        progress: where to show a progress bar.

    Returns:
        The report, also written to report.json in the run directory.

    Raises:
        InputError: the run is not exported, an execution is not available, the images have no labels or too many classes.
    """
    recipe = run.manifest.recipe
    limits = thresholds or default_thresholds(recipe.activation_bits, recipe.weight_bits)
    executions = _executions(run, backends, device)
    collector, seconds = _collect(executions, images, batch_size, limit, workers, progress)
    report = _report(run, images, executions, collector, seconds, limits)
    write_json(run.path / "report.json", report.model_dump(mode="json"))
    return report


def _executions(run: Run, names: Sequence[str], device: str) -> list[Backend]:
    unknown = [name for name in names if name not in ALL_BACKENDS]
    if unknown:
        raise InputError(
            f"there is no execution {unknown[0]!r}", mend=f"use some of {', '.join(ALL_BACKENDS)}"
        )
    provider = "cuda" if device.startswith("cuda") else "cpu"
    result: list[Backend] = []
    for name in names:
        if name == FLOAT:
            result.append(TorchBackend(name, run.float_network(), device))
        elif name == FAKE_QUANT:
            result.append(TorchBackend(name, run.fake_quant_network(), device))
        else:
            file = run.file("model_fp32.onnx" if name == FP32 else "model.onnx")
            result.append(OnnxRuntimeBackend(name, file, optimize=name != UNOPTIMIZED, provider=provider))
    return result


def _collect(
    executions: Sequence[Backend],
    images: ImageSet,
    batch_size: int,
    limit: int | None,
    workers: int,
    progress: Progress | None,
) -> tuple[Collector, dict[str, float]]:
    count = len(images) if limit is None else min(limit, len(images))
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
    executions: Sequence[Backend],
    collector: Collector,
    seconds: dict[str, float],
    thresholds: Thresholds,
) -> Report:
    labels, names = collector.labels(), [e.name for e in executions]
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

    deployed = [name for name in names if name in _DEPLOYED] if FAKE_QUANT in names else []
    comparisons = [pair(FAKE_QUANT, name) for name in deployed]
    not_finite = [name for name in names if not np.isfinite(collector.logits(name)).all()]
    return Report(
        verdict=judge(comparisons, not_finite, thresholds),
        thresholds=thresholds,
        images=len(labels),
        skipped=images.skipped,
        backends=[_result(e, collector, seconds[e.name]) for e in executions],
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
        top5=topk_accuracy(logits, labels, 5),
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
