"""What each operand costs the output: estimated as measured, resumed, and said as patterns that a recipe takes."""

import json
import sys
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from ospq_export import cli
from ospq_export.calibrate.allocate import sensitivity as module
from ospq_export.calibrate.allocate.effects import Operand, Sensitivity, globs
from ospq_export.calibrate.allocate.estimate import Estimator
from ospq_export.calibrate.allocate.sensitivity import divergence_of, measure_sensitivity
from ospq_export.calibrate.observe import observe
from ospq_export.errors import InputError
from ospq_export.formats.choice import integers
from ospq_export.graph.capture import capture
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode
from ospq_export.recipes import load_recipe
from ospq_export.tasks.choice import TASKS
from ospq_export.tasks.classify import CLASSIFY, kl_divergence


@pytest.mark.parametrize("formats", [["int4", "int8"], ["fp8", "nvfp4"]])
def test_the_estimate_ranks_as_the_measurement_does(small_vit, noise, formats):
    """One operand at a time, all of them; the measurement is written anew here."""
    found = measure_sensitivity(small_vit, noise, formats, CLASSIFY, measured=0)
    assert found.passes == 7 * len(noise) and found.passes_of_measuring == len(noise) * len(found.operands)
    with torch.no_grad():
        reference = small_vit(noise)
    measured = []
    for wanted in formats:
        network = insert_quantizers(small_vit, module.Choice(wanted, wanted, wanted, wanted))
        observe(network, noise, batch_size=8, seed=0)
        for name in [o.name for o in found.operands if o.wanted == wanted]:
            network.set_mode(Mode.FLOAT)
            {**network.activations, **network.weights}[name].mode = Mode.QUANTIZE
            with torch.no_grad():
                measured.append(float(kl_divergence(network.module(noise), reference)))
    assert len(measured) == len(found.operands) > 40
    assert spearmanr([o.estimate for o in found.operands], measured).statistic > 0.85


def test_of_a_linear_network_the_estimate_is_the_error():
    """The squared error of the output in units of its spread, averaged over its elements: the task's relative error."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 6)).eval()
    images = torch.randn(400, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    captured = capture(model, (3, 8, 8))
    network = insert_quantizers(captured, integers(4, 4, 4))
    observe(network, images, batch_size=100, seed=0)
    estimator = Estimator({"int4": network}, TASKS["tensors"])
    sums = [estimator.batch(part, seed) for seed, part in enumerate(images.split(8))]
    with torch.no_grad():
        exact = captured(images)
        for name in (*network.weights, *network.activations):
            network.set_mode(Mode.FLOAT)
            {**network.activations, **network.weights}[name].mode = Mode.QUANTIZE
            spread = torch.cat([part.std(correction=0).expand(len(part)) for part in exact.split(8)])
            expected = float(((network.module(images) - exact) / spread[:, None]).square().mean(1).sum())
            assert sum(s[name, "int4"] for s in sums) == pytest.approx(expected, rel=0.2), name


class Shared(torch.nn.Module):
    """A tensor that a linear reads and a product of two activations: NVFP4 for one, FP8 for the other."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(32, 8)

    def forward(self, x):
        tokens = x.flatten(2)
        return self.linear(tokens), tokens @ tokens.transpose(1, 2)


def test_a_tensor_with_two_quantizers_has_two_estimates():
    torch.manual_seed(0)
    images = torch.randn(64, 3, 4, 8, generator=torch.Generator().manual_seed(1))
    captured = capture(Shared().eval(), (3, 4, 8))
    task, formats = TASKS["tensors"], ["int8", "nvfp4"]
    networks = module.observed_networks(captured, images, formats)
    assert len(networks["nvfp4"].activations) > len(networks["int8"].activations)
    found = measure_sensitivity(captured, images, formats, task, measured=0)
    for operand_ in found.operands:
        measured = divergence_of(networks[operand_.wanted], [operand_.name], images, task)
        # The estimate of a relative error is half of it.
        assert 2 * operand_.estimate == pytest.approx(measured, rel=0.5), operand_


def test_the_largest_are_measured_and_the_others_put_on_their_scale(small_vit, noise):
    found = measure_sensitivity(small_vit, noise, ["int4"], CLASSIFY, measured=5)
    measured = [o for o in found.operands if o.measured is not None]
    least = min(o.estimate for o in measured)
    assert len(measured) == 5 and all(o.estimate <= least for o in found.operands if o.measured is None)
    network = insert_quantizers(small_vit, integers(4, 4, 4))
    observe(network, noise, batch_size=8, seed=0)
    assert measured[0].measured == divergence_of(network, [measured[0].name], noise, CLASSIFY)
    ratios = sorted(o.measured / o.estimate for o in measured)
    assert found.scale == ratios[2] and found.loss(measured[0]) == measured[0].measured
    other = next(o for o in found.operands if o.measured is None)
    assert found.loss(other) == found.scale * other.estimate


def test_interrupted_it_goes_on_and_ends_with_the_same(small_vit, noise, tmp_path, monkeypatch):
    arguments = (small_vit, noise, ["int4"], CLASSIFY)
    whole = measure_sensitivity(*arguments, out=tmp_path / "whole", measured=3)
    ran = []
    batch = Estimator.batch

    def counted(self, images, seed):
        assert len(ran) != 2, "interrupted"
        ran.append(seed)
        return batch(self, images, seed)

    monkeypatch.setattr(Estimator, "batch", counted)
    with pytest.raises(AssertionError, match="interrupted"):
        measure_sensitivity(*arguments, out=tmp_path / "twice", measured=3)
    ran.append(None)
    # Other images are another matter: what is kept of these is not taken, and stays.
    other = measure_sensitivity(small_vit, noise[:8], ["int4"], CLASSIFY, out=tmp_path / "twice", measured=0)
    assert len(ran) == 4 and other.images == 8
    again = measure_sensitivity(*arguments, out=tmp_path / "twice", measured=3)
    assert len(ran) == 6 and again == whole, "two of four batches were kept"
    files = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("whole", "twice")]
    assert files[0] == files[1] == ["sensitivity.json"]
    assert Sensitivity.model_validate_json((tmp_path / "twice" / "sensitivity.json").read_text()) == whole


def operand(operator, estimate, wanted="int4"):
    fields = {"kind": "weight", "wanted": wanted, "format": wanted, "estimate": estimate}
    return Operand(name=f"{operator}.weight", operator=operator, **fields)


def test_the_fewest_operators_that_cause_half_of_the_loss_are_named():
    operators = ["stem", "blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "head"]
    losses = dict(zip(operators, [1.0, 4.0, 5.0, 2.0, 3.0], strict=True))
    found = Sensitivity(
        task="classify",
        images=1,
        operators=operators,
        operands=[operand(o, x) for o, x in losses.items()] + [operand("stem", 99.0, "int8")],
    )
    assert found.to_leave("int4") == ["blocks.0.*"] and found.to_leave("int8") == ["stem"]
    assert list(found.by_operator("int4")) == ["blocks.0.fc2", "blocks.0.fc1", "head", "blocks.1.fc1", "stem"]
    (pattern,) = found.to_leave("int4")
    overrides = [f'overrides={{"{pattern}" = "float"}}']
    assert load_recipe("w4a4", overrides).formats().overrides == (("blocks.0.*", "float"),)


@given(st.data())
def test_patterns_fit_what_was_chosen_and_no_other(data):
    path = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(".".join)
    operators = data.draw(st.lists(path, min_size=1, max_size=12, unique=True))
    chosen = data.draw(st.lists(st.sampled_from(operators), unique=True))
    patterns = globs(chosen, operators)
    assert {o for o in operators if any(fnmatchcase(o, p) for p in patterns)} == set(chosen)
    assert len(patterns) <= len(chosen)


def test_what_is_no_format_is_refused(small_vit, noise):
    for formats, said in (
        (["int4", "int9"], "no format 'int9'"),
        (["float"], "loses nothing"),
        ([], "loses nothing"),
    ):
        with pytest.raises(InputError, match=said):
            measure_sensitivity(small_vit, noise, formats, CLASSIFY)


def command(monkeypatch, *words):
    monkeypatch.setattr(
        sys, "argv", ["ospq-export", "sensitivity", *map(str, words), "--workers", "0", "--quiet"]
    )
    with pytest.raises(SystemExit) as info:
        cli.main()
    return info.value.code or 0


def test_from_the_command_line(monkeypatch, tmp_path, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", pixels)
    model = [
        "vit_tiny_patch16_224",
        "--random-weights",
        "--model-kwargs",
        "img_size=32 depth=1 num_classes=5",
    ]
    common = [*model, "--data", tmp_path / "images.npy", "--images", 8]
    assert command(monkeypatch, *common, "--formats", "int4,fp8", "--out", tmp_path / "out", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "out" / "sensitivity.json").read_text())
    assert {o["wanted"] for o in printed["operands"]} == {"int4", "fp8"} and printed["task"] == "classify"
    assert (tmp_path / "out" / "sensitivity.png").read_bytes()[:4] == b"\x89PNG"
    assert command(monkeypatch, *common, "--formats", "int3") == 0
    assert "half of the loss is that of" in capsys.readouterr().out
    assert command(monkeypatch, *common, "--formats", "int3,nonsense", "--out", tmp_path / "no") == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "'nonsense'" in error and not (tmp_path / "no").exists()
