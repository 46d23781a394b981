"""The export stage: writes the ONNX files and scales.json into a run directory."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import fx

from ospq_export.errors import InputError
from ospq_export.export.expand import needs_expansion, write_expanded
from ospq_export.export.jobs import Extras, Job, jobs_of
from ospq_export.export.lower import finishers
from ospq_export.export.lower.graph import highest_opset, lower, probe_names
from ospq_export.export.metadata import describe_scales, float_metadata, quantized_metadata
from ospq_export.export.opset import check_opset
from ospq_export.export.present import check_goes_with
from ospq_export.graph.outputs import output_names
from ospq_export.graph.quantizers import QuantizedGraph
from ospq_export.onnx.kernels import Kernels, integer_kernels
from ospq_export.onnx.write import OPSET, translate, write_translated
from ospq_export.progress import stepper
from ospq_export.runs.files import (
    BRAIN_ONNX,
    FLOAT_TENSORS,
    HALF_ONNX,
    INT4_ONNX,
    QUANTIZED_BRAIN_ONNX,
    QUANTIZED_HALF_ONNX,
    QUANTIZED_ONNX,
    QUANTIZED_TENSORS,
    SCALES,
    UINT8_ACTIVATIONS_ONNX,
    check_file,
    data_file,
    staging,
    take,
    write_json,
)
from ospq_export.runs.manifest import Manifest, record_files, write_manifest
from ospq_export.runs.run import Run
from ospq_export.world.processor import examine_processor
from ospq_export.world.room import CERTAIN, check_disk, check_folder

log = logging.getLogger(__name__)
_BUILT_FROM = (QUANTIZED_HALF_ONNX, QUANTIZED_BRAIN_ONNX)


@dataclass(frozen=True)
class Exported:
    """What an export did.

    Attributes:
        run: with the new files in its manifest.
        written: names of the new files, in the order in which they were made.
    """

    run: Run
    written: list[str]


def export(
    path: Path,
    *,
    batch_size: int | None = None,
    extras: Extras | None = None,
    deploy_batch_size: int | None = 1,
    opset: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    finish: Callable[[Path], Sequence[str]] | None = None,
) -> Exported:
    """Write the deployable files of a calibrated run; those of an earlier export that are asked for again stay as they are.

    The files are written to a folder of their own inside the run directory, and take their place when all of them are complete
    and checked: an export that fails or is interrupted leaves the run as it was.

    Args:
        path: the run directory.
        batch_size: a fixed batch size, or None for a dynamic batch: these files are what `validate` and ONNX Runtime run at any
            batch size.
        extras: further files.
        deploy_batch_size: as `batch_size`, for model_qdq_fp16.onnx and model_fp16.onnx: engines are built for one batch unless
            asked otherwise, because a static shape is what fuses and tunes best.
        opset: of ONNX's operators, for parsers that know no later ones: 17 for TensorRT 8.6; None: 20, or what the formats need.
        overwrite: whether files of an earlier export are replaced.
        progress: where to show a progress bar.
        finish: called with the folder of the finished files before they take their place; what it writes there, an engine, takes
            its place with them, and the names that it returns are listed in the manifest. Files that stay lie in the run.

    Returns:
        The run, and what was written.

    Raises:
        InputError: the run directory is damaged or has no room, nothing is left to write, a file that is there contradicts what
            is asked for, or the network cannot be written as ONNX.
    """
    for size in (batch_size, deploy_batch_size):
        if size is not None and size < 1:
            raise InputError(f"a batch of {size} images", where="`batch_size`", fix="give 1 or more")
    check_folder(path, "RUN")
    run = Run.open(path)
    extras = extras or Extras()
    check_opset(run, extras, opset)
    jobs = jobs_of(run, extras, batch_size, deploy_batch_size)
    engine = finish is not None
    left = jobs if overwrite else _left(run, jobs, opset, stated=batch_size is not None, engine=engine)
    scales = overwrite or SCALES not in run.manifest.files
    _check_room(run, left)
    advance = stepper(progress, "export", len(left) + 1)
    with staging(path) as folder:
        files = _write(run, left, folder, advance, opset, scales=scales)
        files += [] if finish is None else finish(folder)
        files += [data for data in _data_files(files) if (folder / data).is_file()]
        run.manifest = _claim(run, files)
        take(folder, path, stale=_data_files(files))
    run.manifest = record_files(path, run.manifest, *files)
    advance()
    return Exported(run, files)


def _write(
    run: Run,
    jobs: Sequence[Job],
    folder: Path,
    advance: Callable[[], None],
    opset: int | None,
    *,
    scales: bool,
) -> list[str]:
    """Names of what was written."""
    writer, files = _Writer(run, folder, opset), []
    for job, following in zip_longest(jobs, jobs[1:]):
        files += writer.write(job, following)
        advance()
    described = describe_scales(run.manifest, writer.network()) if scales else None
    # ONNX Runtime loads the weights a few times over: the networks make room first.
    del writer
    gc.collect()
    if run.has_integers_only and (scales or UINT8_ACTIVATIONS_ONNX in files):
        made = folder / QUANTIZED_ONNX
        kernels = integer_kernels(made if made.is_file() else run.file(QUANTIZED_ONNX))
        if described is not None:
            described["onnxruntime"] = kernels.model_dump(mode="json")
        _warn_of_saturation(kernels, files)
    if described is not None:
        write_json(folder / SCALES, described)
        files.append(SCALES)
    return files


def _warn_of_saturation(kernels: Kernels, files: Sequence[str]) -> None:
    """Say which files' products can saturate on this processor: all of these have the codes of model.onnx."""
    processor = examine_processor()
    for file in (QUANTIZED_ONNX, UINT8_ACTIVATIONS_ONNX):
        if file in files and (said := kernels.warning(file, processor)):
            log.warning("%s", said)


def _data_files(files: Sequence[str]) -> list[str]:
    return [data_file(Path(name)).name for name in files if name.endswith(".onnx")]


def _left(run: Run, jobs: Sequence[Job], opset: int | None, *, stated: bool, engine: bool) -> list[Job]:
    """The jobs whose files are not there yet; those that are have to go with what is asked for.

    Args:
        run: of the manifest.
        jobs: all that are asked for.
        opset: that was asked for; None leaves files the one that they have.
        stated: whether a batch size was asked for; if not, files keep the one that they have.
        engine: whether an engine is built, which then is what is left to do, and needs its file to have the right batch.

    Raises:
        InputError: a file that is there contradicts its job, or nothing is left.
    """
    there = [job for job in jobs if job.file in run.manifest.files]
    for job in there:
        check_goes_with(run, job, opset, any_batch=not (stated or (engine and job.file in _BUILT_FROM)))
    left = [job for job in jobs if job not in there]
    if not left and not engine:
        names = ", ".join(job.file for job in there)
        raise InputError(
            f"{names} of an earlier export {'is' if len(there) == 1 else 'are'} there already",
            where=run.path,
            fix="give `overwrite` to write anew, or ask for another file",
        )
    return left


def _check_room(run: Run, jobs: Sequence[Job]) -> None:
    """Hold the files to come to the room on the disk; those that they replace go only when all are there."""
    weights = (run.path / FLOAT_TENSORS).stat().st_size
    codes = (run.path / QUANTIZED_TENSORS).stat().st_size
    halves = {HALF_ONNX, BRAIN_ONNX, INT4_ONNX}
    total = sum((codes if job.quantized else weights) // (2 if job.file in halves else 1) for job in jobs)
    check_disk(run.path, "the exported files", certain=int(CERTAIN * total), likely=total)


def _claim(run: Run, files: Sequence[str]) -> Manifest:
    """Take files that are about to be replaced off the manifest: an interruption then leaves a sound run without them."""
    gone = {*files, *_data_files(files)}
    kept = {name: digest for name, digest in run.manifest.files.items() if name not in gone}
    if len(kept) == len(run.manifest.files):
        return run.manifest
    manifest = run.manifest.model_copy(update={"files": kept})
    write_manifest(run.path, manifest)
    return manifest


class _Writer:
    """Writes files of one run: those of the float network first, whose graph then becomes the quantized network's."""

    def __init__(self, run: Run, folder: Path, opset: int | None) -> None:
        self.run, self.folder, self.opset = run, folder, opset
        self.captured: fx.GraphModule | None = None
        self.quantized: QuantizedGraph | None = None
        self.lowered: fx.GraphModule | None = None
        self.probes: dict[str, str] = {}
        self.translated: Any = None

    def network(self) -> QuantizedGraph:
        """The fake-quantized network; the float one is gone then."""
        if self.quantized is None:
            self.quantized, self.captured = self.run.quantized_graph(self.captured), None
        return self.quantized

    def _float(self) -> fx.GraphModule:
        if self.captured is None:
            self.captured = self.run.captured()
        return self.captured

    def _lowered(self) -> fx.GraphModule:
        if self.lowered is None:
            self.probes = probe_names(self.network(), self.run.slices())
            self.lowered = lower(self.network(), self.probes)
        return self.lowered

    def write(self, job: Job, following: Job | None) -> list[str]:
        """Write one file; where the following one is made of the same graph, its translation is kept for it.

        Returns:
            Names of what was written: a file that ONNX Runtime cannot run has one for checking beside it.
        """
        module = self._lowered() if job.quantized else self._float()
        probes, model = list(self.probes.values()), self.translated
        if model is None:
            size, sizes = self.run.manifest.data.input_size, self.run.manifest.size_range
            opset = self.opset or (highest_opset(self.network()) if job.quantized else OPSET)
            returned = output_names(module.graph)
            model = translate(
                module,
                input_size=size,
                batch_size=job.batch_size,
                dimensions={} if sizes is None else sizes.dimensions(),
                outputs=returned,
                opset=opset,
            )
        again = following is not None and following.graph == job.graph
        # Values of a clone share their type's object with it: a pass gives a value another type, and changes none in place.
        self.translated = model.clone() if again else None
        metadata = quantized_metadata(self.run) if job.quantized else float_metadata(self.run)
        finish = finishers(self.network()) if job.quantized else []
        write_translated(
            model,
            self.folder / job.file,
            metadata={**metadata, **dict(job.metadata)},
            probes=probes,
            expose_probes=job.expose_probes,
            passes=(*finish, *job.passes),
        )
        expanded = []
        if job.quantized and needs_expansion(model):
            expanded = [check_file(job.file)]
            write_expanded(self.folder / job.file, self.folder / expanded[0])
        # torch's exporter leaves cyclic garbage that holds on to the weights.
        del model
        gc.collect()
        return [job.file, *expanded]
