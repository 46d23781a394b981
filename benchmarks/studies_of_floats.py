"""Where the error of FP8 and NVFP4 comes from, nearest rounding: the table of notes/results.md.

    python benchmarks/studies_of_floats.py demo --only vit
    python benchmarks/studies_of_floats.py own --name dinov2-vits --model vit_small_patch14_dinov2 \
        --model-kwargs 'img_size=98 num_classes=10' --checkpoint model.safetensors --calibration calib --validation val

For each recipe and equalization: the logit error, as results.py has it, with all quantizers on, and with those of one part only.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator

import torch
from lib.classifiers import Network, add_networks, chosen_networks
from lib.rows import make_parser, table
from torch import Tensor

from ospq_export.calibrate.equalize import equalize
from ospq_export.calibrate.observe import observe
from ospq_export.graph.capture import capture
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode, QuantizedGraph, quantizers_of
from ospq_export.recipes import load_recipe

OBSERVED, EQUALIZED = 256, 32
# Parts by the names of quantizers.
PARTS = {
    "all": ".*",
    "weights": r".*\.weight",
    "activations": r".*\.(input|lhs|rhs)",
    "keys": r".*matmul_0\.rhs",
    "inputs of both ends": r"(patch_embed|head).*\.input",
    **{f"inputs of {name}": rf".*\.{name}\.input" for name in ("qkv", "proj", "fc1", "fc2")},
}


def quantized(network: Network, recipe: str, method: str) -> QuantizedGraph:
    """Searched ranges and nearest codes."""
    formats = load_recipe(recipe).formats()
    images = network.calibration.sample(OBSERVED, seed=0).images
    captured = capture(network.model, network.config.input_size)
    if method != "none":
        equalize(captured, images[:EQUALIZED], formats, method)  # type: ignore[arg-type]
    graph = insert_quantizers(captured, formats)
    observe(graph, images, batch_size=64, seed=0)
    return graph


def logits(module: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """(N, classes), float32."""
    with torch.inference_mode():
        return torch.cat([module(x) for x in images.split(100)])


def errors(network: Network, recipe: str, method: str, images: Tensor) -> Iterator[str]:
    """The logit error of each part, the others left float."""
    graph = quantized(network, recipe, method)
    graph.set_mode(Mode.FLOAT)
    exact = logits(graph.module, images)
    for pattern in PARTS.values():
        for quantizer in quantizers_of(graph.module):
            quantizer.mode = Mode.QUANTIZE if re.fullmatch(pattern, quantizer.name) else Mode.FLOAT
        error = (logits(graph.module, images) - exact).square().sum() / exact.square().sum()
        yield f"{float(error):.4f}"


def study(network: Network, args: argparse.Namespace) -> str:
    """The table of one network."""
    images = network.validation.sample(args.images, seed=1).images
    columns = [(recipe, method) for recipe in args.recipes for method in args.methods]
    found = [list(errors(network, recipe, method, images)) for recipe, method in columns]
    header = ["quantized", *(f"{recipe}, {method}" for recipe, method in columns)]
    return table(header, [[part, *cells] for part, *cells in zip(PARTS, *found, strict=True)])


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    add_networks(parser)
    parser.add_argument("--recipes", nargs="*", default=["fp8", "nvfp4"])
    parser.add_argument("--methods", nargs="*", default=["none", "center", "smooth", "shift"])
    parser.add_argument("--images", type=int, default=400, help="validation images")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for network in chosen_networks(args):
        print(f"{network.name}, {args.images} images\n\n{study(network, args)}")


if __name__ == "__main__":
    main()
