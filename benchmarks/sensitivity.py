"""Which quantizer hurts: the error of a network's logits with one quantizer on and all others float.

    python benchmarks/sensitivity.py --model vit_small_patch14_dinov2 --model-kwargs 'img_size=98 num_classes=10' \
        --checkpoint model.safetensors --calibration calib --validation val --weight-bits 8 --activation-bits 8

Prints the relative squared error of the logits (over their variance) for the worst quantizers, and for all of them together;
ranges as searched, weights rounded to nearest.
"""

from __future__ import annotations

import torch
from lib.classifiers import own_network
from lib.rows import add_network, make_parser
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from ospq_export.calibrate.observe import observe
from ospq_export.formats.choice import integers
from ospq_export.graph.capture import capture
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode, QuantizedGraph


def relative_error(network: QuantizedGraph, images: Tensor, reference: Tensor) -> float:
    """Mean squared error of the logits over the variance of the float ones."""
    with torch.inference_mode():
        logits = torch.cat([network.module(batch) for batch in images.split(100)])
    return float((logits - reference).square().mean() / reference.var())


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
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
    main()
