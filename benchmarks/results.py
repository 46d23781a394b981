"""Top-1 of float, round-to-nearest, reconstructed and deployed networks: the numbers of docs/results.md.

The two packaged networks take no arguments. A network of your own is given as for `ospq-export calibrate`:

    python benchmarks/results.py demo                       # both packaged networks, five bit widths, 10,000 images
    python benchmarks/results.py own --name dinov2-vits --model vit_small_patch14_dinov2 \
        --model-kwargs 'img_size=98 num_classes=10' --checkpoint model.safetensors --calibration calib --validation val
    python benchmarks/results.py table                      # its pages from the results at hand

Finished rows are kept in benchmarks/rows/results.jsonl and not measured again; an interrupted calibration resumes.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import torch
from lib.classifiers import Network, add_networks, chosen_networks, correct, finished_run, observed_network
from lib.rows import DOCS, RESULTS, TABLES_OF_NOTES, make_parser, origin, write_between
from lib.rows import table as markdown

from ospq_export.calibrate import calibrate
from ospq_export.export import export
from ospq_export.graph.quantizers import Mode
from ospq_export.progress import stage_progress
from ospq_export.recipes import load_recipe
from ospq_export.runs.files import FLOAT_TENSORS
from ospq_export.runs.run import Run
from ospq_export.tasks.statistics import mcnemar
from ospq_export.validate import validate
from ospq_export.validate.executions.table import FAKE_QUANT, FLOAT, OPTIMIZED, UNOPTIMIZED

DOCUMENT, SHORT = TABLES_OF_NOTES / "results.md", DOCS / "results.md"
PAGES_WITH_POINTS = (DOCS / "formats.md", DOCS.parent / "README.md")
W3A3 = ["name=w3a3", "weight_bits=3", "activation_bits=3"]
RECIPES: dict[str, tuple[str, list[str]]] = {
    "w8a8": ("w8a8", []),
    "w6a6": ("w6a6", []),
    "w4a8": ("w4a8", []),
    "w4a4": ("w4a4", []),
    "w4a4-attention8": ("w4a4", ["attention=int8"]),
    "w3a3": ("w4a4", W3A3),
    "fp8": ("fp8", []),
    "nvfp4": ("nvfp4", []),
}
# Float minus deployed Top-1, in points, that the project set itself.
GOALS = {
    "demo": {"w8a8": 0.1, "w6a6": 0.2, "w4a8": 0.3, "w4a4": 1.0, "w3a3": 4.0, "fp8": 0.1, "nvfp4": 0.3},
    "dinov2": {"w8a8": 0.3, "w6a6": 1.0, "w4a8": 1.5, "w4a4": 8.0, "fp8": 0.3, "nvfp4": 0.8},
}


def nearest_network(network: Network, run: Run) -> torch.nn.Module:
    """The run's network with the very ranges that the search found for it, and nearest rounding."""
    images = network.calibration.sample(run.manifest.recipe.calibration_images, seed=0).images
    graph = observed_network(run, images)
    graph.set_mode(Mode.QUANTIZE)
    return graph.module


def beside_nearest(network: Network, run: Run, count: int) -> dict[str, Any]:
    """Nearest rounding and the reconstructed network over the same first validation images."""
    nearest = nearest_network(network, run)
    plain, learned = (correct(m, network, count) for m in (nearest, run.fake_quant_network()))
    test = mcnemar(plain, learned)
    return {
        "round_to_nearest": float(plain.mean() * 100),
        "round_to_nearest_images": count,
        "mcnemar": {"lost": test.only_reference, "won": test.only_deployed, "p_value": test.p_value},
        "logit_error": logit_errors(network, run, nearest),
    }


def logit_errors(network: Network, run: Run, nearest: torch.nn.Module, count: int = 1000) -> dict[str, float]:
    """Squared error of the logits over the squared float logits: finer than Top-1 where hardly a prediction changes."""
    batch = network.validation.sample(min(count, len(network.validation)), seed=1)
    modules = {"round_to_nearest": nearest, "fake_quant": run.fake_quant_network()}
    exact, errors = run.float_network(), dict.fromkeys(modules, 0.0)
    total = 0.0
    with torch.inference_mode():
        for x in batch.images.split(100):
            reference = exact(x)
            total += float(reference.square().sum())
            for name, module in modules.items():
                errors[name] += float((module(x) - reference).square().sum())
    return {"images": len(batch.images), **{name: error / total for name, error in errors.items()}}


def measure(network: Network, bits: str, args: argparse.Namespace) -> dict[str, Any]:
    """One row: calibrate, export, validate, and round to nearest beside them."""
    base, overrides = RECIPES[bits]
    recipe = load_recipe(base, [*overrides, *args.set])
    folder = Path(args.runs) / f"{network.name}-{bits}"
    if finished_run(folder) is None:
        images = network.calibration.sample(recipe.calibration_images, seed=0)
        with stage_progress() as progress:
            calibrate(network.model, network.spec, images, network.config, recipe, folder, progress=progress)
    with stage_progress() as progress:
        run = export(folder, overwrite=True, progress=progress).run
        known = _float_top1(network.name, run.manifest.files[FLOAT_TENSORS], args.limit)
        wanted = (FLOAT, FAKE_QUANT, UNOPTIMIZED, OPTIMIZED)
        backends = wanted if known is None else wanted[1:]
        report = validate(run, network.validation, backends=backends, limit=args.limit, progress=progress)
    top1 = {b.name: b.top1 for b in report.backends}
    if known is not None:
        top1[FLOAT] = known
    return {
        "network": network.name,
        "bits": bits,
        "images": report.images,
        "calibration_images": run.manifest.calibration.images,
        "slicing": run.manifest.slicing.choice if run.manifest.slicing else "block",
        "equalization": recipe.equalization,
        "loss": recipe.reconstruction.loss.kind,
        "iterations": recipe.reconstruction.iterations,
        "batch_size": recipe.reconstruction.batch_size,
        "limit": args.limit,
        "float_sha256": run.manifest.files[FLOAT_TENSORS],
        "top1": top1,
        "agreement": {c.deployed: c.agreement for c in report.comparisons},
        "noise_floor": noise_floor(run, network),
        **beside_nearest(network, run, min(args.rtn_limit or report.images, report.images)),
        "parity": report.faithful,
        "reconstruction_seconds": round(sum(s.seconds for s in run.manifest.slices)),
        "slices": [
            {"name": s.name, "before": s.error_before, "after": s.error_after} for s in run.manifest.slices
        ],
        **origin(),
        "versions": report.provenance.versions,
    }


def noise_floor(run: Run, network: Network, count: int = 300) -> dict[str, float]:
    """Agreement of two equally legitimate executions of the fake-quantized network: float32 and float64 arithmetic.

    Both have the same codes, scales and images. No deployed file can be asked to agree better than this.
    """
    batch = network.validation.sample(min(count, len(network.validation)), seed=1)
    module = run.fake_quant_network()
    with torch.inference_mode():
        single = torch.cat([module(x) for x in batch.images.split(100)])
        double = torch.cat([module.double()(x.double()) for x in batch.images.split(100)])
    same = float((single.argmax(1) == double.argmax(1)).float().mean() * 100)
    return {"images": len(batch.images), "agreement": same}


def _float_top1(name: str, weights: str, limit: int | None) -> float | None:
    """The float network's Top-1 from a finished row of the same weights and images: it need not be measured again."""
    rows = RESULTS.rows(network=name, float_sha256=weights, limit=limit)
    return float(rows[0]["top1"][FLOAT]) if rows else None


def table() -> str:
    """notes/tables/results.md, from the results at hand."""
    rows = RESULTS.rows()
    order = list(RECIPES)
    rows.sort(key=lambda r: (r["network"], order.index(r["bits"])))
    lines = [
        "# Results",
        "",
        "Top-1 in percent. *RTN*: round to nearest with the very ranges that the search found. *ORT*: the",
        "exported QDQ ONNX file in ONNX Runtime on the CPU, graph optimisations off / on. *agreement*: images on which ORT and",
        "the fake-quantized network predict the same class. *noise floor*: images (of 300) on which the fake-quantized network",
        "agrees with itself when it computes in float64 instead of float32. *won / lost (p)*: images that only the reconstructed",
        "network or only RTN classifies correctly, and McNemar's exact p. *logit error*: squared error of the logits over the",
        "squared float logits, RTN / reconstructed, on 1,000 images. Seed 0; *slices*: the granularity that `auto` chose",
        "(`block` where so few steps pay for no trials); *eq.*: equalization; *loss*: what reconstruction lowers.",
        "",
        "Made by `python benchmarks/results.py` (its docstring has the commands); raw results in",
        "`benchmarks/rows/results.jsonl`.",
        "",
        "| network | bits | slices | eq. | loss | images | steps | float | RTN | fake-quantized | won / lost (p) "
        "| minus float | ORT off / on | agreement off / on | noise floor | logit error |",
        "|" + 16 * "---|",
    ]
    lines += [_row(r) for r in rows]
    machines = sorted(
        {f"{r['machine']}, torch {r['versions']['torch']}, timm {r['versions']['timm']}" for r in rows}
    )
    return "\n".join([*lines, "", f"Machine: {'; '.join(machines)}.", "", *_goals(rows), "", RESULTS.notes()])


def accuracy(rows: list[dict[str, Any]]) -> str:
    """A table for docs/results.md: the packaged recipes."""
    order = list(RECIPES)
    chosen = [r for r in rows if r["bits"] != "w3a3"]
    chosen.sort(key=lambda r: (r["network"], order.index(r["bits"])))
    cells = [
        [
            r["network"],
            f"`{r['bits']}`",
            f"{r['images']:,}",
            f"{r['top1'][FLOAT]:.2f}",
            f"{r['round_to_nearest']:.2f}" + _subset(r),
            f"{r['top1'][OPTIMIZED]:.2f}",
            f"{r['top1'][FLOAT] - r['top1'][OPTIMIZED]:+.2f}",
        ]
        for r in chosen
    ]
    header = ["network", "recipe", "images", "float", "rounded to nearest", "deployed", "points lost"]
    return markdown(header, cells)


def points_lost(rows: list[dict[str, Any]]) -> str:
    """A table for docs/formats.md and the README: Top-1 below float of the deployed networks, by packaged recipe."""
    networks = sorted({r["network"] for r in rows})
    found = {(r["bits"], r["network"]): r["top1"][FLOAT] - r["top1"][OPTIMIZED] for r in rows}
    cells = [
        [f"`{bits}`", *(f"{found[bits, n]:+.2f}" if (bits, n) in found else "" for n in networks)]
        for bits in RECIPES
        if bits != "w3a3" and any(r["bits"] == bits for r in rows)
    ]
    return markdown(["recipe", *networks], cells)


def write_pages() -> None:
    """The long page, and the tables of the short ones."""
    DOCUMENT.write_text(table())
    write_between(SHORT, "accuracy", accuracy(RESULTS.rows()))
    for page in PAGES_WITH_POINTS:
        write_between(page, "points lost", points_lost(RESULTS.rows()))


def _goals(rows: list[dict[str, Any]]) -> list[str]:
    """How far below float the deployed networks are, beside the goals."""
    cells = []
    for row in rows:
        goal = GOALS.get(row["network"].split("-")[0], {}).get(row["bits"])
        if goal is not None:
            loss = row["top1"][FLOAT] - row["top1"][OPTIMIZED]
            verdict = "met" if round(loss, 2) <= goal else f"missed by {loss - goal:.2f}"
            cells.append([row["network"], row["bits"].upper(), f"{loss:.2f}", f"{goal:g}", verdict])
    header = ["network", "bits", "float minus deployed", "goal", ""]
    return [
        "## The goals",
        "",
        "Top-1 of ONNX Runtime, optimisations on, in points.",
        "",
        markdown(header, cells),
    ]


def _subset(r: dict[str, Any]) -> str:
    return "" if r["round_to_nearest_images"] == r["images"] else f" ({r['round_to_nearest_images']} images)"


def _row(r: dict[str, Any]) -> str:
    top1, agree = r["top1"], r["agreement"]
    off, on = "onnxruntime-unoptimised", "onnxruntime"
    cells = [
        r["network"],
        r["bits"].upper(),
        r["slicing"],
        r.get("equalization", "none"),
        r.get("loss", "normalized"),
        f"{r['images']:,}",
        str(r["iterations"]),
        f"{top1['float']:.2f}",
        f"{r['round_to_nearest']:.2f}" + _subset(r),
        f"{top1['fake_quant']:.2f}",
        _paired(r.get("mcnemar")),
        f"{top1['fake_quant'] - top1['float']:+.2f}",
        f"{top1[off]:.2f} / {top1[on]:.2f}",
        f"{agree[off]:.2f} / {agree[on]:.2f}",
        f"{r['noise_floor']['agreement']:.2f}" if "noise_floor" in r else "",
        _errors(r.get("logit_error")),
    ]
    return "| " + " | ".join(cells) + " |"


def _paired(test: dict[str, float] | None) -> str:
    return "" if test is None else f"{test['won']} / {test['lost']} ({test['p_value']:.2g})"


def _errors(errors: dict[str, float] | None) -> str:
    return "" if errors is None else f"{errors['round_to_nearest']:.2g} / {errors['fake_quant']:.2g}"


def complete(network: Network, bits: str, folder: Path) -> None:
    """Add to an older row what it lacks, where its run is still at hand."""
    row, run = RESULTS.find(network=network.name, bits=bits), finished_run(folder)
    if row and run and "mcnemar" not in row and run.manifest.files[FLOAT_TENSORS] == row["float_sha256"]:
        RESULTS.put(row | beside_nearest(network, run, row["round_to_nearest_images"]))


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    add_networks(parser)
    parser.add_argument("--bits", nargs="*", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--runs", default="runs/results", help="where the run directories go")
    parser.add_argument("--set", nargs="*", default=[], help="recipe overrides")
    parser.add_argument("--limit", type=int, help="validate on a sample of N images, with each class's share")
    parser.add_argument("--rtn-limit", type=int, help="round to nearest on the first N images only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(args.threads)
    for network in chosen_networks(args):
        for bits in args.bits:
            key = {"network": network.name, "bits": bits}
            if RESULTS.find(**key) is None:
                RESULTS.put(measure(network, bits, args))
            complete(network, bits, Path(args.runs) / f"{network.name}-{bits}")
            print(json.dumps(RESULTS.find(**key))[:900])
    write_pages()


if __name__ == "__main__":
    main()
