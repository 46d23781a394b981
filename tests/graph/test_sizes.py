"""A range of input sizes: what has one, in which steps, and a graph of it that is right at both ends, also when it is rebuilt."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from any_size import Convolutions, Tokens
from through import rebuilt
from torch import nn

from ospq_export.errors import InputError
from ospq_export.graph.capture import capture
from ospq_export.graph.labels import concrete
from ospq_export.graph.outputs import output_shapes
from ospq_export.graph.serialize import describe, rebuild
from ospq_export.graph.sizes import SizeRange, follows, sizes_between
from ospq_export.graph.slicing import atoms, extract, run_slice

aten = torch.ops.aten
OWN = (24, 24)
BOUNDS = ((16, 16), (32, 48))


class Skip(nn.Module):
    """Maps of half the size put beside those of the whole one: even sizes only."""

    def __init__(self):
        super().__init__()
        self.down, self.out = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(7, 2, 1)

    def forward(self, x):
        return self.out(torch.cat([x, F.interpolate(self.down(x), scale_factor=2.0)], 1))


class Fixed(nn.Module):
    """A view to a constant."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 2, 3, 2, 1), nn.Linear(2 * 12 * 12, 5)

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


class NativeAlone(Tokens):
    """At its own square size it does not interpolate, as transformers' DINOv2."""

    def forward(self, x):
        if x.shape[2] == x.shape[3] and x.shape[2] == 24:
            x = self.patches(x) + self.positions
        else:
            x = self.patches(x)
            x = x + F.interpolate(self.positions, x.shape[2:], mode="bilinear")
        return self.head(self.norm(x.flatten(2).transpose(1, 2)).mean(1))


def ranged(model, bounds=BOUNDS, own=OWN):
    torch.manual_seed(0)
    model = model().eval() if isinstance(model, type) else model.eval()
    return model, capture(model, (3, *own), sizes=sizes_between(bounds, (3, *own)))


def shapes(graph):
    values = {n.name: n.meta.get("val") for n in graph.graph.nodes if n.op != "output"}
    return {n: tuple(map(concrete, v.shape)) if isinstance(v, torch.Tensor) else v for n, v in values.items()}


@pytest.mark.parametrize("network", [Convolutions, Tokens, Skip])
def test_the_graph_is_the_network_at_both_ends_and_between_also_when_rebuilt(network):
    model, graph = ranged(network)
    again = rebuilt(graph)
    assert again.meta["sizes"] == graph.meta["sizes"]
    assert shapes(again) == shapes(graph)
    for size in (OWN, *BOUNDS, (16, 48), (26, 18)):
        if graph.meta["sizes"].why_not(size):
            continue
        for batch in (1, 3):
            x = torch.randn(batch, 3, *size)
            with torch.no_grad():
                torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)
                assert torch.equal(again(x), graph(x))


def test_shapes_are_those_of_the_calibrations_size_and_say_what_follows_the_images():
    _, graph = ranged(Tokens)
    assert output_shapes(graph.graph) == {"logits": (5,)}
    sizes = {n.name: n.meta["val"].shape[1:] for n in graph.graph.nodes if n.target is aten.conv2d.default}
    assert list(sizes.values()) == [(16, 3, 3)]
    followed = [follows(n) for n in graph.graph.nodes if n.target is aten.matmul.default]
    assert followed == [frozenset({2, 3}), frozenset({2})], "queries by keys, then values by channels"
    again = rebuild(describe(graph), Path("graph.json"), BOUNDS[1])
    sizes = {n.name: n.meta["val"].shape[1:] for n in again.graph.nodes if n.target is aten.conv2d.default}
    assert list(sizes.values()) == [(16, 4, 6)]


@pytest.mark.parametrize("network", [Convolutions, Tokens])
def test_slices_have_numbers_in_place_of_heights_and_widths(network):
    _, graph = ranged(network)
    images = torch.randn(3, 3, *OWN)
    tensors = (images,)
    with torch.no_grad():
        for piece in atoms(graph.graph):
            part = extract(graph, piece)
            assert not any(n.target is aten.sym_size.int for n in part.graph.nodes)
            tensors = run_slice(part, tensors, 3)
        torch.testing.assert_close(tensors[0], graph(images))


def test_steps_that_the_network_needs_are_found_and_said():
    _, graph = ranged(Skip)
    assert graph.meta["sizes"].step == (2, 2)
    assert str(graph.meta["sizes"]) == "16x16 to 32x48 in steps of 2x2"
    with pytest.raises(InputError, match=r"does not take images of 31x48: .*\(Skip\)"):
        ranged(Skip, ((16, 16), (31, 48)))


def test_what_a_network_does_at_its_own_size_alone_is_not_taken_for_what_it_does():
    model, graph = ranged(NativeAlone)
    for size in (OWN, *BOUNDS):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_network_of_one_size_is_refused_with_the_module_that_fixes_it():
    with pytest.raises(
        InputError, match=r"does not take images of 16x16: .*\(head, Linear\): leave the range"
    ):
        ranged(Fixed)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)
    with pytest.raises(InputError, match=r"\(patch_embed, PatchEmbed\).*dynamic_img_size=True"):
        ranged(vit, ((16, 16), (48, 48)), (32, 32))


def test_why_there_is_no_such_range_is_said_in_heights_and_widths():
    # Maps of one pixel are another graph to torch than larger ones.
    tiny = nn.Sequential(nn.Conv2d(3, 4, 16, 16), nn.GELU(), nn.Conv2d(4, 4, 3, padding=1))
    with pytest.raises(InputError, match=r"Not all values of (height|width) in 16 <= .* satisfy \("):
        ranged(tiny)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kwargs", "step"),
    [
        ("vit_tiny_patch16_224", {"img_size": 80, "depth": 1, "dynamic_img_size": True}, (16, 16)),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}, (1, 1)),
    ],
)
def test_networks_of_timm(name, kwargs, step):
    bounds = ((64, 64), (96, 80))
    model, graph = ranged(timm.create_model(name, num_classes=3, **kwargs), bounds, (80, 80))
    assert graph.meta["sizes"].step == step
    for size in bounds:
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)


def test_without_a_range_a_graph_says_nothing_of_one():
    graph = capture(Convolutions().eval(), (3, *OWN))
    assert "sizes" not in describe(graph) and "sizes" not in rebuilt(graph).meta


@pytest.mark.parametrize(
    ("bounds", "match"),
    [
        (((32, 32), (16, 16)), "is no range"),
        (((24, 24), (24, 24)), "is no range"),
        (((16, 16),), "is no range"),
        (((0, 16), (32, 32)), "is no range"),
        (((16, 16), (20, 20)), "images of 24x24 lies outside|24x24 lies outside of 16x16 to 20x20"),
        (((16, 16), (32, 32), (16, 16)), "24x24 is no multiple of 16x16"),
        (((16, 16), (32, 30), (8, 8)), "32x30 is no multiple of 8x8"),
    ],
)
def test_ranges_that_are_none(bounds, match):
    with pytest.raises(InputError, match=match):
        sizes_between(bounds, (3, *OWN))


def test_one_side_alone_may_be_free():
    sizes = SizeRange(smallest=(24, 16), largest=(24, 48))
    assert list(sizes.dimensions()) == [3]
    _, graph = ranged(Convolutions, (sizes.smallest, sizes.largest))
    assert all(2 not in follows(n) for n in graph.graph.nodes if n.target is aten.conv2d.default)
