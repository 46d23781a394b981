"""How a trial's length, batch and learning rate change the order of the granularities that `slicing = "auto"` tries.

    python benchmarks/horizon.py RUN --candidates atom block blocks:2 --trials 20:8:4 60:8:4
    python benchmarks/horizon.py RUN --data calib ...       # not a packaged network: its calibration images

RUN is a finished run (for the candidate outlier-aware, one of `slicing=auto`), whose network (equalized, where its recipe
says so) and bits are taken; a trial is steps:batch:rate, where rate is what the learning rate is raised by at most, and
never by more than the run's steps are as many as the trial's. Prints the score that `auto` goes by; several seeds show how
much of a difference is chance.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Literal

import torch
from networks import table
from results import observed_network

from ospq_export.calibrate.slicing.auto import Candidate, Trials, candidate_of
from ospq_export.data import DataConfig, ImageSet
from ospq_export.demo import demo_images
from ospq_export.graph.granularity import slicing_of
from ospq_export.runs.run import Run
from ospq_export.validate.report.model import machine_name


def image_set(folder: Path | None, split: Literal["calibration", "test"], config: DataConfig) -> ImageSet:
    """A folder's images, or a packaged network's own of that split."""
    return demo_images(split, config) if folder is None else ImageSet.from_folder(folder, config)


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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, help="calibration images; left out for a packaged network")
    parser.add_argument("--candidates", nargs="+", default=["atom", "block", "blocks:2", "model"])
    parser.add_argument("--trials", nargs="+", default=["20:8:4", "60:8:4"], help="steps:batch:rate")
    parser.add_argument("--seeds", type=int, default=1, help="of the trials' own random choices")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trials, candidates = prepare(Run.open(args.run), args.data, args.candidates)
    rows = []
    for text, trials.seed in itertools.product(args.trials, range(args.seeds)):
        steps, batch, rate = text.split(":")
        found = [trials.run(c, int(steps), int(batch), float(rate)) for c in candidates]
        rows.append([steps, batch, rate, trials.seed, *(f"{score:.4f}" for score in found)])
        print(" ".join(map(str, rows[-1])), flush=True)
    print(table(["steps", "batch", "rate", "seed", *args.candidates], rows))
    print(machine_name())


if __name__ == "__main__":
    main()
