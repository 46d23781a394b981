"""Cut points, atoms, blocks: slices chain to the network bit for bit, and every operator is in exactly one."""

import pytest
import torch
from conftest import Captured

from ospq_export.errors import InputError
from ospq_export.graph.capture import quantizable_nodes
from ospq_export.graph.granularity import block_slicing
from ospq_export.graph.slicing import Slice, atoms, cut_points, extract, nodes_between

FAMILIES = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 3},
    "swin_tiny_patch4_window7_224": {"img_size": 56, "depths": (2, 2), "num_heads": (2, 4), "embed_dim": 32},
    "cait_xxs24_224": {"img_size": 32, "depth": 2},
    "levit_128s": {},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
}


@pytest.fixture(scope="module")
def networks():
    return Captured(FAMILIES)


@pytest.mark.parametrize("name", Captured.parameters(FAMILIES))
@pytest.mark.parametrize("slicing", [atoms, block_slicing])
def test_slices_chain_to_the_network(networks, name, slicing):
    network, size = networks[name]
    for batch in (1, 3):
        x = torch.randn(batch, 3, size, size)
        with torch.no_grad():
            expected, y = network(x), x
            for piece in slicing(network.graph):
                y = extract(network, piece)(y, batch)
        assert torch.equal(y, expected)


@pytest.mark.parametrize("name", Captured.parameters(FAMILIES))
@pytest.mark.parametrize("slicing", [atoms, block_slicing])
def test_every_operator_is_in_exactly_one_slice(networks, name, slicing):
    graph = networks[name][0].graph
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


def test_swin_blocks_are_found_inside_its_stages(networks):
    names = [s.name for s in block_slicing(networks["swin_tiny_patch4_window7_224"][0].graph)]
    assert names == [
        "patch_embed.proj",
        "layers.0.blocks.0",
        "layers.0.blocks.1",
        "layers.1.downsample.reduction",
        "layers.1.blocks.0",
        "layers.1.blocks.1",
        "head.fc",
    ]


def test_unknown_cut_point(networks):
    network, _ = networks["vit_tiny_patch16_224"]
    with pytest.raises(InputError, match="no cut point 'nowhere'"):
        extract(network, Slice("s", "nowhere", "head"))


def test_a_slice_that_needs_two_tensors_is_refused(networks):
    network, _ = networks["vit_tiny_patch16_224"]
    norm = next(n for n in network.graph.nodes if "layer_norm" in n.name)
    residual = next(
        n for n in network.graph.nodes if n.name.startswith("add_") and n.meta["module_path"] == "blocks.0"
    )
    with pytest.raises(ValueError, match="lies before its start"):
        extract(network, Slice("s", norm.name, residual.name))
