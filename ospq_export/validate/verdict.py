"""The two verdicts: is the deployment faithful, and is accuracy kept? Each is shown, refuted, or not decided by so few images.

*Faithful* holds the deployed file against the fake-quantized network, *kept* against the float network, on the same images. A
criterion is `met` where the one-sided bound of its figure, at the confidence asked for, lies within what is allowed,
`missed` where the other bound lies outside, and `open` between the two. The statistics are in docs/statistics.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from ospq_export.recipes import Recipe
from ospq_export.tasks.statistics import Record

Outcome = Literal["met", "missed", "open"]
# What a verdict that holds is shown by; the other criteria can only refute.
_FIGURES = ("agreement", "outputs", "accuracy")
_STATUS: dict[Outcome, Literal[0, 1, 3]] = {"met": 0, "missed": 1, "open": 3}
_NO_DEPLOYED = (
    "no deployed execution was compared; run one that this machine has, such as onnxruntime, together with what it is "
    "compared with"
)
_NO_FLOAT = "no float network was executed; add one, `backends` float or onnxruntime-fp32"


class Thresholds(Record):
    """What is allowed.

    Attributes:
        max_drop: points of Top-1 that the deployed network may lose against float.
        confidence: of every one-sided bound; 0.5 takes the bare estimates.
        min_agreement: share of images, percent, on which the deployed file has to predict what the fake-quantized network
            predicts, flips inside the noise aside; refuted where it is shown to be lower, shown where the rest is at most
            `max_drop`.
        max_top1_difference: points of Top-1 between the deployed and the fake-quantized network, either way.
        significance: level of the exact test against the noise floor.
        max_error: mean relative error, in percent, that outputs which decide nothing may have against the float network's.
    """

    max_drop: float = Field(default=1.0, ge=0, le=100)
    confidence: float = Field(default=0.95, ge=0.5, lt=1)
    min_agreement: float = Field(default=99.5, ge=0, le=100)
    max_top1_difference: float = Field(default=0.1, ge=0)
    significance: float = Field(default=0.01, gt=0, lt=1)
    max_error: float = Field(default=10.0, ge=0)

    @property
    def most_flips(self) -> float:
        """The share of flips, in percent, that a faithful deployment is shown to stay below."""
        return max(self.max_drop, 100 - self.min_agreement)


def allowed(recipe: Recipe) -> Thresholds:
    """The defaults, with what a recipe lets its network lose."""
    return Thresholds() if recipe.max_drop is None else Thresholds(max_drop=recipe.max_drop)


class Criterion(Record):
    """One criterion on one deployed execution.

    Attributes:
        deployed: the execution, or the file whose codes were compared.
        name: "agreement" or "outputs", "top1", "codes", "logits", "finite", "compared", "rows", "repeats" or "accuracy".
        outcome: `met`, `missed`, or `open`: too few images to tell.
        by: what decided.
        text: in words, with the figures.
        images_needed: how many images would decide an open one, were the rates those seen; None where no number would.
    """

    deployed: str
    name: str
    outcome: Outcome
    by: str
    text: str
    images_needed: int | None = None


class Judgement(Record):
    """One of the two verdicts: its outcome, the sentence that says it, the criteria that it rests on, and what to do next."""

    outcome: Outcome
    text: str
    criteria: list[Criterion]
    advice: str = ""

    def __bool__(self) -> bool:
        return self.outcome == "met"


class Verdict(Record):
    """Both verdicts.

    Attributes:
        text: what every form of the report begins with, a line for each verdict and for what has to be known beside it.
        exit_status: 0: both hold; 1: one is refuted; 3: too few images to tell.
        faithful: deployed against fake-quantized.
        accuracy: deployed against float.
    """

    text: list[str]
    exit_status: Literal[0, 1, 3]
    faithful: Judgement
    accuracy: Judgement

    def __bool__(self) -> bool:
        return self.exit_status == 0

    @property
    def reasons(self) -> list[str]:
        """What was missed, in words."""
        return [f"{c.deployed}: {c.text}" for c in self.criteria if c.outcome == "missed"]

    @property
    def criteria(self) -> list[Criterion]:
        """Those of both verdicts."""
        return [*self.faithful.criteria, *self.accuracy.criteria]


def conclude(
    faithful: Sequence[Criterion], accuracy: Sequence[Criterion], notes: Sequence[str] = ()
) -> Verdict:
    """Both verdicts from their criteria: one that is missed refutes, all that are met show.

    Args:
        faithful: deployed against fake-quantized, of every deployed execution; none shows nothing.
        accuracy: deployed against float.
        notes: what has to be known beside the verdict, a line each.
    """
    first = _judgement(faithful, "the deployment is", "faithful", _NO_DEPLOYED)
    second = _judgement(accuracy, "accuracy is", "kept", _NO_FLOAT)
    text, status = [first.text, second.text, *notes], _STATUS[worst_of(first, second)]
    return Verdict(text=text, exit_status=status, faithful=first, accuracy=second)


def worst_of(*judged: Judgement | Criterion) -> Outcome:
    """The outcome that decides over several: `missed` before `open` before `met`."""
    outcomes = {one.outcome for one in judged}
    return "missed" if "missed" in outcomes else "open" if "open" in outcomes else "met"


def _judgement(criteria: Sequence[Criterion], subject: str, state: str, missing: str) -> Judgement:
    if not criteria:
        text = f"no verdict on whether {subject} {state}: {missing}"
        return Judgement(outcome="open", text=text, criteria=[])
    outcome = worst_of(*criteria)
    said = {
        "met": f"{subject} {state}",
        "missed": f"{subject} not {state}",
        "open": f"too few images to tell whether {subject} {state}",
    }[outcome]
    deciding = [c for c in criteria if c.outcome == outcome]
    if outcome == "met":
        deciding = [c for c in criteria if c.name in _FIGURES] or deciding
    text = f"{said}: {_listed(deciding)}"
    return Judgement(outcome=outcome, text=text, criteria=list(criteria))


def _listed(criteria: Sequence[Criterion]) -> str:
    """What criteria say; executions that say the same are named together."""
    names: dict[str, list[str]] = {}
    for c in criteria:
        names.setdefault(c.text, []).append(c.deployed)
    spoken = {text: list(dict.fromkeys(who)) for text, who in names.items()}
    return "; ".join(
        f"{'each of ' if len(who) > 1 else ''}{' and '.join(who)} {text}" for text, who in spoken.items()
    )
