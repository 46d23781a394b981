"""Insertion of quantizers into a captured graph.

One tensor has one quantizer, shared by all quantizable operators that read it; every other reader sees the float tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx, nn

from ospq_export.errors import InputError
from ospq_export.formats.base import Format
from ospq_export.formats.choice import Choice
from ospq_export.graph.capture import operator_names
from ospq_export.graph.quantizers import ActivationQuantizer, CorrectedBias, QuantizedGraph, WeightQuantizer
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


def _comes_from_matmul(tensor: fx.Node) -> bool:
    """Whether a tensor is a product moved about: an offset's Sub behind attention would keep TensorRT from fusing it."""
    while tensor.target in _MOVES:
        tensor = tensor.all_input_nodes[0]
    return tensor.target is aten.matmul.default


def _is_unpadded(node: fx.Node) -> bool:
    if node.target is aten.linear.default:
        return True
    if node.target is not aten.conv2d.default:
        return False
    padding = node.args[4] if len(node.args) > 4 else 0
    return all(p == 0 for p in (padding if isinstance(padding, list | tuple) else [padding]))


@dataclass
class _Site:
    """A tensor to be quantized and who reads it quantized."""

    name: str
    format: Format
    may_shift: bool
    readers: list[fx.Node]


def _activation_sites(graph: fx.Graph, formats: Choice) -> dict[fx.Node, _Site]:
    cuts, names = set(cut_points(graph)), operator_names(graph)
    ends = {next(iter(names)), next(reversed(names))}
    sites: dict[fx.Node, _Site] = {}
    for node, name in names.items():
        is_matmul = node.target is aten.matmul.default
        operands = (
            zip(("lhs", "rhs"), node.args[:2], strict=True) if is_matmul else (("input", node.args[0]),)
        )
        for label, operand in operands:
            assert isinstance(operand, fx.Node)
            tensor, reader = _hoist(operand, cuts) if is_matmul else (operand, None)
            wanted = formats.end_activation if node in ends else formats.activation
            site = sites.setdefault(
                tensor, _Site(f"{name}.{label}", wanted, not _comes_from_matmul(tensor), [])
            )
            site.format = max(site.format, wanted, key=lambda f: f.bits)
            site.may_shift = site.may_shift and _is_unpadded(node)
            site.readers.append(reader or node)
    return sites


def insert_quantizers(module: fx.GraphModule, formats: Choice) -> QuantizedGraph:
    """Put a quantizer on every image-dependent operand and every constant weight of the quantizable operators.

    A constant operand of a matmul (one matrix per head or position) has no output channels of its own: it is quantized per
    tensor, as an activation is.

    Args:
        module: what `capture` returned; it is not changed, its constants are shared.
        formats: of weights, activations and the two ends.

    Returns:
        The network with quantizers in Mode.FLOAT; node names of `module` are kept.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, copies)
    assert isinstance(output, fx.Node)
    graph.output(output)
    if any(old.name != new.name for old, new in copies.items()):
        raise AssertionError("node names changed in the copy")
    result = QuantizedGraph(fx.GraphModule(module, graph, class_name="QuantizedNetwork"))
    result.module.add_module("quantizers", nn.Module())
    # Sites are computed on the untouched graph: cut points and names must not see the quantizers.
    sites = _activation_sites(module.graph, formats)
    for tensor, site in sites.items():
        _insert_activation(result, copies[tensor], site, [copies[r] for r in site.readers])
    _insert_weights(result, module.graph, copies, formats)
    _insert_biases(result, module.graph, copies)
    result.module.recompile()
    return result


def _register(result: QuantizedGraph, name: str, quantizer: nn.Module) -> str:
    key = name.replace(".", "__")
    holder = result.module.quantizers
    assert isinstance(holder, nn.Module)
    holder.add_module(key, quantizer)
    return f"quantizers.{key}"


def _insert_activation(result: QuantizedGraph, tensor: fx.Node, site: _Site, readers: list[fx.Node]) -> None:
    quantizer = ActivationQuantizer(site.name, site.format, site.may_shift)
    result.activations[site.name] = quantizer
    target = _register(result, site.name, quantizer)
    # Placed ahead of its first reader, it belongs to the slice that reads it, also where the tensor is a cut point.
    graph = result.module.graph
    first = next(n for n in graph.nodes if n in readers)
    with graph.inserting_before(first):
        node = graph.call_module(target, (tensor,))
    node.meta.update(tensor.meta)
    for reader in readers:
        reader.replace_input_with(tensor, node)


def _insert_weights(
    result: QuantizedGraph, graph: fx.Graph, copies: dict[fx.Node, fx.Node], formats: Choice
) -> None:
    names = operator_names(graph)
    ends = {next(iter(names)), next(reversed(names))}
    placed: dict[fx.Node, fx.Node] = {}
    for original, name in names.items():
        weight = original.args[1]
        if original.target is aten.matmul.default or not isinstance(weight, fx.Node):
            continue
        if weight.op != "get_attr":
            raise InputError(
                f"the weight of {name} is computed from the images", fix="this model is not supported"
            )
        node, weight = copies[original], copies[weight]
        if weight not in placed:
            constant = str(weight.target)
            wanted = formats.end_weight if original in ends else formats.weight
            quantizer = WeightQuantizer(
                f"{name}.weight", wanted, constant, result.module.get_buffer(constant)
            )
            result.weights[quantizer.name] = quantizer
            with result.module.graph.inserting_before(node):
                target = _register(result, quantizer.name, quantizer)
                placed[weight] = result.module.graph.call_module(target, (weight,))
            placed[weight].meta.update(weight.meta)
        node.replace_input_with(weight, placed[weight])


def _insert_biases(result: QuantizedGraph, graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> None:
    for original, name in operator_names(graph).items():
        bias = original.args[2] if len(original.args) > 2 else None
        # A bias that several operators read is left alone: a correction for one would be wrong for the other.
        if not isinstance(bias, fx.Node) or bias.op != "get_attr" or len(bias.users) > 1:
            continue
        constant = str(bias.target)
        corrected = CorrectedBias(f"{name}.bias", constant, result.module.get_buffer(constant))
        result.biases[corrected.name] = corrected
        with result.module.graph.inserting_before(copies[original]):
            placed = result.module.graph.call_module(
                _register(result, corrected.name, corrected), (copies[bias],)
            )
        placed.meta.update(bias.meta)
        copies[original].replace_input_with(copies[bias], placed)
