"""Reconstruction granularities: named slicings of a captured graph, found from its module hierarchy, not from model names."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import fx

from ospq_export.errors import InputError
from ospq_export.graph.capture import QUANTIZABLE, operator_names, quantizable_nodes
from ospq_export.graph.slicing import (
    Slice,
    atoms,
    cut_points,
    has_images_in_front,
    live_tensors,
    name_of,
    quantizable_between,
)

UNIFORM = ("layer", "atom", "block", "blocks:2", "blocks:4", "stage", "model")
"""The ladder of uniform granularities, from fine to coarse."""


def repeated_modules(graph: fx.Graph) -> set[str]:
    """Module paths that are one of several numbered siblings of one class and hold at least two quantizable operators.

    These are what a network repeats: its transformer blocks, and the stages around them.
    """
    classes: dict[str, str] = {}
    work: Counter[str] = Counter()
    for node in graph.nodes:
        for path, kind in node.meta.get("module_stack", ()):
            classes[path] = kind
            work[path] += node.target in QUANTIZABLE
    parted = {path: path.rpartition(".") for path in classes}
    numbered = {path: (parent, classes[path]) for path, (parent, _, last) in parted.items() if last.isdigit()}
    siblings = Counter(numbered.values())
    return {path for path, family in numbered.items() if siblings[family] > 1 and work[path] > 1}


def slicing_of(graph: fx.Graph, granularity: str | Sequence[str]) -> list[Slice]:
    """The slices of a granularity, in order; together they are the whole graph.

    Args:
        graph: captured.
        granularity: "layer" (each quantizable operator), "atom" (attention and MLP apart), "block" (a transformer block),
            "blocks:N" (N neighbouring blocks), "stage", "model", or the names of the cut points to cut at.

    Raises:
        InputError: no such granularity or cut point, or cut points out of order or with no quantizable operator between them.
    """
    if not isinstance(granularity, str):
        return _explicit(graph, granularity)
    named: dict[str, Callable[[fx.Graph], list[Slice]]] = {
        "layer": layer_slicing,
        "atom": lambda g: _numbered(atoms(g)),
        "block": block_slicing,
        "stage": stage_slicing,
        "model": lambda g: join(g, [atoms(g)]),
    }
    if granularity in named:
        return named[granularity](graph)
    match = re.fullmatch(r"blocks:([1-9]\d*)", granularity)
    if match is None:
        raise InputError(
            f"there is no granularity {granularity!r}",
            where="slicing",
            fix=f"use auto, {', '.join(named)}, blocks:N, or a list of cut points",
        )
    return blocks_slicing(graph, int(match[1]))


def join(graph: fx.Graph, groups: Sequence[Sequence[Slice]]) -> list[Slice]:
    """One slice per group of neighbouring slices, each under a name of its own."""
    names = [name_of(graph, group[0].start, group[-1].end) for group in groups]
    taken = Counter(names)
    result = []
    for name, group in zip(names, groups, strict=True):
        if taken[name] > 1 and len(group) > 1:
            name = f"{group[0].name}..{group[-1].name}"
        result.append(Slice(name, group[0].start, group[-1].end))
    return _numbered(result)


def _numbered(slices: list[Slice]) -> list[Slice]:
    """The same slices; where several have one name, a number tells them apart."""
    total = Counter(s.name for s in slices)
    numbers = {name: itertools.count(1) for name in total}
    return [replace(s, name=f"{s.name}#{next(numbers[s.name])}") if total[s.name] > 1 else s for s in slices]


def _around(graph: fx.Graph, piece: Slice, modules: set[str]) -> list[str]:
    """Those of some modules that a slice's last quantizable operator lies in, from the outermost to the innermost."""
    last = quantizable_between(graph, piece.start, piece.end)[-1]
    return [path for path, _ in last.meta["module_stack"] if path in modules]


def _joined_by(graph: fx.Graph, key: Callable[[Slice], str]) -> list[Slice]:
    """One slice per run of neighbouring atoms with the same key."""
    return join(graph, [list(group) for _, group in itertools.groupby(atoms(graph), key)])


def block_slicing(graph: fx.Graph) -> list[Slice]:
    """One slice per transformer block: neighbouring atoms of the innermost repeated module together, other atoms alone."""
    repeated = repeated_modules(graph)
    return _joined_by(graph, lambda atom: [f"atom {atom.name}", *_around(graph, atom, repeated)][-1])


def blocks_slicing(graph: fx.Graph, count: int) -> list[Slice]:
    """Runs of up to `count` neighbouring blocks of one class of siblings; what is no block stays alone and ends a run."""
    leaves = _leaves(repeated_modules(graph))

    def run_of(block: Slice) -> str:
        inside = _around(graph, block, leaves)
        return f"siblings {inside[-1].rpartition('.')[0]}" if inside else f"slice {block.name}"

    groups = []
    for _, group in itertools.groupby(block_slicing(graph), run_of):
        members = list(group)
        groups += [members[i : i + count] for i in range(0, len(members), count)]
    return join(graph, groups)


def _leaves(repeated: set[str]) -> set[str]:
    """Repeated modules that hold no other repeated module: blocks, not stages."""
    return {path for path in repeated if not any(other.startswith(f"{path}.") for other in repeated)}


def stage_slicing(graph: fx.Graph) -> list[Slice]:
    """One slice per stage: the outermost repeated module that holds blocks, else the module that all sibling blocks are in."""
    repeated = repeated_modules(graph)
    leaves = _leaves(repeated)

    def stage_of(atom: Slice) -> str:
        outermost = [*_around(graph, atom, repeated), f"atom {atom.name}"][0]
        return outermost.rpartition(".")[0] if outermost in leaves else outermost

    return _joined_by(graph, stage_of)


def layer_slicing(graph: fx.Graph) -> list[Slice]:
    """One slice per quantizable operator, ending at its output; what else is alive there is handed on.

    Where something alive is not one tensor with the images in front, the operator joins the one after it.
    """
    alive, names = live_tensors(graph), operator_names(graph)
    work = quantizable_nodes(graph)
    ends = [n for n in work[:-1] if all(has_images_in_front(t) for t in (n, *alive[n]))]
    points = cut_points(graph)
    bounds = [points[0], *ends, points[-1]]
    slices, received = [], tuple[str, ...]()
    for start, end in itertools.pairwise(bounds):
        inside = [names[n] for n in quantizable_between(graph, start.name, end.name)]
        carried = tuple(n.name for n in alive[end] if n is not end)
        name = inside[0] if len(inside) == 1 else f"{inside[0]}..{inside[-1]}"
        slices.append(Slice(name, start.name, end.name, received, carried))
        received = carried
    return slices


def _explicit(graph: fx.Graph, names: Sequence[str]) -> list[Slice]:
    points = [n.name for n in cut_points(graph)]
    unknown = [name for name in names if name not in points[1:-1]]
    if unknown:
        raise InputError(
            f"the network has no cut point {unknown[0]!r} between its input and its output",
            where="slicing",
            fix="`ospq-export inspect` lists the cut points",
        )
    places = [points.index(name) for name in names]
    if any(b <= a for a, b in itertools.pairwise(places)):
        raise InputError(
            "the cut points are not in the network's order, so slices would overlap",
            where="slicing",
            fix="list each once, from the input to the output",
        )
    bounds = [points[0], *names, points[-1]]
    for start, end in itertools.pairwise(bounds):
        if not quantizable_between(graph, start, end):
            raise InputError(
                f"between {start} and {end} there is nothing to quantize",
                where="slicing",
                fix="leave one of the two cut points out",
            )
    return _numbered([Slice(name_of(graph, a, b), a, b) for a, b in itertools.pairwise(bounds)])


def check_partition(graph: fx.Graph, slices: Sequence[Slice]) -> None:
    """Hold slices to being a slicing: one after the other, without gap or overlap, over all quantizable operators.

    Raises:
        InputError: they are not.
    """
    gaps = [b.name for a, b in itertools.pairwise(slices) if a.end != b.start or a.carried != b.received]
    work = [n for s in slices for n in quantizable_between(graph, s.start, s.end)]
    if gaps or work != quantizable_nodes(graph):
        where = gaps[0] if gaps else "the ends"
        raise InputError(f"the slices leave a gap or overlap at {where}", fix="cut the network anew")
