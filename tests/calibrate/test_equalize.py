"""Equalization: the float function stays, outliers leave the activations, and only what may move moves."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ospq_export.calibrate.equalize import count_sites, equalize
from ospq_export.calibrate.observe import observe
from ospq_export.formats.choice import Choice, integers
from ospq_export.graph.capture import capture, fingerprint
from ospq_export.graph.equalization import find_sites, rescale
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.keys import find_keys, move_keys
from ospq_export.graph.quantizers import Mode
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model

FAMILIES = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 1},
    "deit3_small_patch16_224": {"img_size": 32, "depth": 1},
    "beit_base_patch16_224": {"img_size": 32, "depth": 1},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 1},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (2, 1), "num_heads": (2, 4), "embed_dim": 32},
    "swinv2_tiny_window8_256": {"img_size": 64, "depths": (1, 1), "num_heads": (2, 4), "embed_dim": 32},
    "cait_xxs24_224": {"img_size": 32, "depth": 1},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "twins_svt_small": {"img_size": 64, "depths": (1, 1, 1, 1)},
    "xcit_nano_12_p16_224": {"img_size": 64, "depth": 1},
    "vit_small_patch14_dinov2": {"img_size": 28, "depth": 1},
    "vit_base_patch16_siglip_224": {"img_size": 32, "depth": 1},
    "maxvit_tiny_rw_224": {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 64)},
}
FP8 = Choice("fp8", "fp8", "fp8", "fp8")
# Producers of each network: a shortfall means that a pattern is no longer seen.
SITES = {
    "vit_tiny_patch16_224": 4,
    "deit3_small_patch16_224": 4,
    "beit_base_patch16_224": 4,
    "eva02_tiny_patch14_224": 4,
    "swin_tiny_patch4_window7_224": 11,
    "swinv2_tiny_window8_256": 3,
    "cait_xxs24_224": 11,
    "convnext_atto": 8,
    "twins_svt_small": 13,
    "xcit_nano_12_p16_224": 5,
    "vit_small_patch14_dinov2": 4,
    "vit_base_patch16_siglip_224": 6,
    "maxvit_tiny_rw_224": 12,
}


def restless(name):
    """A network whose every vector of parameters matters, captured; and a few images."""
    torch.manual_seed(0)
    kwargs = FAMILIES[name]
    model = create_model(ModelSpec(name=name, kwargs={"num_classes": 7, **kwargs}))
    generator = torch.Generator().manual_seed(1)
    for path, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.4)
        if "head" in path and parameter.dim() == 2:
            parameter.data.normal_(0, 1, generator=generator)
    size = kwargs.get("img_size") or model.pretrained_cfg["input_size"][-1]
    return capture(model, (3, size, size)), torch.randn(3, 3, size, size, generator=generator)


def relative(found, expected):
    """Largest difference over the largest output."""
    return float((found - expected).abs().max() / expected.abs().max())


FAST = ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "cait_xxs24_224")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
)
def test_any_rescaling_keeps_the_function(name):
    network, images = restless(name)
    before, expected = fingerprint(network), network(images)
    sites = find_sites(network.graph)
    assert len(sites) == SITES[name]
    generator = torch.Generator().manual_seed(2)
    for site in sites:
        channels = len(site.free)
        scale = torch.where(site.free, torch.exp(1.5 * torch.randn(channels, generator=generator)), 1.0)
        shift = torch.where(site.shiftable, torch.randn(channels, generator=generator), 0.0)
        rescale(network, site, scale, shift)
    assert fingerprint(network) == before
    assert relative(network(images), expected) < 1e-4
    torch.testing.assert_close(network(images[1:2]), network(images)[1:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("swin_tiny_patch4_window7_224", "convnext_atto")),
    ],
)
@pytest.mark.parametrize("method", ["smooth", "shift", "repq"])
def test_the_search_keeps_the_function(name, method):
    network, images = restless(name)
    expected = network(images)
    constants = {k: v.clone() for k, v in network.named_buffers()}
    records = equalize(network, images, integers(4, 4), method)
    assert relative(network(images), expected) < 1e-4
    assert any(not torch.equal(constants[k], v) for k, v in network.named_buffers())
    assert 0 < len(records) <= count_sites(network, method)
    if method != "repq":
        assert all(r.error_after <= r.error_before for r in records)
        assert any(r.error_after < 0.9 * r.error_before for r in records)


# Producers of keys. EVA-02 turns its keys by their position, Swin v2 and XCiT normalise them: no constant cancels there.
# CaiT's heads are mixed before the softmax, but for its two layers of class attention; XCiT has two such, too.
KEYS = {
    "vit_tiny_patch16_224": 1,
    "eva02_tiny_patch14_224": 0,
    "swin_tiny_patch4_window7_224": 3,
    "swinv2_tiny_window8_256": 0,
    "xcit_nano_12_p16_224": 2,
    "vit_base_patch16_siglip_224": 2,
}


@pytest.mark.parametrize("name", KEYS)
def test_any_constant_of_the_keys_keeps_the_function(name):
    network, images = restless(name)
    before, expected = fingerprint(network), network(images)
    found = find_keys(network.graph)
    assert len(found) == KEYS[name]
    generator = torch.Generator().manual_seed(3)
    for keys in found:
        move_keys(network, keys, 5.0 * torch.randn(len(keys.channels), generator=generator))
    assert fingerprint(network) == before
    assert relative(network(images), expected) < 1e-4


def test_keys_with_a_large_bias_are_centred():
    model = create_model(ModelSpec(name="vit_tiny_patch16_224", kwargs=FAMILIES["vit_tiny_patch16_224"]))
    width = model.embed_dim
    with torch.no_grad():
        model.blocks[0].attn.qkv.bias[width : 2 * width].normal_(0, 20)
        model.blocks[0].attn.qkv.bias[:width].normal_(0, 1)
    network, images = capture(model, (3, 32, 32)), torch.randn(4, 3, 32, 32)
    expected = network(images)
    [record] = equalize(network, images, FP8, "center")
    assert record.choice == "center"
    assert record.consumers == ["blocks.0.attn.matmul_0"]
    assert record.error_after < 0.1 * record.error_before
    assert relative(network(images), expected) < 1e-4


def with_outliers(seed=0):
    """A ViT with three channels of each LayerNorm a hundred times too large, and the following weights as much too small."""
    torch.manual_seed(seed)
    kwargs = {"img_size": 32, "depth": 1, "num_classes": 5, "embed_dim": 48, "num_heads": 3}
    model = create_model(ModelSpec(name="vit_tiny_patch16_224", kwargs=kwargs))
    for block in model.blocks:
        for norm, linear in ((block.norm1, block.attn.qkv), (block.norm2, block.mlp.fc1)):
            for channel in (3, 17, 40):
                norm.weight.data[channel] *= 100
                linear.weight.data[:, channel] /= 100
    return capture(model, (3, 32, 32))


@pytest.mark.parametrize("method", ["smooth", "shift", "repq"])
def test_outliers_in_layer_norms_are_undone(method):
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def error(network):
        expected = network(images)
        quantized = insert_quantizers(network, integers(4, 4))
        observe(quantized, images, batch_size=16, seed=0)
        quantized.set_mode(Mode.QUANTIZE)
        with torch.no_grad():
            return float((quantized.module(images) - expected).square().mean() / expected.var())

    plain, network = with_outliers(), with_outliers()
    equalize(network, images, integers(4, 4), method)
    assert error(network) < 0.25 * error(plain)


def test_reproducible():
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    networks = [with_outliers() for _ in range(2)]
    torch.manual_seed(5)
    first = equalize(networks[0], images, integers(4, 4), "shift")
    torch.manual_seed(6)
    assert equalize(networks[1], images, integers(4, 4), "shift") == first
    for (name, a), (_, b) in zip(networks[0].named_buffers(), networks[1].named_buffers(), strict=True):
        assert torch.equal(a, b), name


class Net(nn.Module):
    """A LayerNorm and two linears behind it, with one of the things that forbid or restrict a change."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.norm, self.first = nn.LayerNorm(6), nn.Linear(6, 6, bias=kind != "no bias")
        self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        y = self.norm(x)
        a = self.first(F.pad(y, (0, 0, 0, 1)) if self.kind == "padded" else y)
        if self.kind == "residual":
            return self.head(F.gelu(a + y).mean(1))
        if self.kind == "half residual":
            return self.head(F.gelu(a[..., :3] + y[..., :3]).repeat(1, 1, 2).mean(1))
        if self.kind == "weight read twice":
            return self.head(F.gelu(self.first(a.exp())).mean(1))
        b = self.second(y.flip(-1) if self.kind == "flipped" else a.exp())
        return self.head(F.gelu(a.exp()[:, :4] + b[:, :4]).mean(1))


@pytest.mark.parametrize(
    ("kind", "free", "shiftable"),
    [
        ("plain", 6, 6),
        ("flipped", 6, 6),
        ("padded", 6, 0),
        ("no bias", 6, 0),
        ("residual", 0, 0),
        ("half residual", 3, 3),
    ],
)
def test_what_may_move(kind, free, shiftable):
    torch.manual_seed(0)
    network = capture(Net(kind).eval(), (6, 2, 2))
    images = torch.randn(3, 6, 2, 2)
    expected = network(images)
    norms = [s for s in find_sites(network.graph) if s.is_norm]
    found = [(int(s.free.sum()), int(s.shiftable.sum())) for s in norms]
    assert found == ([(free, shiftable)] if free else [])
    for site in norms:
        rescale(network, site, torch.where(site.free, 7.0, 1.0), torch.where(site.shiftable, 0.5, 0.0))
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


def test_a_weight_that_is_read_twice_is_left_alone():
    network = capture(Net("weight read twice").eval(), (6, 2, 2))
    weight = next(n for n in network.graph.nodes if n.target == "first.weight")
    assert len(weight.users) == 2
    assert not [s for s in find_sites(network.graph) if s.is_norm]


def test_forbidden_changes_are_refused():
    network = capture(Net("half residual").eval(), (6, 2, 2))
    site = next(s for s in find_sites(network.graph) if s.is_norm)
    with pytest.raises(ValueError, match="read elsewhere"):
        rescale(network, site, torch.full((6,), 2.0))
    with pytest.raises(ValueError, match="positive"):
        rescale(network, site, torch.zeros(6))
