"""The calibrate stage: checks, observation, the walk with its checkpoints, and the finished run directory."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, fx, nn

from ospq_export import artifact
from ospq_export.artifact import CalibrationRecord, EqualizedSite, Manifest, SliceRecord
from ospq_export.calibrate.equalize import count_sites, equalize
from ospq_export.calibrate.observe import observation_steps, observe
from ospq_export.calibrate.profile import outlier_profile
from ospq_export.calibrate.reconstruct import Reconstructor
from ospq_export.calibrate.walk import Step, walk
from ospq_export.data import Batch, DataConfig
from ospq_export.errors import InputError
from ospq_export.graph.capture import capture, fingerprint
from ospq_export.graph.quantizers import Bits, QuantizedGraph, insert_quantizers, quantizers_of
from ospq_export.graph.slicing import Slice, block_slicing, extract
from ospq_export.models import ModelSpec
from ospq_export.progress import stepper
from ospq_export.recipes import Recipe
from ospq_export.run import Run, load_quantizer, quantizer_records, quantizer_tensors

log = logging.getLogger(__name__)
_OBSERVATION_BATCH = 64
_EQUALIZATION_IMAGES = 32


def calibrate(
    model: nn.Module,
    spec: ModelSpec,
    images: Batch,
    data: DataConfig,
    recipe: Recipe,
    out: Path,
    *,
    class_to_idx: dict[str, int] | None = None,
    skipped: list[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
) -> Run:
    """Quantize a float model after training and write a run directory.

    Interrupted, the same call continues after the last finished slice and ends with the same bytes.

    Args:
        model: from `create_model(spec)`: eval mode, float32.
        spec: how the later stages rebuild the model.
        images: the calibration images, normalised as `data` says.
        data: the preprocessing, kept for the later stages.
        recipe: bits, slicing, settings.
        out: the run directory; new, empty, or left by an interruption of the same call.
        class_to_idx: classes of the calibration folder, by name.
        skipped: images that could not be read.
        device: torch device the slices run on.
        seed: of every random choice.
        progress: where to show progress bars.

    Raises:
        InputError: the output folder is in use, the model cannot be captured, the activations are not finite, or an interrupted
            run there was made from other inputs.
    """
    check_output_folder(out)
    target = _device(device)
    captured = capture(model, data.input_size)
    bits = Bits(recipe.weight_bits, recipe.activation_bits, recipe.first_last_bits)
    captured.to(target)
    equalized = _equalize(captured, images.images, bits, recipe, seed, progress)
    network = insert_quantizers(captured, bits)
    slices = block_slicing(captured.graph)
    record = CalibrationRecord(
        images=len(images.images),
        images_sha256=artifact.tensor_sha256(images.images),
        skipped=skipped or [],
        seed=seed,
        device=target.type,
    )
    manifest = Manifest(
        status="calibrating",
        model=spec,
        data=data,
        class_to_idx=_complete(class_to_idx or {}, captured),
        recipe=recipe,
        graph_fingerprint=fingerprint(captured),
        calibration=record,
        equalized=equalized,
        profile=outlier_profile(captured, images.images[:_EQUALIZATION_IMAGES]),
        versions=artifact.installed_versions(),
        files={},
    )
    network.module.to(target)
    _observe(network, images.images[: recipe.observation_images], seed, progress)
    job = _Job(out, manifest, network, slices)
    job.begin(captured)
    job.reconstruct(images.images, target, seed, progress)
    return job.finish()


def check_output_folder(out: Path) -> None:
    """Refuse a folder that holds anything but an interrupted calibration.

    Raises:
        InputError: `out` is a file, a finished run, or a folder with other content.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError("the output is not a folder", where=out, mend="choose another --out")
    if not any(out.iterdir()):
        return
    if not (out / artifact.MANIFEST).is_file():
        raise InputError("the output folder is not empty", where=out, mend="choose another --out")
    if artifact.read_manifest(out).status == "calibrated":
        raise InputError(
            "the output folder already holds a finished run", where=out, mend="choose another --out"
        )


def _complete(class_to_idx: dict[str, int], captured: fx.GraphModule) -> dict[str, int]:
    """The class map where it covers the whole classifier: folders of a part of the classes are numbered by chance."""
    output = next(n for n in captured.graph.nodes if n.op == "output").args[0]
    return class_to_idx if len(class_to_idx) == output.meta["val"].shape[-1] else {}


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"device {name!r} cannot be used: {reason}", where="--device", mend="use --device cpu"
        ) from error
    return device


def _equalize(
    captured: fx.GraphModule, images: Tensor, bits: Bits, recipe: Recipe, seed: int, progress: Progress | None
) -> list[EqualizedSite]:
    if recipe.equalization == "none":
        return []
    advance = stepper(progress, "equalize", count_sites(captured))
    sample = images[: min(_EQUALIZATION_IMAGES, recipe.observation_images)]
    return equalize(captured, sample, bits, recipe.equalization, seed=seed, advance=advance)


def _observe(network: QuantizedGraph, images: Tensor, seed: int, progress: Progress | None) -> None:
    steps = observation_steps(network, len(images), _OBSERVATION_BATCH)
    advance = stepper(progress, "observe", steps)
    observe(network, images, batch_size=_OBSERVATION_BATCH, seed=seed, advance=advance)


class _Job:
    """The writing side of one calibration: the manifest as it grows, a checkpoint per slice, the final files."""

    def __init__(self, out: Path, manifest: Manifest, network: QuantizedGraph, slices: list[Slice]) -> None:
        self.out, self.manifest, self.network, self.slices = out, manifest, network, slices
        self.records: dict[int, SliceRecord] = {}
        self.slice_of = {
            quantizer.name: index
            for index, bounds in enumerate(slices)
            for quantizer in quantizers_of(extract(network.module, bounds))
        }

    def begin(self, captured: fx.GraphModule) -> None:
        """Write the unfinished manifest and the float tensors, or check that an interrupted run is this one's."""
        found = artifact.read_manifest(self.out) if (self.out / artifact.MANIFEST).is_file() else None
        if found is not None and found.files:
            self._check_same(found, captured)
            return
        existed = self.out.exists()
        try:
            # The manifest comes first: a folder without one is never taken for an interrupted run.
            artifact.write_manifest(self.out, self.manifest)
            artifact.write_tensors(self.out / artifact.FLOAT_TENSORS, dict(captured.named_buffers()))
            self.manifest = artifact.record_files(self.out, self.manifest, artifact.FLOAT_TENSORS)
        except InputError:
            if not existed:
                shutil.rmtree(self.out, ignore_errors=True)
            raise

    def _check_same(self, found: Manifest, captured: fx.GraphModule) -> None:
        artifact.check_files(self.out, found)
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder) / artifact.FLOAT_TENSORS
            artifact.write_tensors(probe, dict(captured.named_buffers()))
            files = {artifact.FLOAT_TENSORS: artifact.sha256(probe)}
        theirs, mine = found.identity(), self.manifest.model_copy(update={"files": files}).identity()
        changed = [key for key in mine if mine[key] != theirs[key]]
        if changed:
            raise InputError(
                f"the interrupted run there was made with another {', '.join(changed)}",
                where=self.out,
                mend="repeat the very same command to resume, or choose another --out",
            )
        self.manifest = found

    def reconstruct(self, images: Tensor, device: torch.device, seed: int, progress: Progress | None) -> None:
        """Walk all slices, with a checkpoint after each."""
        settings = self.manifest.recipe.reconstruction
        todo = [i for i in range(len(self.slices)) if not self._checkpoint(i).is_file()]
        advance = stepper(progress, "reconstruct", len(todo) * settings.iterations)
        reconstructor = Reconstructor(settings, device, advance)
        if len(todo) < len(self.slices):
            log.info("resuming: %d of %d slices are done", len(self.slices) - len(todo), len(self.slices))
        for step in walk(self.network, self.slices, images, reconstructor, seed, self._restore):
            self._save(step)

    def _checkpoint(self, index: int) -> Path:
        return self.out / artifact.CHECKPOINTS / f"{index:03d}.safetensors"

    def _save(self, step: Step) -> None:
        bounds, metrics = self.slices[step.index], step.metrics
        record = SliceRecord(
            index=step.index,
            name=bounds.name,
            start=bounds.start,
            end=bounds.end,
            error_before=metrics.error_before,
            error_after=metrics.error_after,
            iterations=metrics.iterations,
            kept=metrics.kept,
            seconds=round(step.seconds, 3),
            losses=metrics.losses,
        )
        self.records[step.index] = record
        if not metrics.kept:
            log.info("slice %s: learning did not lower the error; nearest rounding is kept", bounds.name)
        tensors = quantizer_tensors(list(quantizers_of(step.piece)))
        artifact.write_tensors(self._checkpoint(step.index), tensors, {"record": record.model_dump_json()})

    def _restore(self, index: int, piece: fx.GraphModule) -> bool:
        path = self._checkpoint(index)
        if not path.is_file():
            return False
        tensors, header = artifact.read_tensors(path)
        try:
            record = SliceRecord.model_validate_json(header.get("record", ""))
        except ValueError as error:
            raise InputError(
                "the checkpoint is damaged", where=path, mend="delete this file and run again"
            ) from error
        own = {r.name: r for r in quantizer_records(self.network, self.slice_of)}
        for quantizer in quantizers_of(piece):
            load_quantizer(quantizer, own[quantizer.name], tensors, path)
        self.records[index] = record
        return True

    def finish(self) -> Run:
        """Write the quantized tensors and the final manifest; the checkpoints go."""
        replaced = {w.constant for w in self.network.weights.values()}
        quantizers: list[Any] = [*self.network.activations.values(), *self.network.weights.values()]
        rest = {
            n: b
            for n, b in self.network.module.named_buffers()
            if not n.startswith("quantizers.") and n not in replaced
        }
        artifact.write_tensors(
            self.out / artifact.QUANTIZED_TENSORS, {**rest, **quantizer_tensors(quantizers)}
        )
        complete = self.manifest.model_copy(
            update={
                "status": "calibrated",
                "slices": [self.records[i] for i in range(len(self.slices))],
                "quantizers": quantizer_records(self.network, self.slice_of),
            }
        )
        self.manifest = artifact.record_files(self.out, complete, artifact.QUANTIZED_TENSORS)
        shutil.rmtree(self.out / artifact.CHECKPOINTS, ignore_errors=True)
        return Run(self.out, self.manifest)
