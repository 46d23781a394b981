"""Canonical form of a captured graph: constants folded, BatchNorm folded, all quantizable work in three operators.

Each pass takes and changes a GraphModule in place; `canonicalize` runs them in order and returns a fresh module whose constants
are buffers under their original names ("blocks.0.attn.qkv.weight") or, where they were computed, under "folded.<node>".
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from ospq_export.graph.einsum import expand_einsums
from ospq_export.graph.outputs import output_names, output_nodes, return_outputs
from ospq_export.graph.rewrite import (
    VIEWS,
    add_constant,
    call_functions,
    constant_of,
    fold_batch_norm,
    insert_call,
    replace_node,
    unsupported,
)

aten = torch.ops.aten
_IDENTITIES = (
    aten.dropout.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten.type_as.default,
)
_CHECKS = (
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
)
REWRITTEN = frozenset({*_IDENTITIES, *_CHECKS, aten.conv2d.padding})
"""Operators that the canonical form has no more."""


def drop_identities(module: fx.GraphModule) -> None:
    """Remove operators without effect in inference, and assertions."""
    for node in list(module.graph.nodes):
        if (node.op == "call_module" and node.name.startswith("_guards")) or (
            node.op == "call_function" and node.target in _CHECKS
        ):
            module.graph.erase_node(node)
        elif node.op == "call_function" and node.target in _IDENTITIES:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            if source.meta["val"].dtype == node.meta["val"].dtype:
                node.replace_all_uses_with(source)
                module.graph.erase_node(node)


def fold_constants(module: fx.GraphModule) -> None:
    """Evaluate every operator that does not depend on the images: position biases, assembled qkv biases, standardised weights."""
    values: dict[fx.Node, Any] = {}
    for node in list(module.graph.nodes):
        if node.op == "get_attr":
            values[node] = constant_of(module, node)
        elif (
            node.op == "call_function"
            and all(n in values for n in node.all_input_nodes)
            and not isinstance(node.meta.get("val"), torch.SymInt)
        ):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n])
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
    for node, value in values.items():
        is_computed = node.op != "get_attr" and isinstance(value, Tensor)
        if is_computed and any(user not in values for user in node.users):
            constant = add_constant(module, node.name, value, node)
            node.replace_all_uses_with(constant, delete_user_cb=lambda user: user not in values)


def unify_batch_size(module: fx.GraphModule) -> None:
    """Express every symbolic size by the batch size of the network's input, so that a slice needs only that number."""
    graph = module.graph
    placeholder = next(n for n in graph.nodes if n.op == "placeholder")
    root: fx.Node | None = None
    for node in call_functions(graph):
        value = node.meta.get("val")
        if not isinstance(value, torch.SymInt):
            continue
        if root is None:
            with graph.inserting_after(placeholder):
                root = graph.call_function(aten.sym_size.int, (placeholder, 0))
            root.meta.update(val=placeholder.meta["val"].shape[0], module_stack=(), module_path="")
        batch = root.meta["val"].node.expr
        factor = value.node.expr / batch
        if node is root or not factor.is_number or factor.is_integer is False:
            continue
        if factor == 1:
            node.replace_all_uses_with(root)
        else:
            with graph.inserting_before(node):
                product = graph.call_function(operator.mul, (root, int(factor)))
            product.meta.update(val=value, module_stack=(), module_path="")
            node.replace_all_uses_with(product)


def infer_view_sizes(module: fx.GraphModule) -> None:
    """Write -1 for the only symbolic size of a view: fewer shape operators in every slice and in the exported file."""
    for node in call_functions(module.graph):
        if node.target in VIEWS:
            sizes = list(node.args[1])  # type: ignore[arg-type]
            symbolic = [i for i, size in enumerate(sizes) if isinstance(size, fx.Node)]
            if len(symbolic) == 1 and -1 not in sizes:
                sizes[symbolic[0]] = -1
            node.target = aten.reshape.default
            node.args = (node.args[0], sizes)


def to_linear_and_matmul(module: fx.GraphModule) -> None:
    """Rewrite mm, bmm, addmm, baddbmm and products with a constant matrix as linear and matmul."""
    for node in call_functions(module.graph):
        args = node.args
        if node.target in (aten.mm.default, aten.bmm.default):
            node.target = aten.matmul.default
        elif node.target in (aten.addmm.default, aten.baddbmm.default):
            if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
                raise unsupported(node, "brought into canonical form: alpha or beta other than 1")
            product = insert_call(node, aten.matmul.default, args[1], args[2])
            replace_node(node, insert_call(node, aten.add.Tensor, product, args[0]))
            node = product
        if node.target is aten.matmul.default:
            _matmul_with_constant(module, node)


def _matmul_with_constant(module: fx.GraphModule, node: fx.Node) -> None:
    """A product with a constant matrix as a linear layer, whose weight is quantized per output channel."""
    left, right = node.args
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    if left.op == right.op == "get_attr":
        return
    if _is_matrix(right, left):
        matrix = constant_of(module, right).flatten(0, -2)
        weight = add_constant(module, f"{node.name}_weight", matrix.t(), node)
        replace_node(node, insert_call(node, aten.linear.default, left, weight))
    elif _is_matrix(left, right):
        # W x = (x^T W^T)^T
        matrix = constant_of(module, left).flatten(0, -2)
        weight = add_constant(module, f"{node.name}_weight", matrix, node)
        columns = insert_call(node, aten.transpose.int, right, -2, -1)
        product = insert_call(node, aten.linear.default, columns, weight)
        replace_node(node, insert_call(node, aten.transpose.int, product, -2, -1))


def _is_matrix(constant: fx.Node, other: fx.Node) -> bool:
    """Whether a product's operand is one constant matrix, perhaps behind dimensions of size 1 that the other operand has too."""
    if constant.op != "get_attr":
        return False
    shape, dims = constant.meta["val"].shape, other.meta["val"].dim()
    return 2 <= len(shape) <= dims and all(size == 1 for size in shape[:-2])


def normalize_conv_padding(module: fx.GraphModule) -> None:
    """Rewrite conv2d with padding="same"/"valid" as conv2d with numbers (behind an explicit pad where it is uneven)."""
    for node in call_functions(module.graph):
        if node.target is not aten.conv2d.padding:
            continue
        defaults: tuple[Any, ...] = (None, None, None, [1, 1], "valid", [1, 1], 1)
        given: tuple[Any, ...] = (*node.args, *defaults[len(node.args) :])
        x, weight, bias, stride, padding, dilation, groups = given
        total = [0, 0]
        if padding == "same":
            kernel = weight.meta["val"].shape[2:]
            total = [int(d) * (int(k) - 1) for d, k in zip(dilation, kernel, strict=True)]
        even = [t // 2 for t in total]
        extra = [t % 2 for t in total]
        if any(extra):
            x = insert_call(node, aten.constant_pad_nd.default, x, [0, extra[1], 0, extra[0]])
        args = (x, weight, bias, stride, even, dilation, groups)
        replace_node(node, insert_call(node, aten.conv2d.default, *args))


def canonicalize(module: fx.GraphModule, *, share: bool = False) -> fx.GraphModule:
    """Run all passes and return a module whose constants are buffers, with unused ones gone.

    Args:
        module: what `torch.export` captured.
        share: whether buffers may be the model's own memory instead of copies.

    Raises:
        InputError: an operator has no canonical form; names the operator and its module.
    """
    for run in (
        drop_identities,
        expand_einsums,
        unify_batch_size,
        fold_constants,
        infer_view_sizes,
        to_linear_and_matmul,
        normalize_conv_padding,
        fold_batch_norm,
    ):
        run(module)
        module.graph.eliminate_dead_code()
    return _with_plain_buffers(module, share)


def _with_plain_buffers(module: fx.GraphModule, share: bool) -> fx.GraphModule:
    """A GraphModule over the same graph whose only state is the constants the graph reads, as float32-preserving buffers."""
    constants: dict[str, Any] = {}
    taken: set[int] = set()
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            named = dict(zip(output_nodes(module.graph), output_names(module.graph), strict=True))
            # Of one tensor under two names, which a file cannot have, the last name stays.
            return_outputs(graph, [copies[held] for held in named], list(named.values()))
            continue
        if node.op == "get_attr":
            value = constant_of(module, node)
            memory = value.untyped_storage().data_ptr()
            # Two names of one memory would change together.
            kept = share and value.is_contiguous() and memory not in taken
            constants[str(node.target)] = value if kept else value.clone()
            taken.add(memory)
        copies[node] = graph.node_copy(node, copies.__getitem__)
    result = fx.GraphModule(constants, graph, class_name="CapturedNetwork")
    result.graph.lint()
    return result.eval()
