"""Is accuracy kept? The deployed network against the float network, on the same images."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from ospq_export.tasks.comparison import Comparison
from ospq_export.tasks.paired import drop_bounds, images_for_drop, images_for_share, share_bounds
from ospq_export.validate.faithful import enough
from ospq_export.validate.verdict import Criterion, Thresholds

_EPSILON = 1e-9


class AccuracyChange(BaseModel):
    """What a deployed execution lost against the float network; percent and points.

    Attributes:
        deployed: the execution.
        reference: the float execution.
        images: that both classified.
        differing: images with another prediction.
        reference_top1: None without labels, like the next five.
        deployed_top1: Top-1.
        drop: points lost; negative where accuracy rose.
        low: one-sided lower bound of the drop, at the report's confidence.
        high: upper bound; without labels, of the share of predictions that differ, which the drop cannot exceed.
        lost: images that only the float network gets right.
        gained: images that only the deployed network gets right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    deployed: str
    reference: str
    images: int
    differing: int
    reference_top1: float | None = None
    deployed_top1: float | None = None
    drop: float | None = None
    low: float | None = None
    high: float
    lost: int | None = None
    gained: int | None = None


def accuracy_change(c: Comparison, confidence: float) -> AccuracyChange:
    """The drop of one deployed execution with its bounds.

    Args:
        c: the deployed execution against the float network.
        confidence: of each bound alone, in [0.5, 1).
    """
    differing = len(c.flips)
    common = {"deployed": c.deployed, "reference": c.reference, "images": c.images, "differing": differing}
    if c.mcnemar is None:
        return AccuracyChange(**common, high=100 * share_bounds(differing, c.images, confidence)[1])
    lost, gained = c.mcnemar.only_reference, c.mcnemar.only_deployed
    low, high = drop_bounds(lost, gained, c.images, confidence)
    return AccuracyChange(
        **common,
        reference_top1=c.reference_top1,
        deployed_top1=c.deployed_top1,
        drop=100 * (lost - gained) / c.images,
        low=100 * low,
        high=100 * high,
        lost=lost,
        gained=gained,
    )


def accuracy_criteria(changes: Sequence[AccuracyChange], limits: Thresholds) -> list[Criterion]:
    """One criterion for each deployed execution: the upper bound shows that accuracy is kept, the lower one that it is lost."""
    return [_unlabelled(c, limits) if c.drop is None else _labelled(c, limits) for c in changes]


def _labelled(c: AccuracyChange, limits: Thresholds) -> Criterion:
    assert c.drop is not None and c.low is not None and c.lost is not None and c.gained is not None
    allowed, margin = limits.max_drop + _EPSILON, limits.max_drop / 100
    figures = (
        f"has a Top-1 of {c.deployed_top1:.2f} %, {c.reference} {c.reference_top1:.2f} %: {_points(c.drop)} "
        f"on {c.images:,} images"
    )
    sure = f"with {100 * limits.confidence:g} % confidence"
    common = {"deployed": c.deployed, "name": "accuracy", "by": "paired interval"}
    if c.high <= allowed:
        return Criterion(
            **common, outcome="met", text=f"{figures}, {_most(c.high)} {sure} ({limits.max_drop:g} allowed)"
        )
    if c.low > allowed:
        text = f"{figures}, at least {c.low:.2f} {sure} ({limits.max_drop:g} allowed)"
        return Criterion(**common, outcome="missed", text=text)
    more = images_for_drop(c.lost, c.gained, c.images, margin, limits.confidence)
    text = f"{figures}, between {c.low:.2f} and {c.high:.2f} {sure} ({limits.max_drop:g} allowed); {enough(more)}"
    return Criterion(**common, outcome="open", text=text, images_needed=more)


def _points(drop: float) -> str:
    return f"{drop:.2f} points lost" if drop >= 0 else f"{-drop:.2f} points gained"


def _most(high: float) -> str:
    return f"at most {high:.2f} lost" if high >= 0 else f"at least {-high:.2f} gained"


def _unlabelled(c: AccuracyChange, limits: Thresholds) -> Criterion:
    text = (
        f"predicts otherwise than {c.reference} on {c.differing:,} of {c.images:,} images without labels: "
        f"at most {c.high:.2f} points lost with {100 * limits.confidence:g} % confidence ({limits.max_drop:g} allowed)"
    )
    common = {"deployed": c.deployed, "name": "accuracy", "by": "share of flips"}
    if c.high <= limits.max_drop + _EPSILON:
        return Criterion(**common, outcome="met", text=text)
    margin = limits.max_drop / 100
    below = c.differing / c.images < margin
    more = images_for_share(c.differing, c.images, margin, limits.confidence) if below else None
    advice = enough(more) if below else "only labels would tell"
    return Criterion(**common, outcome="open", text=f"{text}; {advice}", images_needed=more)
