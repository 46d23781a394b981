"""Plots of the report as inline SVG."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from ospq_export.tasks.comparison import Comparison
from ospq_export.validate.codes.records import Location, QuantizerComparison, WeightComparison
from ospq_export.validate.report.drawing import FAINT, FILL, INK, SERIES, STYLE, drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

    from ospq_export.formats.base import Format
    from ospq_export.runs.manifest import OutlierRecord, SliceRecord

_SERIES = SERIES[:4]
styled = mpl.rc_context(
    {**STYLE, "font.family": "sans-serif", "font.size": 8.5, "lines.linewidth": 1.3, "lines.markersize": 3.5}
)
_NARROW, _HEIGHT = 4.6, 2.7
_MOST_TICKS, _LONGEST_NAME = 40, 26
_FEW_DECADES, _EVERY_LEVEL, _SHORT_LABEL = 100, 17, 20


def svg(figure: Figure, name: str, *, legend: bool = False) -> str:
    """The figure for the page, with a legend above it where that is asked for."""
    if legend:
        longest = max(len(text) for axes in figure.axes for text in axes.get_legend_handles_labels()[1])
        figure.legend(loc="outside upper left", ncols=1 if longest > _SHORT_LABEL else 2)
    return drawing(figure, name)


def _axes(width: float = _NARROW, height: float = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def plain_log(axis: Axis) -> None:
    """Labels of a logarithmic axis as plain text at powers of ten; at 2 and 5 of each decade, too, where there are few."""
    low, high = axis.get_view_interval()

    def between(value: float, _: object) -> str:
        leading = round(value / 10 ** math.floor(math.log10(value)))
        return f"{value:g}" if high / low < _FEW_DECADES and leading in (2, 5) else ""

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(between))


def tall(count: int, rows: float = 0.17) -> float:
    """Height of a plot with a row for each of `count` names."""
    return 1.1 + rows * min(max(count, 4), _MOST_TICKS)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Names from top to bottom, as a network is read; some of them where there are many."""
    step = -(-len(names) // _MOST_TICKS)
    at = range(0, len(names), step)
    shown = [n if len(n) <= _LONGEST_NAME else f"...{n[3 - _LONGEST_NAME :]}" for n in names]
    axes.set_yticks(list(at), [shown[i] for i in at], fontsize=7.5)
    axes.set_ylim(len(names) - 0.4, -0.6)


@styled
def margin_plots(comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
    """(reference, plot) of images and flipped images by the reference's margin, of every reference with a flip."""
    groups: dict[str, list[Comparison]] = {}
    for c in comparisons:
        if any(c.margins.flips):
            groups.setdefault(c.reference, []).append(c)
    return [(reference, _margin_plot(same)) for reference, same in groups.items()]


def _margin_plot(comparisons: Sequence[Comparison]) -> str:
    """One reference's margins, and which of them each execution flips; executions with the same flips share a line."""
    figure, axes = _axes()
    found, reference = comparisons[0].margins, comparisons[0].reference
    edges = np.asarray(found.edges)
    axes.stairs(found.images, edges, fill=True, color=FILL, label="all images")
    lines: dict[tuple[int, ...], list[str]] = {}
    for c in comparisons:
        lines.setdefault(tuple(c.margins.flips), []).append(c.deployed)
    for (flips, names), colour in zip(lines.items(), cycle(_SERIES)):
        flipped = f"flipped by {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        axes.stairs(flips, edges, color=colour, lw=1.6, fill=len(lines) == 1, label=flipped)
    axes.set(xscale="log", yscale="log", ylabel="images")
    axes.set_xlabel(f"margin of {reference} (first minus second logit)")
    axes.set_ylim(0.6, max(found.images) * 2)
    plain_log(axes.xaxis)
    plain_log(axes.yaxis)
    return svg(figure, f"images and flipped images by the margin of {reference}", legend=True)


@styled
def sqnr_plot(location: Location) -> str:
    """Signal-to-quantization-noise ratio at the end of every slice, dB; slices from top to bottom."""
    series = (
        ("price of quantization (float / fake-quant)", "quantization", "o-", _SERIES[0]),
        ("deployed, running freely", "deployed", "s-", _SERIES[1]),
        ("noise floor (float32 / float64)", "floor", "x--", _SERIES[2]),
        ("deployed, given equal inputs", "equal_input", "^-", _SERIES[3]),
    )
    figure, axes = _axes(height=tall(len(location.slices)) + 0.5)
    rows = range(len(location.slices))
    for label, key, marker, colour in series:
        values = [getattr(s, key) for s in location.slices]
        axes.plot([np.nan if v is None else v for v in values], rows, marker, color=colour, label=label)
    axes.axvline(location.min_sqnr, color=INK, lw=0.8, ls=":", label="limit, given equal inputs")
    name_rows(axes, [s.name for s in location.slices])
    axes.set(xlabel="dB")
    return svg(figure, f"signal-to-noise ratio at the end of every slice of {location.deployed}", legend=True)


@styled
def outlier_plot(profile: Sequence[OutlierRecord], slices: Sequence[SliceRecord]) -> str:
    """The float network's outliers across depth; vertical lines where the chosen slices end."""
    figure = Figure(figsize=(_NARROW, 3.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for kind, marker, colour, label in (
        ("cut", "o", _SERIES[0], "cut point"),
        ("quantizer", "x", _SERIES[1], "quantizer's input"),
    ):
        at = [i for i, r in enumerate(profile) if r.kind == kind]
        chosen = [profile[i] for i in at]
        upper.semilogy(at, [r.max_over_std for r in chosen], marker, color=colour, label=label)
        lower.plot(at, [100 * r.largest_share for r in chosen], marker, color=colour)
    ends = {s.end for s in slices}
    for i, record in enumerate(profile):
        if record.kind == "cut" and record.name in ends:
            upper.axvline(i, color=INK, lw=0.6, ls=":")
            lower.axvline(i, color=INK, lw=0.6, ls=":")
    upper.set(ylabel="max / std")
    plain_log(upper.yaxis)
    lower.set(xlabel="tensor, in graph order", ylabel="% in largest 0.1 %")
    for axes in (upper, lower):
        axes.grid(visible=False, axis="x")
    return svg(figure, "outliers of the float network by depth", legend=True)


@styled
def histogram_plot(
    worst: Sequence[QuantizerComparison | WeightComparison], formats: Mapping[str, Format], name: str
) -> str:
    """How often each level occurs, of a few quantizers; levels are drawn at equal distances, however far apart they lie."""
    figure = Figure(figsize=(_NARROW, 1.25 * len(worst) + 0.2), layout="constrained")
    grid: Any = figure.subplots(len(worst), 1, squeeze=False)
    for axes, quantizer in zip(grid[:, 0], worst, strict=True):
        counts = np.asarray(quantizer.histogram)
        used = np.flatnonzero(counts)
        low, high = (int(used[0]), int(used[-1])) if len(used) else (0, len(counts) - 1)
        levels, middle = formats[quantizer.name].levels.all, len(counts) // 2
        edges = np.arange(low, high + 2) - middle - 0.5
        # Places are counted from zero: every 8th one of E4M3 is a power of two.
        step = 1 if len(edges) <= _EVERY_LEVEL else 1 << (len(edges) // 9).bit_length()
        axes.xaxis.set_major_locator(MultipleLocator(step))
        axes.xaxis.set_major_formatter(FuncFormatter(partial(_level, levels)))
        axes.stairs(counts[low : high + 1] / max(counts.sum(), 1) * 100, edges, fill=True, color=_SERIES[0])
        axes.set_title(f"{quantizer.name}, {quantizer.sqnr:.1f} dB", fontsize=8, loc="left")
        axes.set(ylabel="%", yscale="log")
        plain_log(axes.yaxis)
        axes.grid(visible=False, axis="x")
    grid[-1, 0].set(xlabel="level")
    return svg(figure, f"histograms of {name}")


def _level(levels: Sequence[float], place: float, _: object) -> str:
    """The level at a place counted from zero, where there is one."""
    index = round(place) + len(levels) // 2
    return f"{levels[index]:.3g}" if 0 <= index < len(levels) else ""


@styled
def scale_plot(weights: Sequence[WeightComparison]) -> str | None:
    """Block scales of all weights as they are stored, by powers of two; None where no weight has any."""
    counts = sum((Counter(w.scales) for w in weights), Counter[int]())
    if not counts:
        return None
    figure, axes = _axes(height=1.7)
    low, high = min(counts), max(counts)
    shares = [100 * counts[k] / counts.total() for k in range(low, high + 1)]
    axes.stairs(shares, range(low, high + 2), fill=True, color=_SERIES[0])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda k, _: f"{2.0**k:.3g}"))
    axes.set(xlabel="block scale as stored", ylabel="%", yscale="log")
    plain_log(axes.yaxis)
    axes.grid(visible=False, axis="x")
    return svg(figure, "block scales")


@styled
def error_plot(slices: Sequence[SliceRecord]) -> str:
    """Error of every slice before and after its reconstruction."""
    figure, axes = _axes(height=tall(len(slices)))
    at = np.arange(len(slices))
    before = np.maximum([s.error_before for s in slices], 1e-12)
    after = np.maximum([s.error_after for s in slices], 1e-12)
    axes.hlines(at, after, before, color=FAINT, lw=2)
    axes.semilogx(before, at, "o", color=_SERIES[2], label="nearest rounding", markersize=5)
    axes.semilogx(after, at, "o", color=_SERIES[0], label="reconstructed", markersize=4)
    name_rows(axes, [s.name for s in slices])
    axes.set(xlabel="squared error / variance")
    plain_log(axes.xaxis)
    axes.grid(visible=False, axis="y")
    return svg(figure, "error of every slice before and after reconstruction", legend=True)


@styled
def loss_plot(slices: Sequence[SliceRecord]) -> str | None:
    """Reconstruction loss over the iterations, one line per slice; None where nothing was learned."""
    learned = [s for s in slices if len(s.losses) > 1]
    if not learned:
        return None
    figure, axes = _axes()
    for i, piece in enumerate(learned):
        at = np.linspace(0, piece.iterations, len(piece.losses))
        # Early slices faint, late ones strong: a legend of dozens of lines says nothing.
        alpha = 0.25 + 0.75 * i / max(len(learned) - 1, 1)
        axes.plot(at, piece.losses, color=_SERIES[0], alpha=alpha, lw=1)
    medians = [float(np.median(s.losses)) for s in learned]
    if min(medians) > 0 and max(medians) / min(medians) > _FEW_DECADES:
        axes.set(yscale="log")
        plain_log(axes.yaxis)
    axes.set(xlabel="iteration", ylabel="loss")
    return svg(figure, "reconstruction loss over the iterations")


@styled
def class_plot(rows: Sequence[tuple[str, float | None, float | None]]) -> str:
    """Change of Top-1 per class, points: (class, by quantization, by deployment)."""
    figure, axes = _axes(height=0.9 + 0.24 * len(rows))
    at = np.arange(len(rows))
    for column, offset, colour, label in (
        (1, -0.18, _SERIES[0], "quantization"),
        (2, 0.18, _SERIES[1], "deployment"),
    ):
        values: list[Any] = [row[column] for row in rows]
        if any(v is not None for v in values):
            axes.barh(at + offset, [v or 0 for v in values], 0.34, color=colour, label=label)
    axes.axvline(0, color=INK, lw=0.8)
    axes.set_yticks(at, [row[0][:_LONGEST_NAME] for row in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="change of Top-1, points")
    return svg(figure, "change of Top-1 by class", legend=True)
