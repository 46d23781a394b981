"""The validate stage: one pass over the images, every execution eats the same tensors; writes report.json."""

from __future__ import annotations

import time
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.progress import Progress

from ospq_export.errors import InputError
from ospq_export.progress import stepper
from ospq_export.runs.files import REPORT, write_json
from ospq_export.tasks.choice import TASKS
from ospq_export.tasks.measure import Collector, Measure
from ospq_export.validate.codes.locate import Reference
from ospq_export.validate.executions.backends import Backend
from ospq_export.validate.executions.chosen import open_baseline, open_executions, pairs_of
from ospq_export.validate.executions.inside import open_inside
from ospq_export.validate.executions.origin import check_preprocessing
from ospq_export.validate.executions.probes import Probed
from ospq_export.validate.executions.triton import Server
from ospq_export.validate.findings import baseline_findings
from ospq_export.validate.latency import Latency, check_batches
from ospq_export.validate.preflight import check_batch_memory, check_request
from ospq_export.validate.report.assemble import Evidence, assemble, subject_of
from ospq_export.validate.report.model import Report, stamped
from ospq_export.validate.saved import SavedOutputs
from ospq_export.validate.shards import Samples, locate, part_of, pool, share_of
from ospq_export.validate.steadiness import steady_of
from ospq_export.validate.timing import float_files, time_all
from ospq_export.validate.verdict import Thresholds, allowed
from ospq_export.world.processes import SOLO, World

if TYPE_CHECKING:
    from ospq_export.data import ImageSet, StreamSet
    from ospq_export.data.tensors import TensorSet
    from ospq_export.runs.run import Run


def validate(
    run: Run,
    images: ImageSet | StreamSet | TensorSet,
    *,
    backends: Sequence[str] | None = None,
    batch_size: int = 100,
    limit: int | None = None,
    device: str = "cpu",
    workers: int = 0,
    thresholds: Thresholds | None = None,
    decision_threshold: float | None = None,
    floor_images: int = 1000,
    code_images: int = 32,
    latency: Sequence[int] = (),
    float_type: str = "fp32",
    baseline: Run | None = None,
    save_outputs: Path | None = None,
    engine_debug: bool = False,
    server: Server | None = None,
    provenance: bool = False,
    progress: Progress | None = None,
    world: World = SOLO,
) -> Report:
    """Run every execution over the same preprocessed tensors, and judge those that are deployed.

    Args:
        run: exported.
        images: validation images with the run's preprocessing; without labels, accuracy is judged by differing predictions.
        backends: names out of `ALL_BACKENDS`, a deployed one among them, whose references come along; None takes every
            default one that this machine has.
        batch_size: images per forward pass.
        limit: use that many images only, a seeded sample of all with each class's share.
        device: torch device of the torch executions; a CUDA device makes ONNX Runtime use its CUDA provider.
        workers: processes that decode.
        thresholds: what is allowed; None takes the defaults.
        decision_threshold: of a network with one logit, which stands for two classes: the second one above it; None is 0.
        floor_images: images on which the noise floor is measured, spread over all; 0 leaves it out.
        code_images: images on which codes are compared, spread over all; 0 leaves that out.
        latency: batch sizes to time every execution at, and the float baselines that were exported.
        float_type: "fp16" adds model_qdq_fp16.onnx and the fake-quantized network with FP16 float parts, which it and the engines
            are compared with.
        baseline: another run to compare with on the same images; the verdict is about `run` alone.
        save_outputs: file for every execution's outputs of the first images, as Polygraphy's `RunResults`; the images go beside.
        engine_debug: whether a second engine is built of each one, whose inner tensors are compared like those of files.
        server: where a model is served, for the execution "triton".
        provenance: whether date and host are recorded.
        progress: where to show a progress bar.
        world: processes that share the images; the first one judges.

    Returns:
        The report, also written to report.json in the run directory, or report.224x320.json at another size of its range.

    Raises:
        InputError: the run is not exported, an execution is not available, the images have too many classes, a batch size to time
            would be padded, or the baseline's images or classes are others.
    """
    check_request(run, backends, device, baseline, server, engine_debug=engine_debug)
    check_preprocessing(run, images.config)
    check_batch_memory(_most(images, limit or batch_size), batch_size, images.config.input_size)
    executions = open_executions(run, backends, device, float_type, server)
    others = [] if baseline is None else open_baseline(run, baseline, executions.names, device)
    check_batches(executions.backends, latency)
    reference, inside = None, dict[str, Probed]()
    if engine_debug:
        reference = Reference.of(run)
        inside = open_inside(run, executions.backends, reference.wanted, progress)
    references = executions.references(float_type)
    chosen = choose_images(images, limit, world, max(1, floor_images))
    images, count = chosen.images, len(chosen.places)
    pairs = pairs_of(executions, references, float_type, [backend.name for backend in others])
    measured = TASKS[run.manifest.task].measure(pairs, chosen.count, decision_threshold)
    here = share_of(world, count, batch_size)
    share = chosen.places[here.start : here.stop]
    saved = None
    if save_outputs is not None and world.rank == 0:
        saved = SavedOutputs(save_outputs, max(e.fixed_batch or 1 for e in executions.backends))
    samples = Samples(
        executions,
        device,
        len(share),
        batch_size,
        floor_images=part_of(floor_images, len(share), count),
        code_images=part_of(code_images, len(share), count),
        vary=measured.vary,
        calibrated_on=run.calibration_digests(),
        saved=saved,
    )
    everything = [*executions.backends, *others]
    collector, seconds = collect(everything, images, batch_size, share, workers, progress, samples, measured)
    found = pool(world, collector, seconds, images.skipped, samples, images.record.notes)
    collector, seconds, unreadable, notes = found
    notes |= dict.fromkeys(chosen.remarks, len(collector.ids))
    if world.rank > 0:
        return Report.model_validate_json(world.tell("")[0])
    evidence = Evidence(
        collector=collector,
        seconds=seconds,
        backends=everything,
        executions=executions,
        unreadable=unreadable,
        images=images.record.model_copy(update={"notes": notes}),
        class_to_idx=images.class_to_idx,
        references=references,
        uncompared=executions.uncompared(float_type),
        floor=samples.floor(),
        locations=locate(run, references, samples.kept, device, inside, reference),
        seen=samples.seen,
        measure=measured,
        steadiness=steady_of(executions.backends, references, samples.first, measured.vary),
    )
    files = float_files(run, everything, device) if latency else []
    findings = baseline_findings([*executions.backends, *files], samples.first)
    timed: list[Latency] = []
    if latency and samples.first is not None:
        timed, slow = time_all(run, [*everything, *files], samples.first, latency, device)
        findings += slow
    report = assemble(
        subject_of(run, evidence, findings), evidence, thresholds or allowed(run.manifest.recipe), baseline
    )
    report = report.model_copy(update={"latencies": timed})
    report = stamped(report) if provenance else report
    write_json(run.report_file(REPORT), report.model_dump(mode="json"))
    if saved is not None:
        saved.write()
    world.tell(report.model_dump_json())
    return report


def _most(images: ImageSet | StreamSet | TensorSet, count: int) -> int:
    """How many of `count` images there can be."""
    return min(count, len(images)) if isinstance(images, Sized) else count


@dataclass(frozen=True)
class Chosen:
    """The images of a validation.

    Attributes:
        images: where they are in; what was drawn of a stream.
        places: of those that are used.
        count: how many are used; None of a stream, whose end tells.
        remarks: what has to be known of them.
    """

    images: ImageSet | StreamSet | TensorSet
    places: Sequence[int]
    count: int | None
    remarks: list[str]


def choose_images(
    images: ImageSet | StreamSet | TensorSet, limit: int | None, world: World, nominal: int
) -> Chosen:
    """The images and which of them are used; of a stream, which goes by once, all.

    As many of its images as `nominal` are expected, so that the first ones are looked at closely.

    Raises:
        InputError: several processes cannot share a stream.
    """
    remarks = [f"were prepared with a {name} that was assumed" for name in images.config.assumed]
    if isinstance(images, Sized):
        places = range(len(images)) if limit is None else images.choose(limit)
        if len(places) < len(images):
            remarks.append(f"of {len(images)} were drawn at random, with each class's share")
        return Chosen(images, places, len(places), remarks)
    if world.size > 1:
        raise InputError("several processes cannot share a stream", where="`data`", fix="start one process")
    if limit is None:
        return Chosen(images, range(nominal), None, remarks)
    drawn = images.drawn(limit)
    return Chosen(drawn, range(len(drawn)), None, [*remarks, "were drawn at random from a stream"])


def collect(
    executions: Sequence[Backend],
    images: ImageSet | StreamSet | TensorSet,
    batch_size: int,
    share: Sequence[int],
    workers: int,
    progress: Progress | None,
    samples: Samples,
    measured: Measure,
) -> tuple[Collector, dict[str, float]]:
    """Run every execution over the same tensors.

    Args:
        executions: what runs.
        images: the images.
        batch_size: images per forward pass.
        share: places of those that are used.
        workers: processes that decode.
        progress: where to show a progress bar.
        samples: takes what it needs of every batch.
        measured: takes what is compared.

    Returns:
        What was kept of the outputs, and the seconds spent in each execution.
    """
    total = -(-len(share) // batch_size) if isinstance(images, Sized) else None
    advance = stepper(progress, "validate", total)
    collector = Collector(len(share))
    seconds = {execution.name: 0.0 for execution in executions}
    for batch in images.batches(batch_size, share, workers):
        tensors, labels = np.ascontiguousarray(batch.images.numpy()), batch.labels.numpy()
        outputs = {}
        for execution in executions:
            started = time.perf_counter()
            outputs[execution.name] = execution(tensors)
            seconds[execution.name] += time.perf_counter() - started
        columns = measured.columns(outputs, labels, batch.ids)
        collector.add(columns, measured.label_of(labels), batch.ids)
        samples.add(tensors, outputs)
        advance()
    return collector, seconds
