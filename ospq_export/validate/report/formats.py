"""Which operator has which format, what it loses, and what a search for formats tried: plots and a table."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from ospq_export.runs.allocation import Allocation, Attempt, read_allocation
from ospq_export.runs.files import ALLOCATION
from ospq_export.validate.report.drawing import FAINT, SERIES
from ospq_export.validate.report.plots import name_rows, plain_log, styled, svg, tall
from ospq_export.validate.report.tables import Column, Table, name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ospq_export.runs.manifest import Manifest
    from ospq_export.runs.run import Run

_WIDTH = 4.6


def allocation_of(run: Run) -> Allocation | None:
    """What a search for the run's formats found; None where there was none.

    Raises:
        InputError: it is damaged.
    """
    return read_allocation(run.file(ALLOCATION)) if ALLOCATION in run.manifest.files else None


def formats_by_operator(manifest: Manifest) -> dict[str, dict[str, float]]:
    """Bits of weight and activations by operator, in the order of the quantizers; none of what is left in float."""
    found: dict[str, dict[str, float]] = {}
    for record in manifest.quantizers:
        operator = record.name.rpartition(".")[0]
        found.setdefault(operator, {})[record.kind] = record.read_format().bits
    return found


@styled
def format_plot(manifest: Manifest, allocation: Allocation | None) -> str:
    """Bits of every operator's operands over depth; beside them what each of its formats loses alone, where that is known."""
    bits = formats_by_operator(manifest)
    taken = None if allocation is None or allocation.taken is None else allocation.attempts[allocation.taken]
    names = list(bits) if taken is None else list(taken.formats)
    figure = Figure(figsize=(_WIDTH, tall(len(names)) + 0.4), layout="constrained")
    parts: Any = figure.subplots(1, 1 if allocation is None else 2, sharey=True, squeeze=False)
    left, *right = parts[0]
    rows = range(len(names))
    for kind, marker, colour in (("weight", "o", SERIES[0]), ("activation", "x", SERIES[1])):
        left.plot([bits.get(n, {}).get(kind, np.nan) for n in names], rows, marker, color=colour, label=kind)
    name_rows(left, names)
    left.set(xlabel="bits", xlim=(1, 17))
    if allocation is not None:
        _losses(right[0], names, allocation, taken)
    return svg(figure, "formats over depth", legend=True)


def _losses(axes: Axes, names: list[str], allocation: Allocation, taken: Attempt | None) -> None:
    rows = range(len(names))
    for losses in allocation.losses.values():
        axes.semilogx([_seen(losses.get(n)) for n in names], rows, ".", color=FAINT)
    if taken is not None:
        own = [_seen(allocation.losses.get(f, {}).get(n)) for n, f in taken.formats.items()]
        axes.semilogx(own, rows, "o", color=SERIES[2], label="loss in its format")
    axes.set(xlabel="divergence, alone")
    plain_log(axes.xaxis)


def _seen(loss: float | None) -> float:
    return np.nan if loss is None or loss <= 0 else loss


@styled
def front_plot(allocation: Allocation) -> str | None:
    """What was tried: bits, or the share of FP16's time, against points lost; None where nothing was measured."""
    measured = [a for a in allocation.attempts if a.images]
    if not measured:
        return None
    timed = all(a.latency is not None for a in measured)
    figure = Figure(figsize=(_WIDTH, 2.7), layout="constrained")
    axes = figure.subplots()
    places = [(a.latency if timed else a.bits) or 0.0 for a in measured]
    lost = [_lost(a) for a in measured]
    reach = [max((a.high or 0.0) - value, 0.0) for a, value in zip(measured, lost, strict=True)]
    zero = np.zeros(len(reach))
    axes.errorbar(places, lost, np.array([zero, reach]), fmt="o", color=SERIES[0], capsize=2, label="tried")
    if allocation.taken is not None and (chosen := allocation.attempts[allocation.taken]).images:
        place = (chosen.latency if timed else chosen.bits) or 0.0
        axes.plot([place], [_lost(chosen)], "D", color=SERIES[2], markersize=7, label="taken")
    if allocation.budget.max_drop is not None:
        axes.axhline(allocation.budget.max_drop, color=SERIES[3], lw=1, ls="dashed", label="allowed")
    axes.set(xlabel="share of FP16's time" if timed else "bits on average", ylabel="points lost")
    return svg(figure, "what was tried", legend=True)


def _lost(attempt: Attempt) -> float:
    """Points; of images without labels, the share of other predictions."""
    return 100 * attempt.differing / attempt.images if attempt.drop is None else attempt.drop


def attempts(allocation: Allocation) -> Table:
    """The allocations that were tried."""
    rows = []
    for index, a in enumerate(allocation.attempts):
        if not a.images and index != allocation.taken:
            continue
        counts = ", ".join(f"{count} {kind}" for kind, count in Counter(a.formats.values()).most_common())
        latency = "" if a.latency is None else f"{a.latency:.2f}"
        drop = "" if a.drop is None else f"{a.drop:.2f}"
        high = "" if a.high is None else f"{a.high:.2f}"
        state = "taken" if index == allocation.taken else ""
        rows.append((counts, f"{a.bits:.2f}", latency, f"{a.loss:.2g}", drop, high, state))
    headers = ("bits", "share of FP16's time", "expected divergence", "points lost", "at most")
    columns = (name("operators"), *(Column(header) for header in headers), name("state"))
    images = max(a.images for a in allocation.attempts)
    note = "Bits are those of weights and activations, each weighed by the multiply-adds that read it."
    if images:
        note += f" Losses were measured on {images:,} images that were held out of the calibration."
    return Table("formats", "Formats that were tried", columns, rows, note)
