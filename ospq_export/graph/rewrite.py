"""Small edits of a captured graph that keep every node's fake value and provenance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def call_functions(graph: fx.Graph) -> Iterator[fx.Node]:
    """The operator calls, as a copy that survives edits of the graph."""
    return (node for node in list(graph.nodes) if node.op == "call_function")


def replace_node(old: fx.Node, new: fx.Node) -> None:
    """Let `new` take the place and the provenance of `old`."""
    for key in ("val", "module_stack", "module_path"):
        if key in old.meta:
            new.meta.setdefault(key, old.meta[key])
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def insert_call(before: fx.Node, target: Callable[..., Any], args: tuple[Any, ...], like: fx.Node) -> fx.Node:
    """Insert a call with the module path of `like`; its fake value is computed from the arguments' fake values."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args)
    node.meta["module_stack"], node.meta["module_path"] = like.meta["module_stack"], like.meta["module_path"]
    fake = fx.node.map_arg(args, lambda n: n.meta["val"])
    node.meta["val"] = target(*fake)
    return node


def constant_of(module: fx.GraphModule, node: fx.Node) -> Tensor:
    """The tensor that a get_attr node reads."""
    value: Any = module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise TypeError(f"{node.target} is not a tensor")
    return value.detach()


def add_constant(module: fx.GraphModule, name: str, value: Tensor, before: fx.Node) -> fx.Node:
    """Register a buffer "folded.<name>" and a get_attr node for it ahead of `before`; a name that is taken gets a number."""
    if not hasattr(module, "folded"):
        module.add_module("folded", torch.nn.Module())
    name = _free_name(module.folded, name)
    module.folded.register_buffer(name, value.clone().contiguous())  # type: ignore[union-attr]
    with before.graph.inserting_before(before):
        node = before.graph.get_attr(f"folded.{name}")
    fake = before.meta.get("val")
    mode = getattr(fake, "fake_mode", None)
    node.meta["val"] = mode.from_tensor(value) if mode is not None else value
    node.meta["module_stack"], node.meta["module_path"] = (
        before.meta["module_stack"],
        before.meta["module_path"],
    )
    return node


def _free_name(holder: object, name: str) -> str:
    """`name`, or the first of "name_1", "name_2", ... that is free: one weight in two places may become two constants."""
    count, free = 0, name
    while hasattr(holder, free):
        count += 1
        free = f"{name}_{count}"
    return free
