"""What the report begins with: may this be deployed, what is it, what does it lose, weigh and take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ospq_export.engines.targets import TARGETS
from ospq_export.runs.files import FLOAT_ONNX, checked_file
from ospq_export.tasks.accuracy import ERROR, AccuracyChange
from ospq_export.validate.executions.table import (
    FAKE_QUANT,
    FAKE_QUANT_FP16,
    FLOAT,
    TABLE,
    UNOPTIMIZED,
    Execution,
    Role,
    Runtime,
    float_beside,
)
from ospq_export.validate.latency import Latency
from ospq_export.validate.report.model import BackendResult, Report, points
from ospq_export.validate.verdict import Judgement, Outcome, worst_of

if TYPE_CHECKING:
    from ospq_export.runs.manifest import Manifest

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_DECISIONS = {0: "Ready to deploy", 1: "Do not deploy it as it is", 3: "Not decided yet"}
_ANSWERS: dict[Outcome, str] = {"met": "Yes", "missed": "No", "open": "Open"}
_CLOSE = 1.05
_FAMILIES = {"integer": "INT8"}


@dataclass(frozen=True)
class Card:
    """A verdict in plain words: the question, its outcome and answer, what that means, what it rests on, what to do next."""

    question: str
    outcome: Outcome
    answer: str
    meaning: str
    finding: str
    advice: str


@dataclass(frozen=True)
class Tile:
    """A figure of the float network beside the deployed one's; `before` is empty where there is only one."""

    title: str
    before: str
    after: str
    note: str


@dataclass(frozen=True)
class Summary:
    """The first screen.

    Attributes:
        outcome: of both verdicts.
        decision: the same in words.
        cards: one for each verdict.
        tiles: accuracy, size, latency; those that are known.
        facts: what was validated, where and when.
        notes: what has to be known besides.
    """

    outcome: Outcome
    decision: str
    cards: Sequence[Card]
    tiles: Sequence[Tile]
    facts: dict[str, str]
    notes: Sequence[str]


def summarize(report: Report, manifest: Manifest | None) -> Summary:
    """The first screen of a report; `manifest` is None for files that are no run's."""
    verdict, best = report.verdict, _deployed(report)
    tiles = (_accuracy(report), _size(report, best), _latency(report, best))
    return Summary(
        outcome=worst_of(verdict.faithful, verdict.accuracy),
        decision=_DECISIONS[verdict.exit_status],
        cards=(
            _card("Is the deployment faithful?", verdict.faithful, _same(report)),
            _card("Is accuracy kept?", verdict.accuracy, _loses(report)),
        ),
        tiles=[tile for tile in tiles if tile is not None],
        facts=_facts(report, manifest),
        notes=verdict.text[2:],
    )


def _card(question: str, judged: Judgement, meanings: dict[Outcome, str]) -> Card:
    answer, finding = _ANSWERS[judged.outcome], judged.text.partition(": ")[2]
    return Card(question, judged.outcome, answer, meanings[judged.outcome], finding, judged.advice)


def _same(report: Report) -> dict[Outcome, str]:
    """What it means to be faithful, not to be, and not to know."""
    references = {c.reference for c in report.comparisons}
    if references & {FAKE_QUANT, FAKE_QUANT_FP16} or not references:
        subject, wanted = "the deployed file", "the calibrated network's results"
    elif UNOPTIMIZED in references:
        subject, wanted = (
            "the runtime, with its graph optimisations,",
            "what the deployed file says without them",
        )
    else:
        subject, wanted = "the float file", "the float network's results"
    return {
        "met": f"{subject.capitalize()} gives {wanted}.",
        "missed": f"{subject.capitalize()} does not give {wanted}.",
        "open": f"Too early to say whether {subject} gives {wanted}.",
    }


def _loses(report: Report) -> dict[Outcome, str]:
    limits = report.thresholds
    allowed = f"the {points(limits.max_drop)} allowed"
    subject, more, less = (
        "it",
        "loses more against the float network than",
        "loses no more against the float network than",
    )
    if any(a.measure == ERROR for a in report.accuracy):
        allowed, subject = f"the {limits.max_error:g} % allowed", "the output"
        more, less = "is further from the float network's than", "is no further from the float network's than"
    return {
        "met": f"{subject.capitalize()} {less} {allowed}.",
        "missed": f"{subject.capitalize()} {more} {allowed}.",
        "open": f"Too early to say whether {subject} {more} {allowed}.",
    }


def _deployed(report: Report) -> BackendResult | None:
    """The execution that stands for the deployment: a device, a server or an engine before the runtimes, optimised before not."""
    judged = {a.deployed for a in report.accuracy} | {c.deployed for c in report.comparisons}
    return min(
        (b for b in report.backends if b.name in judged), key=lambda b: _rank(TABLE[b.name]), default=None
    )


def _rank(execution: Execution) -> tuple[bool, bool, bool, bool, bool]:
    return (
        execution.role is not Role.DEPLOYED,
        execution.runtime not in (Runtime.RECORD, Runtime.SERVER, Runtime.ENGINE),
        execution.provider is None,
        not execution.optimize,
        execution.float_type == "fp16",
    )


def _accuracy(report: Report) -> Tile | None:
    """Of the execution that lost most."""
    if not report.accuracy:
        return None
    worst = max(report.accuracy, key=_loss)
    several = len({_loss(a) for a in report.accuracy}) > 1
    which = f"; {worst.deployed}, the worst of {len(report.accuracy)} executions" if several else ""
    if worst.reference_score is None or worst.deployed_score is None or worst.drop is None:
        title = "Error" if worst.measure == ERROR else "Changed predictions"
        said = (
            f"of {worst.images:,} images, against float"
            if worst.measure != ERROR
            else "on average, against float"
        )
        bound = f", at most {worst.high:.2f} %" if worst.measure == ERROR else ", without labels"
        return Tile(title, "", f"{worst.share:.2f} %", f"{said}{bound}{which}")
    change = f"{abs(worst.drop):.2f} points {'lost' if worst.drop >= 0 else 'gained'}"
    bound = f"at most {worst.high:.2f} lost" if worst.high >= 0 else f"at least {-worst.high:.2f} gained"
    if worst.low is not None and worst.low > report.thresholds.max_drop:
        bound = f"at least {worst.low:.2f}"
    sure = f"{bound} ({100 * report.thresholds.confidence:g} % confidence)"
    return Tile(
        f"Accuracy ({worst.measure})",
        f"{worst.reference_score:.2f} %",
        f"{worst.deployed_score:.2f} %",
        f"{change}, {sure}{which}",
    )


def _loss(change: AccuracyChange) -> float:
    return change.share if change.drop is None else change.drop


def _size(report: Report, best: BackendResult | None) -> Tile | None:
    ran = "" if best is None else best.detail.get("file", "")
    file, sizes = checked_file(ran), report.provenance.file_bytes
    known = None if best is None or file != ran else best.detail.get("bytes")
    deployed = int(known) if known else sizes.get(file)
    if deployed is None:
        return None
    title, before = "Size of the file", _float_bytes(report)
    if not before:
        return Tile(title, "", shown_bytes(deployed), file)
    change = _times(before, deployed, "as large", "smaller", "larger")
    return Tile(title, shown_bytes(before), shown_bytes(deployed), f"{file}: {change}")


def _float_bytes(report: Report) -> int:
    """Size of the float file, executed or not; 0 where there is none."""
    ran = [b for b in report.backends if b.name in TABLE and TABLE[b.name].role is Role.FLOAT_FILE]
    sizes = [
        int(b.detail["bytes"]) for b in ran if TABLE[b.name].float_type == "fp32" and "bytes" in b.detail
    ]
    return max(sizes) if sizes else report.provenance.file_bytes.get(FLOAT_ONNX, 0)


def _times(before: float, after: float, same: str, less: str, more: str) -> str:
    ratio = before / max(after, 1e-12)
    if _CLOSE > ratio > 1 / _CLOSE:
        return f"about {same}"
    return f"{ratio:.1f} times {less}" if ratio > 1 else f"{1 / ratio:.1f} times {more}"


def _latency(report: Report, best: BackendResult | None) -> Tile | None:
    found = {x.name: x for x in sorted(report.latencies, key=lambda x: x.batch_size, reverse=True)}
    after = found.get("" if best is None else best.name)
    ran = "" if best is None else best.detail.get("file", "")
    if after is None or checked_file(ran) != ran:
        # The speed of a file that stands in for another says nothing.
        return None
    before = _float_latency(found, after.name)
    title = f"Latency (batch {after.batch_size})"
    if before is None:
        return Tile(title, "", f"{after.median_ms:.3g} ms", after.name)
    change = _times(before.median_ms, after.median_ms, "as fast", "faster", "slower")
    note = f"{change}: {after.name} against {before.name}"
    return Tile(title, f"{before.median_ms:.3g} ms", f"{after.median_ms:.3g} ms", note)


def _float_latency(found: dict[str, Latency], name: str) -> Latency | None:
    """The float network's, in the same runtime where that was timed; a device times the float file itself."""
    files = (n for n in found if n in TABLE and TABLE[n].role is Role.FLOAT_FILE)
    return next((found[n] for n in (*float_beside(name, found), *files)), found.get(FLOAT))


def _facts(report: Report, manifest: Manifest | None) -> dict[str, str]:
    held = report.provenance
    facts = {"Float": held.model, "Deployed": held.recipe}
    if manifest is not None:
        facts = {
            "Network": held.model,
            "Recipe": f"{held.recipe}: {held.formats}",
            "Hardware": _hardware(manifest),
        }
    facts["Validated in"] = "; ".join(_places(report))
    labels = "with labels" if report.labelled else "without labels"
    facts["Images"] = f"{report.images:,}, {labels}, task {report.task}"
    if manifest is not None:
        facts["Run"] = held.run
        facts["Input"] = " x ".join(map(str, manifest.data.input_size))
        facts["Input"] += f", the run takes {manifest.size_range}" if manifest.size_range else ""
    if held.date:
        facts["When"] = f"{held.date}, on {held.host}"
    return facts


def _hardware(manifest: Manifest) -> str:
    """Which GPUs multiply the run's formats."""
    families = list(dict.fromkeys(format_.family for format_ in manifest.formats().values()))
    spoken = " and ".join(_FAMILIES.get(family, family.upper()) for family in families)
    able = [target for target in TARGETS.values() if set(families) <= set(target.formats)]
    if not able:
        return f"{spoken}: no GPU known here multiplies it"
    if len(able) == len(TARGETS):
        return f"{spoken}: NVIDIA GPUs from {able[0].name.capitalize()} on"
    return f"{spoken}: NVIDIA {', '.join(target.name.capitalize() for target in able)}"


def _places(report: Report) -> list[str]:
    """Runtimes of the deployed executions, each with what it ran on."""
    judged = {a.deployed for a in report.accuracy} | {c.deployed for c in report.comparisons}
    found = []
    for b in report.backends:
        if b.name in judged:
            own = "CPU" not in b.detail.get("provider", "CPU")
            device = b.detail.get("device") or (b.detail["provider"] if own else report.provenance.machine)
            found.append(f"{b.detail.get('runtime', b.name)} on {device}")
    return list(dict.fromkeys(found))


def shown_bytes(count: int) -> str:
    """Bytes for people, "2.9 MB"."""
    for size, unit in _UNITS:
        if count >= size:
            return f"{count / size:.{2 if count < 10 * size else 1}f} {unit}"
    return f"{count} bytes"
