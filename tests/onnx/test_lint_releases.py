"""Lint for releases of TensorRT: failures that were reported, each as a small file, and our own files."""

import json
import typing
from importlib import resources

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from ospq_export.cli.app import app
from ospq_export.cli.lint import LintVersion
from ospq_export.errors import InputError
from ospq_export.onnx.lint import Severity, choices, lint
from ospq_export.onnx.names import DYNAMIC_QUANTIZE

F, H, FP8 = np.float32, np.float16, ml_dtypes.float8_e4m3fn
ZERO, TENTH = np.int8(0), F(0.1)
KNOWN = json.loads(resources.files("ospq_export.onnx.lint").joinpath("versions.json").read_text())
RELEASES = tuple(KNOWN["versions"])


class Net:
    """A graph that grows node by node; x is its input."""

    def __init__(self, shape=(4, 64), opset=19, kind=TensorProto.FLOAT):
        self.nodes, self.constants, self.opset, self.domains = [], [], opset, set()
        self.inputs = [helper.make_tensor_value_info("x", kind, shape)]
        self.rng = np.random.default_rng(0)

    def c(self, value):
        self.constants.append(numpy_helper.from_array(np.asarray(value), f"c{len(self.constants)}"))
        return self.constants[-1].name

    def n(self, op, *inputs, domain="", **attributes):
        self.domains |= {domain} - {""}
        output = f"t{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op, inputs, [output], name=f"{op}_{output}", domain=domain, **attributes)
        )
        return output

    def q(self, x, zero=ZERO, scale=0.05):
        inputs = [self.c(F(scale)), self.c(zero)]
        return self.n("DequantizeLinear", self.n("QuantizeLinear", x, *inputs), *inputs)

    def weight(self, shape, axis=1, zero=ZERO):
        codes = self.rng.integers(-9, 9, shape).astype(np.asarray(zero).dtype)
        scale, zeros = np.full(shape[axis], 0.01, F), np.full(shape[axis], zero)
        return self.n("DequantizeLinear", self.c(codes), self.c(scale), self.c(zeros), axis=axis)

    def attention(self, quantize, length=64, size=64, half=False, softmax=True, between=()):
        """Of x with itself: (1, length, size); `between` lies between K's quantizer and the product."""
        x = self.n("Cast", "x", to=TensorProto.FLOAT16) if half else "x"
        key = self.n("Transpose", x, perm=[0, 2, 1]) if "Transpose" not in between else x
        key = quantize(key)
        for op in between:
            key = (
                self.n("Transpose", key, perm=[0, 2, 1])
                if op == "Transpose"
                else self.n("Mul", key, self.c(F(0.125)))
            )
        weights = self.n("Softmax", self.n("MatMul", quantize(x), key), axis=-1)
        return self.n("MatMul", quantize(weights) if softmax else weights, quantize(x))

    def save(self, path, kind=TensorProto.FLOAT):
        outputs = [helper.make_tensor_value_info(self.nodes[-1].output[0], kind, None)]
        graph = helper.make_graph(self.nodes, "g", self.inputs, outputs, self.constants)
        opsets = [
            helper.make_opsetid("", self.opset),
            *(helper.make_opsetid(d, 1) for d in sorted(self.domains)),
        ]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
        return path


def fp8(net):
    return lambda x: net.q(x, FP8(0))


def plain(x):
    return x


def no_quantizers():
    net = Net()
    net.n("MatMul", "x", net.c(np.ones((64, 8), F)))
    return net


def fp8_with_a_bare_softmax():
    net = Net((1, 64, 64), opset=17)
    net.q(net.attention(fp8(net), softmax=False), FP8(0))
    return net


def float32_attention():
    net = Net((1, 64, 64))
    net.attention(plain)
    return net


def fp8_not_at_the_product():
    net = Net((1, 64, 64))
    net.q(net.attention(fp8(net), between=("Transpose", "Mul")), FP8(0))
    return net


def half_attention():
    net = Net((1, 64, 64))
    net.attention(plain, half=True)
    return net


def long_int8_attention():
    net = Net((1, 1024, 64))
    net.q(net.attention(net.q, 1024))
    return net


def wide_int8_attention():
    net = Net((1, 64, 96))
    net.q(net.attention(net.q, 64, 96))
    return net


def norm_in_parts(half=True):
    net = Net((4, 64), opset=17)
    x = net.n("Cast", "x", to=TensorProto.FLOAT16) if half else "x"
    centred = net.n("Sub", x, net.n("ReduceMean", x, axes=[-1]))
    square = net.n("Pow", centred, net.c((H if half else F)(2)))
    deviation = net.n("Sqrt", net.n("ReduceMean", square, axes=[-1]))
    net.n("Div", centred, deviation)
    return net


def custom_norm():
    net = Net(opset=17)
    net.n("LayerNorm", "x", net.c(np.ones(64, F)), domain="custom")
    return net


def rms_norm():
    net = Net(opset=23)
    net.n("RMSNormalization", "x", net.c(np.ones(64, F)), axis=-1)
    return net


def int32_bias():
    net = Net(opset=17)
    product = net.n("MatMul", net.q("x"), net.weight((64, 8)))
    bias = net.n("DequantizeLinear", net.c(np.ones(8, np.int32)), net.c(F(0.01)), net.c(np.int32(0)))
    net.n("Add", product, bias)
    return net


def dynamic_fp4(scale=TENTH):
    net = Net((1, 4, 64), opset=23)
    tensor = net.c(scale)
    attributes = {"axis": -1, "block_size": 16, "scale_type": TensorProto.FLOAT8E4M3FN}
    net.nodes.append(
        helper.make_node(DYNAMIC_QUANTIZE, ["x", tensor], ["codes", "scales"], domain="trt", **attributes)
    )
    net.domains.add("trt")
    net.n("DequantizeLinear", "codes", net.n("DequantizeLinear", "scales", tensor), axis=-1, block_size=16)
    return net


def depthwise_and_sum():
    net = Net((1, 4, 8, 8), opset=17)
    conv = net.n("Conv", net.q("x"), net.weight((4, 1, 3, 3), 0), group=4, pads=[1, 1, 1, 1])
    net.n("Add", conv, "x")
    return net


def zero_scale():
    net = Net(opset=17)
    net.n("MatMul", net.q("x", scale=0.0), net.weight((64, 8)))
    return net


def transposed_convolution():
    net = Net((1, 4, 8, 8))
    conv = net.n("ConvTranspose", net.q("x"), net.weight((4, 4, 2, 2), 1), strides=[2, 2])
    net.q(net.n("Relu", conv))
    return net


def mean_of_opset_18():
    net = Net(opset=18)
    net.n("ReduceMean", "x", net.c(np.array([1])))
    return net


def part_of_a_shape():
    net = Net(opset=17)
    net.n("Cast", net.n("Shape", "x", start=0, end=1), to=TensorProto.FLOAT)
    return net


def gelu():
    net = Net(opset=20)
    net.n("Gelu", "x")
    return net


# What was reported, of which release, and the finding that says it; then a release for which it is none.
REPORTED = {
    "TensorRT#4590: FP8 and FP4 flags of the builder ignored in silence": (
        no_quantizers,
        "tensorrt-10.13",
        "not-quantized",
        "tensorrt-8.6",
    ),
    "TensorRT#4516: FP8 attention runs in half precision": (
        fp8_with_a_bare_softmax,
        "tensorrt-10.13",
        "attention-softmax-bare",
        None,
    ),
    "TensorRT#4537: DINOv2's attention is not one kernel": (
        float32_attention,
        "tensorrt-10.13",
        "attention-float32",
        "tensorrt-8.6",
    ),
    "TensorRT#4599: an FP8 ViT gains little": (
        fp8_not_at_the_product,
        "tensorrt-10.13",
        "attention-between",
        None,
    ),
    "TensorRT#4837: wrong FP16 attention on SM120": (
        half_attention,
        "tensorrt-10.13",
        "attention-half-wrong",
        "tensorrt-11",
    ),
    "TensorRT#4723: wrong FP16 results of a ViT": (
        half_attention,
        "tensorrt-10.3",
        "attention-half-wrong",
        "tensorrt-11",
    ),
    "onnxsim#1742: FP16 falls to 19 % with a LayerNorm in parts": (
        norm_in_parts,
        "tensorrt-10.3",
        "norm-decomposed",
        None,
    ),
    "TensorRT#3657: the same by the builder's FP16 flag": (
        lambda: norm_in_parts(half=False),
        "tensorrt-8.6",
        "norm-decomposed",
        "tensorrt-11",
    ),
    "TensorRT#4167: no INT8 attention kernel, long": (
        long_int8_attention,
        "tensorrt-10.3",
        "attention-size",
        "tensorrt-11",
    ),
    "TensorRT#2981: no INT8 attention kernel, wide": (
        wide_int8_attention,
        "tensorrt-8.6",
        "attention-size",
        "tensorrt-11",
    ),
    "TensorRT#3346: LayerNorm is no operator": (custom_norm, "tensorrt-8.6", "operator-unknown", None),
    "TensorRT#4639: RMSNormalization": (rms_norm, "tensorrt-10.13", "operator-unknown", "tensorrt-11"),
    "RT-DETR#343: a bias in int32": (int32_bias, "tensorrt-8.6", "datatype", None),
    "Model-Optimizer#2333: dynamic FP4": (dynamic_fp4, "tensorrt-10.13", "fp4-dynamic", "tensorrt-11"),
    "pytorch/TensorRT#4196: its scale in float16": (
        lambda: dynamic_fp4(H(0.1)),
        "tensorrt-10.13",
        "dynamic-quantize",
        None,
    ),
    "Model-Optimizer#50: a depthwise convolution and a sum": (
        depthwise_and_sum,
        "tensorrt-8.6",
        "depthwise-add",
        "tensorrt-10.3",
    ),
    "onnx-tensorrt#764: a scale of 0": (zero_scale, "tensorrt-8.6", "scale-not-positive", None),
    "rf-detr#1453: a float32 file on TensorRT 11": (
        no_quantizers,
        "tensorrt-11",
        "not-quantized",
        "tensorrt-8.6",
    ),
    "TensorRT#4366: an activation behind ConvTranspose": (
        transposed_convolution,
        "tensorrt-10.13",
        "convtranspose-activation",
        "tensorrt-8.6",
    ),
    "the importer's source: axes as an input": (
        mean_of_opset_18,
        "tensorrt-8.6",
        "reduction-axes",
        "tensorrt-10.3",
    ),
    "the importer's source: a Shape of some dimensions": (
        part_of_a_shape,
        "tensorrt-8.6",
        "attribute-ignored",
        "tensorrt-11",
    ),
    "the parser of 8.6.0: no Gelu": (gelu, "tensorrt-8.6", "operator-unknown", "tensorrt-10.3"),
}


def rules(path, version, targets=()):
    return {finding.rule for finding in lint(path, targets, version)}


@pytest.mark.parametrize("case", REPORTED)
def test_reported_failures_are_found(tmp_path, case):
    make, release, rule, sound = REPORTED[case]
    path = make().save(tmp_path / "m.onnx")
    assert rule in rules(path, release)
    if sound is not None:
        assert rule not in rules(path, sound)


def sound_int8():
    net = Net((1, 64, 64), opset=17)
    net.q(net.attention(net.q))
    return net


@pytest.mark.parametrize("release", RELEASES)
def test_what_fits_has_no_findings(tmp_path, release):
    """The reports' files with the fault taken out."""
    assert rules(sound_int8().save(tmp_path / "a.onnx"), release) == set()
    net = Net(opset=17)
    x = net.n("LayerNormalization", "x", net.c(np.ones(64, F)), net.c(np.ones(64, F)))
    net.n("Add", net.n("MatMul", net.q(x), net.weight((64, 8))), net.c(np.ones(8, F)))
    assert rules(net.save(tmp_path / "b.onnx"), release) == set()


def test_a_report_of_one_gpu_counts_there(tmp_path):
    path = half_attention().save(tmp_path / "m.onnx")
    assert "attention-half-wrong" in rules(path, "tensorrt-10.13", ["SM120"])
    assert "attention-half-wrong" not in rules(path, "tensorrt-10.13", ["SM89"])


@pytest.mark.parametrize(("release", "refuses"), [("tensorrt-8.6", True), ("tensorrt-10.3", False)])
def test_codes_that_a_release_lacks(tmp_path, release, refuses):
    net = Net()
    net.n("MatMul", net.q("x", FP8(0)), net.weight((64, 8), zero=FP8(0)))
    found = [f for f in lint(net.save(tmp_path / "m.onnx"), (), release) if f.rule == "format-unknown"]
    assert bool(found) == refuses and all(f.refused and f.severity is Severity.ERROR for f in found)


def test_every_rule_has_a_source_and_every_finding_names_it(tmp_path):
    for rule, by_release in KNOWN["rules"].items():
        assert by_release, rule
        for release, names in by_release.items():
            assert release in RELEASES and names and all(KNOWN["sources"][name] for name in names)
    named = {name for by in KNOWN["rules"].values() for names in by.values() for name in names}
    assert named == set(KNOWN["sources"])
    for make, release, _, _ in REPORTED.values():
        found = lint(make().save(tmp_path / "m.onnx"), (), release)
        assert all(finding.source for finding in found)


def test_releases_only_gain_operators():
    """A name that two releases would add is a mistake in the table."""
    added = [name for entry in KNOWN["versions"].values() for name in entry["adds"]]
    assert len(added) == len(set(added))
    # What the parser of 8.6.0 was asked, by scripts/lint_parser.py.
    first = KNOWN["versions"]["tensorrt-8.6"]["adds"]
    assert {"LayerNormalization", "Erf", "Trilu"} <= set(first)
    assert not {"Gelu", "CastLike", "Mish"} & set(first)


def test_the_command_line_takes_the_releases_that_are_known(tmp_path):
    assert set(typing.get_args(LintVersion)) == set(choices())
    path = gelu().save(tmp_path / "m.onnx")
    result = CliRunner().invoke(app, ["lint", str(path), "--for", "tensorrt-8.6"])
    assert result.exit_code == 1
    assert "no importer for Gelu" in result.output and "known from: " in result.output
    assert CliRunner().invoke(app, ["lint", str(path), "--for", "rtx"]).exit_code == 0
    with pytest.raises(InputError, match=r"tensorrt-8\.6"):
        lint(path, (), "tensorrt-7")
