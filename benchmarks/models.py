"""Which timm families take the whole path, at reduced size; writes docs/models.md.

    python benchmarks/models.py [FAMILY ...]     # measures what the rows do not have yet, then writes the page
    python benchmarks/models.py --again "Swin v2"

Each: capture, round to nearest at W8A8 and W4A4, export, ONNX Runtime against the fake-quantized network, TensorRT-RTX parse and
build of the FP16 file (W8A8); the same at FP8 and NVFP4. Weights are random. A row per family in benchmarks/rows/models.jsonl:
an interrupted run goes on.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from families import FAMILIES, Family
from lib import onnx_tools
from lib.networks import Quantized, quantize, random_images
from lib.onnx_tools import FLOAT_TARGETS, TARGET
from lib.rows import DOCS, MODELS, TABLES_OF_NOTES, make_parser, origin, table, write_between
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from torch import Tensor

from ospq_export.engines.plan import Fusion
from ospq_export.errors import InputError
from ospq_export.formats.choice import Choice, integers
from ospq_export.models.timm import ModelSpec
from ospq_export.recipes import load_recipe
from ospq_export.validate.codes.locate import Locator, Place, Reference
from ospq_export.validate.executions.backends import open_session
from ospq_export.validate.executions.probes import open_probed

DOCUMENT, SHORT = TABLES_OF_NOTES / "models.md", DOCS / "models.md"
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


class Compiled(BaseModel):
    """A floating-point recipe: ONNX Runtime as in `Comparison`, what the FP16 file was compiled to, the failure or ""."""

    model_config = ConfigDict(frozen=True)

    deployed: float | None = None
    fusion: Fusion | None = None
    substituted: dict[str, int] = {}
    failure: str = ""


class Result(BaseModel):
    """What became of one family: comparisons by bit width, what its engines were compiled to, the first failure or ""."""

    model_config = ConfigDict(frozen=True)

    label: str
    comparisons: dict[str, Comparison] = {}
    fusion: Fusion | None = None
    floats: dict[str, Compiled] = {}
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


def check_float(family: Family, recipe: str) -> Compiled:
    """One network in a floating-point recipe, as `check` does it, on larger images."""
    family = family.enlarged()
    images = random_images(IMAGES, (3, family.side, family.side))
    step, deployed, fusion, substituted = "capture", None, None, Counter[str]()
    try:
        quantized = quantized_family(family, load_recipe(recipe).formats(), images)
        substituted.update(quantized.network.substituted.values())
        step = "export and ONNX Runtime"
        deployed = float_difference(quantized, images)
        step = f"TensorRT-RTX for {FLOAT_TARGETS[recipe][0]}"
        fusion = compiled(quantized, FLOAT_TARGETS[recipe][0])
        failure = ""
    except Exception as error:
        failure = f"{step}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return Compiled(deployed=deployed, fusion=fusion, substituted=dict(substituted), failure=failure)


def float_difference(quantized: Quantized, images: Tensor) -> float:
    """Mean squared difference of ONNX Runtime's logits from the fake-quantized network's, over quantization's own."""
    with tempfile.TemporaryDirectory() as folder:
        file = quantized.write_runnable(Path(folder) / "model.onnx")
        session = open_session(file, file, optimize=False, provider="cpu")
        found = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    with torch.inference_mode():
        fake, original = quantized.network.module(images), quantized.captured(images)
    error = (original - fake).double().square().mean().clamp_min(1e-20)
    return float((torch.from_numpy(found) - fake).double().square().mean() / error)


def quantized_family(family: Family, bits: Choice, images: Tensor) -> Quantized:
    """Round to nearest, ranges from the images (N, 3, H, W) float32."""
    spec = ModelSpec(name=family.name, kwargs=family.arguments)
    return quantize(spec, (3, family.side, family.side), bits, images)


def compare(quantized: Quantized, images: Tensor) -> Comparison:
    """Codes and logits of the exported file against the fake-quantized network's, on images (N, 3, H, W) float32."""
    network, exact = quantized.network.module, quantized.double()
    end = next(n for n in network.graph.nodes if n.op == "output").all_input_nodes[0].name
    whole = dict.fromkeys(quantized.network.activations, "network")
    reference = Reference(network, exact, quantized.captured, [Place("network", end, "logits")], whole)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        quantized.write(file, half=False, batch_size=None)
        probed = open_probed(file, reference.wanted, optimize=False, provider="cpu")
    locator = Locator(reference, probed, "model.onnx")
    locator.add(images.numpy())
    codes = locator.result().quantizers
    with torch.inference_mode():
        fake, original, double = network(images), quantized.captured(images), exact(images.double())
    deployed = torch.from_numpy(probed.run(images.numpy())["logits"])
    error = (original - fake).double().square().mean().clamp_min(1e-20)
    return Comparison(
        deployed=float((deployed - fake).double().square().mean() / error),
        floor=float((double - fake).square().mean() / error),
        share=max(q.share for q in codes),
        max_step=max(q.max_step for q in codes),
        excess=max(q.excess for q in codes),
    )


def compiled(quantized: Quantized, target: str = TARGET) -> Fusion:
    """What the FP16 file's engine was compiled to, for a compute capability."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        quantized.write(file, half=True)
        return onnx_tools.compiled(file, Path(folder), target).fusion


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
_FLOAT_HEADER = [
    "family",
    *(
        f"{recipe}: {what}"
        for recipe in FLOAT_TARGETS
        for what in ("ORT", "products", "fused attentions", "whole path")
    ),
]
_FLOAT_INTRO = """## FP8 and NVFP4

The same networks with the recipes' formats, rounded to nearest, on images of twice the side where that was below 128 pixels: the
builder's FP8 attention takes 32 keys or more. The files were built for {targets}. *ORT*: as above, for
`model.onnx`, or at NVFP4 for the file for checking that lies beside it. *products*: how many multiply in each format, as the
builder calls it; at NVFP4, linears over whole blocks of 16 run on FP4, everything else on FP8.
"""
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
    """notes/tables/models.md and the table of docs/models.md, from the results at hand."""
    rows = {row["label"]: row for row in MODELS.rows()}
    results = [Result.model_validate(rows[label]) for label in FAMILIES if label in rows]
    whole = sum(not result.failure for result in results)
    machines = "; ".join(dict.fromkeys(result.machine for result in results))
    text = _INTRO.format(target=TARGET, machine=machines, whole=whole, count=len(results))
    targets = ", ".join(f"{targets[0]} ({recipe})" for recipe, targets in FLOAT_TARGETS.items())
    floats = table(_FLOAT_HEADER, [_float_row(r) for r in results if r.floats])
    parts = [text, table(_HEADER, [_row(r) for r in results]), _FLOAT_INTRO.format(targets=targets), floats]
    DOCUMENT.write_text("\n".join([*parts, _dropped(results)]))
    header = ["family", "tried", "INT8", "INT8 attention", "FP8", "FP8 attention", "NVFP4", "NVFP4 attention"]
    write_between(SHORT, "families", table(header, [_short_row(r) for r in results]))


def _short_row(result: Result) -> list[str]:
    """Products and attentions that run quantized, of all; a dash where a format was not tried."""
    fusions = [
        result.fusion,
        *(found.fusion if (found := result.floats.get(r)) else None for r in FLOAT_TARGETS),
    ]
    cells = [
        cell.replace(" of ", "/")
        for f in fusions
        for cell in (("-", "-") if f is None else onnx_tools.fusion_cells(f))
    ]
    return [result.label, f"`{FAMILIES[result.label].name}`", *cells]


def _float_row(result: Result) -> list[str]:
    cells = [result.label]
    for recipe in FLOAT_TARGETS:
        seen = result.floats.get(recipe, Compiled(failure="not tried"))
        cells.append("-" if seen.deployed is None else f"{seen.deployed:.3f}")
        if seen.fusion is None:
            cells += ["-", "-", seen.failure]
        else:
            attentions = onnx_tools.fusion_cells(seen.fusion)[1]
            cells += [f"{onnx_tools.formats_cell(seen.fusion)} of {seen.fusion.gemms}", attentions, "yes"]
    return cells


def _dropped(results: list[Result]) -> str:
    fused = [(result.label, result.fusion) for result in results if result.fusion is not None]
    fused += [(f"{r.label}, {name}", f.fusion) for r in results for name, f in r.floats.items() if f.fusion]
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
        row = None if args.again else MODELS.find(label=label)
        if row is None:
            result = check(label, FAMILIES[label])
            row = {**result.model_dump(mode="json"), **origin()}
            MODELS.put(row)
            Console(width=250).print(_row(result), f"{result.seconds} s")
            gc.collect()
        known = row.get("floats", {})
        for recipe in FLOAT_TARGETS:
            if recipe not in known:
                known[recipe] = check_float(FAMILIES[label], recipe).model_dump(mode="json")
                MODELS.put({**row, "floats": known})
                Console(width=250).print(_float_row(Result.model_validate({**row, "floats": known})))
                gc.collect()
        write_page()


if __name__ == "__main__":
    main()
