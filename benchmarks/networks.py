"""Networks that are no timm classifiers, through all three stages; writes docs/networks-measured.md.

    python benchmarks/networks.py                 # all of them
    python benchmarks/networks.py --only detr     # some

Small configurations of the libraries' own classes, with random weights: they have no accuracy to keep, so that the first
verdict is what counts. Each is calibrated for a few steps, exported, validated in ONNX Runtime and OpenVINO on 320 images,
and built by TensorRT-RTX for SM89, without a GPU.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lib.onnx_tools import compiled, fusion_cells
from lib.rows import DOCS, NETWORKS, Row, make_parser, origin, table
from torch import Tensor, nn

from ospq_export import InputError, Run
from ospq_export.runs.files import QUANTIZED_HALF_ONNX
from ospq_export.validate.report.model import Report

IMAGES, BACKENDS = 320, ("onnxruntime-unoptimised", "onnxruntime", "openvino")
TARGET = "SM89"
SHORT = (
    "slicing=block",
    "calibration_images=64",
    "observation_images=64",
    "reconstruction.iterations=20",
    "reconstruction.batch_size=16",
)
_VIT = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 192}


@dataclass(frozen=True)
class Network:
    """A network of the table.

    Attributes:
        make: builds it, with random weights.
        side: of its images, pixels.
        outputs: that are kept; None keeps all.
    """

    make: Callable[[], nn.Module]
    side: int = 64
    outputs: tuple[str, ...] | None = None


class Heads(nn.Module):
    """A timm backbone with two heads of one's own."""

    def __init__(self) -> None:
        import timm

        super().__init__()
        small = {"img_size": 64, "depth": 3, "embed_dim": 96, "num_heads": 3}
        self.backbone = timm.create_model("vit_tiny_patch16_224", num_classes=0, **small)
        self.classes, self.angles = (
            nn.Linear(96, 10),
            nn.Sequential(nn.Linear(96, 32), nn.GELU(), nn.Linear(32, 3)),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Two heads on the same features."""
        features = self.backbone(x)
        return {"classes": self.classes(features), "angles": self.angles(features)}


def _torchvision_swin() -> nn.Module:
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 64, [2, 2], [2, 4], [4, 4], num_classes=10)


def _torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(64, 16, 3, 3, 96, 192, num_classes=10)


def _transformers(kind: str, config: str, **arguments: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**arguments)
        network: nn.Module = getattr(transformers, kind)(made)
        return network

    return make


def _detr() -> nn.Module:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_queries=8,
        num_labels=5,
    )
    return transformers.DetrForObjectDetection(config)


def _timm(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, **arguments)

    return make


_SMALL = {"img_size": 64, "depth": 3, "embed_dim": 96, "num_heads": 3}
CASES = {
    "torchvision swin_t": Network(_torchvision_swin),
    "torchvision vit_b_16": Network(_torchvision_vit),
    "transformers ViT": Network(
        _transformers(
            "ViTForImageClassification", "ViTConfig", **_VIT, image_size=64, patch_size=16, num_labels=10
        )
    ),
    "transformers DINOv2": Network(
        _transformers("Dinov2Model", "Dinov2Config", **_VIT, image_size=56, patch_size=14, mlp_ratio=2),
        side=56,
    ),
    "transformers DINOv2, pooled": Network(
        _transformers("Dinov2Model", "Dinov2Config", **_VIT, image_size=56, patch_size=14, mlp_ratio=2),
        side=56,
        outputs=("pooler_output",),
    ),
    "transformers SigLIP": Network(
        _transformers("SiglipVisionModel", "SiglipVisionConfig", **_VIT, image_size=64, patch_size=16)
    ),
    "transformers SegFormer": Network(
        _transformers(
            "SegformerForSemanticSegmentation",
            "SegformerConfig",
            hidden_sizes=[16, 32, 64, 96],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 2, 3],
            decoder_hidden_size=64,
            num_labels=6,
        )
    ),
    "transformers DETR": Network(_detr),
    "timm backbone with two heads": Network(Heads),
    "timm features_only": Network(_timm("resnet18", features_only=True, out_indices=(1, 2, 3))),
    "timm num_classes=0": Network(_timm("vit_tiny_patch16_224", num_classes=0, **_SMALL)),
}


def images(count: int, side: int, seed: int) -> Tensor:
    """Coloured clouds with a little noise, float32 (count, 3, side, side)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return smooth + 0.1 * torch.randn(count, 3, side, side, generator=generator)


def measure(name: str, case: Network, recipe: str, folder: Path) -> Row:
    """One network through all stages."""
    torch.manual_seed(0)
    network = case.make().eval()
    run = Run.calibrate(
        network,
        images(64, case.side, 1),
        recipe,
        folder / "run",
        overrides=SHORT,
        outputs=case.outputs,
        name=name,
    ).export(fp16=True)
    report = run.validate(
        images(IMAGES, case.side, 2), backends=BACKENDS, floor_images=IMAGES, documents=False
    )
    return {
        "network": name,
        "recipe": recipe,
        "task": run.manifest.task,
        "outputs": len(report.comparisons[0].outputs) or 1,
        "float": run.manifest.calibration.float_products,
        "slices": len(run.manifest.slices),
        "verdicts": {backend: _verdict(report, backend) for backend in BACKENDS},
        **_errors(report),
        **_engine(run, folder),
        **origin(),
    }


def _verdict(report: Report, backend: str) -> str:
    found = {c.outcome for c in report.verdict.faithful.criteria if c.deployed in (backend, "model.onnx")}
    return "no" if "missed" in found else "open" if "open" in found else "yes"


def _errors(report: Report) -> dict[str, Any]:
    """Mean relative errors, or the share of flips of a classifier: of the deployed file, and of quantization itself."""
    compared = {c.deployed: c for c in report.comparisons}
    quantization = report.quantization
    assert quantization is not None

    def of(c: Any) -> str:
        if c.outputs:
            return f"{100 * max(o.mean_error for o in c.outputs):.3g} %"
        return f"{len(c.flips)} flips"

    return {"error": {b: of(compared[b]) for b in BACKENDS}, "quantization": of(quantization)}


def _engine(run: Run, folder: Path) -> dict[str, Any]:
    try:
        record = compiled(run.path / QUANTIZED_HALF_ONNX, folder, TARGET)
    except InputError as error:
        return {"engine": str(error).splitlines()[0], "products": "-", "attentions": "-"}
    products, attentions = fusion_cells(record.fusion)[:2]
    return {"engine": "built", "products": products, "attentions": attentions}


def page(rows: Sequence[Row]) -> str:
    """docs/networks-measured.md."""
    header = ["network", "recipe", "task", "outputs", "slices", *(f"faithful in {b}" for b in BACKENDS)]
    header += [
        "off fake-quant in ONNX Runtime",
        "off float by quantization",
        "TensorRT-RTX",
        "products on Int8",
        "attentions fused",
        "left in float",
    ]
    lines = [
        [
            *(row[key] for key in ("network", "recipe", "task", "outputs", "slices")),
            *(row["verdicts"][b] for b in BACKENDS),
            row["error"]["onnxruntime"],
            row["quantization"],
            *(row[key] for key in ("engine", "products", "attentions")),
            ", ".join(row["float"]) or "-",
        ]
        for row in rows
    ]
    said = (
        "Networks of torchvision and transformers, and timm's without a classifier, through all three stages: small "
        "configurations of the libraries' own classes with random weights, calibrated for 20 steps on 64 images, validated on "
        f"{IMAGES}. TensorRT-RTX built the engines for {TARGET}, without a GPU.\n"
    )
    measured = f"Measured by `benchmarks/networks.py` on {rows[0]['machine']}.\n"
    return f"# Other networks\n\n{said}\n{table(header, lines)}\n{measured}{NETWORKS.notes()}"


def main() -> None:
    """Measure what has no row yet, and write the page."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="*", default=[], help="parts of names")
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--again", action="store_true", help="also those that have a row")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(1)
    for name, case in CASES.items():
        chosen = not args.only or any(part.lower() in name.lower() for part in args.only)
        known = NETWORKS.find(network=name, recipe=args.recipe)
        if not chosen or (known is not None and not args.again):
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                row = measure(name, case, args.recipe, Path(folder))
        except InputError as error:
            print(f"{name}: {error}", flush=True)
            continue
        NETWORKS.put(row)
        print(
            name,
            row["task"],
            row["verdicts"],
            row["error"],
            row["quantization"],
            row["engine"],
            row["products"],
            flush=True,
        )
    (DOCS / "networks-measured.md").write_text(page(NETWORKS.rows()))


if __name__ == "__main__":
    main()
