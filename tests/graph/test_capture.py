"""Capture: the canonical graph computes what the module computes, with three kinds of quantizable operators."""

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import Captured
from torch import nn

from ospq_export.errors import InputError
from ospq_export.graph.capture import QUANTIZABLE, capture, fingerprint, quantizable_nodes
from ospq_export.graph.outputs import as_tuple, named_leaves, output_names
from ospq_export.graph.serialize import describe, rebuild
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model

aten = torch.ops.aten
FORBIDDEN = {
    aten.scaled_dot_product_attention.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.einsum.default,
    aten.conv2d.padding,
    aten.dropout.default,
}
FAMILIES = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "deit3_small_patch16_224": {"img_size": 32, "depth": 1},
    "beit_base_patch16_224": {"img_size": 32, "depth": 1},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 1},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (2, 1), "num_heads": (2, 4), "embed_dim": 32},
    "swinv2_tiny_window8_256": {"img_size": 64, "depths": (2, 1), "num_heads": (2, 4), "embed_dim": 32},
    "cait_xxs24_224": {"img_size": 32, "depth": 2},
    "levit_128s": {"depth": (1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
}


def randomized(model: nn.Module) -> nn.Module:
    """Statistics and scales that matter: BatchNorm's defaults and zero gains would hide a wrong fold."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", Captured.parameters(FAMILIES))
def test_families_capture_exactly(name):
    kwargs = {**FAMILIES[name], "num_classes": 7}
    torch.manual_seed(0)
    model = randomized(create_model(ModelSpec(name=name, kwargs=kwargs)))
    size = kwargs.get("img_size") or model.pretrained_cfg["input_size"][-1]
    graph = capture(model, (3, size, size))
    assert not {n.target for n in graph.graph.nodes} & FORBIDDEN
    with torch.no_grad():
        for batch in (1, 3):
            x = torch.randn(batch, 3, size, size)
            expected = model(x)
            assert float((graph(x) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


def test_batch_norm_is_folded_where_it_follows_a_convolution_or_linear():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
            self.fc, self.bn1 = nn.Linear(8, 5), nn.BatchNorm1d(5)

        def forward(self, x):
            x = F.relu(self.bn(self.conv(x))).mean((2, 3))
            return self.bn1(self.fc(x))

    net = randomized(Net())
    graph = capture(net, (3, 8, 8))
    assert not any("batch_norm" in str(n.target) for n in graph.graph.nodes)
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(graph(x), net(x), rtol=1e-5, atol=1e-5)


class Products(nn.Module):
    """Attention and products in every spelling that torch has for them."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 6) for _ in range(3))
        self.matrix = nn.Parameter(torch.randn(6, 6))
        self.bias = nn.Parameter(torch.randn(6))
        self.register_buffer("mask", torch.tril(torch.ones(4, 4)).bool())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)[:, :4, :]
        x = x @ self.matrix
        q, k, v = self.q(x), self.k(x), self.v(x)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)
        b = torch.bmm(q.softmax(-1), k.transpose(1, 2)) @ v
        c = torch.einsum("bid,bjd->bij", q, k).softmax(-1)
        c = torch.einsum("bij,bjd->bid", c, v)
        d = torch.addmm(self.bias, x.mean(1), self.matrix)
        return self.head((a + b + c).mean(1) + d)


def test_every_spelling_of_a_product_becomes_linear_or_matmul():
    torch.manual_seed(0)
    net = Products().eval()
    graph = capture(net, (6, 2, 2))
    assert not {n.target for n in graph.graph.nodes} & FORBIDDEN
    kinds = [n.target for n in quantizable_nodes(graph.graph)]
    assert kinds.count(aten.linear.default) == 6, "q, k, v, head, x @ matrix and addmm have constant weights"
    assert kinds.count(aten.matmul.default) == 6, "two each for sdpa, bmm and einsum"
    for batch in (1, 5):
        x = torch.randn(batch, 6, 2, 2)
        torch.testing.assert_close(graph(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_same_padding(kernel):
    net = nn.Sequential(nn.Conv2d(3, 4, kernel, padding="same"), nn.Flatten(), nn.Linear(4 * 64, 2)).eval()
    graph = capture(net, (3, 8, 8))
    assert aten.conv2d.default in {n.target for n in graph.graph.nodes}
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(graph(x), net(x), rtol=1e-5, atol=1e-5)


def vit(**kwargs):
    torch.manual_seed(kwargs.pop("seed", 0))
    settings = {"img_size": 32, "depth": 1, "num_classes": 3, **kwargs}
    return timm.create_model("vit_tiny_patch16_224", **settings).eval()


@pytest.mark.slow
def test_fingerprint_tells_structures_apart_and_nothing_else():
    first = fingerprint(capture(vit(seed=0), (3, 32, 32)))
    assert fingerprint(capture(vit(seed=1), (3, 32, 32))) == first
    others = [vit(depth=2), vit(num_heads=2), vit(num_classes=4), vit(qkv_bias=False)]
    prints = {fingerprint(capture(other, (3, 32, 32))) for other in others}
    assert len(prints) == 4 and first not in prints


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_uncapturable_model_names_the_module():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), Branching()), nn.Flatten(), nn.Linear(16, 2)
    )
    with pytest.raises(InputError, match=r"1\.1, Branching") as info:
        capture(net.eval(), (3, 2, 2))
    assert "\n" not in str(info.value)


class Heads(nn.Module):
    """Returns what a test makes of two heads' outputs and of the images."""

    def __init__(self, form):
        super().__init__()
        self.form, self.a, self.b = form, nn.Linear(12, 2), nn.Linear(12, 3)

    def forward(self, x):
        x = x.flatten(1)
        return self.form(self.a(x), self.b(x).relu())


@dataclasses.dataclass
class Found:
    boxes: torch.Tensor
    classes: torch.Tensor
    nothing: None = None


torch.export.register_dataclass(Found, serialized_type_name="tests.Found")


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (lambda a, b: (a, b), ["output_0", "output_1"]),
        (lambda a, b: [b, a], ["output_0", "output_1"]),
        (lambda a, b: {"logits": a, "images": b}, ["logits", "output_images"]),
        (lambda a, b: {"maps": [a, b], "none": None}, ["maps_0", "maps_1"]),
        (lambda a, b: Found(b, a), ["boxes", "classes"]),
        (lambda a, b: (a, b.argmax(1), b.sum(), a.argmax(1)[:, None]), ["output_0"]),
        (lambda a, b: (a, a), ["output_1"]),
        (lambda a, b: a, ["logits"]),
    ],
)
def test_outputs_have_names(form, names):
    model = Heads(form).eval()
    captured = capture(model, (3, 2, 2))
    assert list(output_names(captured.graph)) == names
    x = torch.randn(5, 3, 2, 2)
    found = dict(zip(names, as_tuple(captured(x)), strict=True))
    for name, expected in named_leaves(model(x)).items():
        if name in found:
            torch.testing.assert_close(found[name], expected)
    again = rebuild(json.loads(json.dumps(describe(captured))), Path("graph.json"))
    assert output_names(again.graph) == tuple(names)


def test_outputs_are_chosen_by_name():
    model = Heads(lambda a, b: {"a": a, "b": b, "ids": b.argmax(1)}).eval()
    captured = capture(model, (3, 2, 2), outputs=["b"])
    assert captured.meta["left_out"] == {"a": "not asked for", "ids": "holds int64, no real numbers"}
    assert tuple(captured(torch.zeros(2, 3, 2, 2)).shape) == (2, 3), "one is returned as it is"
    assert "a.weight" not in dict(captured.named_buffers())
    for wrong in ("c", "ids"):
        with pytest.raises(InputError, match=f"no output '{wrong}'"):
            capture(model, (3, 2, 2), outputs=["a", wrong])


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (lambda a, b: a.argmax(1), "logits holds int64"),
        (
            lambda a, b: {"n": b.sum(), "i": a.argmax(1)},
            "n does not hold a row for every image; i holds int64",
        ),
        (lambda a, b: None, "returns no tensor"),
    ],
)
def test_a_network_without_an_output_to_compare_is_refused(form, said):
    with pytest.raises(InputError, match=said) as info:
        capture(Heads(form).eval(), (3, 2, 2))
    assert "\n" not in str(info.value)


def test_nothing_to_quantize_is_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return x.mean((1, 2, 3)) * self.gain

    with pytest.raises(InputError, match="no linear, conv2d or matmul"):
        capture(Scale().eval(), (3, 2, 2))


def test_nodes_know_their_modules():
    graph = capture(vit(), (3, 32, 32)).graph
    paths = {n.meta["module_path"] for n in graph.nodes if n.target in QUANTIZABLE}
    assert {"patch_embed.proj", "blocks.0.attn.qkv", "blocks.0.attn", "blocks.0.mlp.fc2", "head"} <= paths
