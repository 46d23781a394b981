"""The report in the terminal: the verdicts first, then the executions, then what is worth a line."""

from __future__ import annotations

from itertools import zip_longest

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ospq_export.validate.report.model import Report, image_lines, number, parity_of, score_names
from ospq_export.validate.report.summary import summarize
from ospq_export.validate.verdict import Outcome

_SHOWN_FLIPS, _SHOWN_SCORES = 5, 2
_STYLES: dict[Outcome, str] = {"met": "bold green", "missed": "bold red", "open": "bold yellow"}


def render(report: Report) -> Group:
    """The verdicts with what to do next, accuracy and size, the table of executions, flipped images, criteria."""
    said = [f"  {c.outcome}: {c.name} of {c.deployed}, by {c.by}: {c.text}" for c in report.verdict.criteria]
    parity = map(Text, [*_engine_lines(report), *_baseline_lines(report), *_flip_lines(report)])
    return Group(
        *verdict_lines(report),
        *_summary_lines(report),
        _table(report),
        *parity,
        *_left_out_lines(report),
        *map(Text, said),
    )


def verdict_lines(report: Report) -> list[Text]:
    """The first lines of every form of the report."""
    verdict = report.verdict
    styles = [_STYLES[judgement.outcome] for judgement in (verdict.faithful, verdict.accuracy)]
    return [Text(line, style=style) for line, style in zip_longest(verdict.text, styles, fillvalue="yellow")]


def _summary_lines(report: Report) -> list[Text]:
    """What to do next where something is left to do, and the figures of the first screen."""
    summary = summarize(report, None)
    lines = [Text(f"  next: {card.advice}") for card in summary.cards if card.outcome != "met"]
    for tile in summary.tiles:
        before = f"{tile.before} float, " if tile.before else ""
        lines.append(Text(f"  {tile.title.lower()}: {before}{tile.after} deployed; {tile.note}"))
    return lines


def _table(report: Report) -> Table:
    references = " and ".join(dict.fromkeys(c.reference for c in report.comparisons))
    compared = parity_of(report)
    scores = score_names(report)[:_SHOWN_SCORES]
    cells = list(dict.fromkeys(column for found in compared.values() for column in found))
    table = Table(
        title=f"{report.provenance.model}, {report.provenance.recipe}, {report.images} images",
        caption=f"percent; {', '.join(cells) or 'agreement'}: against {references or 'nothing'}",
    )
    for column in ("execution", *scores, *cells, "img/s"):
        table.add_column(column, justify="left" if column == "execution" else "right", no_wrap=True)
    for b in report.backends:
        parity = compared.get(b.name, {})
        row = [number(b.scores.get(name)) for name in scores] + [parity.get(name, "") for name in cells]
        table.add_row(b.name, *row, f"{b.images_per_second:.0f}")
    return table


def _engine_lines(report: Report) -> list[str]:
    """Which of a run's engines ran: there may be one per target."""
    ran = ((b.name, b.detail.get("file", "")) for b in report.backends)
    return [f"  {name} ran {file}" for name, file in ran if file.endswith(".engine")]


def _baseline_lines(report: Report) -> list[str]:
    if report.baseline is None:
        return []
    other, lines = report.baseline, []
    for c in other.comparisons:
        close = ", ".join(f"{o.name} {100 * o.mean_error:.3g} % off" for o in c.outputs)
        agreed = close if c.agreement is None else f"{c.agreement:.2f} % agreement"
        text = f"  {c.deployed}: {agreed} with {other.run} ({other.recipe})"
        if c.mcnemar is not None:
            text += (
                f", {c.score_difference:+.2f} points of Top-1 against it; right here only: {c.mcnemar.only_deployed}, "
                f"right there only: {c.mcnemar.only_reference}, McNemar p = {c.mcnemar.p_value:.3g}"
            )
        lines.append(text)
    return lines


def _flip_lines(report: Report) -> list[str]:
    lines = []
    for comparison in report.comparisons:
        for flip in comparison.flips[:_SHOWN_FLIPS]:
            label = f", label {flip.label}" if report.labelled else ""
            lines.append(
                f"  {comparison.deployed} flips {flip.id}: {flip.reference} (margin {flip.reference_margin:.3f}) -> "
                f"{flip.deployed} (margin {flip.deployed_margin:.3f}){label}"
            )
        if len(comparison.flips) > _SHOWN_FLIPS:
            lines.append(f"  ... and {len(comparison.flips) - _SHOWN_FLIPS} more, all in report.json")
    return lines


def _left_out_lines(report: Report) -> list[Text]:
    noted = image_lines(report)
    if report.skipped:
        shown = ", ".join(report.skipped[:_SHOWN_FLIPS])
        noted.insert(0, f"{len(report.skipped)} images could not be read: {shown}")
    lines = [Text(f"  {line}", style="yellow") for line in noted]
    left_out = report.executions_skipped.items()
    return [*lines, *(Text(f"  {name} left out: {why}", style="dim") for name, why in left_out)]
