"""A real pretrained backbone in two other tasks than classification; writes docs/tasks-measured.md.

    python benchmarks/real_tasks.py embed --model vit_small_patch14_dinov2 --model-kwargs img_size=98 \
        --checkpoint model.safetensors --calibration calib --validation val
    python benchmarks/real_tasks.py dense --model vit_small_patch14_dinov2 --model-kwargs img_size=98 \
        --checkpoint model.safetensors --calibration calib --validation val
    python benchmarks/real_tasks.py table

*embed*: the network without its classifier. *dense*: a linear head on its patch tokens, fitted here, on canvases composed of the
folders' images: each lies on three by three patches, whose class is the image's; the rest is background.

Finished rows are kept in benchmarks/rows/tasks.jsonl and not measured again; an interrupted calibration resumes.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lib.rows import DOCS, TASKS, Row, add_network, make_parser, origin, table
from safetensors.torch import load_file
from torch import Tensor, nn

from ospq_export import DataConfig, InputError, Run, Session
from ospq_export.data import ImageSet, resolve_data_config
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import parse_model_kwargs
from ospq_export.tasks.embed import KNN
from ospq_export.validate.report.model import Report

RECIPES = {"embed": ("w8a8", "w4a8", "fp8", "nvfp4"), "dense": ("w8a8", "w4a8")}
SCORES = {"embed": KNN, "dense": "mIoU"}
OPTIMIZED, FAKE_QUANT, FLOAT = "onnxruntime", "fake_quant", "float"
CANVASES = {"fit": 600, "calibration": 1024, "validation": 1000}
PATCHES, FITTING_STEPS = 3, 400
FLOOR_IMAGES = 200
_TOKENS_BATCH = 32


def backbone(args: argparse.Namespace) -> nn.Module:
    """The network without its classifier, with the checkpoint's weights."""
    kwargs = {**parse_model_kwargs(args.model_kwargs), "num_classes": 0}
    model: nn.Module = timm.create_model(args.model, pretrained=False, **kwargs)
    held = {k: v for k, v in load_file(args.checkpoint).items() if not k.startswith("head.")}
    model.load_state_dict(held)
    return model.eval()


class Segmenter(nn.Module):
    """A linear head on the patch tokens of a backbone: logits (B, classes, patches, patches)."""

    def __init__(self, network: Any, classes: int) -> None:
        super().__init__()
        self.network = network
        self.grid: tuple[int, int] = network.patch_embed.grid_size
        self.skipped: int = network.num_prefix_tokens
        self.head = nn.Linear(network.num_features, classes)

    def tokens(self, x: Tensor) -> Tensor:
        """Patch tokens (B, patches, features) of images (B, 3, H, W)."""
        found: Tensor = self.network.forward_features(x)
        return found[:, self.skipped :]

    def forward(self, x: Tensor) -> Tensor:
        """Logits of every patch."""
        logits: Tensor = self.head(self.tokens(x)).transpose(1, 2)
        return logits.unflatten(2, self.grid)

    def fit(self, images: Tensor, masks: Tensor) -> None:
        """Fit the head to the classes of the patches.

        Args:
            images: float32 (N, 3, H, W).
            masks: int64 (N, H, W), of one class in each patch.
        """
        with torch.no_grad():
            tokens = torch.cat([self.tokens(part) for part in images.split(_TOKENS_BATCH)]).flatten(0, 1)
        side = masks.shape[1] // self.grid[0]
        labels = masks[:, ::side, ::side].flatten()
        mean, spread = tokens.mean(0), tokens.std(0) + 1e-6
        standard, fitted = (tokens - mean) / spread, nn.Linear(*self.head.weight.shape[::-1])
        optimizer = torch.optim.AdamW(fitted.parameters(), 1e-2, weight_decay=1e-2)
        for _ in range(FITTING_STEPS):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(fitted(standard), labels))
            optimizer.step()
        with torch.no_grad():
            self.head.weight.copy_(fitted.weight / spread)
            self.head.bias.copy_(fitted.bias - self.head.weight @ mean)


def canvases(folder: Path, config: DataConfig, grid: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Canvases of one to four images of a folder each, and their masks.

    Returns:
        float32 (count, 3, H, W), normalised, and int64 (count, H, W); the class after the folder's last one is background.
    """
    images = ImageSet.from_folder(folder, config)
    held, generator = images.sample(len(images), seed), torch.Generator().manual_seed(seed)
    side = config.input_size[1] // grid
    small = F.interpolate(held.images, PATCHES * side, mode="bilinear", antialias=True)
    background = len(images.class_to_idx)
    size = config.input_size[1:]
    # Black is what the images' own background is.
    black = -torch.tensor(config.mean) / torch.tensor(config.std)
    result = black.view(1, -1, 1, 1).expand(count, -1, *size).clone()
    masks = torch.full((count, *size), background)
    for i in range(count):
        for _ in range(int(torch.randint(1, 5, (), generator=generator))):
            place = int(torch.randint(len(held), (), generator=generator))
            row, column = (torch.randint(grid - PATCHES + 1, (2,), generator=generator) * side).tolist()
            rows, columns = slice(row, row + PATCHES * side), slice(column, column + PATCHES * side)
            if bool((masks[i, rows, columns] == background).all()):
                result[i, :, rows, columns] = small[place]
                masks[i, rows, columns] = held.labels[place]
    return result, masks


def prepared(task: str, args: argparse.Namespace) -> tuple[nn.Module, DataConfig, Any, Any]:
    """The network, its preprocessing, calibration and validation data."""
    network = backbone(args)
    spec = ModelSpec(name=args.model, kwargs=parse_model_kwargs(args.model_kwargs))
    config = resolve_data_config(network, spec, {})
    calibration, validation = Path(args.calibration), Path(args.validation)
    if task == "embed":
        return network, config, *(ImageSet.from_folder(f, config) for f in (calibration, validation))
    torch.manual_seed(0)
    classes = len(ImageSet.from_folder(calibration, config).class_to_idx) + 1
    segmenter = Segmenter(network, classes)
    grid = segmenter.grid[0]
    segmenter.fit(*canvases(calibration, config, grid, CANVASES["fit"], 0))
    learned, _ = canvases(calibration, config, grid, CANVASES["calibration"], 1)
    pairs = zip(*canvases(validation, config, grid, CANVASES["validation"], 2), strict=True)
    return segmenter.eval(), config, learned, list(pairs)


def measure(
    task: str, recipe: str, data: tuple[nn.Module, DataConfig, Any, Any], args: argparse.Namespace
) -> Row:
    """One row: calibrate, export, validate."""
    network, config, calibration, validation = data
    folder, session = Path(args.runs) / f"{task}-{recipe}", Session(progress=True)
    try:
        run = Run.open(folder)
    except InputError:
        run = Run.calibrate(
            network,
            calibration,
            recipe,
            folder,
            overrides=args.set,
            task=task,
            preprocessing=config,
            name=args.name or args.model,
            session=session,
        )
    run.export(overwrite=True)
    report = run.validate(validation, session=session, floor_images=FLOOR_IMAGES)
    return {
        "task": task,
        "recipe": recipe,
        "network": args.name or args.model,
        "overrides": args.set,
        **_figures(task, report),
        **origin(),
    }


def _figures(task: str, report: Report) -> dict[str, Any]:
    compared = {c.deployed: c for c in report.comparisons}
    quantization = report.quantization
    assert quantization is not None and report.floor is not None
    exact = next(v for v in report.floor.variations if (v.reference, v.name) == (FAKE_QUANT, "float64"))
    return {
        "images": report.images,
        "scores": {b.name: b.scores[SCORES[task]] for b in report.backends},
        "agreement": {"quantization": quantization.agreement, "deployed": compared[OPTIMIZED].agreement},
        "cosine": quantization.outputs[0].mean_cosine,
        "error": {
            "quantization": quantization.outputs[0].mean_error,
            "deployed": compared[OPTIMIZED].outputs[0].mean_error,
        },
        "noise": next(iter(exact.errors.values())).mean,
        "faithful": report.faithful,
        "kept": report.accuracy_kept,
    }


def page() -> str:
    """docs/tasks-measured.md."""
    rows = TASKS.rows()
    parts = [
        "# Other tasks\n\nA pretrained DINOv2 ViT-S, deployed as an embedder and under a segmentation head. *Deployed* is the "
        "exported file in ONNX Runtime.\n"
    ]
    told = {True: "yes", False: "no", None: "open"}
    for task, what in (("embed", "nearest neighbour"), ("dense", "pixels")):
        found = [r for r in rows if r["task"] == task]
        if not found:
            continue
        score = SCORES[task]
        header = [
            "recipe",
            f"{score}: float",
            "fake-quantized",
            "deployed",
            f"same {what}: float to fake-quantized, %",
        ]
        header += [
            f"same {what}: fake-quantized to deployed, %",
            "cosine to float",
            "error of deployed against fake-quantized, %",
            "of fake-quantized in float64, %",
            "faithful",
            "accuracy kept",
        ]
        lines = [
            [
                r["recipe"],
                *(f"{r['scores'][n]:.2f}" for n in (FLOAT, FAKE_QUANT, OPTIMIZED)),
                *(f"{r['agreement'][n]:.2f}" for n in ("quantization", "deployed")),
                f"{r['cosine']:.4f}",
                *(f"{100 * share:.2f}" for share in (r["error"]["deployed"], r["noise"])),
                *(told[r[n]] for n in ("faithful", "kept")),
            ]
            for r in found
        ]
        parts.append(
            f"## {task}: {found[0]['network']}, {found[0]['images']:,} images\n\n{table(header, lines)}"
        )
    machines = sorted({r["machine"] for r in rows})
    changed = sorted({", ".join(r.get("overrides", [])) for r in rows} - {""})
    if changed:
        parts.append(f"Recipes as packaged, but for {' or '.join(changed)}.\n")
    parts.append(f"Measured by `benchmarks/real_tasks.py` on {'; '.join(machines)}.\n{TASKS.notes()}")
    return "\n".join(parts)


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=(*RECIPES, "table"))
    add_network(parser)
    parser.add_argument("--recipes", nargs="*")
    parser.add_argument("--runs", default="runs/tasks", help="where the run directories go")
    parser.add_argument("--set", nargs="*", default=[], help="recipe overrides")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    torch.set_num_threads(args.threads)
    if args.what != "table":
        data = prepared(args.what, args)
        for recipe in args.recipes or RECIPES[args.what]:
            if TASKS.find(task=args.what, recipe=recipe) is None:
                TASKS.put(measure(args.what, recipe, data, args))
            print(TASKS.find(task=args.what, recipe=recipe), flush=True)
    (DOCS / "tasks-measured.md").write_text(page())


if __name__ == "__main__":
    main()
