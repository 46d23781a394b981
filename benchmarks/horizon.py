"""How a trial's length, batch and learning rate change the order of the granularities that `slicing = "auto"` tries.

    python benchmarks/horizon.py RUN --candidates atom block blocks:2 --trials 20:8:4 60:8:4
    python benchmarks/horizon.py RUN --data calib ...       # not a packaged network: its calibration images

RUN is a finished run (for the candidate outlier-aware, one of `slicing=auto`), whose network (equalized, where its recipe
says so) and bits are taken; a trial is steps:batch:rate, where rate is what the learning rate is raised by at most, and
never by more than the run's steps are as many as the trial's. Prints the score that `auto` goes by; several seeds show how
much of a difference is chance.
"""

from __future__ import annotations

import itertools

import torch
from lib.rows import add_run, make_parser, table
from lib.trials import prepare, steps_batch_rate

from ospq_export.runs.run import Run
from ospq_export.validate.report.model import machine_name


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
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


if __name__ == "__main__":
    main()
