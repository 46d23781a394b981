"""What TensorRT-RTX compiles from our files, ahead of time, without a GPU; writes the tables of docs/engines.md.

    python benchmarks/engines.py --target SM89

Networks: the packaged ViT and Swin (trained) at four bit widths; DeiT-S, ViT-S, Swin-T and Swin-S at 224 px (random weights) at
W8A8. Of the same networks with FP32 around, which products ONNX Runtime computes in integers. Export time and peak memory of
ViT-B at 224 px, in a process of its own.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from lib.networks import demo_sample, quantize, random_batch, random_images, random_network
from lib.onnx_tools import FLOAT_TARGETS, TARGET, compiled, formats_cell, fusion_cells, reasons
from lib.rows import DOCS, TABLES_OF_NOTES, make_parser, percent, table, write_between
from rich.console import Console

from ospq_export.calibrate import calibrate
from ospq_export.engines.plan import Fusion
from ospq_export.engines.record import EngineRecord
from ospq_export.formats.choice import Choice, integers
from ospq_export.models.timm import ModelSpec
from ospq_export.onnx.kernels import Kernels, integer_kernels
from ospq_export.recipes import load_recipe
from ospq_export.runs.files import FLOAT_TENSORS
from ospq_export.validate.report.model import machine_name

RECIPES = {"W8A8": integers(8, 8), "W6A6": integers(6, 6), "W4A8": integers(4, 8), "W4A4": integers(4, 4)}
LARGE = {
    "DeiT-S": "deit_small_patch16_224",
    "ViT-S": "vit_small_patch16_224",
    "Swin-T": "swin_tiny_patch4_window7_224",
    "Swin-S": "swin_small_patch4_window7_224",
}
SIZE = (3, 224, 224)
_MIB = 1 << 20
_PAGE, _WHY = DOCS / "engines.md", TABLES_OF_NOTES / "engines.md"
_FLOATS = "## FP8 and NVFP4"
_FLOAT_NETWORKS = {**LARGE, "DINOv2 ViT-S": "vit_small_patch14_dinov2"}
# The command line itself; the process says its peak, because what wait4 says holds its parent's memory, too.
_EXPORT_SCRIPT = """
import atexit, pathlib, sys
peak_file = pathlib.Path(sys.argv.pop(1))
def note():
    import torch
    from ospq_export.world.memory import peak_memory
    peak_file.write_text(str(peak_memory(torch.device("cpu"))))
atexit.register(note)
from ospq_export.cli.app import main
main()
"""
_REASONS = ["network", "how many", "reason", "for example"]
_HEADER = [
    "network",
    "bits",
    "products on Int8",
    "attentions in one Int8 kernel",
    "integer products in ORT",
    "engine, MiB",
    "ONNX, MiB",
    "build, s",
]


def demo_row(name: str, recipe: str, target: str) -> tuple[list[str], EngineRecord, Kernels]:
    """A packaged network at a bit width."""
    return _row(f"demo {name}", recipe, *demo_sample(name), target)


def large_row(name: str, target: str) -> tuple[list[str], EngineRecord, Kernels]:
    """A network at 224 px with random weights, W8A8."""
    return _row(name, "W8A8", ModelSpec(name=LARGE[name]), SIZE, random_images(1, SIZE), target)


def _row(
    label: str,
    recipe: str,
    spec: ModelSpec,
    size: tuple[int, int, int],
    images: torch.Tensor,
    target: str,
) -> tuple[list[str], EngineRecord, Kernels]:
    quantized = quantize(spec, size, RECIPES[recipe], images)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        quantized.write(file, half=True)
        record = compiled(file, Path(folder), target)
        bytes_ = file.stat().st_size
        quantized.write(file, half=False, batch_size=None)
        kernels = integer_kernels(file)
    row = [
        label,
        recipe,
        *fusion_cells(record.fusion),
        percent(kernels.integer_products, kernels.products),
        f"{record.engine_bytes / _MIB:.1f}",
        f"{bytes_ / _MIB:.1f}",
        f"{record.build_seconds:.1f}",
    ]
    return row, record, kernels


def floats_tables() -> tuple[str, str]:
    """What networks become in the floating-point recipes, and what runs otherwise: the packaged ones, and others at 224 px."""
    samples = _samples(_FLOAT_NETWORKS)
    rows, dropped = [], []
    for label, sample in samples.items():
        for recipe, targets in FLOAT_TARGETS.items():
            # Targets that come to the same share a row.
            same: dict[tuple[str, ...], list[str]] = {}
            for target, fusion in _fusions(load_recipe(recipe).formats(), targets, *sample):
                same.setdefault((formats_cell(fusion), *fusion_cells(fusion)), []).append(target)
                dropped += reasons(
                    f"{label}, {recipe}, {target}", {**fusion.not_quantized, **fusion.not_fused}
                )
            rows += [[label, recipe, ", ".join(found), *cells] for cells, found in same.items()]
            Console().print(rows[-1])
    header = ["network", "recipe", "for", "products in each format", "products quantized", "fused attentions"]
    return table(header, rows), table(_REASONS, dropped)


def _samples(networks: dict[str, str]) -> dict[str, tuple[ModelSpec, tuple[int, int, int], torch.Tensor]]:
    """The packaged networks, and others at 224 px with random weights."""
    samples = {f"demo {name}": demo_sample(name) for name in ("vit", "swin")}
    for label, name in networks.items():
        kwargs = {"img_size": 224, "num_classes": 10} if "dinov2" in name else {}
        samples[label] = ModelSpec(name=name, kwargs=kwargs), SIZE, random_images(1, SIZE)
    return samples


def _fusions(
    choice: Choice, targets: Sequence[str], spec: ModelSpec, size: tuple[int, int, int], images: torch.Tensor
) -> Iterator[tuple[str, Fusion]]:
    quantized = quantize(spec, size, choice, images)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        quantized.write(file, half=True)
        for target in targets:
            yield target, compiled(file, Path(folder), target).fusion


def attention_table(target: str) -> str:
    """W4A4 with attention in 8-bit integers and in FP8: which attentions become one kernel; in 4 bits none does."""
    samples = _samples(
        {n: LARGE[n] for n in ("DeiT-S", "Swin-T")} | {"DINOv2 ViT-S": _FLOAT_NETWORKS["DINOv2 ViT-S"]}
    )
    rows = []
    for label, sample in samples.items():
        for attention in ("int8", "fp8"):
            choice = load_recipe("w4a4", [f"attention={attention}"]).formats()
            ((_, fusion),) = _fusions(choice, [target], *sample)
            rows.append([label, attention, formats_cell(fusion), fusion_cells(fusion)[1]])
            Console().print(rows[-1])
    header = ["network at W4A4", "attention", "products in each format", "fused attentions"]
    return table(header, rows)


def make_run(folder: Path) -> None:
    """A calibrated ViT-B at 224 px with random weights, rounded to nearest on two random images."""
    spec, model, config = random_network("vit_base_patch16_224", "")
    changes = ["iterations=0", "refinement_images=0", "batch_size=2"]
    overrides = [f"reconstruction.{change}" for change in changes]
    overrides += ["equalization=none", "calibration_images=2", "observation_images=2"]
    calibrate(model, spec, random_batch(2, SIZE), config, load_recipe("w8a8", overrides), folder)


def export_text() -> str:
    """Time and memory of `ospq-export export` on ViT-B, in words."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        make_run(run)
        weights = (run / FLOAT_TENSORS).stat().st_size
        peak_file = Path(name) / "peak"
        command = [sys.executable, "-c", _EXPORT_SCRIPT, str(peak_file), "export", str(run), "--quiet"]
        started = time.perf_counter()
        # The process on its own: what this one needed for calibration must not count.
        process = os.posix_spawn(sys.executable, command, os.environ)
        _, status, usage = os.wait4(process, 0)
        seconds = time.perf_counter() - started
        if status:
            raise SystemExit("the export failed")
        peak = int(peak_file.read_text())
    return (
        "`ospq-export export` of ViT-B at 224 px (model.onnx, model_fp32.onnx, scales.json): "
        f"{usage.ru_utime:.0f} s of processor time, {seconds:.0f} s on the clock of a machine that may have been busy otherwise; "
        f"peak memory of the whole process, Python and its libraries included, {peak / _MIB:.0f} MiB, "
        f"{peak / weights:.1f} times the float32 weights ({weights / _MIB:.0f} MiB).\n"
    )


def write_floats() -> None:
    """The section on FP8 and NVFP4."""
    found, why = floats_tables()
    write_between(_PAGE, "engines of floats", found)
    before, heading, _ = _WHY.read_text().partition(_FLOATS)
    _WHY.write_text(f"{before}{heading}\n\n{why}")


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--target", default=TARGET, help="compute capability")
    parser.add_argument("--export-only", action="store_true", help="measure what an export takes anew")
    parser.add_argument("--floats-only", action="store_true", help="measure FP8 and NVFP4 anew")
    parser.add_argument("--attention-only", action="store_true", help="measure 8-bit attention anew")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.export_only or args.floats_only or args.attention_only:
        if args.attention_only:
            write_between(_PAGE, "attention", attention_table(args.target))
        if args.floats_only:
            write_floats()
        if args.export_only:
            write_between(DOCS / "performance.md", "export", export_text())
        return
    rows, dropped, in_float = [], [], []
    jobs = [
        (f"demo {n} {r}", lambda n=n, r=r: demo_row(n, r, args.target))
        for n in ("vit", "swin")
        for r in RECIPES
    ]
    jobs += [(name, lambda name=name: large_row(name, args.target)) for name in LARGE]
    for label, job in jobs:
        row, record, kernels = job()
        rows.append(row)
        dropped += reasons(label, {**record.fusion.not_quantized, **record.fusion.not_fused})
        in_float += reasons(label, kernels.in_float)
        Console().print(row)
    said = (
        f"{record.product} {record.version}, engines for {args.target}, built without a GPU on {machine_name()}: "
        "FP16 around the quantized operators, batch 1, weights rounded to nearest."
    )
    write_between(_PAGE, "engines", f"{table(_HEADER, rows)}\n{said}")
    why = [
        "# Engines: what runs otherwise, and why\n",
        f"Written by `benchmarks/engines.py`. {said}\n",
        table(_REASONS, dropped),
        f"## ONNX Runtime {kernels.version}: products that stay in float\n",
        "Read from the graph that it runs with all optimisations, on the CPU.\n",
        table(_REASONS, in_float),
        f"{_FLOATS}\n",
    ]
    _WHY.write_text("\n".join(why))
    write_floats()
    write_between(_PAGE, "attention", attention_table(args.target))
    write_between(DOCS / "performance.md", "export", export_text())


if __name__ == "__main__":
    main()
