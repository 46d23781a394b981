"""What a captured network returns: one tensor or several, each with a name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ospq_export.errors import InputError, listed

LOGITS = "logits"
"""The name of a single output that the network does not name."""


def output_node(graph: fx.Graph) -> fx.Node:
    """The node that returns."""
    return next(iter(graph.find_nodes(op="output")))


def output_nodes(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """The tensors that a network returns, in order."""
    held = output_node(graph).args[0]
    return (held,) if isinstance(held, fx.Node) else tuple(held)  # type: ignore[arg-type]


def output_names(graph: fx.Graph) -> tuple[str, ...]:
    """Their names."""
    return tuple(output_node(graph).meta.get("names", (LOGITS,)))


def return_outputs(graph: fx.Graph, nodes: Sequence[fx.Node], names: Sequence[str]) -> None:
    """End a graph: it returns one tensor, or a tuple of several.

    Args:
        graph: without an output so far.
        nodes: what it returns.
        names: of each.
    """
    graph.output(nodes[0] if len(nodes) == 1 else tuple(nodes)).meta["names"] = tuple(names)


def as_tuple(returned: Any) -> tuple[Tensor, ...]:
    """What a network returned, as a tuple."""
    return tuple(returned) if isinstance(returned, tuple | list) else (returned,)


def rename_outputs(graph: fx.Graph, names: Sequence[str]) -> None:
    """Call the outputs otherwise."""
    output_node(graph).meta["names"] = tuple(names)


def output_shapes(graph: fx.Graph) -> dict[str, tuple[int, ...]]:
    """Shapes of the outputs for one image, by name."""
    nodes = zip(output_names(graph), output_nodes(graph), strict=True)
    return {name: tuple(map(int, node.meta["val"].shape[1:])) for name, node in nodes}


def named_leaves(returned: Any) -> dict[str, Any]:
    """What a model returned, by the names that `choose_outputs` gives."""
    leaves, spec = pytree.tree_flatten(returned)
    return dict(zip(_names(spec), leaves, strict=True))


def choose_outputs(graph: fx.Graph, spec: pytree.TreeSpec, wanted: Sequence[str] | None) -> dict[str, str]:
    """Let a graph from torch.export return named tensors of images only.

    A name is the path through what the model returns: a key, a field, or `output_N` for the place in a tuple.

    Args:
        graph: its output node holds the leaves of `spec`; it is changed.
        spec: what the model returns.
        wanted: names of those that are kept; None keeps all that hold real numbers for every image.

    Returns:
        What was left out, by name, and why.

    Raises:
        InputError: nothing is left, or a wanted output is not there or holds no real numbers.
    """
    node = output_node(graph)
    leaves: Any = node.args[0] if isinstance(node.args[0], list | tuple) else (node.args[0],)
    names = _names(spec)
    reasons = {name: _unfit(leaf) for name, leaf in zip(names, leaves, strict=True)}
    unknown = [name for name in wanted or () if name not in reasons or reasons[name]]
    if unknown:
        raise InputError(
            f"the network has no output {unknown[0]!r} of real numbers",
            where="`outputs`",
            fix=f"choose among {listed([n for n in names if not reasons[n]])}",
        )
    for name in names:
        if wanted and name not in wanted and not reasons[name]:
            reasons[name] = "not asked for"
    kept = [(name, leaf) for name, leaf in zip(names, leaves, strict=True) if not reasons[name]]
    left_out = {name: why for name, why in reasons.items() if why and why != _NOTHING}
    if not kept:
        what = "; ".join(f"{name} {why}" for name, why in left_out.items()) or "it returns no tensor"
        raise InputError(
            f"no output of the network can be compared: {what}",
            fix="return a float tensor with the images in front",
        )
    node.args = (tuple(leaf for _, leaf in kept),)
    node.meta["names"] = tuple(name for name, _ in kept)
    return left_out


_NOTHING = "is None"


def _unfit(leaf: object) -> str:
    """Why a value is no output that can be compared; "" where it is one."""
    if leaf is None:
        return _NOTHING
    value = leaf.meta.get("val") if isinstance(leaf, fx.Node) else None
    if not isinstance(value, Tensor):
        return "is no tensor"
    if not value.is_floating_point():
        return f"holds {str(value.dtype).removeprefix('torch.')}, no real numbers"
    if value.dim() < 1 or not isinstance(value.shape[0], torch.SymInt):
        return "does not hold a row for every image"
    return ""


def _names(spec: pytree.TreeSpec) -> list[str]:
    """A name for each leaf, from its path."""
    if spec.is_leaf():
        return [LOGITS]
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    found = ["_".join(filter(None, re.split(r"\W+", pytree.keystr(path)))) for path in paths]
    # The input of every file is called images.
    return [f"output_{name}" if name[:1].isdigit() or name == "images" else name for name in found]
