"""What TensorRT-RTX compiles from our files, ahead of time, without a GPU; writes docs/engines.md.

    python benchmarks/engines.py --target SM89

Networks: the packaged ViT and Swin (trained) at four bit widths; DeiT-S, ViT-S, Swin-T and Swin-S at 224 px (random weights) at
W8A8; export time and peak memory of ViT-B at 224 px, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from networks import percent, quantize, random_images, table
from rich.console import Console

from ospq_export.data import resolve_data_config
from ospq_export.demo import demo_data_overrides, demo_images, demo_spec
from ospq_export.export.build import BuildSettings
from ospq_export.export.engine import EngineRecord, build_engine
from ospq_export.export.products import Product
from ospq_export.graph.quantizers import Bits
from ospq_export.models import ModelSpec, create_model
from ospq_export.validate.report import machine_name

RECIPES = {"W8A8": Bits(8, 8), "W6A6": Bits(6, 6), "W4A8": Bits(4, 8), "W4A4": Bits(4, 4)}
LARGE = {
    "DeiT-S": "deit_small_patch16_224",
    "ViT-S": "vit_small_patch16_224",
    "Swin-T": "swin_tiny_patch4_window7_224",
    "Swin-S": "swin_small_patch4_window7_224",
}
SIZE = (3, 224, 224)
_MIB = 1 << 20
_HEADER = [
    "network",
    "bits",
    "products on Int8",
    "attentions in one Int8 kernel",
    "engine, MiB",
    "ONNX, MiB",
    "build, s",
]


def demo_row(name: str, recipe: str, target: str) -> tuple[list[str], EngineRecord]:
    """A packaged network at a bit width."""
    spec = demo_spec(name)
    config = resolve_data_config(create_model(spec), spec, demo_data_overrides())
    images = demo_images("calibration", config).sample(32, seed=0).images
    return _row(f"demo {name}", recipe, spec, config.input_size, images, target)


def large_row(name: str, target: str) -> tuple[list[str], EngineRecord]:
    """A network at 224 px with random weights, W8A8."""
    return _row(name, "W8A8", ModelSpec(name=LARGE[name]), SIZE, random_images(1, SIZE), target)


def _row(
    label: str,
    recipe: str,
    spec: ModelSpec,
    size: tuple[int, int, int],
    images: torch.Tensor,
    target: str,
) -> tuple[list[str], EngineRecord]:
    quantized = quantize(spec, size, RECIPES[recipe], images)
    with tempfile.TemporaryDirectory() as folder:
        file, engine = Path(folder) / "model.onnx", Path(folder) / "model.engine"
        quantized.write(file, half=True)
        settings = BuildSettings(Product.TENSORRT_RTX, compute_capabilities=(target,))
        record = build_engine(file, engine, settings)
        bytes_ = file.stat().st_size
    fusion = record.fusion
    row = [
        label,
        recipe,
        percent(fusion.int8_gemms, fusion.gemms),
        percent(fusion.fused_attentions, fusion.attentions),
        f"{record.engine_bytes / _MIB:.1f}",
        f"{bytes_ / _MIB:.1f}",
        f"{record.build_seconds:.1f}",
    ]
    return row, record


def reasons(label: str, record: EngineRecord) -> list[list[str]]:
    """What dropped out, by reason, with one example."""
    dropped = {**record.fusion.not_int8, **record.fusion.not_fused}
    counts = Counter(dropped.values())
    example = {reason: name for name, reason in reversed(dropped.items())}
    return [[label, str(count), reason, f"`{example[reason]}`"] for reason, count in counts.items()]


def measure_export() -> None:
    """In a process of its own: export ViT-B, print seconds, peak memory and the weights' size as JSON."""
    spec = ModelSpec(name="vit_base_patch16_224")
    quantized = quantize(spec, SIZE, RECIPES["W8A8"], random_images(1, SIZE))
    weights = sum(buffer.numel() * 4 for buffer in quantized.captured.buffers() if buffer.is_floating_point())
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        quantized.write(Path(folder) / "model.onnx", half=False, batch_size=None)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak, "weights": weights}))


def export_text() -> str:
    """Time and memory of exporting ViT-B, in words."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure-export"], capture_output=True, text=True, check=True
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    share = figures["peak"] / figures["weights"]
    return (
        f"ViT-B at 224 px, model.onnx: {figures['seconds']:.0f} s; peak memory of the whole process, capture, quantization "
        f"and the libraries included, {figures['peak'] / _MIB:.0f} MiB, {share:.1f} times the float32 weights "
        f"({figures['weights'] / _MIB:.0f} MiB).\n"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", default="SM89", help="compute capability")
    parser.add_argument("--out", type=Path, default=Path("docs/engines.md"))
    parser.add_argument("--measure-export", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.measure_export:
        measure_export()
        return
    rows, dropped = [], []
    jobs = [
        (f"demo {n} {r}", lambda n=n, r=r: demo_row(n, r, args.target))
        for n in ("vit", "swin")
        for r in RECIPES
    ]
    jobs += [(name, lambda name=name: large_row(name, args.target)) for name in LARGE]
    for label, job in jobs:
        row, record = job()
        rows.append(row)
        dropped += reasons(label, record)
        Console().print(row)
    text = [
        "# Engines\n",
        f"What {record.product} {record.version} compiles from our files for {args.target}, ahead of time: no GPU ran any of it, "
        "and no speed follows from it. FP16 around the quantized operators, batch 1, weights rounded to nearest. Written by "
        f"`benchmarks/engines.py` on {machine_name()}.\n",
        table(_HEADER, rows),
        "## What runs otherwise, and why\n",
        table(["network", "how many", "reason", "for example"], dropped) if dropped else "Nothing.\n",
        "## Export\n",
        export_text(),
    ]
    args.out.write_text("\n".join(text))


if __name__ == "__main__":
    main()
