"""Cut points, atoms and slices of a captured graph (DESIGN section 2), and their extraction as functions.

A cut point is a place where exactly one image-dependent tensor is alive. An atom is the graph between two neighbouring cut
points with at least one quantizable operator; a slice is a run of atoms; a slicing partitions the atoms.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ospq_export.errors import InputError
from ospq_export.graph.capture import QUANTIZABLE
from ospq_export.graph.outputs import output_nodes
from ospq_export.graph.sizes import is_size

aten = torch.ops.aten


@dataclass(frozen=True)
class Slice:
    """The graph after node `start` up to and including node `end`.

    Attributes:
        name: for people: the module path that holds the slice's quantizable work.
        start: name of the node whose tensor the slice begins with; of the first slice, the input.
        end: name of the node whose tensor it is to reproduce.
        received: names of the other tensors alive at the start; empty where the start is a cut point.
        carried: the same at the end.
    """

    name: str
    start: str
    end: str
    received: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()


def _is_image_tensor(node: fx.Node, dependent: set[fx.Node]) -> bool:
    return node in dependent and not is_size(node)


def _image_dependent(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """What depends on the images' content; a size of theirs does not."""
    dependent: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(_is_image_tensor(n, dependent) for n in node.all_input_nodes):
            dependent.add(node)
    return dependent


def _reads(user: fx.Node) -> bool:
    return user.op != "output" and user.target is not aten.sym_size.int


def live_tensors(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every node but the output, what is alive after it: image-dependent values that later nodes read, in order.

    The last tensor is alive at the end. What the network returns besides is not kept alive for that: it belongs to the slice
    that computes it.
    """
    nodes = [n for n in graph.nodes if n.op != "output"]
    order = {node: i for i, node in enumerate(graph.nodes)}
    dependent = _image_dependent(nodes)
    # A size read off the input does not keep the images alive: a slice is given the batch size.
    last_use = {node: max((order[u] for u in node.users if _reads(u)), default=order[node]) for node in nodes}
    last_use[next(n for n in reversed(nodes) if _is_image_tensor(n, dependent))] = len(order)
    alive: list[fx.Node] = []
    result = {}
    for node in nodes:
        if _is_image_tensor(node, dependent):
            alive = [*alive, node]
        alive = [n for n in alive if last_use[n] > order[node]]
        result[node] = alive
    return result


def cut_points(graph: fx.Graph) -> list[fx.Node]:
    """Nodes after which they alone carry everything that depends on the images, which lie in front, in topological order.

    The input is the first and the network's last output the last.
    """
    alive = live_tensors(graph)
    return [n for n, others in alive.items() if others == [n] and has_images_in_front(n)]


def has_images_in_front(node: fx.Node) -> bool:
    """Whether a value is one tensor whose first dimension, and no other, is a multiple of the batch size."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(value.shape[0], torch.SymInt):
        return False
    return not any(isinstance(size, torch.SymInt) for size in value.shape[1:])


def atoms(graph: fx.Graph) -> list[Slice]:
    """The finest slicing: one slice per atom, in order.

    Stretches without quantizable work join the atom before them: its output is then as near as can be to what the next operator
    reads, and what the network throws away (all tokens but one, ahead of a classifier) is not reconstructed. What comes before
    the first quantizable operator joins the first atom, what comes after the last one the last.
    """
    points = cut_points(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    work = [order[n] for n in graph.nodes if n.target in QUANTIZABLE]
    spans = itertools.pairwise(order[p] for p in points)
    busy = [any(start < position <= end for position in work) for start, end in spans]
    first = busy.index(True)
    bounds = [points[i] for i in range(first + 1, len(busy)) if busy[i]]
    spans_of_atoms = itertools.pairwise([points[0], *bounds, points[-1]])
    return [Slice(name_of(graph, a, b), a.name, b.name) for a, b in spans_of_atoms]


def nodes_between(graph: fx.Graph, start: str, end: str) -> list[fx.Node]:
    """The nodes after `start` up to and including `end`, in topological order."""
    names = [n.name for n in graph.nodes]
    if start not in names or end not in names:
        missing = start if start not in names else end
        raise InputError(
            f"the graph has no cut point {missing!r}", fix="the run belongs to another model or version"
        )
    return list(graph.nodes)[names.index(start) + 1 : names.index(end) + 1]


def quantizable_between(graph: fx.Graph, start: fx.Node | str, end: fx.Node | str) -> list[fx.Node]:
    """The linear, conv2d and matmul nodes after `start` up to and including `end`."""
    return [n for n in nodes_between(graph, str(start), str(end)) if n.target in QUANTIZABLE]


def name_of(graph: fx.Graph, start: fx.Node | str, end: fx.Node | str) -> str:
    """The deepest module path that holds all quantizable work of a stretch, or first..last."""
    paths = [n.meta["module_path"] for n in quantizable_between(graph, start, end)]
    levels = zip(*(path.split(".") for path in paths), strict=False)
    common = itertools.takewhile(lambda parts: len(set(parts)) == 1, levels)
    return ".".join(parts[0] for parts in common) or (
        paths[0] if len(paths) == 1 else f"{paths[0]}..{paths[-1]}"
    )


def extract(module: fx.GraphModule, piece: Slice) -> fx.GraphModule:
    """A slice as a function `(tensor at start, batch size, *received) -> (tensor at end, *carried, *sides)`, or the first alone.

    Sides are what the network returns on the way to the end, as far as quantizers of the slice change it.

    It shares the module's constants and quantizers. Quantizers that an earlier slice owns but this one reads too are evaluated
    again; `own_quantizers` leaves those out.

    Args:
        module: the captured network, with or without quantizers.
        piece: the slice; its names are of nodes of `module`.

    Raises:
        InputError: a cut point does not exist.
        ValueError: the stretch needs another tensor than those at its start.
    """
    inner = nodes_between(module.graph, piece.start, piece.end)
    by_name = {n.name: n for n in module.graph.nodes}
    # What is made of constants and the batch size alone, a class token for every image say, is made again where it is read.
    dependent = _image_dependent(module.graph.nodes)
    graph, foreign = fx.Graph(), set[str]()
    copies = {by_name[piece.start]: graph.placeholder("x")}
    batch_size = graph.placeholder("batch_size")
    copies |= {by_name[name]: graph.placeholder(name) for name in piece.received}

    def copy_of(node: fx.Node) -> Any:
        if node in copies:
            return copies[node]
        if node.target is aten.sym_size.int and node.args[1] == 0 and node.args[0].op == "placeholder":  # type: ignore[union-attr]
            return batch_size
        # A slice is run at the calibration's size, so what follows the images' height and width is a number in it.
        if isinstance(value := node.meta.get("val"), int):
            return value
        if node.op == "call_module":
            foreign.add(str(node.target))
        elif node in dependent and not is_size(node):
            raise ValueError(
                f"slice {piece.name} needs {node.name}, which lies before its start {piece.start}"
            )
        return copies.setdefault(node, graph.node_copy(node, copy_of))

    for node in inner:
        number = isinstance(node.meta.get("val"), int)
        if node.target is not aten.sym_size.int and node not in copies and not number:
            copies[node] = graph.node_copy(node, copy_of)
    sides = _sides(module.graph, inner)
    outputs = tuple(copy_of(node) for node in (inner[-1], *(by_name[name] for name in piece.carried), *sides))
    graph.output(outputs if len(outputs) > 1 else outputs[0])
    result = fx.GraphModule(module, graph, class_name="Slice")
    result.graph.eliminate_dead_code()
    result.recompile()
    result.meta["foreign"], result.meta["sides"] = foreign, len(sides)
    return result


def _sides(graph: fx.Graph, inner: list[fx.Node]) -> list[fx.Node]:
    """The network's outputs among the nodes of a slice, but for its end, that depend on a quantizer in it."""
    inside, changed = set(inner), set[fx.Node]()
    for node in inner:
        if node.op == "call_module" or any(n in changed for n in node.all_input_nodes if n in inside):
            changed.add(node)
    return [n for n in output_nodes(graph) if n in changed and n is not inner[-1]]


def run_slice(piece: fx.GraphModule, tensors: Sequence[Tensor], batch_size: int) -> tuple[Tensor, ...]:
    """Call an extracted slice.

    Args:
        piece: what `extract` returned.
        tensors: at its start: the start's own first, then the received ones.
        batch_size: how many images they belong to.

    Returns:
        The tensors at its end, the end's own first, then those that are carried on, then the sides.
    """
    out = piece(tensors[0], batch_size, *tensors[1:])
    return out if isinstance(out, tuple) else (out,)
