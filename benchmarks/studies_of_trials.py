"""How the trials of `slicing = "auto"` are judged: what is chance in them, how long they have to be, what they cost.

python benchmarks/studies_of_trials.py horizon --help
python benchmarks/studies_of_trials.py judges --help
python benchmarks/studies_of_trials.py noise --help
python benchmarks/studies_of_trials.py trials --help
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from lib.classifiers import demo_network, image_set, observed_network
from lib.networks import quantize
from lib.rows import add_run, make_parser, run_study, table
from lib.top1 import BITS
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from ospq_export.calibrate.objectives import objectives
from ospq_export.calibrate.objectives.base import Context
from ospq_export.calibrate.reconstruct.reconstructor import Reconstructor, walk
from ospq_export.calibrate.slicing.auto import Trials, choose_slicing
from ospq_export.calibrate.slicing.plan import Candidate, candidate_of
from ospq_export.demo import demo_images
from ospq_export.formats.choice import integers
from ospq_export.graph.granularity import slicing_of
from ospq_export.graph.slicing import atoms
from ospq_export.recipes import load_recipe
from ospq_export.runs.run import Run
from ospq_export.tasks.classify import kl_divergence, total_variation
from ospq_export.validate.report.model import machine_name

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


HORIZON = """How a trial's length, batch and learning rate change the order of the granularities that `slicing = "auto"` tries.

    python benchmarks/studies_of_trials.py horizon RUN --candidates atom block blocks:2 --trials 20:8:4 60:8:4
    python benchmarks/studies_of_trials.py horizon RUN --data calib ...       # not a packaged network: its calibration images

RUN is a finished run (for the candidate outlier-aware, one of `slicing=auto`), whose network (equalized, where its recipe
says so) and bits are taken; a trial is steps:batch:rate, where rate is what the learning rate is raised by at most, and
never by more than the run's steps are as many as the trial's. Prints the score that `auto` goes by; several seeds show how
much of a difference is chance.
"""


def horizon() -> None:
    """Command line."""
    parser = make_parser(HORIZON)
    add_run(parser)
    parser.add_argument("--candidates", nargs="+", default=["atom", "block", "blocks:2", "model"])
    parser.add_argument("--trials", nargs="+", default=["20:8:4", "60:8:4"], help="steps:batch:rate")
    parser.add_argument("--seeds", type=int, default=1, help="of the trials' own random choices")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trials, candidates = prepare(Run.open(args.run), args.data, args.candidates)
    rows = []
    for text, trials.seed in itertools.product(args.trials, range(args.seeds)):
        found = [trials.run(c, *steps_batch_rate(text)) for c in candidates]
        rows.append([*text.split(":"), trials.seed, *(f"{score:.4f}" for score in found)])
        print(" ".join(map(str, rows[-1])), flush=True)
    print(table(["steps", "batch", "rate", "seed", *args.candidates], rows))
    print(machine_name())


JUDGES = """How far a few images can tell granularities apart, by several measures of the quantized network's output.

    python benchmarks/studies_of_trials.py judges runs/granularity/demo-swin-w3a3-*

Takes finished runs of one packaged network that differ in their slicing. For every measure (total variation is that of the class
probabilities, logits divided by T): its spread over the images relative to its mean, and the rank correlation (Spearman) between
the runs' values on a few images, drawn at random, and on all.
"""


_DRAWS = 300


def logits(module: nn.Module, batches: list[Tensor]) -> Tensor:
    """(N, K)."""
    with torch.inference_mode():
        return torch.cat([module(images) for images in batches])


def agreement(values: NDArray[np.float32], size: int) -> float:
    """Mean rank correlation of the runs' means over `size` images with those over all; values (runs, N)."""
    random = np.random.default_rng(0)
    draws = [random.choice(values.shape[1], size, replace=False) for _ in range(_DRAWS)]
    truth = values.mean(1)
    return float(np.mean([spearmanr(values[:, chosen].mean(1), truth)[0] for chosen in draws]))


def judges() -> None:
    """Command line."""
    parser = make_parser(JUDGES)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--sizes", nargs="*", type=int, default=[128, 256, 512])
    args = parser.parse_args()
    runs = [Run.open(path) for path in args.runs]
    images = demo_images("test", runs[0].manifest.data)
    batches = [batch.images for batch in images.batches(200, range(args.images))]
    target = logits(runs[0].float_network(), batches)
    found = [measures(logits(run.fake_quant_network(), batches), target) for run in runs]
    rows = []
    for name in found[0]:
        values = np.stack([f[name].numpy() for f in found])
        spread = float(np.mean(values.std(1) / values.mean(1)))
        rows.append([name, f"{spread:.2f}", *(f"{agreement(values, size):.2f}" for size in args.sizes)])
    print(table(["measure", "spread over mean", *(f"{size} images" for size in args.sizes)], rows))


NOISE = """How much of a trial's score is chance: trials of `slicing = "auto"` with several seeds, by several
measures and on more images.

    python benchmarks/studies_of_trials.py noise RUN --seeds 6
    python benchmarks/studies_of_trials.py noise RUN --data calib --others val       # not a packaged network: its images

RUN is a finished run, whose network (equalized, where its recipe says so), bits, steps and images are taken. For every
measure, on the last 256 calibration images, on all that trials do not learn from, and on others (of the test or validation
set): mean of each candidate; standard deviation between seeds over the mean; standard deviation between the candidates'
means over the mean; and the last over the one before: how much of a difference between two trials is the slicing's.
"""


_FEW = 256


def others(run: Run, folder: Path | None, count: int) -> Tensor:
    """Images that calibration never saw, float32 (N, C, H, W)."""
    found = image_set(folder, "test", run.manifest.data)
    return found.sample(min(count, len(found)), seed=0).images


def rows(values: Mapping[str, Tensor], place: str) -> list[list[str]]:
    """By measure, from per-image values (seeds, candidates, N)."""
    lines = []
    for name, found in values.items():
        score = found.mean(-1)
        means, mean = score.mean(0), float(score.mean())
        chance = float(score.var(0).mean().sqrt()) / mean
        between = float(means.std()) / mean
        cells = [f"{chance:.3f}", f"{between:.3f}", f"{between / chance:.2f}"]
        lines.append([name, place, *(f"{m:.4f}" for m in means), *cells])
    return lines


def noise() -> None:
    """Command line."""
    parser = make_parser(NOISE)
    add_run(parser)
    parser.add_argument("--others", type=Path, help="further images; left out for a packaged network")
    parser.add_argument("--images", type=int, default=3000, help="of the others")
    parser.add_argument("--candidates", nargs="+", default=["atom", "block", "blocks:2", "blocks:4"])
    parser.add_argument("--trial", default="60:8:4", help="steps:batch:rate")
    parser.add_argument("--seeds", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run.open(args.run)
    trials, candidates = prepare(run, args.data, args.candidates)
    held = len(trials.judge)
    trials.judge_on(torch.cat([trials.judge, others(run, args.others, args.images)]))
    trial = steps_batch_rate(args.trial)
    found: dict[str, list[list[Tensor]]] = {}
    for seed in range(args.seeds):
        trials.seed = seed
        outputs = [trials.outputs(c, *trial) for c in candidates]
        by_candidate = [measures(output[0], trials.reference[0]) for output in outputs]
        for name in by_candidate[0]:
            found.setdefault(name, []).append([m[name] for m in by_candidate])
        print(f"seed {seed}", flush=True)
    values = {name: torch.stack([torch.stack(seed) for seed in seeds]) for name, seeds in found.items()}
    places = {f"{_FEW} held out": slice(held - _FEW, held), f"{held} held out": slice(held)}
    places["others"] = slice(held, None)
    header = ["measure", "images", *args.candidates, "chance", "between", "ratio"]
    lines = [
        line
        for place, at in places.items()
        for line in rows({n: v[..., at] for n, v in values.items()}, place)
    ]
    print(table(header, lines))
    print(machine_name())


TRIALS = """What `slicing = "auto"` costs: processor time of its trials over that of the reconstruction that follows,
beside the plan.

    python benchmarks/studies_of_trials.py trials swin --set reconstruction.iterations=200 pilot.budget=0.6

Both are run in one process, one after the other, on a packaged network at W3A3; the reconstruction is cut into blocks.
"""


def measure(name: str, overrides: list[str]) -> list[object]:
    """Network, candidates, planned share, measured share, choice."""
    network, recipe = demo_network(name), load_recipe("w4a4", ["slicing=auto", *overrides])
    images = network.calibration.sample(recipe.calibration_images, seed=0).images
    observed = images[: recipe.observation_images]
    prepared = quantize(network.spec, network.config.input_size, integers(*BITS["w3a3"]), observed)
    captured, quantized = prepared.captured, prepared.network
    # Any profile does: it moves the cuts of one candidate, which costs the same wherever they are.
    dominances = dict.fromkeys((atom.end for atom in atoms(captured.graph)), 0.01)
    cpu = torch.device("cpu")
    start = time.process_time()
    _, record = choose_slicing(quantized, captured.graph, recipe, images, dominances, cpu, 0)
    middle = time.process_time()
    slices = slicing_of(captured.graph, "block")
    make = objectives(Context(quantized, slices, images, recipe.reconstruction, cpu, 0))
    reconstructor = Reconstructor(recipe.reconstruction, cpu)
    for _ in walk(quantized, slices, images, reconstructor, 0, make_objective=make):
        continue
    share = (middle - start) / (time.process_time() - middle)
    return [network.name, len(record.candidates), f"{record.share:.2f}", f"{share:.2f}", record.choice]


def trials() -> None:
    """Command line."""
    parser = make_parser(TRIALS)
    parser.add_argument("networks", nargs="*", default=["vit", "swin"])
    parser.add_argument("--set", nargs="*", default=[], help="recipe overrides")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measure(name, args.set) for name in args.networks]
    print(table(["network", "candidates", "planned share", "measured share", "choice"], rows))
    print(f"\n{machine_name()}, {args.threads} threads")


if __name__ == "__main__":
    run_study({"horizon": horizon, "judges": judges, "noise": noise, "trials": trials})
