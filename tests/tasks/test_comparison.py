"""Parity statistics against slow independent references."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ospq_export.tasks import statistics
from ospq_export.tasks.comparison import (
    Collector,
    agreement,
    compare,
    flipped,
    margins,
    predictions,
    topk_accuracy,
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


@pytest.mark.parametrize("capacity", [6, 9])
def test_collector_joins_batches_in_order(capacity):
    """Also where fewer images can be read than there are."""
    collector = Collector(capacity)
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    for start in (0, 4):
        part = rows[start : start + 4]
        collector.add({"x": part}, np.arange(start, start + len(part)), [str(i) for i in range(len(part))])
    np.testing.assert_array_equal(collector.logits("x"), rows)
    assert collector.labels().tolist() == [0, 1, 2, 3, 4, 5] and len(collector.ids) == 6
