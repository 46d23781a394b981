"""Losses, Fisher weights and bias correction, against their definitions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT
from scipy.special import softmax
from torch.distributions import Bernoulli
from torch.distributions import kl_divergence as divergence_of

from ospq_export.calibrate import calibrate
from ospq_export.calibrate.cost import kept_bytes_per_image
from ospq_export.calibrate.objectives import fisher, objectives
from ospq_export.calibrate.objectives.base import Context, weight_quantizers
from ospq_export.calibrate.objectives.channel import channel_axis, channel_weight
from ospq_export.calibrate.objectives.divergence import Divergence
from ospq_export.calibrate.objectives.fisher import fisher_weights
from ospq_export.calibrate.objectives.squared import Squared
from ospq_export.calibrate.observe import observe
from ospq_export.calibrate.reconstruct.activations import SliceData, forward, rows_of
from ospq_export.calibrate.reconstruct.bias import correct_biases
from ospq_export.calibrate.reconstruct.reconstructor import Reconstructor, walk
from ospq_export.data import Batch, resolve_data_config
from ospq_export.formats.choice import integers
from ospq_export.graph.capture import capture
from ospq_export.graph.granularity import slicing_of
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import ActivationQuantizer, Mode, quantizers_of
from ospq_export.graph.slicing import extract, run_slice
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model
from ospq_export.recipes import load_recipe
from ospq_export.tasks.classify import class_logits, kl_divergence, total_variation

CPU = torch.device("cpu")


def settings(*overrides):
    short = ("iterations=30", "batch_size=8", "refinement_images=0", "bias_images=32", *overrides)
    return load_recipe("w4a4", [f"reconstruction.{o}" for o in short]).reconstruction


def test_kl_is_torchs():
    output, target = torch.randn(6, 9), torch.randn(6, 9)
    expected = F.kl_div(
        F.log_softmax(output, -1), F.log_softmax(target, -1), log_target=True, reduction="batchmean"
    )
    assert float(kl_divergence(output, target)) == pytest.approx(float(expected), rel=1e-5)
    assert float(kl_divergence(target, target)) == 0.0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_total_variation(temperature):
    output, target = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0)) * 3
    p, q = (softmax(t.double().numpy() / temperature, axis=-1) for t in (output, target))
    expected = np.abs(p - q).sum(-1).mean() / 2
    assert float(total_variation(output, target, temperature)) == pytest.approx(expected, rel=1e-5)
    assert float(total_variation(target, target, temperature)) == 0.0


def test_channel_weights_let_every_channel_count_alike():
    target = torch.randn(64, 7, 5) * torch.tensor([1.0, 2.0, 4.0, 30.0, 100.0])
    weight = channel_weight(target, -1)
    assert weight.shape == (1, 1, 5) and float(weight.mean()) == pytest.approx(1.0)
    weighted = (target.square() * weight).mean((0, 1))
    assert float(weighted[1:].max() / weighted[1:].min()) == pytest.approx(1.0, rel=0.3)
    assert weighted[0] < 0.6 * weighted[1], "a channel of next to no variance is not blown up"
    image = channel_weight(torch.randn(4, 3, 8, 8), 1)
    assert image.shape == (1, 3, 1, 1)


def test_channels_lie_second_only_where_a_convolution_reads_them():
    torch.manual_seed(0)
    spec = ModelSpec(name="convnext_atto", kwargs={"depths": (1, 1, 1, 1), "num_classes": 5})
    convnext = capture(create_model(spec), (3, 64, 64))
    nodes = {n.name: n for n in convnext.graph.nodes}
    ends = [s.end for s in slicing_of(convnext.graph, "block")]
    assert channel_axis(nodes[ends[0]]) == 1 and channel_axis(nodes[ends[-1]]) == -1


def test_fisher_weights_do_not_depend_on_the_batches_that_memory_allows(
    small_vit, observed_vit, noise, monkeypatch
):
    ends = [s.end for s in slicing_of(small_vit.graph, "block")]
    batches = []
    run = fisher.Tap.run
    monkeypatch.setattr(fisher.Tap, "run", lambda s, x: batches.append(len(x)) or run(s, x))
    whole = fisher_weights(observed_vit, ends, noise[:8], CPU, seed=3)
    kept = kept_bytes_per_image(small_vit.graph)
    assert kept == kept_bytes_per_image(observed_vit.module.graph)
    monkeypatch.setattr(fisher, "_FISHER_BYTES", 3 * kept)
    parts = fisher_weights(observed_vit, ends, noise[:8], CPU, seed=3)
    assert batches == [8, 3, 3, 2]
    for name in ends:
        torch.testing.assert_close(parts[name], whole[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_fisher_weights_are_squared_gradients(small_vit, observed_vit, noise, temperature):
    """Against a plain autograd computation on the network from the last cut on."""
    slices = slicing_of(small_vit.graph, "block")
    found = fisher_weights(
        observed_vit, [s.end for s in slices], noise[:8], CPU, seed=3, temperature=temperature
    )
    weights = [found[s.end] for s in slices]
    assert [w.mean() for w in weights] == pytest.approx([1.0] * len(slices), abs=0.06)
    pieces = [extract(observed_vit.module, s) for s in slices]
    observed_vit.set_mode(Mode.FLOAT)
    with torch.no_grad():
        x = noise[:8]
        for piece in pieces[:2]:
            x = piece(x, 8)
    x.requires_grad_(True)
    logits = pieces[3](pieces[2](x, 8), 8) / temperature
    labels = torch.multinomial(
        logits.detach().softmax(-1), 1, generator=torch.Generator().manual_seed(3)
    ).squeeze(1)
    total = -logits.log_softmax(-1)[torch.arange(8), labels].sum()
    (gradient,) = torch.autograd.grad(total, x)
    expected = gradient.square().mean(0, keepdim=True)
    expected = (expected / expected.mean()).clamp_min(0.05)
    torch.testing.assert_close(weights[1], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", ["normalized", "channel", "fisher"])
@pytest.mark.parametrize("granularity", ["layer", "block"])
def test_every_loss_lowers_its_own_objective(small_vit, noise, loss, granularity):
    graph = insert_quantizers(small_vit, integers(3, 3))
    observe(graph, noise, batch_size=16, seed=0)
    slices = slicing_of(small_vit.graph, granularity)
    chosen = settings(f"loss={loss}", "final_loss=kl", "bias_correction=true")
    make = objectives(Context(graph, slices, noise, chosen, CPU, seed=0))
    kinds = []

    def noted(index, piece, target):
        objective = make(index, piece, target)
        kinds.append((isinstance(objective, Divergence), getattr(objective, "weight", None) is not None))
        return objective

    steps = list(walk(graph, slices, noise, Reconstructor(chosen, CPU), 0, make_objective=noted))
    assert len(steps) == len(slices)
    assert kinds[-1] == (True, False)
    assert set(kinds[:-1]) == {(False, loss != "normalized")}
    graph.set_mode(Mode.QUANTIZE)
    with torch.no_grad():
        ours = graph.module(noise)
        graph.set_mode(Mode.FLOAT)
        reference = graph.module(noise)
    nearest = insert_quantizers(small_vit, integers(3, 3))
    observe(nearest, noise, batch_size=16, seed=0)
    nearest.set_mode(Mode.QUANTIZE)
    with torch.no_grad():
        plain = nearest.module(noise)
    assert (ours - reference).square().mean() < 0.9 * (plain - reference).square().mean()


def test_bias_correction_gives_every_operator_the_float_mean(small_vit, observed_vit, noise):
    bounds = slicing_of(small_vit.graph, "block")[1]
    first = extract(observed_vit.module, slicing_of(small_vit.graph, "block")[0])
    x = forward(first, (noise,), Mode.FLOAT, CPU, 32)
    piece = extract(observed_vit.module, bounds)
    target = forward(piece, x, Mode.FLOAT, CPU, 32)[0]
    data = SliceData(x, x, target, 32)

    def mean_error():
        output = forward(piece, x, Mode.QUANTIZE, CPU, 32)[0]
        return float((output - target).mean((0, 1)).abs().mean())

    before = mean_error()
    float_biases = {
        b.name: observed_vit.module.get_buffer(b.constant).clone() for b in observed_vit.biases.values()
    }
    correct_biases(piece, data, CPU)
    assert mean_error() < 0.1 * before
    changed = [n for n, b in observed_vit.biases.items() if not torch.equal(b.value, float_biases[n])]
    assert sorted(changed) == sorted(n for n in observed_vit.biases if n.startswith("blocks.0."))
    torch.testing.assert_close(forward(piece, x, Mode.FLOAT, CPU, 32)[0], target, rtol=0, atol=0)


def test_offsets_are_learned_where_a_grid_is_shifted(small_vit, noise):
    graph = insert_quantizers(small_vit, integers(8, 8))
    observe(graph, noise, batch_size=16, seed=0)
    first = next(iter(graph.activations.values()))
    piece = extract(graph.module, slicing_of(small_vit.graph, "block")[1])
    x = forward(extract(graph.module, slicing_of(small_vit.graph, "block")[0]), (noise,), Mode.FLOAT, CPU, 32)
    data = SliceData(x, x, forward(piece, x, Mode.FLOAT, CPU, 32)[0], 32)
    shifted = [m for m in quantizers_of(piece) if isinstance(m, ActivationQuantizer) and m.format.has_offset]
    assert shifted, f"no shifted grid in {first.name}'s network: the test needs one"
    before = [float(a.offset) for a in shifted]
    for wanted in (False, True):
        graph.set_mode(Mode.FLOAT)
        chosen = settings("learning_rate_scale=0.01", f"learn_offsets={str(wanted).lower()}")
        Reconstructor(chosen, CPU)._learn(piece, data, Squared(chosen, weight_quantizers(piece)), 0)
        assert (([float(a.offset) for a in shifted]) != before) is wanted


def test_rows_of_images_that_hold_several_rows():
    tensor = torch.arange(24).reshape(12, 2)
    picked = rows_of(tensor, torch.tensor([2, 0]), 4)
    assert picked[:, 0].tolist() == [12, 14, 16, 0, 2, 4]


def test_a_layer_slicing_reconstructs_windows(noise):
    torch.manual_seed(0)
    kwargs = {"img_size": 56, "depths": (2,), "num_heads": (2,), "embed_dim": 32, "num_classes": 5}
    network = capture(
        create_model(ModelSpec(name="swin_tiny_patch4_window7_224", kwargs=kwargs)), (3, 56, 56)
    )
    x = torch.randn(8, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    graph = insert_quantizers(network, integers(4, 4))
    observe(graph, x, batch_size=8, seed=0)
    slices = slicing_of(network.graph, "layer")
    chosen = settings("iterations=2", "batch_size=4")
    steps = list(walk(graph, slices, x, Reconstructor(chosen, CPU), 0))
    assert len(steps) == len(slices) and all(s.metrics.error_after <= s.metrics.error_before for s in steps)
    graph.set_mode(Mode.QUANTIZE)
    tensors = (x,)
    with torch.no_grad():
        for piece in slices:
            tensors = run_slice(extract(graph.module, piece), tensors, 8)
        assert torch.equal(tensors[0], graph.module(x))


SPEC = ModelSpec(
    name="vit_tiny_patch16_224",
    kwargs={"img_size": 32, "depth": 2, "num_classes": 1, "embed_dim": 48, "num_heads": 3},
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = create_model(SPEC)
    # A classifier that is sure of some images and not of others.
    made.head.weight.data.normal_(0, 0.5)
    return made


@pytest.fixture(scope="module")
def noise():
    return torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_class_logits_give_the_sigmoid():
    x = torch.randn(5, 1, dtype=torch.float64) * 4
    p = class_logits(x).softmax(-1)
    torch.testing.assert_close(p, torch.cat([x.sigmoid(), 1 - x.sigmoid()], -1))
    several = torch.randn(5, 3)
    assert class_logits(several) is several


def test_kl_is_that_of_bernoulli_variables_and_has_its_gradient():
    output = (torch.randn(6, 1, dtype=torch.float64) * 3).requires_grad_(True)
    target = torch.randn(6, 1, dtype=torch.float64) * 3
    found = kl_divergence(output, target)
    expected = divergence_of(Bernoulli(logits=target), Bernoulli(logits=output)).mean()
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, output)
    # d KL / d x = sigmoid(x) - sigmoid(target), and the mean is over the images.
    torch.testing.assert_close(gradient, (output.sigmoid() - target.sigmoid()).detach() / 6)
    assert float(gradient.abs().min()) > 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_total_variation_is_the_difference_of_probabilities(temperature):
    output, target = torch.randn(6, 1) * 3, torch.randn(6, 1) * 3
    expected = ((output / temperature).sigmoid() - (target / temperature).sigmoid()).abs().mean()
    torch.testing.assert_close(total_variation(output, target, temperature), expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_fisher_weights_are_those_of_bernoulli_labels(model, noise, temperature):
    """Against autograd on the logistic loss; and on average over labels it is p (1 - p) (dx / da)^2."""
    graph = capture(model, (3, 32, 32))
    network = insert_quantizers(graph, integers(4, 4))
    slices = slicing_of(graph.graph, "block")
    found = fisher_weights(network, [s.end for s in slices], noise, torch.device("cpu"), 3, temperature)
    network.set_mode(Mode.FLOAT)
    pieces = [extract(network.module, s) for s in slices]
    with torch.no_grad():
        x = noise
        for piece in pieces[:2]:
            x = piece(x, len(noise))
    x.requires_grad_(True)
    logits = pieces[3](pieces[2](x, len(noise)), len(noise)) / temperature
    both = torch.cat([logits.sigmoid(), 1 - logits.sigmoid()], -1).detach()
    drawn = torch.multinomial(both, 1, generator=torch.Generator().manual_seed(3))
    loss = F.binary_cross_entropy_with_logits(logits, 1.0 - drawn, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    expected = gradient.square().mean(0, keepdim=True)
    expected = (expected / expected.mean()).clamp_min(0.05)
    weight = found[slices[1].end]
    torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-5)
    assert float(weight.max()) > 2 * float(weight.min())
    (slope,) = torch.autograd.grad(logits.sum(), x)
    mean = (both[:, 0] * both[:, 1]).reshape(-1, 1, 1) * slope.square()
    mean = mean.mean(0, keepdim=True)
    mean = (mean / mean.mean()).clamp_min(0.05)
    assert np.corrcoef(weight.flatten(), mean.flatten())[0, 1] > 0.8


@pytest.mark.slow
def test_a_network_with_one_output_is_calibrated(tmp_path, model, noise):
    config = resolve_data_config(model, SPEC, {})
    overrides = ["reconstruction.loss=fisher", "reconstruction.final_loss=kl", "slicing=block"]
    steps = ["reconstruction.batch_size=8", "reconstruction.iterations=30"]
    recipe = load_recipe("w4a4", [*SHORT, *overrides, *steps, "weight_bits=3", "activation_bits=3"])
    batch = Batch(images=noise, labels=torch.arange(32) % 2, ids=list(map(str, range(32))))
    classes = {"no": 0, "yes": 1}
    run = calibrate(model, SPEC, batch, config, recipe, tmp_path / "run", class_to_idx=classes)
    assert run.manifest.class_to_idx == classes
    assert all(np.isfinite([s.error_before, s.error_after]).all() for s in run.manifest.slices)
    # Of a softmax over one number the last slice's loss would be 0 throughout, and nothing learned.
    assert max(run.manifest.slices[-1].losses) > 0 and run.manifest.slices[-1].error_before > 0
    with torch.no_grad():
        fake = run.fake_quant_network()(noise)
    assert fake.shape == (32, 1)
