"""The longer tables of the report: slices, outputs, flipped images, classes, files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ospq_export.tasks.comparison import Comparison, Flip
from ospq_export.validate.codes.records import Location
from ospq_export.validate.report.model import Report
from ospq_export.validate.report.tables import Column, Table, name, text

LISTED_FLIPS, LISTED_CLASSES = 200, 20
ClassRow = tuple[str, float | None, float | None]


def slices(location: Location) -> Table:
    """Signal-to-noise ratios at the end of every slice."""
    headers = ("float / fake-quant", "noise floor", "fake-quant / deployed", "with equal inputs")
    rows = [
        (
            s.name,
            *("" if x is None else f"{x:.1f}" for x in (s.quantization, s.floor, s.deployed, s.equal_input)),
        )
        for s in location.slices
    ]
    note = (
        f"Signal-to-quantization-noise ratio (SQNR) at the end of every slice, dB, on {location.images} images; 200 stands "
        f"for no difference. {diverges(location)}"
    )
    title = f"Slices of {location.deployed}"
    return Table(
        f"slices-{location.deployed}",
        title,
        (name("slice"), *(Column(h, term="sqnr") for h in headers)),
        rows,
        note,
    )


def diverges(location: Location) -> str:
    """Where a file parts from the fake-quantized network, in a sentence."""
    if location.first_diverging:
        return f"The first slice that diverges is {location.first_diverging}."
    return "No slice diverges: with equal inputs every code is the fake-quantized network's, but at rounding edges."


def outputs(report: Report) -> Table:
    """Errors of outputs that are no logits of an image."""
    headers = ("mean error, %", "largest", "noise", "images beyond", "mean cosine")
    columns = (
        name("execution"),
        name("reference"),
        name("output"),
        *(Column(h) for h in headers),
        name("worst image"),
    )
    quantization = [report.quantization] if report.quantization else []
    rows = [
        (
            c.deployed,
            c.reference,
            f"{o.name} (holds {o.holds})" if o.holds else o.name,
            f"{100 * o.mean_error:.3g}",
            f"{100 * o.max_error:.3g}",
            "" if o.noise is None else f"{100 * o.noise:.3g}",
            "" if o.beyond is None else str(o.beyond),
            f"{o.mean_cosine:.5f}",
            o.worst[0].id if o.worst else "",
        )
        for c in [*report.comparisons, *quantization]
        for o in c.outputs
    ]
    note = (
        "Relative error: the norm of the difference over the norm of the reference, image by image. "
        "Noise is twice the largest error in the noise floor."
    )
    return Table("outputs", "Errors of the outputs", columns, rows, note)


@dataclass(frozen=True)
class Flips:
    """The flips of executions that flip the same images in the same way.

    Attributes:
        deployed: their names.
        flips: all.
        names: of the classes.
    """

    deployed: Sequence[str]
    flips: Sequence[Flip]
    names: Sequence[str]

    @property
    def listed(self) -> Sequence[Flip]:
        """Those that are shown."""
        return self.flips[:LISTED_FLIPS]

    def name(self, label: int) -> str:
        """A class's name."""
        return class_name(self.names, label)

    def kind(self, flip: Flip) -> str:
        """What the flip did to the prediction."""
        if flip.label < 0:
            return ""
        if flip.deployed == flip.label:
            return "fixed"
        return "lost" if flip.reference == flip.label else "wrong both times"

    def table(self, place: int) -> Table:
        """A row for each of them."""
        columns = (
            name("image"), text("label"), text("reference"), Column("margin", term="margin"),
            text("deployed"), Column("its margin", term="margin"), text("effect"),
        )  # fmt: skip
        rows = [
            (f.id, self.name(f.label), self.name(f.reference), f"{f.reference_margin:.4f}",
             self.name(f.deployed), f"{f.deployed_margin:.4f}", self.kind(f))
            for f in self.listed
        ]  # fmt: skip
        left = len(self.flips) - len(rows)
        note = f"The other {left:,} are in report.json." if left else ""
        title = f"Flipped by {' and '.join(self.deployed)}: {len(self.flips):,}"
        return Table(f"flips-{place}", title, columns, rows, note)


def flips_of(report: Report) -> list[Flips]:
    """All flips; executions with the same ones are named together."""
    groups: dict[tuple[tuple[str, int, int], ...], list[Comparison]] = {}
    for c in report.comparisons:
        if c.flips:
            groups.setdefault(tuple((f.id, f.reference, f.deployed) for f in c.flips), []).append(c)
    return [Flips([c.deployed for c in same], same[0].flips, report.class_names) for same in groups.values()]


def class_name(names: Sequence[str], label: int) -> str:
    """A class's name, or its index; nothing for an image without a label."""
    if label < 0:
        return ""
    return names[label] if label < len(names) else str(label)


def class_rows(report: Report) -> list[ClassRow]:
    """(class, change by quantization, change by the deployment that changes it most), the most changed first; points."""
    quantized = {c.label: c for c in report.quantization.classes} if report.quantization else {}
    deployed: dict[int, float] = {}
    for change in (c for comparison in report.comparisons for c in comparison.classes):
        points = change.deployed - change.reference
        deployed[change.label] = max(deployed.get(change.label, 0.0), points, key=abs)
    rows = []
    for label in sorted({*quantized, *deployed}):
        by_bits = quantized[label].deployed - quantized[label].reference if label in quantized else None
        rows.append((class_name(report.class_names, label), by_bits, deployed.get(label)))
    return sorted(rows, key=lambda r: -max(abs(r[1] or 0), abs(r[2] or 0)))


def classes(rows: Sequence[ClassRow]) -> Table:
    """The classes whose Top-1 changed most."""
    shown = rows[:LISTED_CLASSES]
    which = "All classes, the most changed first"
    if len(rows) > len(shown):
        which = f"The {len(shown)} most changed of {len(rows)} classes"
    columns = (text("class"), Column("by quantization"), Column("by deployment"))
    cells = [(who, *("" if x is None else f"{x:+.2f}" for x in changes)) for who, *changes in shown]
    note = (
        f"Change of Top-1 in points. {which}. Quantization: float to fake-quantized. Deployment: the execution that changes the "
        "class most."
    )
    return Table("classes", "Classes", columns, cells, note)


def files(report: Report) -> Table:
    """The files with their hashes."""
    from ospq_export.validate.report.summary import shown_bytes

    held = report.provenance
    rows = [(file, shown_bytes(held.file_bytes[file]), digest) for file, digest in held.files.items()]
    return Table("files", "Files", (name("file"), Column("size"), Column("SHA-256", "hash")), rows)
