"""What comes before the slices: equalization and observation, each taken up where an interrupted run left it."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path

import torch
from pydantic import RootModel
from torch import Tensor, fx

from ospq_export.calibrate.checkpoints import parsed
from ospq_export.calibrate.equalize import count_sites, equalize
from ospq_export.calibrate.job import Job
from ospq_export.calibrate.observe import observation_steps, observe, outlier_profile
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.outputs import as_tuple
from ospq_export.progress import stepper
from ospq_export.runs.files import CHECKPOINTS, FLOAT_TENSORS
from ospq_export.runs.manifest import EqualizedSite, QuantizerRecord, record_files
from ospq_export.runs.quantizers import fitting, load_quantizers, quantizer_records, quantizer_tensors
from ospq_export.runs.tensors import read_tensors, write_tensors

_OBSERVATION_BATCH = 64
_EQUALIZATION_IMAGES = 32
_TIMED_IMAGES = 8


def equalize_network(job: Job, captured: fx.GraphModule, images: Tensor) -> None:
    """Equalize the float network as the recipe says, describe its outliers, and write its constants.

    Args:
        job: begun; its network is made anew, of the equalized constants.
        captured: the float network, on the job's device; its constants change.
        images: the calibration images, (N, C, H, W), normalised.

    Raises:
        InputError: the constants cannot be written or read.
    """
    if job.world.agree(int(FLOAT_TENSORS in job.manifest.files)):
        _load(captured, job.out / FLOAT_TENSORS)
    else:
        records = _equalized(job, captured, images)
        profile = outlier_profile(captured, images[:_EQUALIZATION_IMAGES])
        if job.writes:
            write_tensors(job.out / FLOAT_TENSORS, dict(captured.named_buffers()))
            changes = {"equalized": records, "profile": profile}
            job.manifest = record_files(job.out, job.manifest.model_copy(update=changes), FLOAT_TENSORS)
        job.world.wait()
        job.pieces("equalize").remove()
    # The network shares the captured constants, but its quantizers and its biases are its own.
    job.network = insert_quantizers(captured, job.manifest.recipe.formats())
    job.network.module.to(job.device)


def _load(captured: fx.GraphModule, path: Path) -> None:
    tensors, _ = read_tensors(path)
    for name, buffer in captured.named_buffers():
        buffer.copy_(fitting(tensors, name, buffer, path))


def _equalized(job: Job, captured: fx.GraphModule, images: Tensor) -> list[EqualizedSite]:
    recipe, method = job.manifest.recipe, job.manifest.recipe.equalization
    if method == "none":
        return []
    pieces, sites = job.pieces("equalize"), count_sites(captured, method)
    left = sum(not pieces.path(index).is_file() for index in range(sites))
    advance = stepper(job.progress, "equalize", left)

    def settled(record: EqualizedSite) -> None:
        advance()
        job.options.events("equalize", {**record.model_dump(mode="json"), "sites": sites})

    sample = images[: min(_EQUALIZATION_IMAGES, recipe.observation_images)]
    return equalize(captured, sample, recipe.formats(), method, seed=job.seed, settled=settled, pieces=pieces)


def observe_network(job: Job, images: Tensor) -> None:
    """Give every quantizer its searched range and its nearest codes, and time the float network on the way.

    Args:
        job: equalized.
        images: the calibration images, (N, C, H, W), normalised.

    Raises:
        InputError: an activation is not finite, or a checkpoint cannot be written or read.
    """
    network, path = job.network, job.out / CHECKPOINTS / "observed.safetensors"
    anywhere: defaultdict[str, int] = defaultdict(int)
    if job.world.agree(int(path.is_file())):
        tensors, header = read_tensors(path)
        records = parsed(_Records, header.get("records", ""), path).root
        load_quantizers(network, records, {name: tensor.clone() for name, tensor in tensors.items()}, path)
    else:
        _observe(job, images[: job.manifest.recipe.observation_images])
        if job.writes:
            kept = quantizer_tensors([*network.activations.values(), *network.weights.values()])
            held = _Records(quantizer_records(network, anywhere)).model_dump_json()
            write_tensors(path, kept, {"records": held})
        job.world.wait()
        job.pieces("observe").remove()
    job.seconds_per_image = _seconds(job, images[:_TIMED_IMAGES])


def _observe(job: Job, images: Tensor) -> None:
    advance = stepper(
        job.progress, "observe", observation_steps(job.network, len(images), _OBSERVATION_BATCH)
    )
    observe(
        job.network,
        images,
        batch_size=_OBSERVATION_BATCH,
        seed=job.seed,
        advance=advance,
        world=job.world,
        pieces=job.pieces("observe", shared=True),
        events=job.options.events,
    )


def _seconds(job: Job, images: Tensor) -> float:
    """Of the float network, per image."""
    sample = images.to(job.device)
    with torch.no_grad():
        started = time.perf_counter()
        # Brought back to the host, a GPU's result is complete.
        as_tuple(job.network.module(sample))[0].cpu()
        return (time.perf_counter() - started) / len(sample)


class _Records(RootModel[list[QuantizerRecord]]):
    """Records of quantizers, as a checkpoint has them."""
