"""Lowering: a network with fake-quantizers becomes one with deployable operators, stored codes and folded offsets.

The result computes what the fake-quantized network computes, up to the order of float sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from ospq_export.export.lower import lowering_of
from ospq_export.export.lower.patches import as_linear, cuts_patches
from ospq_export.graph.outputs import output_names, output_nodes, return_outputs
from ospq_export.graph.quantizers import ActivationQuantizer, CorrectedBias, QuantizedGraph, WeightQuantizer
from ospq_export.graph.sizes import follows
from ospq_export.graph.slicing import Slice
from ospq_export.onnx.write import OPSET

aten = torch.ops.aten


def lower(network: QuantizedGraph, probes: Mapping[str, str] | None = None) -> fx.GraphModule:
    """Replace fake-quantizers by deployable operators.

    What an activation and a weight become is up to the module of its format. A linear becomes a matmul with the (in, out)
    weight, then its bias; the product with an activation's offset is part of the bias.

    Args:
        network: calibrated.
        probes: what to return beside the outputs, by the name of the network's node; see `probe_names`.

    Returns:
        From images (B, C, H, W) float32 to the outputs and then the probes in order, float32 both; a single one as it is.
        `outputs.output_names` tells their names; buffers are named after the network's constants.
    """
    return _Lowering(network, probes or {}).run()


def probe_names(network: QuantizedGraph, slices: Sequence[Slice]) -> dict[str, str]:
    """Names for the tensors that tell where two executions part: node name -> "<quantizer>.codes" or "<slice>.output".

    The codes are what QuantizeLinear gives; a slice's output is what the next slice starts from. The last slice's output
    is the network's, which needs no other name.
    """
    calls = network.module.graph.find_nodes(op="call_module")
    called = ((node.name, network.module.get_submodule(str(node.target))) for node in calls)
    names = {
        name: f"{module.name}.codes" for name, module in called if isinstance(module, ActivationQuantizer)
    }
    returned = {node.name for node in output_nodes(network.module.graph)}
    ends = {piece.end: f"{piece.name}.output" for piece in slices[:-1]}
    return names | {end: name for end, name in ends.items() if end not in returned}


def highest_opset(network: QuantizedGraph) -> int:
    """The ONNX opset in which a network is written unless another is asked for: what its formats need, if that is more."""
    activations = [a.format.opset for a in network.activations.values()]
    return max([OPSET, *activations, *(w.format.opset for w in network.weights.values())])


class _Lowering:
    def __init__(self, network: QuantizedGraph, probes: Mapping[str, str]) -> None:
        self.network, self.probes = network, probes
        self.modules = dict(network.module.named_modules())
        self.graph = fx.Graph()
        self.constants: dict[str, Tensor] = {}
        self.copies: dict[fx.Node, fx.Node] = {}
        self.codes: dict[fx.Node, fx.Node] = {}
        self.stack: dict[str, tuple[str, str]] = {}  # torch.export's form: the exporter names nodes by it

    def run(self) -> fx.GraphModule:
        for node in self.network.module.graph.nodes:
            self.stack = node.meta.get("nn_module_stack", {})
            if node.op == "output":
                self._return(node.graph)
            elif node.op == "call_module":
                self._quantizer(node, self.modules[str(node.target)])
            elif node.op == "get_attr":
                self._constant(node)
            elif (weight := self._weight_quantizer(node)) is not None:
                self._weighted(node, weight)
            else:
                self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        module = fx.GraphModule(self.constants, self.graph, class_name="LoweredNetwork")
        module.graph.eliminate_dead_code()
        module.recompile()
        return module.eval()

    def _return(self, graph: fx.Graph) -> None:
        by_name = {node.name: self.codes.get(node, copy) for node, copy in self.copies.items()}
        outputs = [self._apart(n) for n in output_nodes(graph)]
        outputs += [by_name[name] for name in self.probes]
        return_outputs(self.graph, outputs, [*output_names(graph), *self.probes.values()])

    def _apart(self, node: fx.Node) -> fx.Node:
        """An output, in a tensor of its own where the network reads it on.

        ONNX Runtime moves a quantizer up through a transposition to a tensor that is returned, and returns it quantized.
        """
        copy, sizes = self.copies[node], node.meta["val"].shape
        if not any(user.op != "output" for user in node.users):
            return copy
        free = follows(node)
        shape = [
            self.call(aten.sym_size.int, copy, i) if i in free else int(n) for i, n in enumerate(sizes[1:], 1)
        ]
        return self.call(aten.reshape.default, copy, [-1, *shape])

    def call(self, target: object, *args: object) -> fx.Node:
        """An operator."""
        node = self.graph.call_function(target, args)  # type: ignore[arg-type]
        node.meta["nn_module_stack"] = self.stack
        return node

    def attribute(self, name: str, value: Tensor) -> fx.Node:
        """A constant."""
        self.constants[name] = value.detach().clone().contiguous()
        return self.graph.get_attr(name)

    def _constant(self, node: fx.Node) -> None:
        # Weights that a quantizer reads travel as codes only.
        if any(not isinstance(self.modules.get(str(user.target)), WeightQuantizer) for user in node.users):
            self.copies[node] = self.attribute(
                str(node.target), self.network.module.get_buffer(str(node.target))
            )

    def _quantizer(self, node: fx.Node, quantizer: object) -> None:
        if isinstance(quantizer, WeightQuantizer | CorrectedBias):
            return
        assert isinstance(quantizer, ActivationQuantizer)
        x = self.copies[node.all_input_nodes[0]]
        codes, values = lowering_of(quantizer.format).activation(self, x, quantizer)
        self.codes[node], self.copies[node] = codes, values

    def _weight_quantizer(self, node: fx.Node) -> WeightQuantizer | None:
        if node.op != "call_function" or node.target not in (aten.linear.default, aten.conv2d.default):
            return None
        source = node.args[1]
        module = self.modules.get(str(source.target)) if isinstance(source, fx.Node) else None
        return module if isinstance(module, WeightQuantizer) else None

    def _weighted(self, node: fx.Node, weight: WeightQuantizer) -> None:
        source = node.all_input_nodes[0]
        bias = self._bias(node, weight, self.modules.get(str(source.target)))
        x = self.copies[source]
        lowering = lowering_of(weight.format)
        if node.target is aten.conv2d.default:
            rest = [fx.node.map_arg(a, self.copies.__getitem__) for a in node.args[3:]]
            dequantized = lowering.weight(self, weight, transposed=False)
            bias_node = None if bias is None else self.attribute(f"{weight.name}.bias_folded", bias)
            if not lowering.convolves(weight.codes.shape) and cuts_patches(node):
                self.copies[node] = as_linear(self, node, x, dequantized, bias_node)
            else:
                self.copies[node] = self.call(aten.conv2d.default, x, dequantized, bias_node, *rest)
            return
        out = self.call(aten.matmul.default, x, lowering.weight(self, weight, transposed=True))
        if bias is not None:
            out = self.call(aten.add.Tensor, out, self.attribute(f"{weight.name}.bias_folded", bias))
        self.copies[node] = out

    def _bias(self, node: fx.Node, weight: WeightQuantizer, source: object) -> Tensor | None:
        """The operator's bias plus k * (W^ summed over its inputs) where its input has lost an offset of k."""
        bias = None
        if len(node.args) > 2 and isinstance(node.args[2], fx.Node):
            own = self.modules.get(str(node.args[2].target))
            constant = str(node.args[2].target)
            bias = own.value if isinstance(own, CorrectedBias) else self.network.module.get_buffer(constant)
        if isinstance(source, ActivationQuantizer) and source.format.has_offset:
            shift = lowering_of(weight.format).sums(weight) * source.offset.double()
            return (shift if bias is None else shift + bias.double()).float()
        return bias
