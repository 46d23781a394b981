"""The verdict: what counts as parity, and which criterion decided.

Two executions of one quantized network differ where a float sum, in another order, lands on the other side of a rounding edge.
On some networks that alone flips more predictions than a fixed threshold allows, so a deployed file has to meet the thresholds
*or* be indistinguishable from the noise floor: the fake-quantized network's disagreement with itself. The rule is ours:

1. agreement: at least `min_agreement`; or, only where the floor itself lies below that, no more flips than the floor has
   (Fisher's exact test, one-sided, p >= significance).
2. Top-1: within `max_top1_difference`; or the flips are no more than the floor has, and McNemar's exact test cannot tell the
   difference from chance (p >= significance).
3. codes: with equal inputs, every code of the deployed file is that of the fake-quantized network, but at rounding edges. This
   one does not depend on how chaotic the network is, and catches what 1 and 2 have no power to see.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from ospq_export.validate.locate import Location
from ospq_export.validate.parity import Comparison
from ospq_export.validate.statistics import excess_p_value

# The smallest difference of two percentages is 100 / N; this keeps rounding of their subtraction out of the verdict.
_EPSILON = 1e-9
_SHOWN_FAULTS = 3


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Thresholds(_Record):
    """What counts as parity.

    Attributes:
        max_top1_difference: between the deployed and the reference Top-1, percentage points.
        min_agreement: share of images with equal predictions, percent.
        significance: level of the exact tests against the noise floor.
    """

    max_top1_difference: float = Field(default=0.1, ge=0)
    min_agreement: float = Field(default=99.5, ge=0, le=100)
    significance: float = Field(default=0.01, gt=0, lt=1)


class FloorVariation(_Record):
    """Another legitimate execution of the fake-quantized network, on a sample: its flips, or why it was not run.

    Attributes:
        reference: the execution that it varies.
    """

    name: str
    reference: str = "fake_quant"
    images: int
    flips: int
    mean_logit_difference: float
    skipped: str | None = None

    @property
    def agreement(self) -> float:
        """Percent of the sample with equal predictions."""
        return 100.0 * (1 - self.flips / self.images) if self.images else 100.0


class NoiseFloor(_Record):
    """The fake-quantized network's disagreement with itself."""

    variations: list[FloorVariation]

    def worst(self, reference: str) -> FloorVariation | None:
        """The variation of an execution with the most flips; None where none was run."""
        run = [v for v in self.variations if v.images and v.reference == reference]
        return max(run, key=lambda v: v.flips / v.images) if run else None


class Criterion(_Record):
    """One criterion on one deployed execution, and in words how it was met or missed."""

    deployed: str
    name: str
    passed: bool
    by: str
    text: str


class Verdict(_Record):
    """Whether parity holds, and if not, why."""

    parity: bool
    reasons: list[str]
    criteria: list[Criterion] = []

    def __bool__(self) -> bool:
        return self.parity


def default_thresholds(activation_bits: int, weight_bits: int) -> Thresholds:
    """99.5 % agreement, or 99 % where both weights and activations have 4 bits or fewer: one code is a larger step there."""
    return Thresholds(min_agreement=99.0 if max(activation_bits, weight_bits) <= 4 else 99.5)


def judge(
    comparisons: Sequence[Comparison],
    not_finite: Sequence[str],
    thresholds: Thresholds,
    floor: NoiseFloor | None = None,
    locations: Sequence[Location] = (),
    images: int = 0,
) -> Verdict:
    """Parity holds when every deployed execution meets every criterion and everything is finite.

    Args:
        comparisons: of each deployed execution with the reference.
        not_finite: names of executions that gave NaN or infinity.
        thresholds: what counts as parity.
        floor: None where it was not measured: then only the thresholds count.
        locations: code-level comparisons.
        images: how many images the comparisons are on.
    """
    reasons = [f"{name} gives logits that are not finite" for name in not_finite]
    criteria: list[Criterion] = []
    for c in comparisons:
        worst = None if floor is None else floor.worst(c.reference)
        p_value = _p_value(c, worst, images)
        criteria += [_agreement(c, thresholds, worst, p_value), _top1(c, thresholds, p_value)]
    criteria += [_codes(location) for location in locations]
    reasons += [f"{c.deployed}: {c.text}" for c in criteria if not c.passed]
    if not comparisons:
        reasons.append("nothing deployed was compared")
    return Verdict(parity=not reasons, reasons=reasons, criteria=criteria)


def _p_value(c: Comparison, worst: FloorVariation | None, images: int) -> float | None:
    if worst is None or images < 1:
        return None
    return excess_p_value(len(c.flips), images, worst.flips, worst.images)


def _agreement(
    c: Comparison, limits: Thresholds, worst: FloorVariation | None, p_value: float | None
) -> Criterion:
    text = f"agrees with {c.reference} on {c.agreement:.2f} % of the images"
    if c.agreement >= limits.min_agreement - _EPSILON:
        return _criterion(c, "agreement", True, "threshold", f"{text} (needed {limits.min_agreement})")
    if worst is None or p_value is None or worst.agreement >= limits.min_agreement:
        return _criterion(c, "agreement", False, "threshold", f"{text} (needed {limits.min_agreement})")
    passed = p_value >= limits.significance
    relation = "no worse than" if passed else "worse than"
    text = (
        f"{text}: below {limits.min_agreement}, but so is the noise floor; {relation} the floor's "
        f"{worst.agreement:.2f} % ({worst.name}, {worst.images} images; p = {p_value:.3g})"
    )
    return _criterion(c, "agreement", passed, "noise floor", text)


def _top1(c: Comparison, limits: Thresholds, p_value: float | None) -> Criterion:
    text = f"Top-1 differs by {c.top1_difference:+.2f} points from {c.reference} (allowed {limits.max_top1_difference})"
    if abs(c.top1_difference) <= limits.max_top1_difference + _EPSILON:
        return _criterion(c, "top1", True, "threshold", text)
    if p_value is None or p_value < limits.significance:
        return _criterion(c, "top1", False, "threshold", text)
    passed = c.mcnemar.p_value >= limits.significance
    chance = "indistinguishable from chance" if passed else "not chance"
    text = f"{text}; by McNemar's exact test {chance} (p = {c.mcnemar.p_value:.3g})"
    return _criterion(c, "top1", passed, "McNemar", text)


def _codes(location: Location) -> Criterion:
    if location.faults:
        shown = "; ".join(location.faults[:_SHOWN_FAULTS])
        text = f"first diverging slice {location.first_diverging}: {shown}"
    else:
        text = (
            f"with equal inputs, the codes of {len(location.quantizers)} quantizers are the fake-quantized network's "
            f"but at rounding edges ({location.images} images)"
        )
    return Criterion(
        deployed=location.deployed, name="codes", passed=not location.faults, by="equal inputs", text=text
    )


def _criterion(c: Comparison, name: str, passed: bool, by: str, text: str) -> Criterion:
    return Criterion(deployed=c.deployed, name=name, passed=passed, by=by, text=text)
