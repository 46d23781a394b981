"""The tables of the report as plain text, once for the page and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ospq_export.tasks.accuracy import ERROR
from ospq_export.validate.executions.chosen import PREFIX
from ospq_export.validate.executions.table import TABLE
from ospq_export.validate.report.model import BackendResult, Report, number, parity_of, points, score_names


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        header: what stands above it.
        kind: "name", "text", "number", "mark" or "hash"; on the page, an "aside" is small print in the cell before it.
        term: its entry in the glossary.
    """

    header: str
    kind: str = "number"
    term: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text, the first column of which names them.

    Attributes:
        anchor: of the page.
        title: the heading.
        columns: from left to right.
        rows: a text for each column.
        note: what explains them, below.
    """

    anchor: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def places(self) -> list[int]:
        """Of the columns that are no small print."""
        return [i for i, c in enumerate(self.columns) if c.kind != "aside"]

    def aside(self, place: int) -> Column | None:
        """The small print of a column."""
        after = self.columns[place + 1 : place + 2]
        return after[0] if after and after[0].kind == "aside" else None

    def filled(self) -> Table:
        """The table without columns in which no row says anything."""
        said = [i for i in range(len(self.columns)) if any(row[i] for row in self.rows)]
        rows = [[row[i] for i in said] for row in self.rows]
        return replace(self, columns=[self.columns[i] for i in said], rows=rows)


def name(header: str) -> Column:
    """A column of names as files and code have them."""
    return Column(header, "name")


def text(header: str) -> Column:
    """A column of words."""
    return Column(header, "text")


def criteria(report: Report) -> Table:
    """What the verdicts rest on; executions of which the same is said share a row."""
    columns = (
        name("execution"),
        Column("outcome", "mark"),
        text("criterion"),
        text("decided by"),
        text("finding"),
    )
    named: dict[tuple[str, str, str, str], list[str]] = {}
    for c in report.verdict.criteria:
        named.setdefault((c.outcome, _CRITERIA.get(c.name, c.name), c.by, c.text), []).append(c.deployed)
    rows = [(", ".join(dict.fromkeys(who)), *said) for said, who in named.items()]
    limits, sure = report.thresholds, f"{100 * report.thresholds.confidence:g} %"
    note = (
        f"Allowed: {points(limits.max_drop)} lost against float; against the reference at least {limits.min_agreement:g} % "
        f"equal predictions, flips inside the noise aside, and {points(limits.max_top1_difference)} of Top-1. Bounds have "
        f"{sure} confidence each; tests against the noise floor have the level {limits.significance:g}."
    )
    return Table("criteria", "What the verdicts rest on", columns, rows, note)


_CRITERIA = {
    "top1": "Top-1",
    "finite": "numbers are finite",
    "compared": "has a reference",
    "accuracy": "accuracy kept",
    "rows": "same in every row",
    "repeats": "same at every call",
}


def executions(report: Report) -> Table:
    """Every execution of this run: what it is, its scores, and how it agrees with its reference."""
    scores, parity = score_names(report), parity_of(report)
    rated = [score for score in scores if any(score in b.intervals for b in report.backends)]
    cells = list(dict.fromkeys(column for found in parity.values() for column in found))
    columns = [name("execution"), Column("what it is", "aside")]
    for score in scores:
        columns += [Column(score, term=_TERMS.get(score, ""))]
        columns += [Column("95 % interval", "aside", "interval")] if score in rated else []
    columns += [Column(cell, term=_TERMS.get(cell, "")) for cell in cells]
    tested = {c.deployed: f"{c.mcnemar.p_value:.3g}" for c in report.comparisons if c.mcnemar is not None}
    columns += [Column("McNemar p", term="mcnemar")] if tested else []
    columns += [Column("images/s")]
    rows = []
    for b in report.backends:
        row = [b.name, described(b)]
        for score in scores:
            row += [number(b.scores.get(score))] + ([_interval(b, score)] if score in rated else [])
        row += [parity.get(b.name, {}).get(cell, "") for cell in cells]
        row += [tested.get(b.name, "")] if tested else []
        rows.append([*row, f"{b.images_per_second:.0f}"])
    references = " and ".join(dict.fromkeys(c.reference for c in report.comparisons))
    note = f"Percent. Columns after the scores compare with {references}. " if references else "Percent. "
    note += "Images per second are those of this pass, not a benchmark."
    return Table("executions", "Every execution", columns, rows, note)


_TERMS = {
    "Top-1": "top1",
    "Top-5": "top1",
    "expected calibration error (ECE)": "ece",
    "k-NN Top-1": "knn",
    "mIoU": "miou",
    "Δ Top-1": "point",
    "Δ k-NN Top-1": "point",
    "Δ mIoU": "point",
    "agree": "agreement",
    "error %": "error",
    "flips": "flip",
}


def _interval(b: BackendResult, score: str) -> str:
    return f"{b.intervals[score].low:.2f} to {b.intervals[score].high:.2f}" if score in b.intervals else ""


def described(b: BackendResult) -> str:
    """What an execution is, in words: its file or its role, and what runs it."""
    known = TABLE.get(b.name.removeprefix(PREFIX))
    off = ", graph optimisations off" if b.detail.get("optimisations") == "off" else ""
    what = b.detail.get("file") or (b.name if known is None else str(known.role).partition(",")[0])
    return f"{what}, in {b.detail.get('runtime', 'an unknown runtime')}{off}"


def against_float(report: Report) -> Table:
    """What every deployed execution lost."""
    limits, of_errors = report.thresholds, any(a.measure == ERROR for a in report.accuracy)
    columns = (
        name("execution"),
        name("reference"),
        text("measure"),
        *(Column(header) for header in ("float", "deployed")),
        Column("points lost", term="point"),
        *(Column(header, term="bound") for header in ("at least", "at most")),
        *(
            Column(header)
            for header in ("images lost", "images gained", "error, %" if of_errors else "differing, %")
        ),
    )
    rows = [
        (
            a.deployed,
            a.reference,
            a.measure,
            *(number(x) for x in (a.reference_score, a.deployed_score, a.drop, a.low, a.high)),
            *("" if x is None else str(x) for x in (a.lost, a.gained)),
            number(a.share),
        )
        for a in report.accuracy
    ]
    allowed = f"{limits.max_error:g} %" if of_errors else points(limits.max_drop)
    note = f"One-sided bounds, each with {100 * limits.confidence:g} % confidence; allowed: {allowed}."
    if not (report.labelled or of_errors):
        note += " Without labels, the share of differing predictions bounds what was lost."
    return Table("against-float", "Against the float network", columns, rows, note)


def noise_floor(report: Report) -> Table:
    """How far one network is from itself."""
    columns = (
        name("network"),
        text("executed otherwise"),
        *(Column(h) for h in ("images", "flips", "mean logit difference", "largest change of a margin")),
        Column("largest error, %"),
    )
    rows = [
        (
            v.reference,
            f"{v.name}: not run, {v.skipped}" if v.skipped else v.name,
            f"{v.images:,}",
            str(v.flips),
            f"{v.mean_logit_difference:.2g}",
            f"{v.margin_change:.2g}",
            f"{100 * max(e.largest for e in v.errors.values()):.3g}" if v.errors else "",
        )
        for v in (report.floor.variations if report.floor else ())
    ]
    note = "One quantized network, computed in other orders or types: what differs here is rounding, and no fault of a file."
    return Table("noise-floor", "Noise floor", columns, rows, note)


def latency(report: Report) -> Table:
    """Medians by execution and batch size."""
    sizes = sorted({x.batch_size for x in report.latencies})
    found = {(x.name, x.batch_size): x for x in report.latencies}
    columns = [name("execution")]
    graphs = any(x.graph_ms is not None for x in report.latencies)
    for size in sizes:
        columns += [Column(f"batch {size}, ms"), Column("90th percentile", "aside"), Column("images/s")]
        columns += [Column("GPU alone, ms")] if graphs else []
    rows = []
    for who in dict.fromkeys(x.name for x in report.latencies):
        row = [who]
        for size in sizes:
            x = found[who, size]
            row += [f"{x.median_ms:.2f}", f"{x.p90_ms:.2f}", f"{x.images_per_second:.0f}"]
            row += [number(x.graph_ms)] if graphs else []
        rows.append(row)
    pieces = [
        f" {x.name} takes a batch of {x.batch_size} in {x.pieces} pieces."
        for x in report.latencies
        if x.pieces > 1
    ]
    alone = " GPU alone: replayed as a CUDA graph, no copies." if graphs else ""
    note = f"Medians of whole batches after a warm-up, host to host, on {report.provenance.machine}."
    note = f"{note}{alone}{''.join(pieces)}"
    return Table("latency", "Latency", columns, rows, note)


def baseline(report: Report) -> Table:
    """This run against another one, image by image."""
    other = report.baseline
    score = next(iter(score_names(report)), "score")
    columns = (
        name("execution"),
        Column(f"Δ {score}", term="point"),
        Column("agree", term="agreement"),
        *(Column(header) for header in ("right here only", "right there only")),
        Column("McNemar p", term="mcnemar"),
    )
    rows = [
        (
            c.deployed,
            number(c.score_difference, "%+.2f"),
            number(c.agreement),
            *(("", "", "") if c.mcnemar is None else
              (str(c.mcnemar.only_deployed), str(c.mcnemar.only_reference), f"{c.mcnemar.p_value:.3g}")),
        )
        for c in (other.comparisons if other else ())
    ]  # fmt: skip
    title = f"Against {other.run} ({other.recipe})" if other else ""
    return Table(
        "baseline",
        title,
        columns,
        rows,
        "The other run, on the same images. The verdicts do not depend on it.",
    )
