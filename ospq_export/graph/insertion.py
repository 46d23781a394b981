"""Insertion of quantizers into a captured graph.

One tensor has one quantizer for each kind of format, shared by all quantizable operators that read it so; every other reader sees
the float tensor.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import fx

from ospq_export.errors import InputError
from ospq_export.formats.base import Format, Role
from ospq_export.formats.choice import Choice, Operands
from ospq_export.graph.capture import operator_names
from ospq_export.graph.outputs import output_names, output_nodes, return_outputs
from ospq_export.graph.quantizers import ActivationQuantizer, CorrectedBias, QuantizedGraph, WeightQuantizer
from ospq_export.graph.rewrite import is_padded, parameter
from ospq_export.graph.slicing import cut_points

aten = torch.ops.aten
_MOVES = (
    aten.transpose.int,
    aten.permute.default,
    aten.reshape.default,
    aten.clone.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
)


def _hoist(tensor: fx.Node, cuts: set[fx.Node]) -> tuple[fx.Node, fx.Node | None]:
    """Walk from a matmul's operand up through pure data movement; TensorRT wants K quantized before its transpose.

    Returns:
        The tensor to quantize, and the movement that reads it (None when the operator itself does).
    """
    reader = None
    while tensor.target in _MOVES and len(tensor.users) == 1 and tensor not in cuts:
        reader, tensor = tensor, tensor.all_input_nodes[0]
    return tensor, reader


def source_product(tensor: object) -> fx.Node | None:
    """The product of two activations that a tensor is, moved about; None where it is something else."""
    while isinstance(tensor, fx.Node) and tensor.target in _MOVES:
        tensor = tensor.all_input_nodes[0]
    assert isinstance(tensor, fx.Node)
    return tensor if tensor.target is aten.matmul.default else None


def _comes_from_matmul(tensor: fx.Node) -> bool:
    """Whether a tensor is a product moved about: an offset's Sub behind attention would keep TensorRT from fusing it."""
    return source_product(tensor) is not None


def _is_unpadded(node: fx.Node) -> bool:
    return node.target is aten.linear.default or (node.target is aten.conv2d.default and not is_padded(node))


@dataclass
class _Site:
    """A tensor to be quantized to one kind of format, and who reads it so."""

    name: str
    tensor: fx.Node
    format: Format
    may_shift: bool
    readers: list[fx.Node]


def role_of(node: fx.Node) -> Role:
    """What a quantizable operator is."""
    if node.target is aten.matmul.default:
        return Role.ATTENTION
    return Role.LINEAR if node.target is aten.linear.default else Role.CONVOLUTION


def inner_dimension(node: fx.Node) -> int:
    """Elements that a quantizable operator's products sum over."""
    first, second = (operand.meta["val"].shape for operand in node.args[:2])  # type: ignore[union-attr]
    return int(first[-1] if role_of(node) is Role.ATTENTION else second[1:].numel())


def quantized_tensor(node: fx.Node, operand: fx.Node, cuts: set[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """The tensor to quantize for an activation operand of a quantizable operator, and the node that reads it.

    Args:
        node: the operator.
        operand: that it reads.
        cuts: cut points of the graph, beyond which no quantizer is moved.
    """
    tensor, reader = _hoist(operand, cuts) if role_of(node) is Role.ATTENTION else (operand, None)
    return tensor, reader or node


def _operands(names: dict[fx.Node, str], formats: Choice) -> dict[fx.Node, Operands]:
    """The formats of every quantizable operator."""
    ends, found = _ends(names), {}
    for node, name in names.items():
        found[node] = formats.operands(name, role_of(node), inner_dimension(node), is_end=node in ends)
    free = [node for node, name in names.items() if not formats.names(name)]
    return found | {node: _with_result(node, found[node], found) for node in free}


def _with_result(node: fx.Node, own: Operands, found: dict[fx.Node, Operands]) -> Operands:
    """What a linear reads of an attention has the attention's format, where that has more bits.

    An INT8 attention kernel quantizes its result itself; below 8 bits there would be a Clip in between, and no kernel.
    """
    product = source_product(node.args[0])
    attention = found[product].activation if product in found else None
    if node.target is not aten.linear.default or own.activation is None or attention is None:
        return own
    if attention.family != own.activation.family or attention.bits <= own.activation.bits:
        return own
    reason = f"what it reads is an attention's result, which has {attention.name}"
    return dataclasses.replace(own, activation=attention, reason=own.reason or reason)


def check_overrides(graph: fx.Graph, formats: Choice) -> None:
    """Hold a recipe's overrides to a network; runs are read without, so that older ones stay what they were.

    Raises:
        InputError: a pattern fits no operator, or asks for a format that one cannot have.
    """
    names = operator_names(graph)
    formats.check_patterns(list(names.values()))
    _operands(names, formats)


def _activation_sites(
    graph: fx.Graph, names: dict[fx.Node, str], operands: dict[fx.Node, Operands]
) -> list[_Site]:
    """Readers that want integers of several widths share the widest; other kinds have a quantizer of their own."""
    cuts = set(cut_points(graph))
    sites: dict[tuple[fx.Node, str], _Site] = {}
    for node, name in names.items():
        wanted = operands[node].activation
        if wanted is None:
            continue
        is_matmul = node.target is aten.matmul.default
        for label, operand in zip(("lhs", "rhs") if is_matmul else ("input",), node.args, strict=False):
            assert isinstance(operand, fx.Node)
            tensor, reader = quantized_tensor(node, operand, cuts)
            new = _Site(f"{name}.{label}", tensor, wanted, not _comes_from_matmul(tensor), [])
            site = sites.setdefault((tensor, wanted.family), new)
            site.format = max(site.format, wanted, key=lambda f: f.bits)
            # An offset becomes part of a bias by way of the quantized weight.
            site.may_shift &= _is_unpadded(node) and operands[node].weight is not None
            site.readers.append(reader)
    return list(sites.values())


def _ends(names: dict[fx.Node, str]) -> set[fx.Node]:
    """The first and the last quantizable operator."""
    return {next(iter(names)), next(reversed(names))}


def insert_quantizers(module: fx.GraphModule, formats: Choice) -> QuantizedGraph:
    """Put a quantizer on every image-dependent operand and every constant weight of the quantizable operators.

    A constant operand of a matmul (one matrix per head or position) has no output channels of its own: it is quantized per
    tensor, as an activation is.

    Args:
        module: what `capture` returned; it is not changed, its constants are shared.
        formats: of weights, activations and the two ends.

    Returns:
        The network with quantizers in Mode.FLOAT; node names of `module` are kept.

    Raises:
        InputError: an override cannot be, every operator stays float, or a weight is computed from the images.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, copies)
    return_outputs(graph, [copies[n] for n in output_nodes(module.graph)], output_names(module.graph))
    if any(old.name != new.name for old, new in copies.items()):
        raise AssertionError("node names changed in the copy")
    result = QuantizedGraph(fx.GraphModule(module, graph, class_name="QuantizedNetwork"))
    # Names and sites are computed on the untouched graph: cut points and names must not see the quantizers.
    names = operator_names(module.graph)
    operands = _operands(names, formats)
    result.substituted = {
        name: operands[node].reason for node, name in names.items() if operands[node].reason
    }
    for site in _activation_sites(module.graph, names, operands):
        quantizer = ActivationQuantizer(site.name, site.format, site.may_shift)
        result.activations[site.name] = quantizer
        _insert(result.module, quantizer, copies[site.tensor], [copies[r] for r in site.readers])
    _insert_weights(result, names, copies, operands)
    if not result.activations and not result.weights:
        raise InputError("every operator stays float", where="`weights`, `activations`", fix="give a format")
    _insert_biases(result, {n: name for n, name in names.items() if operands[n].weight is not None}, copies)
    result.module.recompile()
    return result


def _insert(
    module: fx.GraphModule,
    quantizer: ActivationQuantizer | WeightQuantizer | CorrectedBias,
    tensor: fx.Node,
    readers: list[fx.Node],
) -> None:
    """Put a quantizer between a tensor and some of its readers."""
    key = f"quantizers.{quantizer.name.replace('.', '__')}"
    module.add_submodule(key, quantizer)
    # Placed ahead of its first reader, it belongs to the slice that reads it, also where the tensor is a cut point.
    first = next(n for n in module.graph.nodes if n in readers)
    with module.graph.inserting_before(first):
        node = module.graph.call_module(key, (tensor,))
    node.meta.update(tensor.meta)
    for reader in readers:
        reader.replace_input_with(tensor, node)


def _insert_weights(
    result: QuantizedGraph,
    names: dict[fx.Node, str],
    copies: dict[fx.Node, fx.Node],
    operands: dict[fx.Node, Operands],
) -> None:
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node, name in names.items():
        if node.target is not aten.matmul.default:
            weight = parameter(node, 1)
            if weight is None:
                raise InputError(
                    f"the weight of {name} is computed from the images", fix="this model is not supported"
                )
            readers.setdefault(weight, []).append(node)
    for weight, nodes in readers.items():
        constant, wanted = str(weight.target), operands[nodes[0]].weight
        if wanted is None:
            continue
        value = result.module.get_buffer(constant)
        quantizer = WeightQuantizer(f"{names[nodes[0]]}.weight", wanted, constant, value)
        result.weights[quantizer.name] = quantizer
        _insert(result.module, quantizer, copies[weight], [copies[n] for n in nodes])


def _insert_biases(result: QuantizedGraph, names: dict[fx.Node, str], copies: dict[fx.Node, fx.Node]) -> None:
    for node, name in names.items():
        bias = parameter(node, 2)
        # A bias that several operators read is left alone: a correction for one would be wrong for the other.
        if bias is not None and len(bias.users) == 1:
            constant = str(bias.target)
            corrected = CorrectedBias(f"{name}.bias", constant, result.module.get_buffer(constant))
            result.biases[corrected.name] = corrected
            _insert(result.module, corrected, copies[bias], [copies[node]])
