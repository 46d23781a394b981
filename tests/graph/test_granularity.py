"""Granularities: found from the module hierarchy alone, partitions of the network, and chained bit for bit."""

import itertools
import statistics

import pytest
import torch
from conftest import Captured
from torch import nn

from ospq_export.calibrate.observe import outlier_profile
from ospq_export.calibrate.slicing.plan import cut_dominance, outlier_aware_slicing
from ospq_export.errors import InputError
from ospq_export.formats.choice import integers
from ospq_export.graph.capture import capture, quantizable_nodes
from ospq_export.graph.granularity import UNIFORM, block_slicing, check_partition, slicing_of
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode, own_quantizers
from ospq_export.graph.slicing import Slice, atoms, cut_points, extract, nodes_between, run_slice

VIT, SWIN = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
FAMILIES = {
    VIT: {"img_size": 32, "depth": 5, "embed_dim": 48, "num_heads": 3},
    SWIN: {"img_size": 56, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32},
    "levit_128s": {"depth": (1, 1, 1)},
    "convnext_atto": {"depths": (1, 2, 1, 1)},
    "xcit_nano_12_p16_224": {"img_size": 32, "depth": 2},
}


@pytest.fixture(scope="module")
def networks():
    return Captured(FAMILIES)


@pytest.mark.parametrize("name", Captured.parameters(FAMILIES))
@pytest.mark.parametrize("granularity", UNIFORM)
def test_every_granularity_is_a_partition_that_chains_to_the_network(networks, name, granularity):
    network, size = networks[name]
    slices = slicing_of(network.graph, granularity)
    check_partition(network.graph, slices)
    assert len({s.name for s in slices}) == len(slices)
    quantized = insert_quantizers(network, integers(4, 4))
    for batch in (1, 3):
        x = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            tensors = (x,)
            for piece in slices:
                tensors = run_slice(extract(quantized.module, piece), tensors, batch)
            assert torch.equal(tensors[0], network(x)) and len(tensors) == 1


@pytest.mark.parametrize("name", Captured.parameters(FAMILIES))
def test_every_quantizer_belongs_to_exactly_one_slice(networks, name):
    network, _ = networks[name]
    quantized = insert_quantizers(network, integers(4, 4))
    for granularity in ("layer", "atom"):
        owned = [
            q.name
            for piece in slicing_of(network.graph, granularity)
            for q in own_quantizers(extract(quantized.module, piece))
        ]
        assert sorted(owned) == sorted([*quantized.activations, *quantized.weights])


def test_layers_are_the_operators(networks):
    network, _ = networks[VIT]
    layers = slicing_of(network.graph, "layer")
    assert len(layers) == len(quantizable_nodes(network.graph)) == 5 * 6 + 2
    assert layers[1].name == "blocks.0.attn.qkv" and len(layers[1].carried) == 1, "the residual is handed on"


def test_a_quantizer_that_an_earlier_slice_owns_is_evaluated_again():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.q, self.k, self.head = (torch.nn.Linear(12, 12) for _ in range(4))

        def forward(self, x):
            x = self.stem(x.flatten(1)).relu()
            return self.head(self.q(x) * self.k(x))

    torch.manual_seed(0)
    network = capture(Net().eval(), (3, 2, 2))
    quantized = insert_quantizers(network, integers(8, 8))
    quantized.set_mode(Mode.QUANTIZE)
    for a in quantized.activations.values():
        a.scale.fill_(0.1)
    for w in quantized.weights.values():
        w.round_to_nearest(quantized.module.get_buffer(w.constant))
    pieces = [extract(quantized.module, s) for s in slicing_of(network.graph, "layer")]
    assert [[q.name for q in own_quantizers(p)] for p in pieces][1:3] == [
        ["q.input", "q.weight"],
        ["k.weight"],
    ]
    x = torch.randn(3, 3, 2, 2)
    with torch.no_grad():
        tensors = (x,)
        for piece in pieces:
            tensors = run_slice(piece, tensors, 3)
        assert torch.equal(tensors[0], quantized.module(x))


def test_blocks_stages_and_the_model(networks):
    def names(name, granularity):
        return [s.name for s in slicing_of(networks[name][0].graph, granularity)]

    pairs = ["patch_embed.proj", "blocks.0..blocks.1", "blocks.2..blocks.3", "blocks.4", "head"]
    assert names(VIT, "blocks:2") == pairs
    assert [len(names(VIT, f"blocks:{n}")) for n in (1, 2, 3, 4, 9)] == [7, 5, 4, 4, 3]
    assert names(VIT, "stage")[0] == "patch_embed.proj" and len(names(VIT, "stage")) == 3
    assert names(SWIN, "stage") == ["patch_embed.proj", "layers.0.blocks", "layers.1", "head.fc"]
    assert len(names(SWIN, "blocks:4")) == 5, "runs of blocks end at what is no block"
    assert len(names(VIT, "model")) == len(names(SWIN, "model")) == 1


def test_explicit_cut_points(networks):
    graph = networks[VIT][0].graph
    ends = [s.end for s in slicing_of(graph, "block")][:-1]
    assert [s.end for s in slicing_of(graph, ends[1:3])][:-1] == ends[1:3]
    with pytest.raises(InputError, match="no cut point 'nowhere'"):
        slicing_of(graph, ["nowhere"])
    with pytest.raises(InputError, match="not in the network's order, so slices would overlap"):
        slicing_of(graph, [ends[2], ends[1]])
    with pytest.raises(InputError, match="not in the network's order"):
        slicing_of(graph, [ends[1], ends[1]])
    inner = next(n.name for n in graph.nodes if n.name.startswith("layer_norm"))
    with pytest.raises(InputError, match=f"no cut point '{inner}'"):
        slicing_of(graph, [inner])
    with pytest.raises(InputError, match="no granularity 'blocks:x'"):
        slicing_of(graph, "blocks:x")


def test_gaps_and_overlaps_are_found(networks):
    graph = networks[VIT][0].graph
    pieces = atoms(graph)
    for wrong in (pieces[:-1], pieces[1:], [*pieces[:2], *pieces[3:]], [*pieces[:3], *pieces[2:]]):
        with pytest.raises(InputError, match="gap or overlap"):
            check_partition(graph, wrong)


def every_slicing(pieces):
    for cuts in itertools.product((False, True), repeat=len(pieces) - 1):
        groups = [[pieces[0]]]
        for piece, cut in zip(pieces[1:], cuts, strict=True):
            groups.append([piece]) if cut else groups[-1].append(piece)
        yield groups


def test_outlier_aware_slicing_is_the_cheapest_of_all(networks):
    """Against brute force over all 2**11 slicings."""
    graph = networks[VIT][0].graph
    pieces = atoms(graph)
    rng = torch.Generator().manual_seed(0)
    dominances = {p.end: float(torch.rand(1, generator=rng)) for p in pieces}
    usual = statistics.median(dominances.values())
    ideal = len(pieces) / len(slicing_of(graph, "block"))

    def cost(groups):
        total = sum(0.25 * ((len(g) - ideal) / ideal) ** 2 for g in groups)
        excess = [dominances[g[-1].end] / usual - 1 for g in groups[:-1]]
        return total + sum(0.25 * min(8, max(0, e)) for e in excess)

    best = min(every_slicing(pieces), key=cost)
    assert [s.end for s in outlier_aware_slicing(graph, dominances)] == [g[-1].end for g in best]


def test_outlier_aware_slicing_avoids_outliers(networks):
    graph = networks[VIT][0].graph
    pieces = atoms(graph)
    bad = {p.end for p in pieces[3:8]}
    dominances = {p.end: 0.9 if p.end in bad else 0.02 for p in pieces}
    ends = {s.end for s in outlier_aware_slicing(graph, dominances)[:-1]}
    assert not ends & bad and ends


@pytest.mark.parametrize("name", [VIT, SWIN])
def test_the_profile_knows_every_atoms_end(networks, name):
    captured, size = (
        networks[name][0],
        networks[name][0].graph.find_nodes(op="placeholder")[0].meta["val"].shape,
    )
    dominances = cut_dominance(outlier_profile(captured, torch.randn(2, *size[1:])))
    assert {p.end for p in atoms(captured.graph)} <= set(dominances)


def test_unknown_start(networks):
    with pytest.raises(InputError, match="no cut point"):
        extract(networks[VIT][0], Slice("s", "nowhere", "head"))


SMALLER = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 3},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32},
    "cait_xxs24_224": {"img_size": 32, "depth": 2},
    "levit_128s": {"depth": (1, 1, 1)},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
}


@pytest.fixture(scope="module")
def smaller_networks():
    return Captured(SMALLER)


@pytest.mark.parametrize("name", Captured.parameters(SMALLER))
@pytest.mark.parametrize("slicing", [atoms, block_slicing])
def test_slices_chain_to_the_network(smaller_networks, name, slicing):
    network, size = smaller_networks[name]
    for batch in (1, 3):
        x = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            expected, y = network(x), x
            for piece in slicing(network.graph):
                y = extract(network, piece)(y, batch)
        assert torch.equal(y, expected)


@pytest.mark.parametrize("name", Captured.parameters(SMALLER))
@pytest.mark.parametrize("slicing", [atoms, block_slicing])
def test_every_operator_is_in_exactly_one_slice(smaller_networks, name, slicing):
    graph = smaller_networks[name][0].graph
    slices = slicing(graph)
    assert [a.end for a in slices[:-1]] == [b.start for b in slices[1:]]
    inside = [
        n for s in slices for n in nodes_between(graph, s.start, s.end) if n in set(quantizable_nodes(graph))
    ]
    assert inside == quantizable_nodes(graph)
    points = {n.name for n in cut_points(graph)}
    assert {s.start for s in slices} | {s.end for s in slices} <= points


def test_deit_tiny_has_26_atoms_and_14_blocks():
    network, _ = Captured({"deit_tiny_patch16_224": {"img_size": 32}})["deit_tiny_patch16_224"]
    assert len(atoms(network.graph)) == 26
    names = [s.name for s in block_slicing(network.graph)]
    assert names == ["patch_embed.proj", *[f"blocks.{i}" for i in range(12)], "head"]


def test_swin_blocks_are_found_inside_its_stages(smaller_networks):
    names = [s.name for s in block_slicing(smaller_networks["swin_tiny_patch4_window7_224"][0].graph)]
    assert names == [
        "patch_embed.proj",
        "layers.0.blocks.0",
        "layers.0.blocks.1",
        "layers.1.downsample.reduction",
        "layers.1.blocks.0",
        "layers.1.blocks.1",
        "head.fc",
    ]


def test_unknown_cut_point(smaller_networks):
    network, _ = smaller_networks["vit_tiny_patch16_224"]
    with pytest.raises(InputError, match="no cut point 'nowhere'"):
        extract(network, Slice("s", "nowhere", "head"))


def test_a_slice_that_needs_two_tensors_is_refused(smaller_networks):
    network, _ = smaller_networks["vit_tiny_patch16_224"]
    norm = next(n for n in network.graph.nodes if "layer_norm" in n.name)
    residual = next(
        n for n in network.graph.nodes if n.name.startswith("add_") and n.meta["module_path"] == "blocks.0"
    )
    with pytest.raises(ValueError, match="lies before its start"):
        extract(network, Slice("s", norm.name, residual.name))


class Tokens(nn.Module):
    """A class token for every image, made where nothing depends on the images, and read after the first cut."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        token = self.token.expand(x.shape[0], -1, -1)
        x = self.first(x.flatten(2).transpose(1, 2)).relu()
        x = self.second(torch.cat([token, x], 1)).relu()
        return self.third(x.mean(1) + token[:, 0])


def test_what_depends_on_the_number_of_images_alone_is_made_again_where_it_is_read():
    model = Tokens().eval()
    captured = capture(model, (6, 2, 3))
    images = torch.randn(5, 6, 2, 3)
    for granularity in ("atom", "layer"):
        tensors = (images,)
        for piece in slicing_of(captured.graph, granularity):
            tensors = run_slice(extract(captured, piece), tensors, 5)
        torch.testing.assert_close(tensors[0], model(images))


class Branches(nn.Module):
    """Two outputs: one on the way, of a layer of its own, and the last."""

    def __init__(self):
        super().__init__()
        self.first, self.side, self.last = nn.Linear(6, 6), nn.Linear(6, 2), nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x.flatten(1)).relu()
        return self.side(x), self.last(x)


def test_an_output_on_the_way_belongs_to_the_slice_that_computes_it():
    model = Branches().eval()
    captured = capture(model, (6, 1, 1))
    network = insert_quantizers(captured, integers(8, 8))
    network.set_mode(Mode.FLOAT)
    images = torch.randn(5, 6, 1, 1)
    pieces = [extract(network.module, s) for s in slicing_of(captured.graph, "atom")]
    assert [p.meta["sides"] for p in pieces] == [0, 1]
    tensors = (images,)
    for piece in pieces:
        tensors = run_slice(piece, tensors, 5)
    last, side = tensors
    expected = model(images)
    torch.testing.assert_close((side, last), expected)
    own = {q.name for piece in pieces for q in own_quantizers(piece)}
    assert own == {*network.activations, *network.weights}, "the side branch is learned, too"
