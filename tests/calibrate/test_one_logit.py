"""Networks with one output: what calibration looks at is the sigmoid's two classes, not a softmax over one number."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SHORT
from torch.distributions import Bernoulli
from torch.distributions import kl_divergence as divergence_of

from ospq_export.calibrate import calibrate
from ospq_export.calibrate.objectives.fisher import fisher_weights
from ospq_export.data import Batch, resolve_data_config
from ospq_export.formats.choice import integers
from ospq_export.graph.capture import capture
from ospq_export.graph.granularity import slicing_of
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode
from ospq_export.graph.slicing import extract
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model
from ospq_export.recipes import load_recipe
from ospq_export.tasks.classify import class_logits, kl_divergence, total_variation

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
