"""Kinds of files that public bug reports were about: lint held to what the real builder makes of each."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

import lint_difference as difference
from ospq_export.cli.app import app
from ospq_export.onnx.lint import Severity, lint, predict

F = np.float32
FP8 = ml_dtypes.float8_e4m3fn
SCALE, ZERO = F(0.05), np.int8(0)


class Net:
    """A graph on x of (4, 8), or on an image of (1, 4, 8, 8), that grows node by node."""

    def __init__(self, shape=(4, 8), opset=17):
        self.rng = np.random.default_rng(3)
        self.opset, self.nodes, self.constants, self.functions, self.domains = opset, [], [], [], []
        self.inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]

    def c(self, value):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def n(self, op, *inputs, name="", **attributes):
        output = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name or f"n{len(self.nodes)}", **attributes))
        return output

    def pair(self, source, scale=SCALE, zero=ZERO, **attributes):
        inputs = [self.c(scale), self.c(zero)]
        return self.n(
            "DequantizeLinear", self.n("QuantizeLinear", source, *inputs, **attributes), *inputs, **attributes
        )

    def weight(self, shape=(8, 6), axis=1, kind=np.int8):
        codes = self.rng.integers(-100, 100, shape).astype(kind)
        scale = self.rng.uniform(0.01, 0.02, shape[axis]).astype(F)
        return self.n(
            "DequantizeLinear", self.c(codes), self.c(scale), self.c(np.zeros(shape[axis], kind)), axis=axis
        )

    def save(self, path, output=None, shape=None):
        out = helper.make_tensor_value_info(output or f"t{len(self.nodes) - 1}", TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, "g", self.inputs, [out], self.constants)
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in self.domains)]
        ir = 10 if self.opset > 20 else 9
        model = helper.make_model(graph, opset_imports=opsets, functions=self.functions, ir_version=ir)
        onnx.save(model, str(path))
        return path


def matmul(change):
    def make(net):
        net.n("MatMul", change(net), net.weight(), name="product")

    return make


def moved(op, *constants, **attributes):
    """An operator behind DQ, and the same one between Q and DQ."""

    def behind(net):
        source = net.pair("x")
        extra = [net.c(c) for c in constants]
        net.n("MatMul", net.n(op, source, *extra, **attributes), net.weight(), name="product")

    return behind


def on_codes(op, *constants, **attributes):
    def between(net):
        inputs = [net.c(F(0.05)), net.c(np.int8(0))]
        codes = net.n("QuantizeLinear", "x", *inputs)
        codes = net.n(op, codes, *(net.c(c) for c in constants), **attributes)
        net.n("MatMul", net.n("DequantizeLinear", codes, *inputs), net.weight(), name="product")

    return between


def convolution(scale, zero):
    def make(net):
        net.n("Conv", net.pair("x", scale, zero), net.weight((6, 4, 3, 3), 0), name="product")

    return make


def own_fp8(net):
    net.domains.append("trt")

    def pair(source):
        scale = net.c(F(0.05))
        codes = net.n("TRT_FP8QuantizeLinear", source, scale, domain="trt")
        return net.n("TRT_FP8DequantizeLinear", codes, scale, domain="trt")

    net.n("MatMul", pair("x"), pair(net.c(np.ones((8, 6), F))), name="product")


def fp8(net):
    weight = net.weight(kind=FP8)
    net.n("MatMul", net.pair("x", zero=FP8(0)), weight, name="product")


def mixed(net):
    net.n("MatMul", net.pair("x", zero=FP8(0)), net.weight(), name="product")


def unknown(op, domain):
    def make(net):
        net.domains.extend([domain] if domain else [])
        net.n(op, net.n("MatMul", net.pair("x"), net.weight(), name="product"), domain=domain)

    return make


def function(calls, zero=ZERO):
    """A local function with a quantized product in it, called so many times in a row."""

    def make(net):
        body = [
            helper.make_node("QuantizeLinear", ["a", "s", "z"], ["q"], "q"),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "d"),
            helper.make_node("MatMul", ["d", "w"], ["b"], "product"),
        ]
        imports = [helper.make_opsetid("", 17)]
        net.functions.append(
            helper.make_function("local", "Linear", ["a", "s", "z", "w"], ["b"], body, imports)
        )
        net.domains.append("local")
        source, inputs = "x", [net.c(F(0.05)), net.c(zero), net.weight((8, 8))]
        for _ in range(calls):
            source = net.n("Linear", source, *inputs, domain="local")

    return make


def codes_constant(net):
    codes = net.n("Transpose", net.c(np.ones((6, 8), np.int8)))
    net.n(
        "MatMul",
        net.pair("x"),
        net.n("DequantizeLinear", codes, net.c(F(0.1)), net.c(np.int8(0))),
        name="product",
    )


def scalar(net):
    value = net.n("DequantizeLinear", net.c(np.int8(5)), net.c(F(0.1)), net.c(np.int8(0)))
    net.n("Mul", net.n("MatMul", net.pair("x"), net.weight(), name="product"), value)


def product(op, shape, axis, **attributes):
    def make(net):
        net.n(op, net.pair("x"), net.weight(shape, axis), name="product", **attributes)

    return make


def first(net):
    net.n("MatMul", net.weight((6, 4), 0), net.pair("x"), name="product")


def zero_of(values):
    return matmul(lambda net: net.pair("x", zero=values))


IMAGE = (1, 4, 8, 8)


def branch(outside, inside, shape):
    """What `inside` adds lies in one branch of an If, and reads what `outside` gave."""

    def make(net):
        given = outside(net)
        start = len(net.nodes)
        inside(net, given)
        body, net.nodes = net.nodes[start:], net.nodes[:start]
        value = helper.make_tensor_value_info(body[-1].output[0], TensorProto.FLOAT, shape)
        then = helper.make_graph(body, "then", [], [value])
        zero = numpy_helper.from_array(np.zeros(shape, F), "zero")
        other = [helper.make_node("Relu", ["zero"], ["otherwise"], "n_otherwise")]
        value = helper.make_tensor_value_info("otherwise", TensorProto.FLOAT, shape)
        otherwise = helper.make_graph(other, "else", [], [value], [zero])
        net.inputs.append(helper.make_tensor_value_info("condition", TensorProto.BOOL, []))
        net.n("If", "condition", name="n_if", then_branch=then, else_branch=otherwise)

    return make


def product_inside(*between):
    def add(net, source):
        for op in between:
            source = net.n(op, source)
        net.n("MatMul", source, net.weight(), name="product")

    return add


def reshaped(net):
    return net.n("Reshape", "x", net.c(np.array([4, 8])))


def scaled_by_input(per_channel):
    def make(net):
        codes = net.c(net.rng.integers(-100, 100, (8, 6)).astype(np.int8))
        weight = net.weight() if per_channel else net.n("DequantizeLinear", codes, net.c(SCALE), net.c(ZERO))
        source = net.n("MatMul", net.pair("x"), weight, name="product")
        scale = net.n("ReduceMax", "x", keepdims=0)
        codes = net.n("QuantizeLinear", source, scale, net.c(ZERO))
        net.n("DequantizeLinear", codes, scale, net.c(ZERO))

    return make


def joined_by_computed(net):
    scale = net.n("ReduceMax", "x", keepdims=0)
    codes = net.n("QuantizeLinear", "x", scale, net.c(ZERO))
    source = net.n("DequantizeLinear", codes, scale, net.c(ZERO))
    net.n("MatMul", net.n("Concat", source, source, axis=0), net.weight(), name="product")


def padded_codes(*value):
    def make(net):
        inputs = [net.c(SCALE), net.c(ZERO)]
        codes = net.n("QuantizeLinear", "x", *inputs)
        padded = net.n("Pad", codes, net.c(np.array([0, 0, 1, 0])), *map(net.c, value))
        net.n("MatMul", net.n("DequantizeLinear", padded, *inputs), net.weight(), name="product")

    return make


def scaled_columns(net):
    scaled = net.n("Mul", net.pair("x"), net.c(np.linspace(0.5, 2, 8, dtype=F)))
    net.n("MatMul", net.weight((6, 4), 0), scaled, name="product")


KINDS = {
    "plain": (matmul(lambda net: net.pair("x")), (4, 8), 17, "int8"),
    "weight_first": (first, (4, 8), 17, "int8"),
    "zero_point_128": (zero_of(np.uint8(128)), (4, 8), 17, "refused"),
    "two_zero_points": (zero_of(np.zeros(2, np.int8)), (4, 8), 17, "refused"),
    "int16": (zero_of(np.int16(0)), (4, 8), 21, "refused"),
    "scale_of_rank_2": (
        matmul(lambda n: n.pair("x", F([[0.1]]), np.zeros((1, 1), np.int8))),
        (4, 8),
        21,
        "refused",
    ),
    "scale_per_row": (
        matmul(lambda n: n.pair("x", np.full(4, 0.1, F), np.zeros(4, np.int8), axis=0)),
        (4, 8),
        17,
        "int8",
    ),
    "scale_per_column": (
        matmul(lambda n: n.pair("x", np.full(8, 0.1, F), np.zeros(8, np.int8), axis=1)),
        (4, 8),
        17,
        "float",
    ),
    "float_activation": (matmul(lambda net: "x"), (4, 8), 17, "float"),
    "relu_between": (moved("Relu"), (4, 8), 17, "float"),
    "relu_on_codes": (on_codes("Relu"), (4, 8), 17, "int8"),
    "clip_on_codes": (on_codes("Clip", np.int8(-8), np.int8(7)), (4, 8), 17, "int8"),
    "softmax_on_codes": (on_codes("Softmax"), (4, 8), 17, "refused"),
    "gather_between": (moved("Gather", np.array([1, 0]), axis=0), (4, 8), 17, "int8"),
    "concat_constant": (codes_constant, (4, 8), 17, "refused"),
    "scalar_constant": (scalar, (4, 8), 17, "refused"),
    "conv_scale_of_shape_1": (convolution(F([0.05]), np.zeros(1, np.int8)), IMAGE, 17, "float"),
    "conv": (convolution(F(0.05), np.int8(0)), IMAGE, 17, "int8"),
    "conv_transpose": (product("ConvTranspose", (4, 6, 3, 3), 1), IMAGE, 17, "float"),
    "einsum": (product("Einsum", (8, 6), 1, equation="ij,jk->ik"), (4, 8), 17, "int8"),
    "einsum_wrong_axis": (product("Einsum", (8, 6), 0, equation="ij,jk->ik"), (4, 8), 17, "float"),
    "gemm_turned": (product("Gemm", (6, 8), 0, transB=1), (4, 8), 17, "int8"),
    "own_fp8": (own_fp8, (4, 8), 17, "fp8"),
    "fp8": (fp8, (4, 8), 19, "fp8"),
    "fp8_by_int8": (mixed, (4, 8), 19, "refused"),
    "unknown_domain": (unknown("FusedMatMul", "com.microsoft"), (4, 8), 17, "refused"),
    "no_importer": (unknown("Det", ""), (4, 4), 17, "refused"),
    "scale_computed_behind_product": (scaled_by_input(False), (4, 8), 17, "refused"),
    "scale_computed_behind_channels": (scaled_by_input(True), (4, 8), 17, "int8"),
    "concat_of_computed_scales": (joined_by_computed, (4, 8), 17, "refused"),
    "pad_of_codes": (padded_codes(), (4, 8), 17, "int8"),
    "pad_of_codes_with_a_value": (padded_codes(np.int8(0)), (4, 8), 17, "refused"),
    "scaled_columns": (scaled_columns, (4, 8), 17, "float"),
    "branch": (
        branch(lambda net: "x", lambda net, x: matmul(lambda n: n.pair(x))(net), (4, 6)),
        (4, 8),
        17,
        "int8",
    ),
    "branch_dequantized_outside": (
        branch(lambda net: net.pair("x"), product_inside(), (4, 6)),
        (4, 8),
        17,
        "float",
    ),
    "branch_with_a_layer": (
        branch(lambda net: net.pair("x"), product_inside("Neg"), (4, 6)),
        (4, 8),
        17,
        "int8",
    ),
    "branch_reads_a_reshape": (branch(reshaped, product_inside("Relu"), (4, 6)), (2, 16), 17, "refused"),
    "branch_multiplies_a_reshape": (branch(reshaped, product_inside(), (4, 6)), (2, 16), 17, "float"),
    "function_once": (function(1), (4, 8), 17, "int8"),
    "function_twice": (function(2), (4, 8), 17, "refused"),
    "function_uint8": (function(1, np.uint8(128)), (4, 8), 17, "refused"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kind(tmp_path, kind):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    make, shape, opset, expected = KINDS[kind]
    net = Net(shape, opset)
    if kind == "no_importer":
        net.n("Det", "x")
    else:
        make(net)
    path = net.save(tmp_path / "m.onnx")
    outcome, prediction = difference.observe(path), predict(path)
    if expected == "refused":
        assert outcome.refused and prediction.refused
    else:
        assert not outcome.refused and set(outcome.products.values()) == {expected}
        assert prediction.products == outcome.products
    floats = [finding for finding in lint(path) if finding.rule == "product-in-float"]
    assert expected == "refused" or bool(floats) == (expected == "float")


def test_comparison_notices_each_disagreement():
    class Says:
        def __init__(self, refused, **products):
            self.refused, self.products = refused, products

    outcome = difference.Outcome
    assert difference.difference(Says(False, p="int8"), outcome("", {"p": "int8"})) == ""
    assert difference.difference(Says(True), outcome("no", {})) == ""
    assert difference.difference(Says(True), outcome("", {"p": "int8"})) == "false error"
    assert difference.difference(Says(False), outcome("no", {})) == "missed refusal"
    assert difference.difference(Says(False, p="float"), outcome("", {"p": "int8"})) == "false float"
    assert difference.difference(Says(False, p="int8"), outcome("", {"p": "float"})).startswith("false int8")


@pytest.mark.slow
def test_drawn_graphs():
    """200 graphs by seed; the long run of the same is in benchmarks/rows/lint.jsonl."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    cases = list(difference.run(range(7_000, 7_200)))
    assert sum(case.predicted.startswith("invalid") for case in cases) < 10
    differences = [case for case in cases if case.difference]
    hard = [case for case in differences if case.difference in ("false error", "missed refusal")]
    assert not hard
    # docs/lint.md names what is left: the precision of about 1 in 400 is predicted wrong.
    assert len(differences) <= 4, differences


def test_several_files(tmp_path):
    sound, broken = Net(), Net()
    matmul(lambda net: net.pair("x"))(sound)
    matmul(lambda net: net.pair("x", zero=np.int8(1)))(broken)
    paths = [str(sound.save(tmp_path / "a.onnx")), str(broken.save(tmp_path / "b.onnx"))]
    (tmp_path / "c.onnx").write_text("not a model")
    runner = CliRunner()
    assert runner.invoke(app, ["lint", paths[0]]).exit_code == 0
    result = runner.invoke(app, ["lint", *paths])
    assert result.exit_code == 1
    assert (
        "a.onnx: 0 errors, 0 warnings" in result.stdout.replace("\n", "")
        and "zero-point-nonzero" in result.stdout
    )
    result = runner.invoke(app, ["lint", str(tmp_path / "c.onnx"), *paths])
    assert result.exit_code == 2 and "b.onnx: 2 errors" in result.stdout.replace("\n", "")


def test_uint8_is_an_error_that_builds(tmp_path):
    net = Net()
    matmul(lambda n: n.pair("x", zero=np.uint8(0)))(net)
    findings = lint(net.save(tmp_path / "m.onnx"))
    assert findings and all(f.severity is Severity.ERROR and not f.refused for f in findings)
