"""Bounds of a paired drop: against the normal limit, brute force over all outcomes, and simulation."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ospq_export.tasks import paired
from ospq_export.tasks.paired import below, drop_bounds, images_for_drop, images_for_share, share_bounds

counts = st.integers(1, 40).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda b: st.tuples(st.just(b), st.integers(0, n - b), st.just(n)))
)


@pytest.mark.parametrize(
    ("lost", "gained", "images"), [(900, 700, 20_000), (50, 400, 10_000), (3000, 3000, 50_000)]
)
def test_large_samples_are_normal(lost, gained, images):
    # Wald's interval: what every interval for paired proportions becomes with many discordant images.
    estimate, z = (lost - gained) / images, stats.norm.ppf(0.95)
    half = z * np.sqrt(lost + gained - (lost - gained) ** 2 / images) / images
    assert drop_bounds(lost, gained, images, 0.95) == pytest.approx(
        (estimate - half, estimate + half), abs=0.05 * half
    )


def chance(limit_score, images, margin, rate):
    """Chance of an outcome no worse than the observed one, by adding up every outcome."""
    total, probabilities = 0.0, [rate + margin, rate, 1 - 2 * rate - margin]
    for lost, gained in itertools.product(range(images + 1), repeat=2):
        if lost + gained <= images:
            score = float(paired._score(np.array([lost]), np.array([gained]), images, margin)[0])
            if score <= limit_score + 1e-9:
                cells = [lost, gained, images - lost - gained]
                total += stats.multinomial.pmf(cells, images, probabilities)
    return total


@pytest.mark.parametrize(
    ("lost", "gained", "images", "margin"), [(0, 1, 9, 0.2), (2, 3, 12, 0.15), (1, 0, 14, 0.3)]
)
def test_p_value_bounds_every_nuisance(lost, gained, images, margin):
    alpha = 0.05
    found = paired._p_value(lost, gained, images, margin, alpha)
    observed = float(paired._score(np.array([lost]), np.array([gained]), images, margin)[0])
    low, high = share_bounds(gained, images, 1 - alpha * 0.0025)
    rates = np.linspace(low, min(high, (1 - margin) / 2), 15)
    worst = max(chance(observed, images, margin, rate) for rate in rates)
    assert worst - 1e-6 <= found <= worst + 0.02


@settings(deadline=None, max_examples=40)
@given(counts, st.sampled_from([0.6, 0.8, 0.95, 0.99]))
def test_bounds_are_ordered_and_symmetric(case, confidence):
    lost, gained, images = case
    low, high = drop_bounds(lost, gained, images, confidence)
    assert -1 <= low <= (lost - gained) / images + 1e-6 and (lost - gained) / images - 1e-6 <= high <= 1
    assert drop_bounds(gained, lost, images, confidence) == pytest.approx((-high, -low))
    wider = drop_bounds(lost, gained, images, 0.995)
    assert wider[0] <= low + 1e-6 and high <= wider[1] + 1e-6


def test_bare_estimates():
    assert drop_bounds(7, 2, 100, 0.5) == (0.05, 0.05)
    assert share_bounds(3, 100, 0.5) == (0.03, 0.03)


def test_nothing_lost_follows_the_rule_of_three():
    # (1 - margin)^n <= 0.05: 298.1 images for one point.
    assert drop_bounds(0, 0, 295, 0.95)[1] > 0.01 > drop_bounds(0, 0, 300, 0.95)[1]
    assert 298 <= images_for_drop(0, 0, 5, 0.01, 0.95) <= 310
    assert images_for_share(0, 5, 0.01, 0.95) == pytest.approx(299, abs=5)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_share_bounds_are_exact(case):
    count, images = case
    low, high = share_bounds(count, images, 0.95)
    # Clopper and Pearson: at each end, the tail beyond the count holds exactly 5 %.
    assert low == 0 or stats.binom.sf(count - 1, images, low) == pytest.approx(0.05)
    assert high == 1 or stats.binom.cdf(count, images, high) == pytest.approx(0.05)


def test_images_that_would_tell():
    more = images_for_drop(6, 2, 1000, 0.01, 0.95)
    assert (
        more is not None
        and drop_bounds(round(6 * more / 1000), round(2 * more / 1000), more, 0.95)[1] <= 0.01
    )
    lost = images_for_drop(15, 0, 1000, 0.01, 0.95)
    assert lost is not None and drop_bounds(round(15 * lost / 1000), 0, lost, 0.95)[0] >= 0.0098
    assert images_for_drop(10, 0, 1000, 0.01, 0.95) is None, "the estimate is the margin"
    assert images_for_share(5, 1000, 0.005, 0.95) is None
    assert images_for_drop(0, 0, 10, 1.0, 0.95) is None, "every drop is allowed"


@pytest.mark.parametrize(
    "case", [(-1, 0, 5, 0.9), (3, 3, 5, 0.9), (0, 0, 0, 0.9), (0, 0, 5, 1.0), (0, 0, 5, 0.4)]
)
def test_impossible_counts(case):
    with pytest.raises(ValueError, match=r"fit each other|confidence"):
        drop_bounds(*case)


MARGIN, RUNS, LEVEL = 0.01, 2000, 0.05


@settings(deadline=None, max_examples=40)
@given(counts, st.sampled_from([0.01, 0.05, 0.2]))
def test_the_short_way_says_what_the_bounds_say(case, margin):
    low, high = drop_bounds(*case, 0.95)
    lost, gained, images = case
    assert abs(high - margin) < 1e-5 or below(lost, gained, images, margin, 0.95) is (high <= margin)
    assert abs(low - margin) < 1e-5 or below(gained, lost, images, -margin, 0.95) is (low >= margin)


def wrong_verdicts(images, both_ways):
    """Of 2,000 simulated validations each: how many call a drop just above the margin kept, and one on the margin lost."""
    rng = np.random.default_rng(images)

    @functools.cache
    def shown(bad, good, margin):
        return below(bad, good, images, margin, 1 - LEVEL)

    def draw(drop):
        return rng.multinomial(images, [both_ways + drop, both_ways, 1 - 2 * both_ways - drop], RUNS)

    kept = sum(shown(int(lost), int(gained), MARGIN) for lost, gained, _ in draw(MARGIN * 1.0001))
    lost = sum(shown(int(gained), int(lost), -MARGIN) for lost, gained, _ in draw(MARGIN))
    return {"kept": kept, "lost": lost}


@pytest.mark.slow
@pytest.mark.parametrize("images", [60, 300, 1000])
@pytest.mark.parametrize("both_ways", [0.0, 0.004, 0.03])
def test_wrong_verdicts_are_rare(images, both_ways):
    # More than this many of 2,000 would be significantly (1 %) above 5 %.
    wrong = wrong_verdicts(images, both_ways)
    assert max(wrong.values()) <= stats.binom.ppf(0.99, RUNS, LEVEL), wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("drop", "images", "shown"), [(0.0, 1000, "kept"), (0.03, 2000, "lost"), (0.35, 100, "lost")]
)
def test_right_verdicts_are_reached(drop, images, shown):
    rng = np.random.default_rng(1)
    drawn = rng.multinomial(images, [0.002 + drop, 0.002, 0.996 - drop], 200)
    if shown == "kept":
        hits = sum(below(int(lost), int(gained), images, MARGIN, 0.95) for lost, gained, _ in drawn)
    else:
        hits = sum(below(int(gained), int(lost), images, -MARGIN, 0.95) for lost, gained, _ in drawn)
    assert hits >= 180
