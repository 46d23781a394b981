"""The criteria of both verdicts.

Is the deployment faithful? The deployed file against the fake-quantized network, and against that network's noise floor. Is
accuracy kept? The deployed network against the float network, on the same images.

Two executions of one quantized network differ where a float sum, in another order, lands on the other side of a
rounding edge. How far that moves a margin between two classes is measured: the *noise floor*, the fake-quantized
network against itself. The rule is ours:

1. agreement: flips that the noise does not explain are rare, where the reference's margin is larger than any change of
   a margin in the floor; their share is bounded by Clopper and Pearson. And flips as such are rare, or no more frequent
   than the floor's own (Fisher's exact test).
2. Top-1: no difference beyond what is allowed can be shown. This can only refute: showing is what agreement does.
3. codes: with equal inputs, every code of the deployed file is that of the fake-quantized network, but at rounding
   edges. It does not depend on how chaotic the network is, and sees what 1 and 2 have no power to see.
"""

from __future__ import annotations

from collections.abc import Sequence

from ospq_export.tasks.comparison import Comparison
from ospq_export.tasks.paired import drop_bounds, images_for_drop, images_for_share, share_bounds
from ospq_export.tasks.statistics import Record, excess_p_value
from ospq_export.validate.codes.records import Location
from ospq_export.validate.floor import FloorVariation, NoiseFloor
from ospq_export.validate.verdict import Criterion, Outcome, Thresholds

_EPSILON = 1e-9
_SHOWN_FAULTS = 3


def faithful_criteria(
    comparisons: Sequence[Comparison],
    not_finite: Sequence[str],
    uncompared: Sequence[str],
    limits: Thresholds,
    floor: NoiseFloor | None = None,
    locations: Sequence[Location] = (),
) -> list[Criterion]:
    """All criteria of all deployed executions.

    Args:
        comparisons: of each deployed execution with its reference.
        not_finite: names of executions that gave NaN or infinity.
        uncompared: deployed executions that nothing could be compared with.
        limits: what is allowed.
        floor: None where it was not measured: then no flip is noise.
        locations: comparisons of codes.
    """
    criteria = [_missed(name, "finite", "gives logits that are not finite") for name in not_finite]
    criteria += [_missed(name, "compared", "was compared with nothing") for name in uncompared]
    for c in comparisons:
        criteria.append(_agreement(c, limits, floor))
        if c.mcnemar is not None:
            criteria.append(_top1(c, limits))
    return [*criteria, *(_codes(location) for location in locations)]


def _missed(deployed: str, name: str, text: str) -> Criterion:
    return Criterion(deployed=deployed, name=name, outcome="missed", by=name, text=text)


def _agreement(c: Comparison, limits: Thresholds, floor: NoiseFloor | None) -> Criterion:
    worst = None if floor is None else floor.worst(c.reference)
    reach = 0.0 if floor is None else floor.reach(c.reference)
    flips, allowed = len(c.flips), 1 - limits.min_agreement / 100 + _EPSILON
    bound = limits.most_flips / 100 + _EPSILON
    beyond = sum(flip.reference_margin > reach for flip in c.flips)
    p_value = 0.0 if worst is None else excess_p_value(flips, c.images, worst.flips, worst.images)
    excess = p_value < limits.significance
    low, high = share_bounds(beyond, c.images, limits.confidence)
    flips_low, flips_high = share_bounds(flips, c.images, limits.confidence)
    by = "share of flips" if worst is None or not flips else "noise floor"
    common = {"deployed": c.deployed, "name": "agreement", "by": by}
    text = f"{_agreement_text(c, beyond, reach, worst, p_value)} ({limits.min_agreement:g} % needed)"
    if low > allowed or (excess and flips_low > allowed):
        return Criterion(**common, outcome="missed", text=text)
    if high <= bound and (not excess or flips_high <= bound):
        return Criterion(**common, outcome="met", text=text)
    count = beyond if high > bound else flips
    more = images_for_share(count, c.images, bound, limits.confidence)
    return Criterion(**common, outcome="open", text=f"{text}; {enough(more)}", images_needed=more)


def _agreement_text(
    c: Comparison, beyond: int, reach: float, worst: FloorVariation | None, p_value: float
) -> str:
    text = f"agrees with {c.reference} on {c.agreement:.2f} % of {c.images:,} images"
    if not c.flips:
        return text
    flips = f"{len(c.flips):,} flip{'' if len(c.flips) == 1 else 's'}"
    if worst is None:
        return f"{text}, {flips}"
    return (
        f"{text}, {flips}, {beyond:,} of them beyond the noise, which moves margins by up to {reach:.3g} "
        f"and flips {worst.flips:,} of {worst.images:,} ({worst.name}; p = {p_value:.3g})"
    )


def enough(images: int | None) -> str:
    """How many images would tell, in words."""
    return "no number of images would tell" if images is None else f"about {images:,} images would tell"


def _top1(c: Comparison, limits: Thresholds) -> Criterion:
    assert c.mcnemar is not None
    sure = max(0.5, 1 - limits.significance)
    low, high = drop_bounds(c.mcnemar.only_reference, c.mcnemar.only_deployed, c.images, sure)
    allowed = limits.max_top1_difference / 100 + _EPSILON
    refuted = low > allowed or high < -allowed
    text = (
        f"differs by {c.top1_difference:+.2f} points of Top-1 from {c.reference}, "
        f"{'more than' if refuted else 'not shown to exceed'} the {limits.max_top1_difference:g} allowed"
    )
    outcome: Outcome = "missed" if refuted else "met"
    return Criterion(deployed=c.deployed, name="top1", outcome=outcome, by="paired interval", text=text)


def _codes(location: Location) -> Criterion:
    if location.faults:
        shown = "; ".join(location.faults[:_SHOWN_FAULTS])
        text = f"diverges first in slice {location.first_diverging}: {shown}"
    else:
        text = (
            f"has, with equal inputs, the fake-quantized network's codes at {len(location.quantizers)} quantizers "
            f"but at rounding edges ({location.images} images)"
        )
    outcome: Outcome = "missed" if location.faults else "met"
    return Criterion(deployed=location.deployed, name="codes", outcome=outcome, by="equal inputs", text=text)


class AccuracyChange(Record):
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
    allowed = limits.max_drop + _EPSILON
    figures = (
        f"has a Top-1 of {c.deployed_top1:.2f} %, {c.reference} {c.reference_top1:.2f} %: "
        f"{abs(c.drop):.2f} points {'lost' if c.drop >= 0 else 'gained'} on {c.images:,} images"
    )
    sure = f"with {100 * limits.confidence:g} % confidence ({limits.max_drop:g} allowed)"
    common = {"deployed": c.deployed, "name": "accuracy", "by": "paired interval"}
    if c.high <= allowed:
        most = f"at most {c.high:.2f} lost" if c.high >= 0 else f"at least {-c.high:.2f} gained"
        return Criterion(**common, outcome="met", text=f"{figures}, {most} {sure}")
    if c.low > allowed:
        return Criterion(**common, outcome="missed", text=f"{figures}, at least {c.low:.2f} {sure}")
    more = images_for_drop(c.lost, c.gained, c.images, limits.max_drop / 100, limits.confidence)
    text = f"{figures}, between {c.low:.2f} and {c.high:.2f} {sure}; {enough(more)}"
    return Criterion(**common, outcome="open", text=text, images_needed=more)


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
