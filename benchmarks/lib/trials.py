"""The trials of `slicing = "auto"` as `calibrate` runs them, and measures to judge them by."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from lib.classifiers import image_set, observed_network
from ospq_export.calibrate.slicing.auto import Trials
from ospq_export.calibrate.slicing.plan import Candidate, candidate_of
from ospq_export.graph.granularity import slicing_of
from ospq_export.runs.run import Run
from ospq_export.tasks.classify import kl_divergence, total_variation

_TEMPERATURES = (1.0, 2.0, 4.0)


def prepare(run: Run, data: Path | None, names: list[str]) -> tuple[Trials, list[Candidate]]:
    """The trials as `calibrate` would run them with the run's recipe and all of its images."""
    manifest = run.manifest
    recipe, config, seed = manifest.recipe, manifest.data, manifest.calibration.seed
    found = image_set(data, "calibration", config)
    images = found.sample(recipe.calibration_images, seed=seed).images
    network, graph = observed_network(run, images), run.captured().graph
    dominances = manifest.slicing.dominance if manifest.slicing else {}
    candidates = [candidate_of(graph, name, dominances) for name in names]
    block = slicing_of(graph, "block")
    cpu = torch.device("cpu")
    return Trials(network, block, candidates, recipe, images, cpu, seed), candidates


def steps_batch_rate(text: str) -> tuple[int, int, float]:
    """A trial as the command line has it, steps:batch:rate."""
    steps, batch, rate = text.split(":")
    return int(steps), int(batch), float(rate)


def measures(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Per image, (N,): how far logits (N, K) are from those of the float network."""
    centred = [t - t.mean(-1, keepdim=True) for t in (output, target)]
    softened = {
        f"total variation, T = {t:g}": torch.vmap(partial(total_variation, temperature=t))(output, target)
        for t in _TEMPERATURES
    }
    return {
        "KL divergence": torch.vmap(kl_divergence)(output, target),
        "squared logit error": (centred[0] - centred[1]).square().mean(-1),
        **softened,
        "flips": (output.argmax(-1) != target.argmax(-1)).float(),
    }
