"""report.md and report.html: what report.json and the manifest say, for people; one self-contained file each."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ospq_export.runs.files import REPORT_HTML, REPORT_MD, replacing
from ospq_export.validate.report.model import image_lines, number, parity_cells, score_names
from ospq_export.validate.verdict import worst_of

if TYPE_CHECKING:
    from jinja2 import Environment

    from ospq_export.data import DataConfig, ImageSet, StreamSet
    from ospq_export.data.tensors import TensorSet
    from ospq_export.runs.manifest import Manifest
    from ospq_export.runs.run import Run
    from ospq_export.tasks.comparison import Comparison, Flip
    from ospq_export.validate.report.model import Report

_ClassRow = tuple[str, float | None, float | None]
_MARKS = {"met": "good", "missed": "bad", "open": "open"}
_THUMBNAILS, _LISTED_FLIPS, _WORST, _CLASSES = 24, 200, 3, 20
_SIDE = 112


def write_documents(run: Run | Path, report: Report, images: ImageSet | StreamSet | TensorSet) -> Path:
    """Write report.md and report.html into the run directory.

    Args:
        run: what was validated, or, of files that are no run's, the folder that the report goes to.
        report: the outcome.
        images: what it was validated on; flipped ones are shown.

    Returns:
        Path of report.html.

    Raises:
        InputError: a file cannot be written.
    """
    folder, manifest = (run, None) if isinstance(run, Path) else (run.path, run.manifest)
    context = _context(manifest, report)
    _write(folder / REPORT_MD, "report.md.jinja", context)
    shown = list(dict.fromkeys(f.id for c in report.comparisons for f in c.flips))[:_THUMBNAILS]
    context["plots"] = _plots(manifest, report, context["classes"])
    context["pictures"] = thumbnails(images, shown)
    _write(folder / REPORT_HTML, "report.html.jinja", context)
    return folder / REPORT_HTML


def _write(path: Path, template: str, context: Mapping[str, Any]) -> None:
    text = _environment().get_template(template).render(context)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("ospq_export.validate.report"),
        autoescape=select_autoescape(enabled_extensions=("html.jinja",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "cell": lambda text: str(text).replace("|", "\\|").replace("\n", " "),
        "kib": lambda count: f"{count / 1024:,.0f}",
        "number": number,
        "headline": lambda text: text.partition(": ")[0],
        "finding": lambda text: text.partition(": ")[2],
    }
    return environment


def _context(manifest: Manifest | None, report: Report) -> dict[str, Any]:
    rows = _class_rows(report)
    return {
        "report": report,
        "image_lines": image_lines(report),
        "manifest": manifest,
        "marks": _MARKS,
        "worst": worst_of(report.verdict.faithful, report.verdict.accuracy),
        "references": " and ".join(dict.fromkeys(c.reference for c in report.comparisons)),
        "compared": {c.deployed: c for c in report.comparisons},
        "scores": score_names(report),
        "intervals": {name for b in report.backends for name in b.intervals},
        "cells": list(dict.fromkeys(x for c in report.comparisons for x in parity_cells(c))),
        "parity": parity_cells,
        "outputs": [(c, o) for c in _all_comparisons(report) for o in c.outputs],
        "quantization": _quantization(report.quantization),
        "latencies": _latencies(report),
        "batch_sizes": sorted({x.batch_size for x in report.latencies}),
        "flips": [_Flips(c, report.class_names) for c in report.comparisons if c.flips],
        "classes": rows[:_CLASSES],
        "all_classes": len(rows),
        "details": {} if manifest is None else _details(manifest),
    }


def _details(manifest: Manifest) -> dict[str, str]:
    """Parts of the manifest as JSON, by their headings."""
    parts = {"model": manifest.model, "preprocessing": manifest.data, "recipe": manifest.recipe}
    return {name: json.dumps(part.model_dump(mode="json"), indent=2) for name, part in parts.items()}


def _all_comparisons(report: Report) -> list[Comparison]:
    """Of the deployed executions, then of quantization itself."""
    return [*report.comparisons, *([report.quantization] if report.quantization else [])]


def _quantization(c: Comparison | None) -> str:
    """What quantization itself changes, in a sentence."""
    if c is None:
        return ""
    if c.outputs and c.mcnemar is None:
        errors = ", ".join(f"{o.name} by {100 * o.mean_error:.3g} %" for o in c.outputs)
        score = "" if c.score_difference is None else f", and the score by {c.score_difference:+.2f} points"
        return f"Quantization itself changes {errors} on average{score}."
    score = "" if c.mcnemar is None else f"the score by {c.score_difference:+.2f} points and "
    return f"Quantization itself changes {score}{len(c.flips)} predictions."


class _Flips:
    """The flips of one execution, with the names of their classes."""

    def __init__(self, comparison: Comparison, names: Sequence[str]) -> None:
        self.deployed, self.total = comparison.deployed, len(comparison.flips)
        self.listed = comparison.flips[:_LISTED_FLIPS]
        self.name = partial(_class_name, names)

    def kind(self, flip: Flip) -> str:
        """What the flip did to the prediction."""
        if flip.label < 0:
            return ""
        if flip.deployed == flip.label:
            return "fixed"
        return "lost" if flip.reference == flip.label else "wrong both times"


def _class_name(names: Sequence[str], label: int) -> str:
    """A class's name, or its index; nothing for an image without a label."""
    if label < 0:
        return ""
    return names[label] if label < len(names) else str(label)


def _latencies(report: Report) -> dict[str, dict[int, Any]]:
    rows: dict[str, dict[int, Any]] = {}
    for latency in report.latencies:
        rows.setdefault(latency.name, {})[latency.batch_size] = latency
    return rows


def _class_rows(report: Report) -> list[_ClassRow]:
    """(class, change by quantization, change by the deployment that changes it most), the most changed first; points."""
    quantized = {c.label: c for c in report.quantization.classes} if report.quantization else {}
    deployed: dict[int, float] = {}
    for change in (c for comparison in report.comparisons for c in comparison.classes):
        points = change.deployed - change.reference
        deployed[change.label] = max(deployed.get(change.label, 0.0), points, key=abs)
    rows = []
    for label in sorted({*quantized, *deployed}):
        by_bits = quantized[label].deployed - quantized[label].reference if label in quantized else None
        rows.append((_class_name(report.class_names, label), by_bits, deployed.get(label)))
    return sorted(rows, key=lambda r: -max(abs(r[1] or 0), abs(r[2] or 0)))


def _plots(manifest: Manifest | None, report: Report, classes: Sequence[_ClassRow]) -> dict[str, Any]:
    """SVG by name; lists of (comparison, SVG) for margins and of (location, SVG) for slices."""
    from ospq_export.validate.report import plots

    formats = {} if manifest is None else manifest.formats()
    profile, slices = ([], []) if manifest is None else (manifest.profile, manifest.slices)

    def histograms(quantizers: Sequence[Any], name: str) -> str | None:
        worst = sorted(quantizers, key=lambda q: q.sqnr)[:_WORST]
        return plots.histogram_plot(worst, formats, name) if worst else None

    compared = report.locations[0].quantizers if report.locations else []
    return {
        "margins": [(c, svg) for c in report.comparisons if (svg := plots.margin_plot(c)) is not None],
        "sqnr": [(x, plots.sqnr_plot(x)) for x in report.locations],
        "outliers": plots.outlier_plot(profile, slices) if profile else None,
        "activations": histograms(compared, "activation codes"),
        "weights": histograms(report.weights, "weight codes"),
        "scales": plots.scale_plot(report.weights),
        "errors": plots.error_plot(slices) if slices else None,
        "losses": plots.loss_plot(slices),
        "classes": plots.class_plot(classes) if classes else None,
    }


def thumbnails(images: ImageSet | StreamSet | TensorSet, ids: Sequence[str]) -> dict[str, str]:
    """PNG data URLs by id, preprocessed and then de-normalised: what the network saw, not the file.

    Args:
        images: the set they come from.
        ids: which ones; those that the set does not have are left out.
    """
    wanted = set(ids)
    indices = [i for i, name in enumerate(images.ids) if name in wanted]
    batches = images.batches(1, indices) if indices else ()
    return {batch.ids[0]: data_url(batch.images[0], images.config) for batch in batches}


def data_url(image: Tensor, config: DataConfig) -> str:
    """One normalised image, float32 (C, H, W), as a PNG of at most 112 px."""
    if len(image) not in (1, 3):
        image = image.mean(0, keepdim=True)
    mean, std = torch.tensor(config.mean)[:, None, None], torch.tensor(config.std)[:, None, None]
    if not config.known:
        mean, std = image.amin((1, 2), keepdim=True), (image.amax() - image.amin()).clamp_min(1e-6)
    pixels = ((image.cpu() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1))
    if max(picture.size) > _SIDE:
        picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
