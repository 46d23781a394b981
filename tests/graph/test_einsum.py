"""Einsum in a captured graph: one product per pair of operands, equal to torch.einsum on equations and shapes drawn at random."""

import string

import hypothesis.strategies as st
import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import fx, nn

from ospq_export.calibrate.observe import observe
from ospq_export.export.lower.graph import lower
from ospq_export.formats.choice import integers
from ospq_export.graph.capture import capture, operator_names, quantizable_nodes
from ospq_export.graph.einsum import expand_einsums, parse_equation
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode
from ospq_export.onnx.write import write_onnx

aten = torch.ops.aten


def graph_of(equation, shapes, constants=()):
    """A graph with one einsum over operands of these shapes, of which some are constants."""
    graph, buffers, operands = fx.Graph(), {}, []
    for i, shape in enumerate(shapes):
        value = torch.randn(shape, dtype=torch.float64)
        if i in constants:
            buffers[f"c{i}"] = value
        operands.append(graph.get_attr(f"c{i}") if i in constants else graph.placeholder(f"x{i}"))
        operands[-1].meta.update(val=value)
    node = graph.call_function(aten.einsum.default, (equation, operands))
    node.meta.update(val=torch.einsum(equation, [n.meta["val"] for n in operands]))
    for each in graph.nodes:
        each.meta.update(module_stack=(), module_path="")
    graph.output(node)
    return fx.GraphModule(buffers, graph)


def check(equation, shapes, constants=()):
    """Expand, compare with torch.einsum; returns the operators."""
    module = graph_of(equation, shapes, constants)
    given = [torch.randn(s, dtype=torch.float64) for i, s in enumerate(shapes) if i not in constants]
    expected = module(*given)
    expand_einsums(module)
    module.recompile()
    torch.testing.assert_close(module(*given), expected, rtol=1e-10, atol=1e-10)
    return [n.target for n in module.graph.nodes if n.op == "call_function"]


@st.composite
def equations(draw, most_operands=2, repeats=False):
    """An equation and shapes that torch.einsum takes: any mix of kinds of indices, broadcasts, an ellipsis."""
    letters = draw(st.lists(st.sampled_from(string.ascii_letters), min_size=1, max_size=6, unique=True))
    size = {c: draw(st.integers(1, 3)) for c in letters}
    count = draw(st.integers(1, most_operands))
    hidden = draw(st.lists(st.integers(1, 3), max_size=2))
    parts, shapes = [], []
    for _ in range(count):
        own = draw(st.permutations(letters))[: draw(st.integers(0, len(letters)))]
        if repeats and own:
            own = [*own, draw(st.sampled_from(own))]
        # A repeated index must have one size; others may be 1 and broadcast.
        thin = {c for c in own if own.count(c) == 1 and draw(st.integers(0, 4)) == 0}
        sizes = [1 if c in thin else size[c] for c in own]
        text = "".join(own)
        if hidden and draw(st.booleans()):
            at = draw(st.integers(0, len(own)))
            seen = hidden[draw(st.integers(0, len(hidden))) :]
            seen = [1 if draw(st.integers(0, 3)) == 0 else s for s in seen]
            text, sizes = f"{text[:at]}...{text[at:]}", [*sizes[:at], *seen, *sizes[at:]]
        parts.append(text)
        shapes.append(tuple(sizes))
    if draw(st.booleans()):
        return ",".join(parts), shapes
    used = sorted({c for part in parts for c in part if c != "."})
    out = "".join(draw(st.permutations(used))[: draw(st.integers(0, len(used)))])
    if any("..." in part for part in parts) and draw(st.booleans()):
        at = draw(st.integers(0, len(out)))
        out = f"{out[:at]}...{out[at:]}"
    return f"{','.join(parts)}->{out}", shapes


@settings(deadline=None, max_examples=300)
@given(equations())
def test_two_operands_are_one_product_at_most(drawn):
    equation, shapes = drawn
    targets = check(equation, shapes)
    assert aten.einsum.default not in targets
    assert targets.count(aten.matmul.default) + targets.count(aten.mul.Tensor) == len(shapes) - 1


@settings(deadline=None, max_examples=100)
@given(equations(repeats=True))
def test_diagonals(drawn):
    check(*drawn)


@settings(deadline=None, max_examples=100)
@given(equations(most_operands=4), st.randoms())
def test_more_operands_go_pair_by_pair(drawn, random):
    equation, shapes = drawn
    constants = [i for i in range(1, len(shapes)) if random.random() < 0.5]
    targets = check(equation, shapes, constants)
    assert targets.count(aten.matmul.default) + targets.count(aten.mul.Tensor) == len(shapes) - 1


def test_a_path_of_opt_einsum_is_followed():
    module = graph_of("ij,jk,kl->il", [(2, 3), (3, 4), (4, 5)])
    node = next(n for n in module.graph.nodes if n.target is aten.einsum.default)
    node.kwargs = {"path": [1, 2, 0, 1]}
    given = [torch.randn(s, dtype=torch.float64) for s in [(2, 3), (3, 4), (4, 5)]]
    expected = module(*given)
    expand_einsums(module)
    module.recompile()
    torch.testing.assert_close(module(*given), expected)
    first = next(n for n in module.graph.nodes if n.target is aten.matmul.default)
    assert [n.name for n in first.all_input_nodes] == ["x1", "x2"], "the path multiplies the last two first"


@pytest.mark.parametrize(
    ("equation", "ranks"), [("ij,jk->ik", (2,)), ("ij->i", (3,)), ("i...j,j->i", (1, 1))]
)
def test_an_equation_that_does_not_fit_is_refused(equation, ranks):
    with pytest.raises(ValueError, match=r"operand|equation"):
        parse_equation(equation, ranks)


class Mixed(nn.Module):
    """An einsum between two linear layers; its second operand is a constant or image-dependent too."""

    def __init__(self, equation, left, right, constant):
        super().__init__()
        self.equation, self.left, self.right = equation, left, right
        self.fc = nn.Linear(12, 12)
        self.table = nn.Parameter(torch.randn(right)) if constant else None

    def forward(self, x):
        x = self.fc(x)
        other = x.reshape(x.shape[0], *self.right) if self.table is None else self.table
        return torch.einsum(self.equation, x.reshape(x.shape[0], *self.left), other).flatten(1)


LAYERS = [
    # equation, left without its batch, right, whether the right is a constant, product
    ("bhwc,nc->bhwn", (2, 2, 3), (5, 3), True, "linear"),
    ("bnd,hkd->bnhk", (4, 3), (2, 5, 3), True, "linear"),
    ("bhnd,dhv->bvn", (2, 2, 3), (3, 2, 4), True, "linear"),
    ("...ij,jk->...ik", (2, 2, 3), (3, 4), True, "linear"),
    ("byhwc,hkc->byhwk", (1, 2, 2, 3), (2, 5, 3), True, "matmul"),
    ("byhwc,wkc->byhwk", (1, 2, 2, 3), (2, 5, 3), True, "matmul"),
    ("bhnd,bmd->bhnm", (2, 2, 3), (4, 3), False, "matmul"),
    ("...ij,...jk", (3, 4), (4, 3), False, "matmul"),
    ("bij,jk", (3, 4), (4, 3), True, "linear"),
    ("bij,akj->baik", (3, 4), (3, 4), False, "matmul"),
    ("bcij,bcji->bc", (3, 2, 2), (3, 2, 2), False, "matmul"),
    ("bchw,bcxy->bhx", (3, 2, 2), (3, 2, 2), False, "matmul"),
]


@pytest.mark.parametrize(("equation", "left", "right", "constant", "kind"), LAYERS)
def test_in_a_network_with_a_dynamic_batch(equation, left, right, constant, kind):
    torch.manual_seed(0)
    net = Mixed(equation, left, right, constant).eval()
    graph = capture(net, (12,))
    assert [str(n.target).split(".")[1] for n in quantizable_nodes(graph.graph)] == ["linear", kind]
    for batch in (1, 2, 5):
        x = torch.randn(batch, 12)
        torch.testing.assert_close(graph(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("equation", "left", "right", "constant", "kind"), LAYERS[:5])
def test_a_constant_operand_is_quantized(equation, left, right, constant, kind):
    torch.manual_seed(0)
    graph = capture(Mixed(equation, left, right, constant).eval(), (12,))
    network = insert_quantizers(graph, integers(4, 8, 4))
    name = list(operator_names(graph.graph).values())[-1]
    assert (f"{name}.weight" in network.weights) == (kind == "linear")
    assert (f"{name}.rhs" in network.activations) == (kind == "matmul")
    if kind == "linear":
        channels = graph.get_buffer(network.weights[f"{name}.weight"].constant).shape[0]
        assert network.weights[f"{name}.weight"].scale.numel() == channels


class LeftMatrix(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return (self.mix @ x.reshape(x.shape[0], 4, 3)).flatten(1)


@pytest.mark.parametrize("shape", [(5, 4), (1, 5, 4)])
def test_a_matrix_on_the_left_is_a_weight_too(shape):
    torch.manual_seed(0)
    net = LeftMatrix(shape).eval()
    graph = capture(net, (12,))
    assert [n.target for n in quantizable_nodes(graph.graph)] == [aten.linear.default]
    x = torch.randn(3, 12)
    torch.testing.assert_close(graph(x), net(x), rtol=1e-5, atol=1e-5)


def small_mvit():
    torch.manual_seed(0)
    config = MultiScaleVitCfg(depths=(1,), embed_dim=(16,), num_heads=(2,), stride_q=((1, 1),))
    model = MultiScaleVit(config, img_size=(32, 32), num_classes=5).eval()
    for name, table in model.named_parameters():
        # The position tables start near zero; here they are to matter.
        if "rel_pos" in name:
            table.data.normal_()
    return model


@pytest.mark.slow
def test_mvit_is_quantized_exported_and_computed_by_onnx_runtime(tmp_path):
    model = small_mvit()
    graph = capture(model, (3, 32, 32))
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(graph(images[:3]), model(images[:3]), rtol=1e-4, atol=1e-5)
    options = onnxruntime.SessionOptions()
    # As the file says it: the fused integer kernels of processors without VNNI saturate.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for bits in (8, 4):
        network = insert_quantizers(graph, integers(bits, bits))
        observe(network, images, batch_size=8, seed=0)
        network.set_mode(Mode.QUANTIZE)
        nodes = [n for n in network.module.graph.nodes if n.op == "call_module" and n.name.endswith("rhs")]
        assert sum(n.args[0].op == "get_attr" for n in nodes) == 2, "the tables of height and width"
        file = tmp_path / f"w{bits}.onnx"
        write_onnx(lower(network), file, input_size=(3, 32, 32), batch_size=None, metadata={})
        runtime = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        assert runtime.get_inputs()[0].shape[0] == "batch"
        for batch in (1, 5):
            with torch.no_grad():
                expected = network.module(images[:batch]).numpy()
                error = np.square(graph(images[:batch]).numpy() - expected).mean()
            got = runtime.run(None, {"images": images[:batch].numpy()})[0]
            assert np.square(got - expected).mean() < 0.1 * error
