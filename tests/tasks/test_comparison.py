"""Parity statistics against slow independent references."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ospq_export.tasks import statistics
from ospq_export.tasks.comparison import (
    agreement,
    compare,
    flipped,
    margins,
    predictions,
    topk_accuracy,
)
from ospq_export.tasks.measure import Collector
from ospq_export.tasks.statistics import (
    class_changes,
    excess_p_value,
    expected_calibration_error,
    mcnemar,
    wilson,
)

# Few distinct values, so that ties happen.
values = st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0])


@st.composite
def cases(draw, count=2):
    n, k = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    arrays = [draw(hnp.arrays(np.float32, (n, k), elements=values)) for _ in range(count)]
    labels = draw(hnp.arrays(np.int64, n, elements=st.integers(0, k - 1)))
    return (*arrays, labels)


def ranked(row):
    """Classes from the largest logit down, ties by index: Python's sort is stable."""
    return sorted(range(len(row)), key=lambda i: -row[i])


@settings(deadline=None)
@given(cases(), st.integers(1, 6))
def test_accuracy_and_agreement(case, k):
    first, second, labels = case
    slow = sum(label in ranked(row)[:k] for row, label in zip(first, labels, strict=True)) / len(labels) * 100
    assert topk_accuracy(first, labels, k) == pytest.approx(slow)
    same = sum(ranked(a)[0] == ranked(b)[0] for a, b in zip(first, second, strict=True)) / len(labels) * 100
    assert agreement(first, second) == pytest.approx(same)
    assert [ranked(row)[0] for row in first] == predictions(first).tolist()


@settings(deadline=None)
@given(cases())
def test_flips_and_margins(case):
    first, second, labels = case
    ids = [f"image {i}" for i in range(len(labels))]
    flips = flipped(first, second, labels, ids)
    expected = {
        f"image {i}"
        for i, (a, b) in enumerate(zip(first, second, strict=True))
        if ranked(a)[0] != ranked(b)[0]
    }
    assert {f.id for f in flips} == expected
    assert [f.reference_margin for f in flips] == sorted((f.reference_margin for f in flips), reverse=True)
    for row, margin in zip(first, margins(first), strict=True):
        ordered = sorted(row.tolist(), reverse=True)
        assert margin == (np.inf if len(ordered) < 2 else pytest.approx(ordered[0] - ordered[1]))


def test_more_images_than_are_looked_at_at_once():
    generator = np.random.default_rng(0)
    count = 2 * statistics._ROWS + 5
    ours, theirs = generator.integers(-3, 4, (2, count, 7)).astype(np.float32)
    labels = generator.integers(0, 7, count)
    order = np.argsort(-ours, axis=1, kind="stable")
    assert topk_accuracy(ours, labels, 3) == pytest.approx(
        (order[:, :3] == labels[:, None]).any(1).mean() * 100
    )
    assert (predictions(ours) == order[:, 0]).all()
    assert (margins(ours) == np.diff(np.sort(ours, axis=1)[:, -2:])[:, 0]).all()
    found = compare(("a", ours), ("b", theirs), labels, [str(i) for i in range(count)])
    assert found.max_logit_difference == 6.0
    assert found.mean_logit_difference == pytest.approx(np.abs(ours - theirs).mean())
    assert found.median_logit_difference == pytest.approx(np.median(np.abs(ours - theirs).mean(1)))


@pytest.mark.parametrize("capacity", [1, 6, 9])
def test_collector_joins_batches_in_order(capacity):
    """Also where fewer or more images come than were expected."""
    collector = Collector(capacity)
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    for start in (0, 4):
        part = rows[start : start + 4]
        collector.add({"x": part}, np.arange(start, start + len(part)), [str(i) for i in range(len(part))])
    np.testing.assert_array_equal(collector.column("x"), rows)
    assert collector.labels().tolist() == [0, 1, 2, 3, 4, 5] and len(collector.ids) == 6


@settings(deadline=None)
@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_the_score_equation(case):
    hits, trials = case
    rate, z, p = wilson(hits, trials), 1.959963984540054, hits / trials
    # Wilson (1927): the ends are the roots of (p - x)^2 = z^2 x (1 - x) / n.
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    assert rate.percent == pytest.approx(100 * p)
    assert rate.low == pytest.approx(100 * max(centre - half, 0), abs=1e-9)
    assert rate.high == pytest.approx(100 * min(centre + half, 1), abs=1e-9)


def test_wilson_published():
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    cases = {(81, 263): (25.53, 36.62), (15, 148): (6.24, 16.05), (0, 20): (0, 16.11), (1, 29): (0.61, 17.18)}
    for counts, (low, high) in cases.items():
        rate = wilson(*counts)
        assert (round(rate.low, 2), round(rate.high, 2)) == (low, high)


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 5), st.integers(0, 5))
def test_mcnemar_is_the_two_sided_binomial_test(only_reference, only_deployed, both, neither):
    pairs = [(True, False)] * only_reference + [(False, True)] * only_deployed
    pairs += [(True, True)] * both + [(False, False)] * neither
    ours, theirs = (np.array([p[i] for p in pairs], dtype=bool) for i in (0, 1))
    found = mcnemar(ours, theirs)
    assert (found.only_reference, found.only_deployed) == (only_reference, only_deployed)
    n = only_reference + only_deployed
    tail = sum(math.comb(n, k) for k in range(min(only_reference, only_deployed) + 1)) / 2**n
    assert found.p_value == pytest.approx(min(1.0, 2 * tail))


@settings(deadline=None)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(20, 60), st.integers(20, 60))
def test_excess_is_the_hypergeometric_tail(flips, floor_flips, images, floor_images):
    total, marked = images + floor_images, flips + floor_flips
    ways = [
        math.comb(marked, k) * math.comb(total - marked, images - k) for k in range(min(marked, images) + 1)
    ]
    expected = sum(ways[flips:]) / math.comb(total, images)
    assert excess_p_value(flips, images, floor_flips, floor_images) == pytest.approx(expected)


def test_excess_on_fishers_tea():
    # Fisher, The Design of Experiments (1935): 3 of 4 cups right has p = 17 / 70.
    assert excess_p_value(3, 4, 1, 4) == pytest.approx(17 / 70)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 20), st.integers(0, 10**6))
def test_calibration_error_by_loops(images, classes, bins, seed):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(images, classes)).astype(np.float32) * 3
    labels = rng.integers(0, classes, images)
    members: dict[int, list[tuple[float, bool]]] = {}
    for row, label in zip(logits.astype(float), labels, strict=True):
        exponentials = [math.exp(x - max(row)) for x in row]
        confidence = max(exponentials) / sum(exponentials)
        index = next(i for i in range(bins) if confidence <= (i + 1) / bins + 1e-12 or i == bins - 1)
        members.setdefault(index, []).append((confidence, int(np.argmax(row)) == label))
    expected = sum(abs(sum(hit for _, hit in m) - sum(c for c, _ in m)) for m in members.values()) / images
    assert expected_calibration_error(logits, labels, bins) == pytest.approx(100 * expected, abs=1e-6)


def test_calibration_error_of_rows_that_are_not_finite():
    logits = np.array([[np.nan, 0], [50, 0]], np.float32)
    assert expected_calibration_error(logits, np.array([0, 0])) == pytest.approx(0)


def test_class_changes():
    labels = np.array([2, 0, 2, 2, 0])
    ours = np.array([True, True, False, True, False])
    theirs = np.array([True, False, False, False, False])
    found = class_changes(ours, theirs, labels)
    assert [(c.label, c.images) for c in found] == [(0, 2), (2, 3)]
    assert [c.reference for c in found] == pytest.approx([50, 200 / 3])
    assert [c.deployed for c in found] == pytest.approx([0, 100 / 3])
