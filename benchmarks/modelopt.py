"""Our logit error beside that of nvidia-modelopt's torch quantization: same networks, formats and images.

    python benchmarks/modelopt.py demo --python PYTHON           # both packaged networks
    python benchmarks/modelopt.py own --python PYTHON --name dinov2-vits --model vit_small_patch14_dinov2 \
        --model-kwargs 'img_size=98 num_classes=10' --checkpoint model.safetensors --calibration calib --validation val
    python benchmarks/modelopt.py table                          # the table, from the rows at hand

PYTHON is of an environment with nvidia-modelopt and timm; `benchmarks/peers.py` makes one in benchmarks/.modelopt, the default.
Modelopt calibrates by the maximum on the images that our recipe calibrates on. *default* is its FP8_DEFAULT_CFG or
NVFP4_DEFAULT_CFG as it stands; *example* is what its own example for timm's networks makes of it: no quantizers in the patch
embedding and in downsampling, other convolutions in FP8. Its NVFP4 needs CUDA: its arithmetic is written again in
lib/modelopt_logits.py, and the table says so.

The logit error is the squared error of the logits over the squared float logits, on the images that `results.py` takes for it.
Ours is the fake-quantized network of the run in RUNS/NETWORK-FORMAT; where there is none yet, call the script again later:
modelopt's rows are kept in benchmarks/rows/modelopt.jsonl and not measured again.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lib.classifiers import Network, add_networks, chosen_networks, finished_run
from lib.rows import (
    BENCHMARKS,
    DOCS,
    MODELOPT,
    TABLES_OF_NOTES,
    Row,
    make_parser,
    origin,
    table,
    write_between,
)
from torch import Tensor

from ospq_export.recipes import load_recipe
from ospq_export.runs.files import QUANTIZED_TENSORS
from ospq_export.runs.run import Run

FORMATS, SETTINGS = ("fp8", "nvfp4"), ("default", "example")
CHILD = BENCHMARKS / "lib" / "modelopt_logits.py"
ENVIRONMENT = BENCHMARKS / ".modelopt" / "bin" / "python"


class Reference:
    """A network's float logits on the images that errors are measured on, computed when they are first asked for."""

    def __init__(self, network: Network, count: int) -> None:
        self.network, self.count = network, count

    @cached_property
    def batch(self) -> Any:
        """The images, as `results.py` chooses them."""
        validation = self.network.validation
        return validation.sample(min(self.count, len(validation)), seed=1)

    @cached_property
    def logits(self) -> Tensor:
        """Of the float network, (B, K)."""
        return self.of(self.network.model)

    def of(self, module: Callable[[Tensor], Tensor]) -> Tensor:
        """A network's logits, (B, K)."""
        with torch.inference_mode():
            return torch.cat([module(x) for x in self.batch.images.split(50)])

    def beside(self, logits: Tensor) -> dict[str, float]:
        """Logit error and Top-1 (percent) of a quantized network's logits."""
        error = (logits - self.logits).square().sum() / self.logits.square().sum()
        return {"logit_error": float(error), "top1": self.top1(logits)}

    def top1(self, logits: Tensor) -> float:
        """In percent."""
        return float((logits.argmax(1) == self.batch.labels).double().mean() * 100)


def modelopt_logits(reference: Reference, format_: str, setting: str, python: Path) -> tuple[Tensor, Row]:
    """Logits of the network that modelopt quantized, and what it says of itself."""
    network = reference.network
    calibration = network.calibration.sample(load_recipe(format_).calibration_images, seed=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = {"name": network.spec.name, "kwargs": network.spec.kwargs}
        (folder / "model.json").write_text(json.dumps(spec))
        torch.save(network.model.state_dict(), folder / "weights.pt")
        np.save(folder / "calibration.npy", calibration.images.numpy())
        np.save(folder / "images.npy", reference.batch.images.numpy())
        command = [str(python), str(CHILD), str(folder), format_, setting]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        logits = torch.from_numpy(np.load(folder / "logits.npy"))
    return logits, {"calibration_images": len(calibration.images), **found}


def measure(reference: Reference, format_: str, setting: str, python: Path) -> Row:
    """Modelopt's row."""
    logits, found = modelopt_logits(reference, format_, setting, python)
    place = origin()
    place["versions"] = {**place["versions"], **found.pop("versions")}
    return {
        "network": reference.network.name,
        "format": format_,
        "setting": setting,
        "images": len(logits),
        "float_top1": reference.top1(reference.logits),
        **reference.beside(logits),
        **found,
        **place,
    }


def ours(reference: Reference, run: Run) -> Row:
    """What our run gives on the same images."""
    return {
        "sha256": run.manifest.files[QUANTIZED_TENSORS],
        "formats": run.manifest.recipe.named_formats(),
        "calibration_images": run.manifest.calibration.images,
        **reference.beside(reference.of(run.fake_quant_network())),
        **origin(),
    }


def fill(reference: Reference, args: argparse.Namespace) -> None:
    """Measure what a network's rows lack: modelopt's side, and ours where the run is new."""
    name = reference.network.name
    for format_ in args.formats:
        run = finished_run(Path(args.runs) / f"{name}-{format_}")
        found: Row | None = None
        for setting in args.settings:
            key = {"network": name, "format": format_, "setting": setting}
            row = MODELOPT.find(**key) or {**measure(reference, format_, setting, args.python), "ours": None}
            known = row["ours"] and row["ours"]["sha256"]
            if run is not None and known != run.manifest.files[QUANTIZED_TENSORS]:
                row["ours"] = found = found or ours(reference, run)
            MODELOPT.put(row)


def parts(row: Row) -> str:
    """What modelopt quantizes, in short: the modules that it has quantizers in."""
    kinds: dict[str, set[str]] = {}
    for key, count in row["quantizers"].items():
        module, _, bits = key.split()
        format_ = {"e4m3": "fp8", "e2m1": "nvfp4"}[bits]
        kinds.setdefault(f"{count} {module}", set()).add(format_)
    return ", ".join(f"{kind} {'/'.join(sorted(formats))}" for kind, formats in kinds.items())


def our_parts(row: Row) -> str:
    """What our recipe quantizes, in short: every product."""
    formats = (row["ours"] or {}).get("formats", {})
    if not formats:
        return "-"
    shown = {
        "linears": formats["weights"],
        "attention products": formats.get("attention", formats["weights"]),
    }
    shown["ends"] = formats["ends"]
    return ", ".join(f"{where} {format_}" for where, format_ in shown.items())


def cells(rows: list[Row]) -> Iterator[list[str]]:
    """The rows of the table."""
    for row in rows:
        our = row["ours"]
        tops = [row["float_top1"], row["top1"], our and our["top1"]]
        yield [
            row["network"],
            row["format"].upper(),
            row["setting"],
            f"{parts(row)}; attention products float",
            our_parts(row),
            f"{row['logit_error']:.2e}",
            f"{our['logit_error']:.2e}" if our else "-",
            f"{row['logit_error'] / our['logit_error']:.2f}" if our else "-",
            " / ".join("-" if top is None else f"{top:.2f}" for top in tops),
            "written again" if row["written_again"] else "modelopt's",
        ]


def markdown() -> str:
    """The table."""
    rows = MODELOPT.rows()
    header = ["network", "format", "modelopt's configuration", "modelopt quantizes", "ours quantizes"]
    header += ["its logit error", "ours", "its over ours", "Top-1, float / its / ours", "its arithmetic"]
    counts = ", ".join(sorted({f"{row['images']:,}" for row in rows}))
    versions = ", ".join(sorted({row["versions"]["modelopt"] for row in rows}))
    return f"{table(header, list(cells(rows)))}\nnvidia-modelopt {versions}; {counts} images.\n"


def short() -> str:
    """The table of docs/formats.md: modelopt's own configurations, which quantize all that ours do but attention."""
    found = [
        [
            row["network"],
            row["format"].upper(),
            f"{row['logit_error']:.2g}",
            f"{row['ours']['logit_error']:.2g}",
            f"{row['logit_error'] / row['ours']['logit_error']:.1f}",
        ]
        for row in MODELOPT.rows(setting="default")
        if row["ours"]
    ]
    return table(["network", "format", "modelopt", "ours", "modelopt over ours"], found)


def write_pages() -> None:
    """The table of docs/formats.md, and the long one of the notes."""
    write_between(DOCS / "formats.md", "modelopt", short())
    title = "# FP8 and NVFP4 beside nvidia-modelopt"
    about = "Written by `benchmarks/modelopt.py`. Logit error: squared error of the logits over the squared float logits."
    (TABLES_OF_NOTES / "modelopt.md").write_text(f"{title}\n\n{about}\n\n{markdown()}")


def main() -> None:
    """Command line."""
    parser = make_parser(__doc__)
    add_networks(parser)
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--python", type=Path, default=ENVIRONMENT, help="of modelopt's environment")
    parser.add_argument("--runs", default="runs/results", help="where our run directories are")
    parser.add_argument("--images", type=int, default=1000, help="validation images")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(args.threads)
    for network in chosen_networks(args):
        fill(Reference(network, args.images), args)
    write_pages()


if __name__ == "__main__":
    main()
