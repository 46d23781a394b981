"""The criteria of the first verdict: is the deployment faithful?

The deployed file against the fake-quantized network, and against that network's noise floor.

Two executions of one quantized network differ where a float sum, in another order, lands on the other side of a
rounding edge. How far that moves a margin between two classes is measured: the *noise floor*, the fake-quantized
network against itself. The rule is ours:

1. agreement: flips that the noise does not explain are rare, where the reference's margin is larger than any change of
   a margin in the floor; their share is bounded by Clopper and Pearson. And flips as such are rare, or no more frequent
   than the floor's own (Fisher's exact test).
2. Top-1: no difference beyond what is allowed can be shown. This can only refute: showing is what agreement does.
3. codes: with equal inputs, every code of the deployed file is that of the fake-quantized network, but at rounding
   edges. It does not depend on how chaotic the network is, and sees what 1 and 2 have no power to see.

4. logits, where no codes can be seen, as on a server: the median image is at most twice as far off as the floor is on average.

Outputs that are no logits of an image are judged in place of 1 by their errors: images are rare on which an output is further
from the reference than twice the largest error in the floor.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from scipy import stats

from ospq_export.tasks.comparison import Comparison, OutputChange
from ospq_export.tasks.paired import drop_bounds, images_for_share, share_bounds
from ospq_export.tasks.statistics import excess_p_value
from ospq_export.validate.codes.records import Location
from ospq_export.validate.floor import FloorVariation, NoiseFloor
from ospq_export.validate.verdict import Criterion, Outcome, Thresholds

EPSILON = 1e-9
_SHOWN_FAULTS = 3
# Where a floor is nothing but the last digits of float32, other digits are no finding.
_TINY_LOGIT = 1e-4


def faithful_criteria(
    comparisons: Sequence[Comparison],
    not_finite: Sequence[str],
    uncompared: Sequence[str],
    limits: Thresholds,
    floor: NoiseFloor | None = None,
    locations: Sequence[Location] = (),
    closed: Collection[str] = (),
) -> list[Criterion]:
    """All criteria of all deployed executions.

    Args:
        comparisons: of each deployed execution with its reference.
        not_finite: names of executions that gave NaN or infinity.
        uncompared: deployed executions that nothing could be compared with.
        limits: what is allowed.
        floor: None where it was not measured: then no flip is noise.
        locations: comparisons of codes.
        closed: executions that nobody can look into: their logits are judged, too.
    """
    criteria = [_missed(name, "finite", "gives logits that are not finite") for name in not_finite]
    criteria += [_missed(name, "compared", "was compared with nothing") for name in uncompared]
    for c in comparisons:
        criteria += [_outputs(c, o, limits) for o in c.outputs] or [_agreement(c, limits, floor)]
        if c.mcnemar is not None:
            criteria.append(_top1(c, limits))
        if c.deployed in closed and not c.outputs:
            criteria += _logits(c, floor)
    return [*criteria, *(_codes(location) for location in locations)]


def _outputs(c: Comparison, output: OutputChange, limits: Thresholds) -> Criterion:
    """One output: how many images have an error that noise does not explain."""
    common = {"deployed": c.deployed, "name": "outputs", "by": "noise floor"}
    mean, most = 100 * output.mean_error, 100 * output.max_error
    text = f"{output.name} is {mean:.3g} % off {c.reference} on average, {most:.3g} % at most"
    if output.holds is not None:
        return Criterion(**common, outcome="missed", text=f"{output.name} holds what {output.holds} should")
    if output.beyond is None or output.noise is None:
        return Criterion(**common, outcome="open", text=f"{text}; the noise floor was not measured")
    text += f"; {output.beyond:,} of {c.images:,} images are beyond the noise of {100 * output.noise:.3g} %"
    if _mean_beyond(output, c.images, limits.confidence):
        text += f", and the mean is beyond that of {100 * (output.mean_noise or 0.0):.3g} %"
        return Criterion(**common, outcome="missed", text=text)
    allowed, bound = 1 - limits.min_agreement / 100 + EPSILON, limits.most_flips / 100 + EPSILON
    low, high = share_bounds(output.beyond, c.images, limits.confidence)
    if low > allowed or high <= bound:
        return Criterion(**common, outcome="missed" if low > allowed else "met", text=text)
    more = images_for_share(output.beyond, c.images, bound, limits.confidence)
    return Criterion(**common, outcome="open", text=f"{text}; {enough(more)}", images_needed=more)


def _mean_beyond(output: OutputChange, images: int, confidence: float) -> bool:
    """Whether the mean error is shown to be larger than noise: one-sided, by the normal distribution."""
    quantile = float(stats.norm.ppf(confidence))
    low = output.mean_error - quantile * output.error_deviation / images**0.5
    return output.mean_noise is not None and low > output.mean_noise + EPSILON


def _logits(c: Comparison, floor: NoiseFloor | None) -> list[Criterion]:
    """A classifier's logits as numbers, where no codes can be compared: twice what the noise moves them is too much.

    A scale that is a few percent wrong changes few predictions, and the logits of all images. A rounding edge moves those of few.
    """
    noise = None if floor is None else floor.difference(c.reference)
    if noise is None:
        return []
    outcome: Outcome = "missed" if c.median_logit_difference > noise + _TINY_LOGIT else "met"
    text = (
        f"has logits {c.median_logit_difference:.3g} off {c.reference} in the median image, "
        f"{'beyond' if outcome == 'missed' else 'within'} the noise of {noise:.3g}"
    )
    return [Criterion(deployed=c.deployed, name="logits", outcome=outcome, by="noise floor", text=text)]


def _missed(deployed: str, name: str, text: str) -> Criterion:
    return Criterion(deployed=deployed, name=name, outcome="missed", by=name, text=text)


def _agreement(c: Comparison, limits: Thresholds, floor: NoiseFloor | None) -> Criterion:
    worst = None if floor is None else floor.worst(c.reference)
    reach = 0.0 if floor is None else floor.reach(c.reference)
    flips, allowed = len(c.flips), 1 - limits.min_agreement / 100 + EPSILON
    bound = limits.most_flips / 100 + EPSILON
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
    allowed = limits.max_top1_difference / 100 + EPSILON
    refuted = low > allowed or high < -allowed
    text = (
        f"differs by {c.score_difference:+.2f} points of Top-1 from {c.reference}, "
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
