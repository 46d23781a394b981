"""Which timm families take the whole path, at reduced size; writes docs/models.md.

    python benchmarks/models.py [FAMILY ...]

Each: capture, round to nearest at W8A8 and W4A4, export, ONNX Runtime against the fake-quantized network, TensorRT-RTX parse and
build of the FP16 file (W8A8). Weights are random.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from networks import Quantized, percent, quantize, random_images, table
from rich.console import Console

from ospq_export.errors import InputError
from ospq_export.export.build import BuildSettings
from ospq_export.export.engine import build_engine
from ospq_export.export.products import Product
from ospq_export.graph.quantizers import Bits, Mode
from ospq_export.models import ModelSpec
from ospq_export.validate.report import machine_name

_VIT: dict[str, Any] = {"depth": 2, "num_classes": 10, "img_size": 64}
# Name in timm, arguments that make it small, image side.
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "ViT": ("vit_tiny_patch16_224", _VIT, 64),
    "PE": ("vit_pe_core_tiny_patch16_384", _VIT, 64),
    "DeiT": ("deit_tiny_patch16_224", _VIT, 64),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", _VIT, 64),
    "DeiT-3": ("deit3_small_patch16_224", _VIT, 64),
    "FlexiViT": ("flexivit_small", _VIT, 64),
    "DINOv2": ("vit_small_patch14_dinov2", {"depth": 2, "num_classes": 10, "img_size": 56}, 56),
    "DINOv3": ("vit_small_patch16_dinov3", _VIT, 64),
    "SigLIP": ("vit_base_patch16_siglip_224", _VIT, 64),
    "CLIP": ("vit_base_patch32_clip_224", _VIT, 64),
    "BEiT": ("beit_base_patch16_224", _VIT, 64),
    "BEiT v2": ("beitv2_base_patch16_224", _VIT, 64),
    "EVA-02": ("eva02_tiny_patch14_224", {"depth": 2, "num_classes": 10, "img_size": 56}, 56),
    "CaiT": ("cait_xxs24_224", _VIT, 64),
    "XCiT": ("xcit_nano_12_p16_224", {"depth": 2, "num_classes": 10}, 64),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": (2, 2), "num_heads": (3, 6), "num_classes": 10, "img_size": 56},
        56,
    ),
    "Swin v2": (
        "swinv2_tiny_window8_256",
        {"depths": (2, 2), "num_heads": (3, 6), "num_classes": 10, "img_size": 64},
        64,
    ),
    "LeViT": ("levit_128s", {"num_classes": 10}, 224),
    "PVT v2": ("pvt_v2_b0", {"num_classes": 10}, 64),
    "Twins": ("twins_svt_small", {"depths": (1, 1, 1, 1), "num_classes": 10}, 224),
    "MaxViT": ("maxvit_rmlp_pico_rw_256", {"num_classes": 10}, 256),
    "CoAtNet": ("coatnet_nano_rw_224", {"num_classes": 10, "img_size": 64}, 64),
    "MobileViT": ("mobilevit_xxs", {"num_classes": 10}, 64),
    "MobileViT v2": ("mobilevitv2_050", {"num_classes": 10}, 64),
    "EfficientFormer": ("efficientformer_l1", {"num_classes": 10}, 224),
    "EfficientViT": ("efficientvit_b0", {"num_classes": 10}, 64),
    "FastViT": ("fastvit_t8", {"num_classes": 10}, 64),
    "PoolFormer": ("poolformer_s12", {"num_classes": 10}, 64),
    "GC ViT": ("gcvit_xxtiny", {"num_classes": 10}, 224),
    "Hiera": ("hiera_tiny_224", {"num_classes": 10}, 224),
    "ConViT": ("convit_tiny", {"num_classes": 10, "depth": 2}, 224),
    "TNT": ("tnt_s_patch16_224", {"num_classes": 10, "depth": 2}, 224),
    "CrossViT": ("crossvit_9_240", {"num_classes": 10}, 240),
    "MLP-Mixer": ("mixer_s32_224", {"num_classes": 10}, 224),
    "ConvNeXt": ("convnext_atto", {"num_classes": 10}, 64),
    "ConvNeXt v2": ("convnextv2_atto", {"num_classes": 10}, 64),
}
_TARGET = "SM89"


@dataclass(frozen=True)
class Result:
    """What became of one family.

    Attributes:
        share: per bit width, the deployed logits' squared difference from the fake-quantized ones over quantization's own error.
        int8, fused: of the TensorRT-RTX plan.
        failure: the first failing step with its reason, or "".
    """

    share: dict[str, float]
    int8: str = "-"
    fused: str = "-"
    failure: str = ""


def check(name: str, kwargs: dict[str, Any], side: int, *, engine: bool = True) -> Result:
    """Take one network along the whole path; a failure is reported, not raised."""
    spec, size = ModelSpec(name=name, kwargs=kwargs), (3, side, side)
    images = random_images(4, size)
    shares: dict[str, float] = {}
    step, int8, fused = "capture", "-", "-"
    try:
        for label, bits in (("W8A8", Bits(8, 8)), ("W4A4", Bits(4, 4))):
            step = f"{label} capture"
            quantized = quantize(spec, size, bits, images)
            step = f"{label} export and ONNX Runtime"
            shares[label] = difference(quantized, images)
            if engine and label == "W8A8":
                step = "TensorRT-RTX"
                int8, fused = plan(quantized)
    except InputError as error:
        return Result(shares, int8, fused, f"{step}: {error}")
    except Exception as error:
        # The table is about which families fail and how; a fault of any kind is a row of it.
        line = (str(error).splitlines() or [""])[0]
        return Result(shares, int8, fused, f"{step}: {type(error).__name__}: {line[:200]}")
    return Result(shares, int8, fused)


def difference(quantized: Quantized, images: torch.Tensor) -> float:
    """Mean squared difference of ONNX Runtime's logits from the fake-quantized ones, over quantization's own error."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        quantized.write(file, half=False, batch_size=None)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        deployed = session.run(None, {"images": images.numpy()})[0]
    with torch.inference_mode():
        fake = quantized.network.module(images).numpy()
        quantized.network.set_mode(Mode.FLOAT)
        original = quantized.network.module(images).numpy()
    quantized.network.set_mode(Mode.QUANTIZE)
    return float(np.square(deployed - fake).mean() / max(np.square(original - fake).mean(), 1e-20))


def plan(quantized: Quantized) -> tuple[str, str]:
    """Int8 products and fused attentions of the FP16 file's engine."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        quantized.write(file, half=True)
        settings = BuildSettings(Product.TENSORRT_RTX, compute_capabilities=(_TARGET,))
        fusion = build_engine(file, Path(folder) / "model.engine", settings).fusion
    return percent(fusion.int8_gemms, fusion.gemms), percent(fusion.fused_attentions, fusion.attentions)


def _row(label: str, result: Result) -> list[str]:
    name, _, side = FAMILIES[label]
    shares = [f"{result.share[k]:.3f}" if k in result.share else "-" for k in ("W8A8", "W4A4")]
    return [label, f"`{name}`, {side} px", *shares, result.int8, result.fused, result.failure or "yes"]


_INTRO = """# Models

timm families at reduced size (fewer blocks, small images, random weights), each captured, quantized to nearest, exported, run in
ONNX Runtime and built by TensorRT-RTX for {target} without a GPU. "Against fake-quant" is the mean squared difference of
ONNX Runtime's logits from the fake-quantized network's, over the error of quantization itself: well below 1 means that the file
computes what was calibrated. Written by `benchmarks/models.py` on {machine}.
"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", help="default: all; only all of them write the page")
    parser.add_argument("--out", type=Path, default=Path("docs/models.md"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for label in args.families or FAMILIES:
        rows.append(_row(label, check(*FAMILIES[label])))
        Console(width=250).print(rows[-1])
        gc.collect()
    if args.families:
        return
    header = [
        "family",
        "tried",
        "W8A8 against fake-quant",
        "W4A4",
        "products on Int8",
        "fused attentions",
        "whole path",
    ]
    whole = sum(row[-1] == "yes" for row in rows)
    text = [
        _INTRO.format(target=_TARGET, machine=machine_name()),
        f"{whole} of {len(rows)} take the whole path.\n",
    ]
    args.out.write_text("\n".join([*text, table(header, rows)]))


if __name__ == "__main__":
    main()
