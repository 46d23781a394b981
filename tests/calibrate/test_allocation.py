"""Formats within a budget: the programme against brute force, costs by hand, and the search from its losses to a run."""

import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import computed
from helpers import RTX, SETTINGS, SHORT, SPEC
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ospq_export import Budget, BudgetError, InputError, Run, cli
from ospq_export.calibrate.allocate import plan
from ospq_export.calibrate.allocate import search as module
from ospq_export.calibrate.allocate.cost import Roofline, average_bits
from ospq_export.calibrate.allocate.operators import groups_of, operators_of, stored_bits
from ospq_export.calibrate.allocate.plan import recipe_of
from ospq_export.calibrate.allocate.programme import Border, Programme
from ospq_export.calibrate.allocate.search import cheapest, check_held_out
from ospq_export.calibrate.allocate.stage import split
from ospq_export.data import Batch
from ospq_export.engines.rates import GPUS, HALF, find_gpu
from ospq_export.engines.record import build_engine
from ospq_export.engines.targets import TARGETS, find_target
from ospq_export.formats.choice import engine_types, named
from ospq_export.graph.capture import capture, operator_names
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model
from ospq_export.recipes import load_recipe
from ospq_export.runs.allocation import read_allocation
from ospq_export.runs.files import ALLOCATION, MANIFEST, RECIPE, SEARCH
from ospq_export.runs.tensors import read_tensors

ROOT = Path(__file__).parents[2]

# The programme


@st.composite
def programmes(draw):
    groups, formats = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    values = st.integers(0, 20).map(float)
    table = st.lists(st.lists(values, min_size=formats, max_size=formats), min_size=groups, max_size=groups)
    losses, costs = np.array(draw(table)), np.array(draw(table))
    losses[draw(st.integers(0, groups - 1)), 0] = draw(
        st.sampled_from([0.0, math.inf if formats > 1 else 0.0])
    )
    kinds = st.lists(st.sampled_from(["a", "b", HALF]), min_size=formats, max_size=formats)
    ends = st.integers(0, groups - 1)
    border = st.builds(Border, ends, ends, kinds, kinds, values)
    return Programme(losses, costs, draw(st.lists(border, max_size=3)))


def choices(programme):
    every = itertools.product(range(programme.losses.shape[1]), repeat=len(programme.losses))
    return [c for c in every if np.isfinite(programme.loss(c))]


def cost_of(programme, chosen):
    """Written anew: what is spent, and what every border adds."""
    total = sum(programme.costs[g][f] for g, f in enumerate(chosen))
    for b in programme.borders:
        made, read = b.made[chosen[b.producer]], b.read[chosen[b.reader]]
        if made != read and read != HALF:
            total += b.cost
    return total


@settings(max_examples=60, deadline=None)
@example(Programme(np.zeros((1, 2)), np.array([[10.0, 9.0]])), 0.99999)
@given(programmes(), st.floats(0, 1))
def test_the_programme_finds_what_brute_force_finds(programme, share):
    every = choices(programme)
    costs = [cost_of(programme, c) for c in every]
    limit = min(costs) + share * (max(costs) - min(costs))
    kept = limit * (1 + 1e-9)
    least = min(programme.loss(c) for c, cost in zip(every, costs, strict=True) if cost <= kept)
    found = programme.least_loss(limit)
    assert programme.loss(found) == pytest.approx(least) and cost_of(programme, found) <= kept
    assert programme.cost(found) == pytest.approx(cost_of(programme, found))
    cheap = programme.least_cost(least)
    within = [cost for c, cost in zip(every, costs, strict=True) if programme.loss(c) <= least * (1 + 1e-9)]
    assert cost_of(programme, cheap) == pytest.approx(min(within))
    if min(costs) > 0:
        assert programme.least_loss(min(costs) - 0.5) is None


DEAR = np.array([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), np.array([[0.0, 0.0, 1.0], [9.0, 0.0, 8.0]])


@settings(max_examples=30, deadline=None)
@example(Programme(*DEAR))
@given(programmes())
def test_no_choice_beats_one_of_the_front(programme):
    front = programme.front(9)
    points = [(cost_of(programme, c), programme.loss(c)) for c in front]
    assert all(a[0] <= b[0] + 1e-6 and a[1] > b[1] for a, b in itertools.pairwise(points))
    for choice in choices(programme):
        cost, loss = cost_of(programme, choice), programme.loss(choice)
        assert not any(cost < point[0] - 1e-6 and loss <= point[1] for point in points)


@given(st.integers(1, 40), st.data())
def test_the_cheapest_that_holds_is_found_by_halving(count, data):
    first = data.draw(st.integers(0, count))
    asked = []

    def holds(index):
        asked.append(index)
        return index >= first

    assert cheapest(count, holds) == (first if first < count else None)
    assert len(asked) == len(set(asked)) <= count.bit_length()


# Operators, groups and costs


def test_operators_of_a_vit(small_vit):
    found = {o.name: o for o in operators_of(small_vit)}
    assert list(found) == list(operator_names(small_vit.graph).values())
    # Five tokens of 48: four patches of 16 x 16, and the class token; three heads of 16.
    qkv, first, second = (found[f"blocks.0.attn.{n}"] for n in ("qkv", "matmul_0", "matmul_1"))
    assert (qkv.macs, qkv.weights, qkv.inputs, qkv.outputs) == (5 * 48 * 144, 48 * 144, 5 * 48, 5 * 144)
    assert first.macs == second.macs == 3 * 5 * 5 * 16 and first.outputs == first.attention.matrix == 75
    assert (first.attention.is_first, first.attention.keys, first.attention.head_size) == (True, 5, 16)
    assert found["blocks.0.mlp.fc2"].source == "blocks.0.mlp.fc1" and first.source == "blocks.0.attn.qkv"
    assert found["blocks.0.mlp.fc1"].source is None, "a normalization lies in between"
    total = sum(o.macs for o in found.values())
    patch = found["patch_embed.proj"]
    assert patch.macs == 4 * 48 * 3 * 16 * 16 and total > patch.macs


class Projections(torch.nn.Module):
    """Queries, keys and values from linears of their own."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (torch.nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        tokens = x.flatten(2)
        scores = (self.q(tokens) @ self.k(tokens).transpose(1, 2)).softmax(-1)
        return self.out(scores @ self.v(tokens))


def test_readers_of_a_tensor_and_an_attention_share_a_format(small_vit):
    captured = capture(Projections().eval(), (3, 4, 4))
    operators = operators_of(captured)
    names = [{operators[i].name for i in inside} for inside in groups_of(captured, operators)]
    assert names == [{"q", "k", "v"}, {"matmul_0", "matmul_1", "out"}]
    operators = operators_of(small_vit)
    groups = groups_of(small_vit, operators)
    assert sorted(i for inside in groups for i in inside) == list(range(len(operators)))
    together = {operators[i].name.removeprefix("blocks.1.attn.") for g in groups for i in g if len(g) > 1}
    assert {"matmul_0", "matmul_1", "proj"} <= together and len(groups) == 2 + 2 * 4


def test_average_bits(small_vit):
    operators = operators_of(small_vit)
    everything = lambda name: dict.fromkeys((o.name for o in operators), name)  # noqa: E731
    assert average_bits(operators, everything("int4")) == 4
    assert average_bits(operators, everything("float")) == 16 and stored_bits("nvfp4", weight=True) == 4.5
    attention = sum(o.macs for o in operators if not o.weights or o.name == "patch_embed.proj")
    share = attention / sum(o.macs for o in operators)
    assert average_bits(operators, everything("nvfp4")) == pytest.approx(4.5 + 3.5 * share), "FP8 takes over"
    mixed = everything("int4") | {"head": "int8"}
    head = next(o for o in operators if o.name == "head")
    total = sum(o.macs for o in operators)
    assert average_bits(operators, mixed) == pytest.approx(4 + 4 * head.macs / total)


def test_times_by_hand(small_vit):
    operators = {o.name: o for o in operators_of(small_vit)}
    fc1, l4 = operators["blocks.0.mlp.fc1"], find_gpu("l4")
    # One image is bound by memory: weights of a byte, activations read as one byte and written as two.
    moved = fc1.weights + fc1.inputs + 2 * fc1.outputs
    assert Roofline(l4).seconds(fc1, "int8") == pytest.approx(moved / 300e9)
    assert Roofline(l4).seconds(fc1, "int4") == Roofline(l4).seconds(fc1, "int8"), "it is multiplied as INT8"
    many = Roofline(find_gpu("b200"), 10**6)
    wide = fc1.__class__(**{**vars(fc1), "macs": 10**9})
    assert many.seconds(wide, "fp8") == pytest.approx(2e15 / 4500e12)
    assert many.seconds(wide, "float") == pytest.approx(2 * many.seconds(wide, "fp8"))
    first = operators["blocks.0.attn.matmul_0"]
    fused, apart = (Roofline(l4).seconds(first, name) for name in ("int8", "int4"))
    assert apart - fused == pytest.approx(4 * first.attention.matrix / 300e9), "below 8 bits it is no kernel"
    names = list(operators)
    every = dict.fromkeys(names, "fp8")
    border = every | {"blocks.0.mlp.fc2": "int8"}
    changed = Roofline(l4).total(list(operators.values()), border) - Roofline(l4).total(
        list(operators.values()), every
    )
    assert changed == pytest.approx(3 * fc1.outputs / 300e9)
    assert Roofline(l4).share(list(operators.values()), every) < 1


def test_every_gpu_has_a_rate_for_what_its_generation_multiplies():
    kinds = {f.family: f.engine_type for f in (named(n, weight=True) for n in ("int8", "fp8", "nvfp4"))}
    for name, gpu in GPUS.items():
        target = find_target(name)
        assert target is TARGETS[gpu.target] and gpu.sources and gpu.bandwidth > 0
        assert set(gpu.rates) == {HALF, *(kinds[family] for family in target.formats)}
        assert set(gpu.rates) - {HALF} <= engine_types()
        assert all(rate >= gpu.rates[HALF] for rate in gpu.rates.values())
    with pytest.raises(InputError, match=r"ada is a generation.*l4, rtx4090, l40s"):
        find_gpu("ada")
    with pytest.raises(InputError, match=r"'l5' are not known.*h100"):
        find_gpu("l5")
    with pytest.raises(InputError, match=r"no target 'l5'.*turing.*l40s"):
        find_target("l5")


def test_the_page_has_the_rates_of_the_table():
    page = (ROOT / "docs" / "budgets.md").read_text()
    rows = [
        [c.strip(" `") for c in line.split("|")[1:-1]] for line in page.splitlines() if "GPU |" not in line
    ]
    found = {row[0]: row[1:] for row in rows if row and row[0] in GPUS}

    def cells(gpu):
        rates = [gpu.rates.get(kind) for kind in (HALF, "Int8", "FP8", "FP4E2M1")]
        return [gpu.about, *("-" if r is None else f"{r:g}" for r in (*rates, gpu.bandwidth))]

    assert found == {name: cells(gpu) for name, gpu in GPUS.items()}


# Recipes


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_recipe_gives_every_operator_its_format(small_vit, data):
    operators = operators_of(small_vit)
    chosen = {}
    for inside in groups_of(small_vit, operators):
        kind = data.draw(st.sampled_from(["int4", "int8", "fp8", "nvfp4", "float"]))
        chosen |= {operators[i].name: kind for i in inside}
    if set(chosen.values()) == {"float"}:
        return
    recipe = recipe_of(load_recipe("w4a4"), operators, chosen)
    network = insert_quantizers(small_vit, recipe.formats())
    has = {name.rpartition(".")[0]: [] for name in (*network.activations, *network.weights)}
    for name, quantizer in (*network.activations.items(), *network.weights.items()):
        has[name.rpartition(".")[0]].append(quantizer.format.name)
    for operator in operators:
        expected = {n for n in operator.format_names(chosen[operator.name]) if n != "float"}
        # An operand may share the quantizer of another reader.
        assert set(has.get(operator.name, [])) <= expected, operator.name


# The search


def data_of(count, seed=0):
    images = torch.randn(count, 1, 32, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        labels = network()(images).argmax(1)
    return [(image[None], label[None]) for image, label in zip(images, labels, strict=True)]


def network():
    torch.manual_seed(0)
    return create_model(SPEC)


def search(out, budget, **changes):
    settings_ = [*SHORT, "reconstruction.iterations=2", "slicing=block"]
    return Run.calibrate(network(), data_of(96), "w4a4", out, overrides=settings_, budget=budget, **changes)


def codes(run):
    return {
        n: t for n, t in read_tensors(run.path / "quantized.safetensors")[0].items() if n.endswith("codes")
    }


@pytest.mark.slow
def test_bits_are_kept_and_the_recipe_makes_the_same_run(tmp_path):
    run = search(tmp_path / "run", Budget(formats=("int3", "int4", "int8"), bits=4.5))
    assert sorted(p.name for p in run.path.iterdir()) == sorted([MANIFEST, *run.manifest.files])
    found = read_allocation(run.file(ALLOCATION))
    (attempt,) = found.attempts
    operators = operators_of(run.captured())
    bits = {name: format_.bits for name, format_ in run.manifest.formats().items()}
    assert found.taken == 0 and 4 < attempt.bits <= 4.5 and len(set(bits.values())) > 1
    assert average_bits(operators, attempt.formats) == attempt.bits
    for operator in operators:
        own = {bits[n] for n in bits if n.rpartition(".")[0] == operator.name}
        assert own <= {named(attempt.formats[operator.name], weight=False).bits}
    again = Run.calibrate(network(), data_of(16), run.file(RECIPE), tmp_path / "again")
    assert codes(again).keys() == codes(run).keys()
    for name in (MANIFEST, ALLOCATION, RECIPE):
        assert (run.path / name).exists()
    for name in again.manifest.files:
        assert (again.path / name).read_bytes() == (run.path / name).read_bytes(), name
    assert computed(again.manifest.model_dump()["slices"]) == computed(run.manifest.model_dump()["slices"])


@pytest.fixture
def measured(monkeypatch):
    """The folders of the runs whose drop was measured, in order; five allocations in place of 24."""
    made = []
    monkeypatch.setattr(plan, "POINTS", 5)
    original = module.Search._drop

    def drop(self, run, looks):
        made.append(run.path.name)
        return original(self, run, looks)

    monkeypatch.setattr(module.Search, "_drop", drop)
    return made


@pytest.mark.slow
def test_a_drop_is_kept_or_said_not_to_be(tmp_path, measured, monkeypatch):
    lenient = Budget(formats=("int2", "int8"), max_drop=40.0, confidence=0.5)
    run = search(tmp_path / "run", lenient)
    found = read_allocation(run.file(ALLOCATION))
    taken = found.attempts[found.taken]
    assert run.manifest.recipe.max_drop == 40 and taken.images == 80 and taken.drop == taken.high <= 40
    tried = [a for a in found.attempts if a.images]
    assert len(tried) == len(measured) <= len(found.attempts).bit_length()
    assert all(a.high > 40 for a in tried if a.bits < taken.bits)
    assert not (run.path / SEARCH).exists()
    with torch.no_grad():
        images, labels = (torch.cat(x) for x in zip(*data_of(96)[16:], strict=True))
        wrong = (run.fake_quant_network()(images).argmax(1) != labels).float().mean()
    assert taken.drop == pytest.approx(100 * float(wrong))

    strict = Budget(formats=("int2",), max_drop=0.5, confidence=0.5)
    with pytest.raises(BudgetError, match=r"of int2 the best allocation loses [\d.]+ points on 80 .* fewer"):
        search(tmp_path / "none", strict)
    assert [p.name for p in (tmp_path / "none").iterdir()] == [SEARCH]
    count = len(measured)
    monkeypatch.setattr(module, "measure_sensitivity", lambda *_args, **_how: pytest.fail("once more"))
    with pytest.raises(BudgetError):
        search(tmp_path / "none", strict)
    assert len(measured) == count, "what was tried is not tried again"


@pytest.mark.slow
def test_interrupted_it_goes_on(tmp_path, measured, monkeypatch):
    budget = Budget(formats=("int2", "int8"), max_drop=30.0, confidence=0.5)
    whole = search(tmp_path / "whole", budget)
    tries = list(measured)
    original = module.Search._tried

    def interrupted(self, attempt, choices_, looks):
        assert len(measured) < len(tries) + 2, "interrupted"
        return original(self, attempt, choices_, looks)

    with monkeypatch.context() as patch:
        patch.setattr(module.Search, "_tried", interrupted)
        with pytest.raises(AssertionError, match="interrupted"):
            search(tmp_path / "twice", budget)
    again = search(tmp_path / "twice", budget)
    assert measured[len(tries) :] == tries, "each was tried once"
    for name in again.manifest.files:
        assert (again.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    with pytest.raises(InputError, match="already holds a finished run"):
        search(tmp_path / "twice", budget)


def test_few_images_are_shared():
    budget, recipe = Budget(formats=("int4",), max_drop=1.0), load_recipe("w4a4")

    def batch(count):
        ids = [str(i) for i in range(count)]
        return Batch(torch.zeros(count, 1, 2, 2), torch.zeros(count, dtype=torch.int64), ids)

    first, rest, found = split(batch(100), budget, recipe)
    assert (len(first.images), len(rest.images), found.calibration_images) == (75, 25, 75)
    assert not set(first.ids) & set(rest.ids)
    first, rest, found = split(batch(recipe.calibration_images + 500), budget, recipe)
    assert len(rest.images) == 500 and found == recipe
    assert split(batch(10), Budget(formats=("int4",), bits=4.0), recipe)[1] is None
    check_held_out(Budget(formats=("int4",), max_drop=1.0, confidence=0.5), 1)
    with pytest.raises(InputError, match=r"25 held-out images cannot show .* give 459"):
        check_held_out(budget, 25)
    check_held_out(budget, 459)


# The command line


def command(*words):
    with pytest.raises(SystemExit) as info, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ospq-export", "calibrate", *map(str, words)])
        cli.main()
    return info.value.code or 0


MODEL = ["vit_tiny_patch16_224", "--random-weights", "--model-kwargs", "img_size=32 depth=1 num_classes=5"]


@pytest.fixture
def pixels(tmp_path):
    np.save(
        tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3), dtype=np.uint8)
    )
    return tmp_path / "images.npy"


@pytest.mark.slow
def test_from_the_command_line(tmp_path, pixels, capsys):
    common = [*MODEL, "--data", pixels, "--workers", 0, "--recipe", "w4a4", "--quiet"]
    common += ["--set", "reconstruction.iterations=0", "--set", "reconstruction.refinement_images=0"]
    common += ["--set", "calibration_images=16", "--set", "equalization=none"]
    rtx = ["--formats", "int8,fp8,nvfp4,float", "--target", "rtx5090", "--budget-latency", "0.7"]
    assert command(*common, *rtx, "--out", tmp_path / "run") == 0
    assert "calibrated vit_tiny_patch16_224 with w4a4-allocated" in capsys.readouterr().out
    (attempt,) = read_allocation(tmp_path / "run" / ALLOCATION).attempts
    assert 0.3 < attempt.latency <= 0.7 and attempt.images == 0
    drop = ["--formats", "int2", "--max-drop", 0, "--confidence", 0.5, "--out", tmp_path / "no"]
    assert command(*common, *drop) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("budget not kept: of int2 the best")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-drop", 1], "a budget needs formats to choose from (--formats)"),
        (["--formats", "int4"], "it belongs to a budget (--formats): give --max-drop"),
        (["--confidence", 0.9], "it belongs to a budget (--confidence)"),
        (["--budget-bits", 4, "--formats", "int4,int9"], "no format 'int9'"),
        (["--budget-bits", 4, "--formats", "float"], "a network in float loses nothing (--formats)"),
        (["--budget-latency", 0.5, "--formats", "fp8"], "a latency needs a GPU"),
        (["--budget-latency", 0.5, "--formats", "fp8", "--target", "ada"], "ada is a generation"),
        (["--budget-latency", 0.5, "--formats", "nvfp4", "--target", "l4"], "does not multiply NVFP4"),
        (["--budget-bits", 2, "--formats", "int4,int8"], "the network takes 4 at least (--budget-bits 2)"),
        (["--budget-bits", 4, "--formats", "int4", "--set", 'overrides={"head" = "int8"}'], "has overrides"),
        (["--max-drop", 0.5, "--formats", "int4"], "12 held-out images cannot show a drop of 0.5 points"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(tmp_path, pixels, capsys, words, said):
    common = [*MODEL, "--data", pixels, "--workers", 0, "--quiet", "--set", "equalization=none"]
    assert command(*common, *words, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and said in error[0]
    assert not (tmp_path / "run" / MANIFEST).exists()


# What is deployed


@RTX
@pytest.mark.slow
def test_no_format_unfuses_an_attention_and_nothing_quantized_runs_in_float(tmp_path):
    """Three kinds of products in one network, in the plan of the real builder."""
    kwargs = {"img_size": 64, "patch_size": 8, "depth": 3, "num_classes": 5, "embed_dim": 64, "num_heads": 2}
    torch.manual_seed(0)
    model = create_model(ModelSpec(name="vit_tiny_patch16_224", kwargs=kwargs))
    images = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    budget = Budget(formats=("fp8", "nvfp4", "float"), latency=0.75, gpu="rtx5090")
    short = [*SHORT, "reconstruction.iterations=0", "equalization=none"]
    run = Run.calibrate(
        model, list(images.split(1)), "nvfp4", tmp_path / "run", overrides=short, budget=budget
    )
    (attempt,) = read_allocation(run.file(ALLOCATION)).attempts
    assert len(set(attempt.formats.values())) > 1
    run.export(fp16=True)
    settings_ = replace(SETTINGS, compute_capabilities=("SM120",))
    fusion = build_engine(run.file("model_qdq_fp16.onnx"), tmp_path / "m.engine", settings_).fusion
    assert fusion.attentions == fusion.fused_attentions == 3, fusion.not_fused
    left = {name for name, kind in attempt.formats.items() if kind == "float"}
    assert all(any(name.startswith(o) for o in left) for name in fusion.not_quantized), fusion.not_quantized
