"""What the losses weigh: the spread of Fisher information, and which quantizers move the output.

python benchmarks/studies_of_losses.py fisher --help
python benchmarks/studies_of_losses.py sensitivity --help
"""

from __future__ import annotations

import torch
from lib.classifiers import image_set, own_network
from lib.rows import add_network, add_run, make_parser, run_study, table
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ospq_export.calibrate.objectives.fisher import fisher_weights
from ospq_export.calibrate.observe import observe
from ospq_export.formats.choice import integers
from ospq_export.graph.capture import capture
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode, QuantizedGraph
from ospq_export.runs.run import Run
from ospq_export.validate.report.model import machine_name

FISHER = """How much of the Fisher weights is chance: two halves of the calibration images, at several temperatures of the logits.

    python benchmarks/studies_of_losses.py fisher RUN
    python benchmarks/studies_of_losses.py fisher RUN --data calib  # not a packaged network: its calibration images

RUN is a finished run, whose float network (equalized, where its recipe says so), slices and images are taken. At every
fourth cut: correlation of the weights that one half of the images gives with those of the other, over all elements; and the
share of the elements that would hold as much if they were equal (participation ratio), which says how concentrated they are.
"""


_EVERY = 4


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, over all elements."""
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def participation(weights: Tensor) -> float:
    """(sum w)^2 / (n sum w^2), in (0, 1]."""
    return float(weights.sum().square() / (weights.numel() * weights.square().sum()))


def fisher() -> None:
    """Command line."""
    parser = make_parser(FISHER)
    add_run(parser)
    parser.add_argument("--images", type=int, default=256, help="both halves together")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 2.0, 4.0, 8.0])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run.open(args.run)
    recipe = run.manifest.recipe
    images = image_set(args.data, "calibration", run.manifest.data).sample(args.images, seed=0).images
    halves = images.chunk(2)
    network = insert_quantizers(
        run.captured(), integers(recipe.weight_bits, recipe.activation_bits, recipe.first_last_bits)
    )
    ends = [s.end for s in run.manifest.slices][1::_EVERY]
    rows = []
    for temperature in args.temperatures:
        one, other = (
            fisher_weights(network, ends, half, torch.device("cpu"), seed, temperature)
            for seed, half in enumerate(halves)
        )
        cells = [f"{correlation(one[e], other[e]):.2f} ({participation(one[e]):.3f})" for e in ends]
        rows.append([f"T = {temperature:g}", *cells])
    print(table([f"{len(halves[0])} images each", *ends], rows))
    print(f"\nMachine: {machine_name()}.")


SENSITIVITY = """Which quantizer hurts: the error of a network's logits with one quantizer on and all others float.

    python benchmarks/studies_of_losses.py sensitivity --model vit_small_patch14_dinov2 \
        --model-kwargs 'img_size=98 num_classes=10' --checkpoint model.safetensors \
        --calibration calib --validation val --weight-bits 8 --activation-bits 8

Prints the relative squared error of the logits (over their variance) for the worst quantizers, and for all of them together;
ranges as searched, weights rounded to nearest.
"""


def relative_error(network: QuantizedGraph, images: Tensor, reference: Tensor) -> float:
    """Mean squared error of the logits over the variance of the float ones."""
    with torch.inference_mode():
        logits = torch.cat([network.module(batch) for batch in images.split(100)])
    return float((logits - reference).square().mean() / reference.var())


def sensitivity() -> None:
    """Command line."""
    parser = make_parser(SENSITIVITY)
    add_network(parser, required=True)
    parser.add_argument("--weight-bits", type=int, default=8)
    parser.add_argument("--activation-bits", type=int, default=8)
    parser.add_argument("--images", type=int, default=100, help="validation images")
    parser.add_argument("--observe", type=int, default=64, help="calibration images")
    parser.add_argument("--rows", type=int, default=16)
    args = parser.parse_args()
    own = own_network(args)
    network = insert_quantizers(
        capture(own.model, own.config.input_size), integers(args.weight_bits, args.activation_bits)
    )
    observe(network, own.calibration.sample(args.observe, seed=0).images, batch_size=64, seed=0)
    images = own.validation.sample(args.images, seed=0).images
    with torch.inference_mode():
        reference = torch.cat([network.module(batch) for batch in images.split(100)])
    errors = {}
    quantizers = {**network.activations, **network.weights}
    for name, quantizer in track(quantizers.items(), description="sensitivity", total=len(quantizers)):
        quantizer.mode = Mode.QUANTIZE
        errors[name] = relative_error(network, images, reference)
        quantizer.mode = Mode.FLOAT
    network.set_mode(Mode.QUANTIZE)
    table = Table("quantizer", "relative error of the logits")
    table.add_row("all together", f"{relative_error(network, images, reference):.5f}")
    for name, error in sorted(errors.items(), key=lambda item: -item[1])[: args.rows]:
        table.add_row(name, f"{error:.5f}")
    Console().print(table)


if __name__ == "__main__":
    run_study({"fisher": fisher, "sensitivity": sensitivity})
