"""Two ONNX files held against each other, whoever made them: a float one, and what is deployed in its place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import ValidationError
from rich.progress import Progress

from ospq_export.data import DataConfig, ImageSet, StreamSet
from ospq_export.data.config import ASSUMED
from ospq_export.errors import InputError, refusal_of
from ospq_export.formats.fp8 import Fp8
from ospq_export.runs.files import REPORT, sha256, stored_bytes, write_json
from ospq_export.tasks.choice import choose_task
from ospq_export.tasks.measure import Outputs
from ospq_export.tasks.statistics import FloatArray
from ospq_export.validate.executions.backends import OnnxRuntimeBackend
from ospq_export.validate.executions.chosen import Executions, pairs_of
from ospq_export.validate.executions.origin import file_preprocessing
from ospq_export.validate.executions.probes import read_proto
from ospq_export.validate.executions.table import FP32, OPTIMIZED, UNOPTIMIZED
from ospq_export.validate.floor import Meter, in_parts
from ospq_export.validate.report.assemble import Evidence, Subject, assemble
from ospq_export.validate.report.model import Provenance, Report, stamped
from ospq_export.validate.shards import Samples
from ospq_export.validate.stage import choose_images, collect
from ospq_export.validate.steadiness import steady_of
from ospq_export.validate.verdict import Thresholds
from ospq_export.world.processes import SOLO
from ospq_export.world.processor import examine_processor, machine_name

if TYPE_CHECKING:
    from ospq_export.data.tensors import TensorSet

log = logging.getLogger(__name__)
_STATED = ("mean", "std")


def preprocessing_of_files(files: Sequence[Path], given: Mapping[str, Any]) -> DataConfig:
    """How images become the input of ONNX files.

    Args:
        files: one after the other is asked for its metadata.
        given: fields of DataConfig that win over them; None means not given.

    Returns:
        What is given, then what a file says of itself; crop and filter are timm's defaults where nobody says, with a warning.

    Raises:
        InputError: mean and std are not known, or a value is impossible.
    """
    stated = next((found for file in files if (found := file_preprocessing(file))), {})
    values = {**stated, **{key: value for key, value in given.items() if value is not None}}
    values["input_size"] = given.get("input_size") or _input_size(files[0])
    missing = [key for key in _STATED if key not in values]
    if missing:
        raise InputError(
            f"neither file says how images are normalised: {' and '.join(missing)} are not known",
            where=files[0],
            fix="give " + " and ".join(f"`{key}`" for key in missing),
        )
    assumed = {key: value for key, value in ASSUMED.items() if key not in values}
    for key, value in assumed.items():
        log.warning("%s is not known: %s is assumed", key, value)
    try:
        return DataConfig.model_validate({**values, **assumed, "assumed": tuple(assumed)})
    except ValidationError as error:
        first = error.errors()[0]
        what = (
            f"the preprocessing does not fit: {': '.join([*map(str, first['loc'][:1]), refusal_of(first)])}"
        )
        raise InputError(what, where=files[0], fix="check the values") from error


def _input_size(file: Path) -> tuple[int, int, int]:
    shape = [d.dim_value for d in read_proto(file).graph.input[0].type.tensor_type.shape.dim]
    if len(shape) != 4 or min(shape[1:]) < 1:
        raise InputError(
            f"the file takes {shape}, no images of a fixed size", where=file, fix="give `input_size`"
        )
    return shape[1], shape[2], shape[3]


def validate_files(
    float_file: Path,
    deployed_file: Path,
    images: ImageSet | StreamSet | TensorSet,
    out: Path,
    *,
    task: str | None = None,
    thresholds: Thresholds | None = None,
    batch_size: int = 100,
    limit: int | None = None,
    decision_threshold: float | None = None,
    floor_images: int = 1000,
    workers: int = 0,
    provenance: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Run two ONNX files in ONNX Runtime over the same tensors, and judge the deployed one.

    *Faithful* is whether ONNX Runtime with its graph optimisations computes what the deployed file says: what it computes
    without them. *Accuracy* is judged against the float file. The noise floor is measured for both.

    Args:
        float_file: of one float32 input (B, C, H, W).
        deployed_file: of the same input and outputs.
        images: with the files' preprocessing.
        out: folder that report.json is written to; it is made if need be.
        task: as `tasks.choice.choose_task` has it.
        thresholds: what is allowed; None takes the defaults.
        batch_size: images per forward pass.
        limit: use that many images only.
        decision_threshold: of a network with one logit.
        floor_images: images on which the noise floor is measured.
        workers: processes that decode.
        provenance: whether date and host are recorded.
        progress: where to show a progress bar.

    Raises:
        InputError: a file cannot be loaded, or both have not one signature.
    """
    backends = _open(float_file, deployed_file)
    executions = Executions(backends=[*backends], asked=(OPTIMIZED, UNOPTIMIZED))
    shapes = {name: v.shape[1:] for name, v in backends[0](_blank(images.config)).items()}
    found, reason = choose_task(task, shapes, images.config.input_size)
    if reason:
        log.warning("task: %s, because %s; `task` says otherwise", found.name, reason)
    chosen = choose_images(images, limit, SOLO, max(1, floor_images))
    images, places = chosen.images, chosen.places
    references = executions.references("fp32")
    pairs = pairs_of(executions, references, "fp32", [])
    measured = found.measure(pairs, chosen.count, decision_threshold)
    samples = Samples(executions, "cpu", len(places), batch_size, floor_images, 0, measured.vary)
    if floor_images:
        samples.meters = [_meter(backend, measured.vary) for backend in backends if backend.name != OPTIMIZED]
    collector, seconds = collect(backends, images, batch_size, places, workers, progress, samples, measured)
    notes = images.record.notes | dict.fromkeys(chosen.remarks, len(collector.ids))
    evidence = Evidence(
        collector=collector,
        seconds=seconds,
        backends=backends,
        executions=executions,
        unreadable=images.skipped,
        images=images.record.model_copy(update={"notes": notes}),
        class_to_idx=images.class_to_idx,
        references=references,
        uncompared=executions.uncompared("fp32"),
        floor=samples.floor(),
        locations=[],
        seen=0,
        measure=measured,
        steadiness=steady_of(backends, references, samples.first, measured.vary),
    )
    subject = Subject(found.name, images.class_to_idx, _provenance(float_file, deployed_file, out))
    report = assemble(subject, evidence, thresholds or Thresholds())
    report = stamped(report) if provenance else report
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / REPORT, report.model_dump(mode="json"))
    return report


def _open(float_file: Path, deployed_file: Path) -> list[OnnxRuntimeBackend]:
    """The float file, and the deployed one without and with ONNX Runtime's graph optimisations."""
    original = OnnxRuntimeBackend(FP32, float_file, optimize=True)
    without = Fp8.onnxruntime_without if _has_fp8(deployed_file) else ()
    deployed = [
        OnnxRuntimeBackend(name, deployed_file, optimize=optimize, without=without)
        for name, optimize in ((UNOPTIMIZED, False), (OPTIMIZED, True))
    ]
    theirs = deployed[0].outputs
    if len(theirs) != len(original.outputs):
        raise InputError(
            f"it has {len(theirs)} outputs, {float_file.name} {len(original.outputs)}",
            where=deployed_file,
            fix="compare files of one signature",
        )
    if set(theirs) != set(original.outputs):
        log.warning("outputs are compared in order: %s with %s", original.outputs, theirs)
        for backend in deployed:
            backend.outputs = original.outputs
    return [original, *deployed]


def _has_fp8(file: Path) -> bool:
    from onnx import TensorProto

    return any(t.data_type == TensorProto.FLOAT8E4M3FN for t in read_proto(file).graph.initializer)


def _blank(config: DataConfig) -> FloatArray:
    return np.zeros((1, *config.input_size), np.float32)


def _meter(backend: OnnxRuntimeBackend, vary: Any) -> Meter:
    """Varies a file: in other batches, and where that is allowed with another number of threads."""
    optimize = backend.detail["optimisations"] != "off"
    threads = 2 if torch.get_num_threads() == 1 else 1
    other = OnnxRuntimeBackend(backend.name, backend.path, optimize=optimize, threads=threads)
    other.outputs = backend.outputs
    variations: dict[str, Callable[[FloatArray], Outputs]] = {"thread count": other}
    if backend.fixed_batch is None:
        variations["batch split"] = lambda images: in_parts(backend, images)
    return Meter(backend.name, variations, vary)


def _provenance(float_file: Path, deployed_file: Path, out: Path) -> Provenance:
    files = {"float": float_file, "deployed": deployed_file}
    names = ("ospq-export", "torch", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy")
    return Provenance(
        run=out.name,
        model=float_file.name,
        recipe=deployed_file.name,
        formats="as the file has them",
        files={f"{role}: {file}": sha256(file) for role, file in files.items()},
        file_bytes={f"{role}: {file}": stored_bytes(file) for role, file in files.items()},
        versions=_versions(names),
        machine=machine_name(),
        processor=examine_processor(),
        threads=torch.get_num_threads(),
    )


def _versions(names: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
