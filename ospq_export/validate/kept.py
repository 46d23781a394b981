"""The criteria of the second verdict: is accuracy kept?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ospq_export.tasks.accuracy import ERROR, FEWEST, AccuracyChange
from ospq_export.tasks.dense import PIXELS
from ospq_export.tasks.embed import NEIGHBOURS
from ospq_export.tasks.paired import images_for_drop, images_for_share
from ospq_export.validate.criteria import EPSILON, enough
from ospq_export.validate.verdict import Criterion, Outcome, Thresholds


def accuracy_criteria(changes: Sequence[AccuracyChange], limits: Thresholds) -> list[Criterion]:
    """One criterion for each deployed execution: the upper bound shows that accuracy is kept, the lower one that it is lost."""
    return [_criterion(c, limits) for c in changes]


def _criterion(c: AccuracyChange, limits: Thresholds) -> Criterion:
    if c.measure == ERROR:
        return _error(c, limits)
    if c.drop is None:
        return _pixels(c, limits) if c.measure == PIXELS else _unlabelled(c, limits)
    return _labelled(c, limits)


def _sure(limits: Thresholds, allowed: float, unit: str = "") -> str:
    return f"with {100 * limits.confidence:g} % confidence ({allowed:g}{unit} allowed)"


def _labelled(c: AccuracyChange, limits: Thresholds) -> Criterion:
    """Points of a score: paired counts of images, or bounds by bootstrap."""
    assert c.drop is not None and c.low is not None
    allowed, sure = limits.max_drop + EPSILON, _sure(limits, limits.max_drop)
    figures = (
        f"has {'an' if c.measure.startswith('m') else 'a'} {c.measure} of {c.deployed_score:.2f} %, "
        f"{c.reference} {c.reference_score:.2f} %: "
        f"{abs(c.drop):.2f} points {'lost' if c.drop >= 0 else 'gained'} on {c.images:,} images"
    )
    common = {"deployed": c.deployed, "name": "accuracy"}
    common["by"] = "bootstrap over images" if c.lost is None else "paired interval"
    if c.high <= allowed:
        most = f"at most {c.high:.2f} lost" if c.high >= 0 else f"at least {-c.high:.2f} gained"
        return Criterion(**common, outcome="met", text=f"{figures}, {most} {sure}")
    if c.low > allowed:
        return Criterion(**common, outcome="missed", text=f"{figures}, at least {c.low:.2f} {sure}")
    more = _more(c, limits)
    text = f"{figures}, between {c.low:.2f} and {c.high:.2f} {sure}; {enough(more)}"
    return Criterion(**common, outcome="open", text=text, images_needed=more)


def _more(c: AccuracyChange, limits: Thresholds) -> int | None:
    if c.lost is not None and c.gained is not None:
        return images_for_drop(c.lost, c.gained, c.images, limits.max_drop / 100, limits.confidence)
    assert c.drop is not None
    return _narrower(c.images, c.drop, c.high, limits.max_drop)


def _narrower(images: int, estimate: float, bound: float, allowed: float) -> int | None:
    """About how many images bring a bound of a mean within what is allowed: its distance shrinks with their root."""
    if images < FEWEST:
        return FEWEST
    room = allowed - estimate
    return None if room == 0 else int(images * max(1.0, ((bound - estimate) / room) ** 2)) + 1


def _unlabelled(c: AccuracyChange, limits: Thresholds) -> Criterion:
    differs = f"has other {NEIGHBOURS} than" if c.measure == NEIGHBOURS else "predicts otherwise than"
    sure = _sure(limits, limits.max_drop)
    text = (
        f"{differs} {c.reference} on {c.differing:,} of {c.images:,} images without labels: "
        f"at most {c.high:.2f} points lost {sure}"
    )
    margin, share = limits.max_drop / 100, c.differing / c.images

    def more() -> int | None:
        return images_for_share(c.differing, c.images, margin, limits.confidence)

    return _share(c, limits, "share of flips", text, more if share < margin else None)


def _pixels(c: AccuracyChange, limits: Thresholds) -> Criterion:
    text = (
        f"gives {c.share:.2f} % of the pixels another class than {c.reference} on {c.images:,} images without labels, "
        f"at most {c.high:.2f} {_sure(limits, limits.max_drop)}"
    )

    def more() -> int | None:
        return _narrower(c.images, c.share, c.high, limits.max_drop)

    return _share(c, limits, "bootstrap over images", text, more if c.share < limits.max_drop else None)


def _share(
    c: AccuracyChange, limits: Thresholds, by: str, text: str, more: Callable[[], int | None] | None
) -> Criterion:
    """A share that bounds what is lost; `more` says how many images would show it, None where none would."""
    common = {"deployed": c.deployed, "name": "accuracy", "by": by}
    if c.high <= limits.max_drop + EPSILON:
        return Criterion(**common, outcome="met", text=text)
    needed = None if more is None else more()
    advice = "only labels would tell" if more is None else enough(needed)
    return Criterion(**common, outcome="open", text=f"{text}; {advice}", images_needed=needed)


def _error(c: AccuracyChange, limits: Thresholds) -> Criterion:
    """Outputs that decide nothing: their error against the float network's is all there is."""
    assert c.low is not None
    text = (
        f"is {c.share:.2f} % off {c.reference} on average over {c.images:,} images, between {c.low:.2f} and {c.high:.2f} "
        f"{_sure(limits, limits.max_error, ' %')}"
    )
    outcome: Outcome = (
        "met" if c.high <= limits.max_error else "missed" if c.low > limits.max_error else "open"
    )
    more = _narrower(c.images, c.share, c.high, limits.max_error) if outcome == "open" else None
    if outcome == "open":
        text = f"{text}; {enough(more)}"
    return Criterion(
        deployed=c.deployed,
        name="accuracy",
        outcome=outcome,
        by="relative error",
        text=text,
        images_needed=more,
    )
