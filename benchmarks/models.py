"""Which timm families take the whole path, at reduced size; writes docs/models.md.

    python benchmarks/models.py [FAMILY ...]     # measures what the rows do not have yet, then writes the page
    python benchmarks/models.py --again "Swin v2"

Each: capture, round to nearest at W8A8 and W4A4, export, ONNX Runtime against the fake-quantized network, TensorRT-RTX parse and
build of the FP16 file (W8A8). Weights are random. A row per family in benchmarks/rows/models.jsonl:
an interrupted run goes on.
"""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path

import torch
from families import FAMILIES, Family
from lib import onnx_tools
from lib.networks import Quantized, quantize, random_images
from lib.onnx_tools import TARGET
from lib.rows import DOCS, MODELS, make_parser, origin, table
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from torch import Tensor

from ospq_export.engines.plan import Fusion
from ospq_export.errors import InputError
from ospq_export.formats.choice import Choice, integers
from ospq_export.models.timm import ModelSpec
from ospq_export.validate.codes.locate import Locator, Reference
from ospq_export.validate.executions.probes import open_probed

DOCUMENT = DOCS / "models.md"
BITS = {"W8A8": integers(8, 8), "W4A4": integers(4, 4)}
IMAGES = 4


class Comparison(BaseModel):
    """ONNX Runtime (graph optimisations off) beside the fake-quantized network, on the images that ranges were set on.

    Attributes:
        deployed: mean squared difference of their logits, over quantization's own error.
        floor: the same between the fake-quantized network in float64 and in float32.
        share: largest share of codes (percent) of any quantizer that differ, given equal inputs.
        max_step: largest such difference, in codes.
        excess: how far, given equal inputs, a code lies beyond the half step that rounding takes, at most, in steps.
    """

    model_config = ConfigDict(frozen=True)

    deployed: float
    floor: float
    share: float
    max_step: int
    excess: float


class Result(BaseModel):
    """What became of one family: comparisons by bit width, what its engine was compiled to, the first failure or ""."""

    model_config = ConfigDict(frozen=True)

    label: str
    comparisons: dict[str, Comparison] = {}
    fusion: Fusion | None = None
    failure: str = ""
    seconds: float = 0.0
    machine: str = ""


def check(label: str, family: Family) -> Result:
    """Take one network along the whole path; a failure is reported, not raised."""
    started = time.perf_counter()
    images = random_images(IMAGES, (3, family.side, family.side))
    comparisons: dict[str, Comparison] = {}
    step, fusion, failure = "", None, ""
    try:
        for name, bits in BITS.items():
            step = f"{name} capture"
            quantized = quantized_family(family, bits, images)
            step = f"{name} export and ONNX Runtime"
            comparisons[name] = compare(quantized, images)
            if name == "W8A8":
                step = "TensorRT-RTX"
                fusion = compiled(quantized)
    except InputError as error:
        failure = f"{step}: {error}"
    except Exception as error:
        # The table is about which families fail and how; a fault of any kind is a row of it.
        line = (str(error).splitlines() or [""])[0]
        failure = f"{step}: {type(error).__name__}: {line[:200]}"
    return Result(
        label=label,
        comparisons=comparisons,
        fusion=fusion,
        failure=failure,
        seconds=round(time.perf_counter() - started, 1),
    )


def quantized_family(family: Family, bits: Choice, images: Tensor) -> Quantized:
    """Round to nearest, ranges from the images (N, 3, H, W) float32."""
    spec = ModelSpec(name=family.name, kwargs=family.arguments)
    return quantize(spec, (3, family.side, family.side), bits, images)


def compare(quantized: Quantized, images: Tensor) -> Comparison:
    """Codes and logits of the exported file against the fake-quantized network's, on images (N, 3, H, W) float32."""
    network, exact = quantized.network.module, quantized.double()
    end = next(n for n in network.graph.nodes if n.op == "output").all_input_nodes[0].name
    whole = dict.fromkeys(quantized.network.activations, "network")
    reference = Reference(network, exact, quantized.captured, [("network", end)], whole)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        quantized.write(file, half=False, batch_size=None)
        probed = open_probed(file, reference.wanted, optimize=False, provider="cpu")
    locator = Locator(reference, probed, "model.onnx")
    locator.add(images.numpy())
    codes = locator.result().quantizers
    with torch.inference_mode():
        fake, original, double = network(images), quantized.captured(images), exact(images.double())
    deployed = torch.from_numpy(probed.run(images.numpy())[probed.logits])
    error = (original - fake).double().square().mean().clamp_min(1e-20)
    return Comparison(
        deployed=float((deployed - fake).double().square().mean() / error),
        floor=float((double - fake).square().mean() / error),
        share=max(q.share for q in codes),
        max_step=max(q.max_step for q in codes),
        excess=max(q.excess for q in codes),
    )


def compiled(quantized: Quantized) -> Fusion:
    """What the FP16 file's engine was compiled to."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        quantized.write(file, half=True)
        return onnx_tools.compiled(file, Path(folder)).fusion


def _row(result: Result) -> list[str]:
    family = FAMILIES[result.label]
    cells = []
    for name in BITS:
        seen = result.comparisons.get(name)
        cells.append("-" if seen is None else f"{seen.deployed:.3f} / {seen.floor:.3f}")
    seen = list(result.comparisons.values())
    codes = f"{max(c.share for c in seen):.3f} %, {max(c.max_step for c in seen)}" if seen else "-"
    excess = f"{max(c.excess for c in seen):.0e}" if seen else "-"
    fusion = result.fusion
    plan = ("-", "-") if fusion is None else onnx_tools.fusion_cells(fusion)
    tried = f"`{family.name}`, {family.side} px"
    return [result.label, tried, *cells, codes, excess, *plan, result.failure or "yes"]


_HEADER = [
    "family",
    "tried",
    "W8A8: ORT / floor",
    "W4A4: ORT / floor",
    "other codes, steps",
    "beyond the edge",
    "products on Int8",
    "fused attentions",
    "whole path",
]
_INTRO = """# Models

timm families at reduced size (fewer blocks, small images, random weights), each captured, quantized to nearest, exported, run in
ONNX Runtime and built by TensorRT-RTX for {target} without a GPU: {whole} of {count} take the whole path. Written by
`benchmarks/models.py` on {machine}.

- *ORT / floor*: mean squared difference of ONNX Runtime's logits from the fake-quantized network's, over the error of
  quantization itself; and, as the noise floor, that of the fake-quantized network in float64 from itself in float32. On random
  weights and images every code that a float sum tips over a rounding edge moves those behind it, so the floor may be as high as
  quantization's own error; what counts is that the file does not lie far above it, and the next two columns.
- *other codes, steps*: the largest share of the codes of any quantizer that differ given equal inputs, and by how many steps at
  most. *beyond the edge*: how far such a code's real value lies beyond the rounding edge, in steps. These say whether the file
  computes what was calibrated; a wrong scale, axis, padding or layout would show here as whole steps.
- *products on Int8*, *fused attentions*: in the compiled plan of the W8A8 file with FP16 around the quantized operators.
"""


def write_page() -> None:
    """docs/models.md from the results at hand."""
    rows = {row["label"]: row for row in MODELS.rows()}
    results = [Result.model_validate(rows[label]) for label in FAMILIES if label in rows]
    whole = sum(not result.failure for result in results)
    machines = "; ".join(dict.fromkeys(result.machine for result in results))
    text = _INTRO.format(target=TARGET, machine=machines, whole=whole, count=len(results))
    DOCUMENT.write_text(text + "\n" + table(_HEADER, [_row(r) for r in results]) + "\n" + _dropped(results))


def _dropped(results: list[Result]) -> str:
    fused = [(result.label, result.fusion) for result in results if result.fusion is not None]
    rows = [
        row for label, f in fused for row in onnx_tools.reasons(label, {**f.not_quantized, **f.not_fused})
    ]
    listed = table(["family", "how many", "reason", "for example"], rows) if rows else "Nothing.\n"
    return f"## What runs otherwise, and why\n\n{listed}"


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("families", nargs="*", help="default: all")
    parser.add_argument("--again", action="store_true", help="measure also what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for label in args.families or FAMILIES:
        if args.again or MODELS.find(label=label) is None:
            result = check(label, FAMILIES[label])
            MODELS.put({**result.model_dump(mode="json"), **origin()})
            Console(width=250).print(_row(result), f"{result.seconds} s")
            gc.collect()
        write_page()


if __name__ == "__main__":
    main()
