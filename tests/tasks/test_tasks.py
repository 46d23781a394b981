"""Tasks beside classification, against slow references that share no code with them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ospq_export.errors import InputError
from ospq_export.tasks.accuracy import FEWEST, bootstrap_bounds
from ospq_export.tasks.base import relative_error
from ospq_export.tasks.choice import TASKS, choose_task
from ospq_export.tasks.dense import MIOU, Pixels, miou, overlaps, pixel_classes
from ospq_export.tasks.distances import distances
from ospq_export.tasks.embed import KNN, TEMPERATURE, K, Neighbours, neighbour_votes, sampled, similarities
from ospq_export.tasks.measure import Collector, Noise
from ospq_export.tasks.tensors import Errors, gaussian_loss
from ospq_export.validate.criteria import faithful_criteria
from ospq_export.validate.kept import accuracy_criteria
from ospq_export.validate.verdict import Thresholds

rng = np.random.default_rng(0)
floats = st.floats(-8, 8, width=32)


def collected(measure, outputs, labels, batch=7):
    """What a measure keeps of outputs that come in batches."""
    collector = Collector(4)
    for start in range(0, len(labels), batch):
        part = {e: {n: v[start : start + batch] for n, v in held.items()} for e, held in outputs.items()}
        some, ids = (
            labels[start : start + batch],
            [str(i) for i in range(start, start + len(labels[start : start + batch]))],
        )
        collector.add(measure.columns(part, some, ids), measure.label_of(some), ids)
    return collector


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.float32, (3, 2, 4), elements=floats), hnp.arrays(np.float32, (3, 2, 4), elements=floats))
def test_distances_by_loops(a, b):
    for row, x, y in zip(distances(a, b), a.astype(float), b.astype(float), strict=True):
        x, y = x.ravel(), y.ravel()
        apart, size = math.dist(x, y), math.hypot(*x)
        assert row[0] == pytest.approx(apart / max(size, 1e-30), rel=1e-9)
        assert row[1] == pytest.approx(max(abs(p - q) for p, q in zip(x, y, strict=True)))
        product = sum(p * q for p, q in zip(x, y, strict=True))
        lengths = size * math.hypot(*y)
        if lengths > 1e-3:
            assert row[2] == pytest.approx(product / lengths, abs=1e-6)
        assert row[3] == pytest.approx(np.abs(x - y).mean())


def test_what_is_not_finite_is_infinitely_far():
    a = np.ones((2, 3), np.float32)
    b = np.array([[1, np.nan, 1], [1, 1, np.inf]], np.float32)
    found = distances(a, b)
    assert np.isinf(found[:, [0, 1, 3]]).all() and (found[:, 2] == -1).all()
    zero = np.zeros((1, 3), np.float32)
    assert distances(zero, zero).tolist() == [[0, 0, 1, 0]]


def test_votes_of_neighbours_by_loops():
    points, labels = rng.normal(size=(60, 5)).astype(np.float32), rng.integers(0, 4, 60)
    votes = neighbour_votes(similarities(points), labels)
    for i, x in enumerate(points.astype(float)):
        cosines = [(x @ y) / math.sqrt((x @ x) * (y @ y)) for y in points.astype(float)]
        others = sorted((j for j in range(60) if j != i), key=lambda j: -cosines[j])[:K]
        expected = [
            sum(math.exp((cosines[j] - 1) / TEMPERATURE) for j in others if labels[j] == k) for k in range(4)
        ]
        np.testing.assert_allclose(votes[i], expected, rtol=1e-3)


def test_the_sample_of_neighbours_does_not_grow():
    ids = [f"class/{i:06d}.jpg" for i in range(60_000)]
    chosen = sampled(ids, 60_000)
    assert 1_800 < chosen.sum() < 2_200
    parts = np.concatenate([sampled(ids[i : i + 100], 60_000) for i in range(0, 60_000, 100)])
    np.testing.assert_array_equal(parts, chosen)
    assert sampled(ids[:50], 50).all()
    stream = np.concatenate([sampled(ids[i : i + 100], None, i) for i in range(0, 60_000, 100)])
    assert stream.sum() == 2_000 and stream[:2_000].all()


def test_embeddings_of_one_direction_have_the_same_neighbours():
    labels = rng.integers(0, 3, 90)
    points = (np.eye(3)[labels] * 3 + rng.normal(size=(90, 3)) * 0.3).astype(np.float32)
    outputs = {name: {"embeddings": values} for name, values in {"float": points, "ours": points * 2}.items()}
    measure = Neighbours([("float", "ours")], 90)
    found = measure.compare(collected(measure, outputs, labels), "float", "ours", None)
    assert found.agreement == 100 and found.reference_score == found.deployed_score == 100
    assert found.outputs[0].mean_error == pytest.approx(1) and found.outputs[0].min_cosine == pytest.approx(1)
    collector = collected(measure, outputs, np.full(90, -1))
    assert measure.compare(collector, "float", "ours", None).mcnemar is None
    assert measure.scores(collector, "ours") == {}
    assert measure.scores(collected(measure, outputs, labels), "ours")[KNN].percent == 100


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 2**31))
def test_overlaps_by_loops(count, classes, seed):
    draw = np.random.default_rng(seed)
    logits = draw.normal(size=(count, classes, 3, 4)).astype(np.float32)
    labels = draw.integers(-1, classes, (count, 3, 4))
    found = overlaps(logits, labels)
    expected = np.zeros_like(found)
    for i in range(count):
        for y in range(3):
            for x in range(4):
                if labels[i, y, x] >= 0:
                    mine = max(range(classes), key=lambda k: logits[i, k, y, x])
                    expected[i, 0, mine] += mine == labels[i, y, x]
                    for k in {mine, labels[i, y, x]}:
                        expected[i, 1, k] += 1
    np.testing.assert_array_equal(found, expected)
    total = expected.sum(0)
    shares = [a / b for a, b in zip(*total, strict=True) if b]
    assert miou(total[None])[0] == pytest.approx(100 * sum(shares) / max(len(shares), 1))


def test_masks_of_another_size_and_of_other_classes():
    logits = np.zeros((1, 2, 2, 2), np.float32)
    logits[0, 0, :, 0] = logits[0, 1, :, 1] = 4
    labels = np.zeros((1, 8, 8), np.int64)
    labels[0, :, 4:] = 1
    assert miou(overlaps(logits, labels))[0] == 100
    with pytest.raises(InputError, match="label 2, but the network has 2 classes"):
        overlaps(logits, labels + 1)
    assert pixel_classes(np.array([[[[-1.0, 1.0]]]], np.float32)).tolist() == [[[0, 1]]]


def test_pixels_that_agree_and_points_of_miou():
    labels = rng.integers(0, 3, (40, 4, 4))
    good = (
        np.moveaxis(np.eye(3, dtype=np.float32)[labels], -1, 1)
        + rng.normal(size=(40, 3, 4, 4)).astype(np.float32) * 0.3
    )
    worse = good.copy()
    worse[:, :, 0] = -worse[:, :, 0]
    measure = Pixels([("float", "ours")], 40)
    collector = collected(measure, {"float": {"logits": good}, "ours": {"logits": worse}}, labels)
    found = measure.compare(collector, "float", "ours", None)
    share = (good.argmax(1) != worse.argmax(1)).mean()
    assert found.agreement == pytest.approx(100 * (1 - share)) and share > 0.1
    change = measure.accuracy(collector, "float", "ours", 0.95)
    assert change.measure == MIOU and change.drop == pytest.approx(
        found.reference_score - found.deployed_score
    )
    assert change.low < change.drop < change.high and change.high - change.low < 10
    (lost,) = accuracy_criteria([change], Thresholds())
    assert lost.outcome == "missed" and "an mIoU of" in lost.text
    (kept,) = accuracy_criteria([measure.accuracy(collector, "float", "ours", 0.95)], Thresholds(max_drop=60))
    assert kept.outcome == "met"
    blind = collected(measure, {"float": {"logits": good}, "ours": {"logits": worse}}, np.full(40, -1))
    (unknown,) = accuracy_criteria([measure.accuracy(blind, "float", "ours", 0.95)], Thresholds())
    assert unknown.outcome == "open" and "only labels would tell" in unknown.text


def test_bootstrap_bounds_hold_as_often_as_they_say():
    covered = 0
    for seed in range(100):
        values = np.random.default_rng(seed).exponential(size=60)
        low, high = bootstrap_bounds(values, lambda sums: sums / 60, 0.95, seed)
        assert low < values.mean() < high
        covered += low <= 1.0
    assert 88 <= covered <= 100
    assert bootstrap_bounds(np.ones(5), lambda sums: sums / 5, 0.5) == (1.0, 1.0)


def pair(noise=0.0, images=400, swap=False):
    a = {name: rng.normal(size=(images, 6)).astype(np.float32) for name in ("boxes", "angles")}
    b = {name: v + np.float32(noise) * rng.normal(size=v.shape).astype(np.float32) for name, v in a.items()}
    if swap:
        b = dict(zip(b, reversed(b.values()), strict=True))
    measure = Errors([("fake_quant", "ours")], images)
    collector = collected(measure, {"fake_quant": a, "ours": b}, np.full(images, -1))
    return measure, collector


def judged(noise, floor, **arguments):
    measure, collector = pair(noise, **arguments)
    known = (
        None if floor is None else dict.fromkeys(("boxes", "angles"), Noise(mean=floor, largest=4 * floor))
    )
    return faithful_criteria([measure.compare(collector, "fake_quant", "ours", known)], [], [], Thresholds())


def test_outputs_within_the_noise_are_faithful():
    assert [c.outcome for c in judged(0.01, 0.02)] == ["met", "met"]
    assert [c.outcome for c in judged(0.01, 0.02, images=20)] == ["open", "open"], "20 images show nothing"
    assert [c.outcome for c in judged(0.01, None)] == ["open", "open"]


@pytest.mark.parametrize("noise", [0.012, 0.1])
def test_outputs_beyond_the_noise_are_not(noise):
    found = judged(noise, 0.01)
    assert [c.outcome for c in found] == ["missed", "missed"]
    assert all("beyond" in c.text for c in found)


def test_swapped_outputs_are_named():
    found = judged(0.01, 0.02, swap=True)
    assert [c.text for c in found] == ["boxes holds what angles should", "angles holds what boxes should"]
    assert {c.outcome for c in found} == {"missed"}


def test_errors_against_float():
    measure, collector = pair(0.05)
    (kept,) = accuracy_criteria([measure.accuracy(collector, "fake_quant", "ours", 0.95)], Thresholds())
    mean = 100 * measure.errors(collector, "fake_quant", "ours").mean()
    assert kept.outcome == "met" and f"is {mean:.2f} % off" in kept.text and 4 < mean < 7
    (lost,) = accuracy_criteria(
        [measure.accuracy(collector, "fake_quant", "ours", 0.95)], Thresholds(max_error=2)
    )
    assert lost.outcome == "missed"
    measure, collector = pair(0.05, images=FEWEST - 1)
    (few,) = accuracy_criteria(
        [measure.accuracy(collector, "fake_quant", "ours", 0.95)], Thresholds(max_error=2)
    )
    assert few.outcome == "open" and few.images_needed == FEWEST


def test_executions_with_other_outputs_are_refused():
    measure = Errors([("a", "b")], 2)
    one = {"x": np.zeros((2, 3), np.float32)}
    for other in ({"y": one["x"]}, {"x": np.zeros((2, 4), np.float32)}, {**one, "y": one["x"]}):
        with pytest.raises(InputError, match="b returns"):
            measure.columns({"a": one, "b": other}, np.zeros(2, np.int64), ["0", "1"])


@pytest.mark.parametrize(
    ("shapes", "headless", "expected"),
    [
        ({"logits": (10,)}, False, "classify"),
        ({"logits": (10,)}, True, "embed"),
        ({"pooler_output": (10,)}, False, "embed"),
        ({"logits": (5, 8, 8)}, False, "dense"),
        ({"logits": (5, 4, 4)}, False, "tensors"),
        ({"logits": (16, 10)}, False, "tensors"),
        ({"logits": (10,), "boxes": (4,)}, False, "tensors"),
    ],
)
def test_the_task_that_outputs_look_like(shapes, headless, expected):
    task, reason = choose_task(None, shapes, (3, 64, 64), headless=headless)
    assert task.name == expected and reason
    assert choose_task("tensors", shapes, (3, 64, 64))[0].name == "tensors"


def test_a_task_that_does_not_fit_is_refused():
    for name, shapes in (
        ("classify", {"a": (3,), "b": (3,)}),
        ("embed", {"a": (3, 4)}),
        ("dense", {"a": (3,)}),
        ("nothing", {"a": (3,)}),
    ):
        with pytest.raises(InputError, match="`task`") as info:
            choose_task(name, shapes, (3, 8, 8))
        assert "\n" not in str(info.value)


@pytest.mark.parametrize("name", ["embed", "dense", "tensors"])
def test_losses_are_zero_for_equal_outputs_and_have_gradients(name):
    task = TASKS[name]
    shape = (4, 3, 5, 5) if name == "dense" else (4, 6)
    target, output = torch.randn(shape), torch.randn(shape, requires_grad=True)
    assert float(task.divergence(target, target)) == pytest.approx(0, abs=1e-6)
    assert float(task.distance([target], [target], 2.0)) == pytest.approx(0, abs=1e-6)
    assert task.divergence(output, target).item() > 0.1
    assert task.distance([output], [target], 2.0).item() > 0.01
    generator = torch.Generator().manual_seed(0)
    task.sampled_loss([output], generator, 1.0).backward()
    assert output.grad is not None and float(output.grad.abs().sum()) > 0


def test_relative_error_is_one_for_the_mean():
    target = torch.randn(50, 8)
    assert float(relative_error(target.mean().expand_as(target), target)) == pytest.approx(1, rel=1e-5)


def test_the_gaussian_loss_has_the_jacobian_for_fisher_information():
    """Squared gradients, averaged over draws, are the diagonal of J^T J in units of the spread."""
    weight = torch.randn(5, 3)
    x = torch.randn(1, 3)
    spread = float((x @ weight.T).std(correction=0))
    total = torch.zeros(3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        leaf = x.clone().requires_grad_(True)
        gaussian_loss([leaf @ weight.T], generator).backward()
        total += leaf.grad[0].square()
    expected = weight.square().sum(0) / (5 * spread**2)
    torch.testing.assert_close(total / 4000, expected, rtol=0.1, atol=0)
