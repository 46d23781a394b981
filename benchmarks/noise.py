"""How much of a trial's score is chance: trials of `slicing = "auto"` with several seeds, by several measures and on more images.

    python benchmarks/noise.py RUN --seeds 6
    python benchmarks/noise.py RUN --data calib --others val       # not a packaged network: its images

RUN is a finished run, whose network (equalized, where its recipe says so), bits, steps and images are taken. For every
measure, on the last 256 calibration images, on all that trials do not learn from, and on others (of the test or validation
set): mean of each candidate; standard deviation between seeds over the mean; standard deviation between the candidates'
means over the mean; and the last over the one before: how much of a difference between two trials is the slicing's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from lib.classifiers import image_set
from lib.rows import add_run, make_parser, table
from lib.trials import measures, prepare, steps_batch_rate
from torch import Tensor

from ospq_export.runs.run import Run
from ospq_export.validate.report.model import machine_name

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


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
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
        by_candidate = [measures(output, trials.reference) for output in outputs]
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


if __name__ == "__main__":
    main()
