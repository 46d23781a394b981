"""report.md and report.html: what report.json and the manifest say, for people; one self-contained file each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospq_export.runs.files import REPORT_HTML, REPORT_MD, replacing
from ospq_export.validate.report import details, tables
from ospq_export.validate.report.glossary import terms
from ospq_export.validate.report.model import Report, image_lines
from ospq_export.validate.report.pictures import thumbnails
from ospq_export.validate.report.summary import summarize

if TYPE_CHECKING:
    from jinja2 import Environment

    from ospq_export.data import ImageSet, StreamSet
    from ospq_export.data.tensors import TensorSet
    from ospq_export.runs.manifest import Manifest
    from ospq_export.runs.run import Run
    from ospq_export.tasks.comparison import Comparison

_MARKS = {"met": "good", "missed": "bad", "open": "open"}
_THUMBNAILS, _WORST = 24, 3


def write_documents(
    run: Run | Path, report: Report, images: ImageSet | StreamSet | TensorSet, *, pictures: bool = True
) -> Path:
    """Write report.md and report.html into the run directory.

    Args:
        run: what was validated, or, of files that are no run's, the folder that the report goes to.
        report: the outcome.
        images: what it was validated on; flipped ones are shown.
        pictures: whether the page may show images; False where they must not leave. Their names stay.

    Returns:
        Path of report.html.

    Raises:
        InputError: a file cannot be written.
    """
    manifest = None if isinstance(run, Path) else run.manifest
    markdown, page = (
        run / name if isinstance(run, Path) else run.report_file(name) for name in (REPORT_MD, REPORT_HTML)
    )
    # Only here: matplotlib takes a second to import.
    from ospq_export.validate.report import formats

    allocation = None if isinstance(run, Path) else formats.allocation_of(run)
    context = _context(manifest, report)
    if allocation is not None:
        context["tables"]["formats"] = formats.attempts(allocation).filled()
    _write(markdown, "report.md.jinja", context)
    flipped = dict.fromkeys(f.id for group in context["flips"] for f in group.flips)
    context["plots"] = _plots(manifest, report, context["all_classes"][: details.LISTED_CLASSES])
    if manifest is not None and (allocation is not None or manifest.recipe.overrides):
        context["plots"]["formats"] = formats.format_plot(manifest, allocation)
    if allocation is not None:
        context["plots"]["front"] = formats.front_plot(allocation)
    context["pictures"] = thumbnails(images, list(flipped)[:_THUMBNAILS]) if pictures else {}
    context["without_pictures"] = bool(flipped) and not pictures
    _write(page, "report.html.jinja", context)
    return page


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
    }
    return environment


def _context(manifest: Manifest | None, report: Report) -> dict[str, Any]:
    classes = details.class_rows(report)
    return {
        "report": report,
        "manifest": manifest,
        "marks": _MARKS,
        "summary": summarize(report, manifest),
        "tables": _tables(report),
        "slices": [details.slices(location) for location in report.locations],
        "diverges": details.diverges,
        "flips": details.flips_of(report),
        "classes": details.classes(classes) if classes else None,
        "all_classes": classes,
        "quantization": _quantization(report.quantization),
        "image_lines": image_lines(report),
        "details": {} if manifest is None else _details(manifest),
        "terms": terms(report),
    }


def _tables(report: Report) -> dict[str, tables.Table]:
    """By name; those without a row are left out."""
    makers = (
        tables.criteria,
        tables.executions,
        tables.against_float,
        tables.noise_floor,
        tables.latency,
        details.outputs,
        tables.baseline,
        details.files,
    )
    made = {maker.__name__: maker(report) for maker in makers}
    return {name: table.filled() for name, table in made.items() if table}


def _details(manifest: Manifest) -> dict[str, str]:
    """Parts of the manifest as JSON, by their headings."""
    parts = {"Model": manifest.model, "Preprocessing": manifest.data, "Recipe": manifest.recipe}
    return {name: json.dumps(part.model_dump(mode="json"), indent=2) for name, part in parts.items()}


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


def _plots(manifest: Manifest | None, report: Report, classes: Sequence[details.ClassRow]) -> dict[str, Any]:
    """SVG by name; lists of (reference, SVG) for margins and of (location, SVG) for slices."""
    from ospq_export.validate.report import plots

    formats = {} if manifest is None else manifest.formats()
    profile, slices = ([], []) if manifest is None else (manifest.profile, manifest.slices)

    def histograms(quantizers: Sequence[Any], name: str) -> str | None:
        worst = sorted(quantizers, key=lambda q: q.sqnr)[:_WORST]
        return plots.histogram_plot(worst, formats, name) if worst else None

    compared = report.locations[0].quantizers if report.locations else []
    changed = [row for row in classes if any(row[1:])]
    return {
        "margins": plots.margin_plots(report.comparisons),
        "sqnr": [(x, plots.sqnr_plot(x)) for x in _told_apart(report)],
        "outliers": plots.outlier_plot(profile, slices) if profile else None,
        "activations": histograms(compared, "activation codes"),
        "weights": histograms(report.weights, "weight codes"),
        "scales": plots.scale_plot(report.weights),
        "errors": plots.error_plot(slices) if slices else None,
        "losses": plots.loss_plot(slices),
        "formats": None,
        "front": None,
        "classes": plots.class_plot(changed) if changed else None,
    }


def _told_apart(report: Report) -> list[Any]:
    """The files whose slices are drawn: the first, and each that diverges; a file that does not looks like the first."""
    return [x for i, x in enumerate(report.locations) if i == 0 or x.first_diverging]
