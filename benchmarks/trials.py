"""What `slicing = "auto"` costs: processor time of its trials over that of the reconstruction that follows, beside the plan.

    python benchmarks/trials.py swin --set reconstruction.iterations=200 pilot.budget=0.6

Both are run in one process, one after the other, on a packaged network at W3A3; the reconstruction is cut into blocks.
"""

from __future__ import annotations

import time

import torch
from lib.classifiers import demo_network
from lib.networks import quantize
from lib.rows import make_parser, table
from lib.top1 import BITS

from ospq_export.calibrate.objectives import objectives
from ospq_export.calibrate.objectives.base import Context
from ospq_export.calibrate.reconstruct.reconstructor import Reconstructor, walk
from ospq_export.calibrate.slicing.auto import choose_slicing
from ospq_export.formats.choice import integers
from ospq_export.graph.granularity import slicing_of
from ospq_export.graph.slicing import atoms
from ospq_export.recipes import load_recipe
from ospq_export.validate.report.model import machine_name


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


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("networks", nargs="*", default=["vit", "swin"])
    parser.add_argument("--set", nargs="*", default=[], help="recipe overrides")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [measure(name, args.set) for name in args.networks]
    print(table(["network", "candidates", "planned share", "measured share", "choice"], rows))
    print(f"\n{machine_name()}, {args.threads} threads")


if __name__ == "__main__":
    main()
