"""Insertion of quantizers into a captured graph.

One tensor has one quantizer, shared by all quantizable operators that read it; every other reader sees the float tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ospq_export.errors import InputError
from ospq_export.formats.base import Format
from ospq_export.formats.choice import Choice
from ospq_export.graph.capture import operator_names
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


def _comes_from_matmul(tensor: fx.Node) -> bool:
    """Whether a tensor is a product moved about: an offset's Sub behind attention would keep TensorRT from fusing it."""
    while tensor.target in _MOVES:
        tensor = tensor.all_input_nodes[0]
    return tensor.target is aten.matmul.default


def _is_unpadded(node: fx.Node) -> bool:
    return node.target is aten.linear.default or (node.target is aten.conv2d.default and not is_padded(node))


@dataclass
class _Site:
    """A tensor to be quantized and who reads it quantized."""

    name: str
    format: Format
    may_shift: bool
    readers: list[fx.Node]


def _activation_sites(graph: fx.Graph, names: dict[fx.Node, str], formats: Choice) -> dict[fx.Node, _Site]:
    cuts, ends = set(cut_points(graph)), _ends(names)
    sites: dict[fx.Node, _Site] = {}
    for node, name in names.items():
        is_matmul = node.target is aten.matmul.default
        wanted = formats.end_activation if node in ends else formats.activation
        for label, operand in zip(("lhs", "rhs") if is_matmul else ("input",), node.args, strict=False):
            assert isinstance(operand, fx.Node)
            tensor, reader = _hoist(operand, cuts) if is_matmul else (operand, None)
            site = sites.setdefault(
                tensor, _Site(f"{name}.{label}", wanted, not _comes_from_matmul(tensor), [])
            )
            site.format = max(site.format, wanted, key=lambda f: f.bits)
            site.may_shift = site.may_shift and _is_unpadded(node)
            site.readers.append(reader or node)
    return sites


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
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(module.graph, copies)
    assert isinstance(output, fx.Node)
    graph.output(output)
    if any(old.name != new.name for old, new in copies.items()):
        raise AssertionError("node names changed in the copy")
    result = QuantizedGraph(fx.GraphModule(module, graph, class_name="QuantizedNetwork"))
    # Names and sites are computed on the untouched graph: cut points and names must not see the quantizers.
    names = operator_names(module.graph)
    for tensor, site in _activation_sites(module.graph, names, formats).items():
        quantizer = ActivationQuantizer(site.name, site.format, site.may_shift)
        result.activations[site.name] = quantizer
        _insert(result.module, quantizer, copies[tensor], [copies[r] for r in site.readers])
    _insert_weights(result, names, copies, formats)
    _insert_biases(result, names, copies)
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
    result: QuantizedGraph, names: dict[fx.Node, str], copies: dict[fx.Node, fx.Node], formats: Choice
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
        constant = str(weight.target)
        wanted = formats.end_weight if nodes[0] in _ends(names) else formats.weight
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
