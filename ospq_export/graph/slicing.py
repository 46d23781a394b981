"""Cut points, atoms and slices of a captured graph (DESIGN section 2), and their extraction as functions.

A cut point is a place where exactly one image-dependent tensor is alive. An atom is the graph between two neighbouring cut
points with at least one quantizable operator; a slice is a run of atoms; a slicing partitions the atoms.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ospq_export.errors import InputError
from ospq_export.graph.capture import QUANTIZABLE

aten = torch.ops.aten
Path = tuple[str, ...]


@dataclass(frozen=True)
class Slice:
    """The graph after node `start` up to and including node `end` (names of cut points; `start` of the first is the input)."""

    name: str
    start: str
    end: str


def _is_image_tensor(node: fx.Node, dependent: set[fx.Node]) -> bool:
    return node in dependent and not isinstance(node.meta.get("val"), torch.SymInt)


def cut_points(graph: fx.Graph) -> list[fx.Node]:
    """Nodes after which they alone carry everything that depends on the images, in topological order.

    The input is the first and the network's output the last.
    """
    nodes = [n for n in graph.nodes if n.op != "output"]
    output = next(n for n in graph.nodes if n.op == "output")
    order = {node: i for i, node in enumerate(graph.nodes)}
    dependent: set[fx.Node] = set()
    for node in nodes:
        if node.op == "placeholder" or any(_is_image_tensor(n, dependent) for n in node.all_input_nodes):
            dependent.add(node)
    # A size read off the input does not keep the images alive: a slice is given the batch size.
    last_use = {
        node: max((order[u] for u in node.users if u.target is not aten.sym_size.int), default=order[node])
        for node in nodes
    }
    points, alive = [], set()
    for node in nodes:
        if _is_image_tensor(node, dependent):
            alive.add(node)
        alive = {n for n in alive if last_use[n] > order[node] or n is node}
        if (
            alive == {node}
            and isinstance(node.meta.get("val"), Tensor)
            and (node.users or node is output.args[0])
        ):
            points.append(node)
    return points


def atoms(graph: fx.Graph) -> list[Slice]:
    """The finest slicing: one slice per atom, in order.

    Stretches without quantizable work join the atom before them: its output is then as near as can be to what the next operator
    reads, and what the network throws away (all tokens but one, ahead of a classifier) is not reconstructed. What comes before
    the first quantizable operator joins the first atom, what comes after the last one the last.
    """
    points = cut_points(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    work = [order[n] for n in graph.nodes if n.target in QUANTIZABLE and n.op == "call_function"]
    spans = zip([order[p] for p in points], [order[p] for p in points[1:]], strict=False)
    busy = [any(start < position <= end for position in work) for start, end in spans]
    first = busy.index(True)
    bounds = [points[i] for i in range(first + 1, len(busy)) if busy[i]]
    starts, ends = [points[0], *bounds], [*bounds, points[-1]]
    return [Slice(_name_of(graph, a, b), a.name, b.name) for a, b in zip(starts, ends, strict=True)]


def nodes_between(graph: fx.Graph, start: str, end: str) -> list[fx.Node]:
    """The nodes after `start` up to and including `end`, in topological order."""
    names = [n.name for n in graph.nodes]
    if start not in names or end not in names:
        missing = start if start not in names else end
        raise InputError(
            f"the graph has no cut point {missing!r}", mend="the run belongs to another model or version"
        )
    inner = itertools.islice(graph.nodes, names.index(start) + 1, names.index(end) + 1)
    return list(inner)


def _quantizable_paths(graph: fx.Graph, start: fx.Node | str, end: fx.Node | str) -> list[fx.Node]:
    nodes = nodes_between(graph, str(start), str(end))
    return [n for n in nodes if n.op == "call_function" and n.target in QUANTIZABLE]


def _name_of(graph: fx.Graph, start: fx.Node | str, end: fx.Node | str) -> str:
    """The deepest module path that holds all quantizable work of a stretch, or first..last."""
    paths = [n.meta["module_path"] for n in _quantizable_paths(graph, start, end)]
    common = paths[0].split(".")
    for path in paths[1:]:
        pairs = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(common, path.split("."), strict=False)
        )
        common = [part for part, _ in pairs]
    return ".".join(common) or (paths[0] if len(paths) == 1 else f"{paths[0]}..{paths[-1]}")


def repeated_modules(graph: fx.Graph) -> set[str]:
    """Module paths that are one of several numbered siblings of one class and hold at least two quantizable operators.

    These are what a network repeats: its transformer blocks, and the stages around them.
    """
    classes: dict[str, str] = {}
    work: Counter[str] = Counter()
    for node in graph.nodes:
        for path, kind in node.meta.get("module_stack", ()):
            classes[path] = kind
            if node.op == "call_function" and node.target in QUANTIZABLE:
                work[path] += 1
    siblings: Counter[tuple[str, str]] = Counter()
    for path, kind in classes.items():
        parent, _, last = path.rpartition(".")
        if last.isdigit():
            siblings[parent, kind] += 1
    return {
        path
        for path, kind in classes.items()
        if path.rpartition(".")[2].isdigit()
        and siblings[path.rpartition(".")[0], kind] > 1
        and work[path] > 1
    }


def block_slicing(graph: fx.Graph) -> list[Slice]:
    """One slice per transformer block: neighbouring atoms of the innermost repeated module together, other atoms alone."""
    repeated = repeated_modules(graph)

    def block_of(atom: Slice) -> str:
        last = _quantizable_paths(graph, atom.start, atom.end)[-1]
        inside = [path for path, _ in last.meta["module_stack"] if path in repeated]
        return inside[-1] if inside else f"atom {atom.name}"

    slices = []
    for _, group in itertools.groupby(atoms(graph), block_of):
        run = list(group)
        slices.append(Slice(_name_of(graph, run[0].start, run[-1].end), run[0].start, run[-1].end))
    return slices


def extract(module: fx.GraphModule, piece: Slice) -> fx.GraphModule:
    """A slice as a function `(tensor at start, batch size) -> tensor at end` that shares the module's constants and quantizers.

    Args:
        module: the captured network, with or without quantizers.
        piece: the slice; its names are of nodes of `module`.

    Raises:
        InputError: a cut point does not exist.
        ValueError: the stretch needs another tensor than the one at its start.
    """
    inner = nodes_between(module.graph, piece.start, piece.end)
    graph = fx.Graph()
    copies = {next(n for n in module.graph.nodes if n.name == piece.start): graph.placeholder("x")}
    batch_size = graph.placeholder("batch_size")

    def copy_of(node: fx.Node) -> fx.Node:
        if node in copies:
            return copies[node]
        if node.target is aten.sym_size.int and node.args[1] == 0 and _is_input(node.args[0]):
            return batch_size
        if node.op == "get_attr" or isinstance(node.meta.get("val"), torch.SymInt):
            copies[node] = graph.node_copy(node, copy_of)
            return copies[node]
        raise ValueError(f"slice {piece.name} needs {node.name}, which lies before its start {piece.start}")

    for node in inner:
        if node.target is not aten.sym_size.int and node not in copies:
            copies[node] = graph.node_copy(node, copy_of)
    graph.output(copies[inner[-1]])
    result = fx.GraphModule(module, graph, class_name="Slice")
    result.graph.eliminate_dead_code()
    result.recompile()
    return result


def _is_input(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder"
