"""The calibrate stage: checks, observation, and the job that slices, reconstructs and writes the run directory."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, fx, nn

from ospq_export.calibrate.checkpoints import Events, no_events
from ospq_export.calibrate.checks import (
    check_batch,
    check_images,
    check_module,
    check_output_folder,
    check_processes,
    check_sizes,
    float_products,
    locked,
    say_substituted,
)
from ospq_export.calibrate.cost import check_budget, cost_of
from ospq_export.calibrate.job import Job, Options
from ospq_export.calibrate.prepare import equalize_network, observe_network
from ospq_export.calibrate.reconstruct.store import Store
from ospq_export.data import Batch, DataConfig, ImagesRecord
from ospq_export.formats.choice import Choice
from ospq_export.graph.capture import capture, fingerprint
from ospq_export.graph.granularity import slicing_of
from ospq_export.graph.insertion import check_overrides, insert_quantizers
from ospq_export.graph.outputs import LOGITS, output_names, output_shapes, rename_outputs
from ospq_export.graph.serialize import describe
from ospq_export.graph.sizes import SizeRange, sizes_between
from ospq_export.graph.slicing import Slice
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import torch_device
from ospq_export.models.weights import checkpoint_record
from ospq_export.recipes import Recipe
from ospq_export.runs.manifest import CalibrationRecord, Manifest, installed_versions
from ospq_export.runs.run import Run
from ospq_export.runs.tensors import tensor_sha256, tensors_sha256
from ospq_export.tasks.base import Task
from ospq_export.tasks.choice import choose_task
from ospq_export.tasks.classify import CLASSIFY
from ospq_export.world.processes import joined
from ospq_export.world.room import check_disk

log = logging.getLogger(__name__)


def calibrate(
    model: nn.Module,
    spec: ModelSpec,
    images: Batch,
    data: DataConfig,
    recipe: Recipe,
    out: Path,
    *,
    task: str | None = None,
    outputs: Sequence[str] | None = None,
    size_range: Sequence[Sequence[int]] | None = None,
    class_to_idx: dict[str, int] | None = None,
    skipped: list[str] | None = None,
    origin: ImagesRecord | None = None,
    device: str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    memory_budget: int | None = None,
    events: Events = no_events,
) -> Run:
    """Quantize a float model after training and write a run directory.

    Interrupted, the same call continues after what was finished (a site that was equalized, a batch that was observed, a trial,
    a slice) and ends with the same bytes.

    Args:
        model: in eval mode, float32; of one image tensor.
        spec: what it was made from; the later stages have the graph in the run directory.
        images: the calibration images, normalised as `data` says.
        data: the preprocessing, kept for the later stages.
        recipe: bits, slicing, settings.
        out: the run directory; new, empty, or left by an interruption of the same call.
        task: what its outputs are, out of `tasks.choice.TASKS`; None takes what they look like.
        outputs: names of those that are kept; None keeps all that hold real numbers.
        size_range: the smallest and the largest (height, width) that the network is to take, and, where torch.export does not
            tell, what they are multiples of; None fixes the size. The calibration's own lies inside.
        class_to_idx: classes of the calibration folder, by name.
        skipped: images that could not be read.
        origin: where the images and their classes came from; kept in the manifest.
        device: torch device the slices run on.
        seed: of every random choice.
        progress: where to show progress bars.
        memory_budget: bytes of host memory for activations, the images among them; the rest goes to disk. None takes half of
            what is available.
        events: told what happens; see `checkpoints.json_lines`.

    Raises:
        InputError: the output folder is in use, the model is in training mode, is not a function of one image at a time or
            cannot be captured, the images are all one value, the activations are not finite, or an interrupted run there was
            made from other inputs.
    """
    check_output_folder(out)
    check_module(model)
    target = torch_device(device)
    check_batch(recipe, len(images.images))
    check_processes(recipe)
    origin, pixels = origin or ImagesRecord(), images.images
    sizes = sizes_between(size_range, data.input_size)
    with joined() as world, locked(out) if world.rank == 0 else contextlib.nullcontext():
        # Once more: whoever held the folder until now may have finished.
        check_output_folder(out)
        distinct = check_images(pixels)
        wanted = recipe.formats()
        captured, chosen = captured_with_task(
            model, pixels, data, task=task, outputs=outputs, sizes=sizes, formats=wanted
        )
        # Equalization changes what constants hold, not the graph: an operator that no run may hold is named before any work.
        described = describe(captured)
        if recipe.slicing != "auto":
            # A slicing that does not fit is better said before the observation than after it, and so is what it takes.
            slices = slicing_of(captured.graph, recipe.slicing)
            check_cost(captured.graph, slices, len(pixels), recipe, out, target, memory_budget)
        captured.to(target)
        network = insert_quantizers(captured, recipe.formats())
        record = CalibrationRecord(
            images=len(pixels),
            images_sha256=tensor_sha256(pixels),
            skipped=skipped or [],
            seed=seed,
            device=target.type,
            processes=world.size,
            threads=torch.get_num_threads(),
            passed_over=origin.passed_over,
            notes=origin.notes,
            distinct=distinct,
            float_products=float_products(captured),
            substituted=say_substituted(network.substituted),
            outputs_left_out=captured.meta["left_out"],
            weights_sha256=tensors_sha256(dict(captured.named_buffers())),
        )
        manifest = Manifest(
            status="calibrating",
            model=spec,
            data=data,
            size_range=captured.meta.get("sizes"),
            task=chosen.name,
            **_classes(captured, chosen, class_to_idx or {}, origin),
            recipe=recipe,
            graph_fingerprint=fingerprint(captured),
            calibration=record,
            checkpoint=checkpoint_record(model),
            versions=installed_versions(),
            files={},
        )
        options = Options(memory_budget, events if world.rank == 0 else no_events, world)
        job = Job(out, manifest, network, target, progress, options)
        job.begin(captured, described, pixels)
        equalize_network(job, captured, pixels)
        observe_network(job, pixels)
        job.slice(captured, pixels)
        job.reconstruct(pixels)
        return job.finish()


def captured_with_task(
    model: nn.Module,
    images: Tensor,
    data: DataConfig,
    *,
    task: str | None,
    outputs: Sequence[str] | None,
    sizes: SizeRange | None,
    formats: Choice | None = None,
) -> tuple[fx.GraphModule, Task]:
    """The network's graph, held to the network on a few images, and what its outputs are; arguments as `calibrate`'s.

    Raises:
        InputError: it cannot be captured, the graph computes something else, or an override of `formats` does not fit it.
    """
    captured = capture(model, data.input_size, outputs=outputs, sizes=sizes)
    chosen = _task(model, captured, task, data)
    if formats is not None:
        check_overrides(captured.graph, formats)
    check_sizes(model, captured, images)
    if output_names(captured.graph) == (LOGITS,):
        rename_outputs(captured.graph, [chosen.output])
    return captured, chosen


def _task(model: nn.Module, captured: fx.GraphModule, wanted: str | None, data: DataConfig) -> Task:
    """The network's task; a guess is said aloud, and so is what the network returns besides."""
    headless = getattr(model, "num_classes", None) == 0
    shapes = output_shapes(captured.graph)
    task, reason = choose_task(wanted, shapes, data.input_size, headless=headless)
    if reason and task is not CLASSIFY:
        log.warning("task: %s, because %s; `task` says otherwise", task.name, reason)
    for name, why in captured.meta["left_out"].items():
        log.warning("output %s is left out: it %s", name, why)
    return task


def _classes(
    captured: fx.GraphModule, task: Task, class_to_idx: dict[str, int], origin: ImagesRecord
) -> dict[str, Any]:
    """What a manifest says of the logits, and of the classes where they cover the whole classifier."""
    outputs = next(iter(output_shapes(captured.graph).values()))[-1] if task is CLASSIFY else None
    # One output tells two classes apart.
    known = class_to_idx if outputs is None or len(class_to_idx) == max(outputs, 2) else {}
    source = origin.classes_source if known else None
    return {
        "outputs": outputs,
        "class_to_idx": known,
        "classes_source": source,
        "class_from": origin.class_from,
    }


def check_cost(
    graph: fx.Graph,
    slices: list[Slice],
    images: int,
    recipe: Recipe,
    out: Path,
    device: torch.device,
    memory_budget: int | None,
) -> None:
    """Hold the activations of a calibration to its memory budget and to the disk.

    Raises:
        InputError: the budget cannot hold one batch, or the disk cannot hold what the budget does not.
    """
    store = Store.with_default(memory_budget, out, device)
    cost = cost_of(graph, slices, len(slices), images, recipe.reconstruction, None)
    check_budget(cost, store.budget)
    if device.type == "cpu":
        # The estimate is for the worst moment, and counts all that is held at both sides of a slice.
        least = int(cost.activation_bytes / 2)
        check_disk(
            out,
            "the activations beyond the memory budget",
            certain=max(0, least - store.budget),
            likely=max(0, cost.activation_bytes - store.budget),
        )
