"""The writing side of one calibration: the manifest as it grows, a checkpoint per slice, the final files."""

from __future__ import annotations

import logging
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, fx

from ospq_export.calibrate.checkpoints import (
    Events,
    Pieces,
    Scores,
    checkpoint,
    no_events,
    parsed,
    restore,
    save,
    share,
)
from ospq_export.calibrate.checks import check_same
from ospq_export.calibrate.cost import check_budget, cost_of
from ospq_export.calibrate.objectives import objectives
from ospq_export.calibrate.objectives.base import Context
from ospq_export.calibrate.reconstruct.reconstructor import Reconstructor, Step, walk
from ospq_export.calibrate.reconstruct.store import Store
from ospq_export.calibrate.slicing.auto import choose_slicing
from ospq_export.calibrate.slicing.plan import candidate_of, cut_dominance
from ospq_export.errors import InputError
from ospq_export.graph.granularity import check_partition, slicing_of
from ospq_export.graph.quantizers import QuantizedGraph, own_quantizers
from ospq_export.graph.slicing import Slice, extract
from ospq_export.onnx.serialize import ONNX_BYTES, files_summary
from ospq_export.progress import announce, stepper
from ospq_export.runs.files import (
    CALIBRATION_IMAGES,
    CHECKPOINTS,
    GRAPH,
    MANIFEST,
    QUANTIZED_TENSORS,
    remove_temporary,
    write_json,
)
from ospq_export.runs.manifest import (
    Manifest,
    SliceRecord,
    SlicingRecord,
    read_manifest,
    record_files,
    write_manifest,
)
from ospq_export.runs.quantizers import quantizer_records, quantizer_tensors
from ospq_export.runs.run import Run
from ospq_export.runs.tensors import image_digests, write_tensors
from ospq_export.tasks.choice import TASKS
from ospq_export.world.memory import peak_memory
from ospq_export.world.processes import SOLO, World

log = logging.getLogger(__name__)
# What is written before anything is computed.
_INPUTS = (GRAPH, CALIBRATION_IMAGES)


@dataclass(frozen=True)
class Options:
    """How a calibration runs, as opposed to what it computes: none of this changes a result.

    Attributes:
        memory_budget: bytes of host memory for activations; None takes half of what is available.
        events: told what happens.
        world: who shares the work; the first process alone writes.
    """

    memory_budget: int | None = None
    events: Events = no_events
    world: World = SOLO


@dataclass
class Job:
    """The writing side of one calibration: the manifest as it grows, a checkpoint per slice, the final files.

    Attributes:
        out: the run directory.
        manifest: what it says so far.
        network: with quantizers; made anew when the constants are equalized.
        device: where the network lies.
        progress: where bars are shown.
        options: how the calibration runs.
        seconds_per_image: measured time of the float network; None where it was not timed yet.
        records: of the slices that are learned, by their index.
        slices: where the network is cut.
        slice_of: the index of the slice that a quantizer lies in, by the quantizer's name.
    """

    out: Path
    manifest: Manifest
    network: QuantizedGraph
    device: torch.device
    progress: Progress | None
    options: Options
    seconds_per_image: float | None = None
    records: dict[int, SliceRecord] = field(default_factory=dict)
    slices: list[Slice] = field(default_factory=list)
    slice_of: dict[str, int] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Of every random choice."""
        return self.manifest.calibration.seed

    @property
    def writes(self) -> bool:
        """Whether this process writes the run directory."""
        return self.options.world.rank == 0

    @property
    def world(self) -> World:
        """Who shares the work."""
        return self.options.world

    def pieces(self, stage: str, *, shared: bool = False) -> Pieces:
        """Checkpoints of a stage; where its pieces are shared, every process keeps its own."""
        return Pieces(self.out, stage, self.writes or shared)

    def begin(self, captured: fx.GraphModule, described: dict[str, Any], images: Tensor) -> None:
        """Write what is known at the start, or check that an interrupted run is this one's.

        Args:
            captured: the float network.
            described: its graph, see `serialize.describe`.
            images: the calibration images, (N, C, H, W).
        """
        if not self.writes:
            return
        self._say(self._files(captured))
        for folder in (self.out, self.out / CHECKPOINTS):
            remove_temporary(folder)
        found = read_manifest(self.out) if (self.out / MANIFEST).is_file() else None
        if found is not None and found.files:
            check_same(self.out, found, self.manifest)
            self.manifest = found
            return
        try:
            # The manifest comes first: a folder without one is never taken for an interrupted run.
            write_manifest(self.out, self.manifest)
            write_json(self.out / GRAPH, described, indent=None)
            write_json(self.out / CALIBRATION_IMAGES, image_digests(images.cpu().numpy()))
            self.manifest = record_files(self.out, self.manifest, *_INPUTS)
        except InputError:
            for name in (MANIFEST, *_INPUTS):
                (self.out / name).unlink(missing_ok=True)
            raise

    def _files(self, captured: fx.GraphModule) -> str:
        sizes = {name: buffer.nbytes for name, buffer in captured.named_buffers()}
        codes = {w.constant: sizes[w.constant] // 4 for w in self.network.weights.values()}
        return files_summary(sum(sizes.values()), sum({**sizes, **codes}.values()), ONNX_BYTES)

    def slice(self, captured: fx.GraphModule, images: Tensor) -> None:
        """Cut the network as the recipe says, or as trials show; what trials found is kept for a resumed run."""
        recipe = self.manifest.recipe
        if recipe.slicing != "auto":
            self._take(slicing_of(captured.graph, recipe.slicing), captured)
            return
        pilot = self.out / CHECKPOINTS / "slicing.json"
        if self.writes and not pilot.is_file():
            _, found = choose_slicing(
                self.network,
                captured.graph,
                recipe,
                images,
                cut_dominance(self.manifest.profile),
                self.device,
                self.seed,
                lambda steps: stepper(self.progress, "choose slicing", steps),
                self._say,
                TASKS[self.manifest.task],
                Scores(self.out / CHECKPOINTS / "trials.json", self.options.events),
            )
            write_json(pilot, found.model_dump(mode="json"))
        self.options.world.wait()
        record = parsed(SlicingRecord, pilot.read_bytes(), pilot)
        self._take(candidate_of(captured.graph, record.choice, record.dominance).slices, captured, record)
        if record.share:
            self._say(f"slicing: {record.choice} did best")

    def _say(self, line: str) -> None:
        log.info("%s", line)
        announce(self.progress, line)

    def _take(
        self, slices: list[Slice], captured: fx.GraphModule, record: SlicingRecord | None = None
    ) -> None:
        check_partition(captured.graph, slices)
        name = self.manifest.recipe.slicing
        record = record or SlicingRecord(choice=name if isinstance(name, str) else "cut points")
        self.manifest = self.manifest.model_copy(update={"slicing": record})
        self.slices = slices
        self.slice_of = {
            quantizer.name: index
            for index, bounds in enumerate(slices)
            for quantizer in own_quantizers(extract(self.network.module, bounds))
        }

    def reconstruct(self, images: Tensor) -> None:
        """Walk all slices, with a checkpoint after each."""
        settings = self.manifest.recipe.reconstruction
        todo = [i for i in range(len(self.slices)) if not checkpoint(self.out, i).is_file()]
        store = self._store(images, len(todo))
        advance = stepper(self.progress, "reconstruct", len(todo) * settings.iterations)
        reconstructor = Reconstructor(
            settings, self.device, store.trimming(advance), world=self.options.world
        )
        if self.writes and len(todo) < len(self.slices):
            log.info("resuming: %d of %d slices are done", len(self.slices) - len(todo), len(self.slices))
        task = TASKS[self.manifest.task]
        context = Context(self.network, self.slices, images, settings, self.device, self.seed, task)
        make = objectives(context)
        steps = walk(self.network, self.slices, images, reconstructor, self.seed, self._restore, make, store)
        for step in steps:
            share(self.options.world, step.piece)
            if self.writes:
                self._save(step)
        self.options.events("done", {"peak_bytes": peak_memory(self.device), "activation_bytes": store.peak})

    def _store(self, images: Tensor, todo: int) -> Store:
        """Where activations go; says beforehand what the run will cost."""
        store = Store.with_default(self.options.memory_budget, self.out / CHECKPOINTS, self.device)
        settings, seconds = self.manifest.recipe.reconstruction, self.seconds_per_image
        cost = cost_of(self.network.module.graph, self.slices, todo, len(images), settings, seconds)
        check_budget(cost, store.budget)
        self._say(cost.summary(store.budget))
        self.options.events("cost", {**asdict(cost), "budget": store.budget})
        store.hold(images)
        return store

    def _save(self, step: Step) -> None:
        bounds, metrics = self.slices[step.index], step.metrics
        record = SliceRecord(
            index=step.index,
            **asdict(bounds),
            **asdict(metrics),
            seconds=round(step.seconds, 3),
            peak_bytes=peak_memory(self.device),
        )
        self.records[step.index] = record
        self.options.events("slice", record.model_dump(mode="json"))
        if metrics.warning:
            log.warning("slice %s: %s", bounds.name, metrics.warning)
        if not metrics.kept:
            log.info("slice %s: learning did not lower the error; nearest rounding is kept", bounds.name)
        save(checkpoint(self.out, step.index), step.piece, record)

    def _restore(self, index: int, piece: fx.GraphModule) -> bool:
        path, world = checkpoint(self.out, index), self.options.world
        # The first process looks: the others might see a checkpoint that it is just writing.
        if not world.agree(int(path.is_file())):
            return False
        if self.writes:
            self.records[index] = restore(path, piece, quantizer_records(self.network, self.slice_of))
        share(world, piece)
        return True

    def finish(self) -> Run:
        """Write the quantized tensors and the final manifest; the checkpoints go."""
        if self.writes:
            self._write_result()
        self.options.world.wait()
        return Run(self.out, self.manifest) if self.writes else Run.open(self.out)

    def _write_result(self) -> None:
        replaced = {w.constant for w in self.network.weights.values()}
        quantizers = quantizer_tensors([*self.network.activations.values(), *self.network.weights.values()])
        biases = {b.constant: b.value for b in self.network.biases.values()}
        rest = {
            n: biases.get(n, b)
            for n, b in self.network.module.named_buffers()
            if not n.startswith("quantizers.") and n not in replaced
        }
        write_tensors(self.out / QUANTIZED_TENSORS, {**rest, **quantizers})
        complete = self.manifest.model_copy(
            update={
                "status": "calibrated",
                "slices": [self.records[i] for i in range(len(self.slices))],
                "quantizers": quantizer_records(self.network, self.slice_of),
            }
        )
        self.manifest = record_files(self.out, complete, QUANTIZED_TENSORS)
        shutil.rmtree(self.out / CHECKPOINTS, ignore_errors=True)
