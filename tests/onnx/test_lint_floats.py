"""Lint's rules for FP8 and NVFP4, each on a small graph beside a good one, held to what NVIDIA's builder does with both."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from helpers import RTX
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from ospq_export.cli.app import app
from ospq_export.engines.build import BuildSettings, build
from ospq_export.engines.plan import PlanLayer, analyse, layers_from_log
from ospq_export.engines.products import Product
from ospq_export.errors import InputError
from ospq_export.onnx.lint import Severity, lint, predict

RNG = np.random.default_rng(0)
E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
FP16, FP32 = TensorProto.FLOAT16, TensorProto.FLOAT
SCALE = np.float32(0.05)
LEVELS = (-6, -3, -1, 0.5, 2, 4)
node = helper.make_node


def save(path, nodes, constants, inputs, outputs, opset=23, ir_version=11):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FP32, inputs)],
        [helper.make_tensor_value_info("y", FP32, outputs)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("trt", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version), str(path))
    return path


def fp8(path, *, scale=SCALE, cast=FP16, own=False, opset=19, ir_version=9):
    """A linear layer on (8, 64); `own`: written with TensorRT's operators, as nvidia-modelopt does."""
    kind = scale.dtype.type
    constants = {
        "s": scale,
        "z": np.zeros((), E4M3),
        "w": RNG.normal(size=(64, 32)).astype(E4M3),
        "ws": RNG.uniform(0.01, 0.02, 32).astype(kind),
        "wz": np.zeros(32, E4M3),
    }
    names = {"domain": "trt"} if own else {}
    prefix = "TRT_FP8" if own else ""

    def zero(name):
        return [] if own else [name]

    wide = FP32 if kind == np.float32 else FP16
    nodes = [
        node("Cast", ["x"], ["xc"], "xc", to=wide),
        node(f"{prefix}QuantizeLinear", ["xc", "s", *zero("z")], ["q"], "Q", **names),
        node(f"{prefix}DequantizeLinear", ["q", "s", *zero("z")], ["a"], "DQ", **names),
        node(f"{prefix}DequantizeLinear", ["w", "ws", *zero("wz")], ["d"], "W", axis=1, **names),
        *(node("Cast", [name], [f"{name}c"], f"{name}.cast", to=cast) for name in "ad"),
        node("MatMul", ["ac", "dc"], ["p"], "product"),
        node("Cast", ["p"], ["y"], "y", to=FP32),
    ]
    return save(path, nodes, constants, [8, 64], [8, 32], opset, ir_version)


def nvfp4(path, *, shape=(2, 8, 64), dynamic=None, block=16, axis=-1, first=200.0, doubled=True, **changes):
    """A linear layer with dynamic quantization; the weight is (out, in).

    `first` is its first block scale; not `doubled`: its block scales are float32.
    """
    blocks = (32, shape[-1] // block) if axis == -1 else (32 // block, shape[-1])
    weight_scales = RNG.uniform(100, 400, blocks).astype(np.float32)
    weight_scales[0, 0] = first
    constants = {
        "xs": changes.get("scale", np.float32(0.01)),
        "ts": np.float32(0.002),
        "ws": weight_scales.astype(E4M3 if doubled else np.float32),
        "w": RNG.choice(LEVELS, size=(32, shape[-1])).astype(E2M1),
    }
    attributes = {"axis": -1, "block_size": 16, "scale_type": TensorProto.FLOAT8E4M3FN, **(dynamic or {})}
    nodes = [
        node("TRT_FP4DynamicQuantize", ["x", "xs"], ["q", "qs"], "dynamic", domain="trt", **attributes),
        node("DequantizeLinear", ["qs", "xs"], ["qd"], "DQs"),
        node("DequantizeLinear", ["q", "qd"], ["a"], "DQ", axis=-1, block_size=16),
        *([node("DequantizeLinear", ["ws", "ts"], ["wd"], "Ws")] if doubled else []),
        node("DequantizeLinear", ["w", "wd" if doubled else "ws"], ["d"], "W", axis=axis, block_size=block),
        *(node("Cast", [name], [f"{name}c"], f"{name}.cast", to=FP16) for name in "ad"),
        node("Transpose", ["dc"], ["t"], "turned", perm=[1, 0]),
        node("MatMul", ["ac", "t"], ["p"], "product"),
        node("Cast", ["p"], ["y"], "y", to=FP32),
    ]
    versions = {name: changes[name] for name in ("opset", "ir_version") if name in changes}
    return save(path, nodes, constants, list(shape), [*shape[:-1], 32], **versions)


def attention(path, *, bare=(), keys=64, head=32, kind=FP16, own=False):
    """Attention over (1, 2, 64, head) in FP8, but for the operands in `bare`, with an additive table."""
    constants = {
        "s": np.float32(0.05),
        "z": np.zeros((), E4M3),
        "from": np.asarray([0]),
        "to": np.asarray([keys]),
        "two": np.asarray([2]),
        "table": RNG.normal(size=(1, 2, 64, keys)).astype(np.float16 if kind == FP16 else np.float32),
    }
    names, prefix = ({"domain": "trt"}, "TRT_FP8") if own else ({}, "")
    zero = [] if own else ["z"]

    def pair(source, name):
        if name in bare:
            return [node("Cast", [source], [name], f"{name}.cast", to=kind)]
        return [
            node(f"{prefix}QuantizeLinear", [source, "s", *zero], [f"{name}.q"], f"{name}.Q", **names),
            node(
                f"{prefix}DequantizeLinear", [f"{name}.q", "s", *zero], [f"{name}.d"], f"{name}.DQ", **names
            ),
            node("Cast", [f"{name}.d"], [name], f"{name}.cast", to=kind),
        ]

    nodes = [
        node("Slice", ["x", "from", "to", "two"], ["xk"], "first"),
        node("Sin", ["xk"], ["xv"], "sine"),
        *pair("x", "query"),
        *pair("xk", "key"),
        *pair("xv", "value"),
        node("Transpose", ["key"], ["turned"], "turned", perm=[0, 1, 3, 2]),
        node("MatMul", ["query", "turned"], ["logits"], "qk"),
        node("Add", ["logits", "table"], ["added"], "added"),
        node("Cast", ["added"], ["wide"], "wide", to=FP32),
        node("Softmax", ["wide"], ["soft"], "softmax", axis=-1),
        *pair("soft", "probabilities"),
        node("MatMul", ["probabilities", "value"], ["o"], "av"),
        node("Cast", ["o"], ["y"], "y", to=FP32),
    ]
    return save(path, nodes, constants, [1, 2, 64, head], [1, 2, 64, head], 19, 9)


def found(path, *targets):
    return {(finding.rule, finding.node) for finding in lint(path, targets)}


def fused(path, target="SM120"):
    """How many FP8 attentions and products the builder makes of a file, or "refused"."""
    settings = BuildSettings(Product.TENSORRT_RTX, compute_capabilities=(target,))
    try:
        built = build(path, settings)
    except InputError:
        return "refused"
    result = analyse(onnx.load(str(path)), layers_from_log(m.text for m in built.log))
    return result.fused_attentions, result.formats


GOOD = {
    "fp8": (fp8, {}, "fp8"),
    "fp8 in bfloat16": (fp8, {"cast": TensorProto.BFLOAT16}, "fp8"),
    "fp8 of TensorRT": (fp8, {"own": True, "opset": 17, "ir_version": 8}, "fp8"),
    "nvfp4": (nvfp4, {}, "fp4"),
    "nvfp4 in 2-D": (nvfp4, {"shape": (16, 64)}, "fp4"),
}


@pytest.mark.parametrize("case", GOOD)
def test_sound_files(tmp_path, case):
    make, changes, kind = GOOD[case]
    prediction = predict(make(tmp_path / "m.onnx", **changes))
    assert prediction.findings == () and prediction.products == {"product": kind}


@RTX
@pytest.mark.parametrize("case", GOOD)
def test_the_builder_multiplies_sound_files_in_their_format(tmp_path, case):
    make, changes, kind = GOOD[case]
    name = {"fp8": "FP8", "fp4": "FP4E2M1"}[kind]
    assert fused(make(tmp_path / "m.onnx", **changes)) == (0, {name: 1})


def test_descriptions_of_tensorrts_operators_are_not_believed(tmp_path):
    # nvidia-modelopt writes uint8 for FP8 codes.
    path = fp8(tmp_path / "m.onnx", own=True)
    model = onnx.load(str(path))
    model.graph.value_info.append(helper.make_tensor_value_info("q", TensorProto.UINT8, [8, 64]))
    onnx.save(model, str(path))
    assert found(path) == set()


REFUSED = {
    "four dimensions": ({"shape": (2, 4, 4, 64)}, "dynamic-quantize", "4 dimensions"),
    "blocks of 32": ({"dynamic": {"block_size": 32}}, "dynamic-quantize", "blocks of 32"),
    "indivisible axis": ({"dynamic": {"axis": 1}}, "dynamic-quantize", "axis 1 of length 8"),
    "type of block scales": ({"dynamic": {"scale_type": FP32}}, "dynamic-quantize", "block scales of float"),
    "type of the scale": ({"scale": np.float16(0.01)}, "dynamic-quantize", "a scale of float16 for float"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_dynamic_quantization_refuses(tmp_path, case):
    changes, rule, what = REFUSED[case]
    findings = [f for f in lint(nvfp4(tmp_path / "m.onnx", **changes)) if f.rule == rule]
    assert [(f.node, f.refused) for f in findings] == [("dynamic", True)] and what in findings[0].what


@RTX
@pytest.mark.parametrize("case", REFUSED)
def test_the_builder_refuses_it(tmp_path, case):
    assert fused(nvfp4(tmp_path / "m.onnx", **REFUSED[case][0])) == "refused"


IN_FLOAT = {
    "blocks over the outputs": (nvfp4, {"axis": 0}, "does not sum over"),
    "block scales in float32": (nvfp4, {"doubled": False}, "not FP8 numbers with one scale"),
    "widened behind the scale": (fp8, {"scale": np.float16(0.05), "cast": FP32}, "Cast lies between"),
}


@pytest.mark.parametrize("case", IN_FLOAT)
def test_products_in_float(tmp_path, case):
    make, changes, why = IN_FLOAT[case]
    (finding,) = lint(make(tmp_path / "m.onnx", **changes))
    assert finding.rule == "product-in-float" and why in finding.what


@RTX
@pytest.mark.parametrize("case", IN_FLOAT)
def test_the_builder_runs_them_in_float(tmp_path, case):
    make, changes, _ = IN_FLOAT[case]
    assert fused(make(tmp_path / "m.onnx", **changes)) == (0, {})


def mixed(path):
    """The good FP4 weight beside an activation in FP8."""
    model = onnx.load(str(nvfp4(path)))
    made = {n.name: n for n in model.graph.node}
    for name in ("dynamic", "DQs", "DQ"):
        model.graph.node.remove(made[name])
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((), E4M3), "z"))
    model.graph.node.insert(0, node("QuantizeLinear", ["x", "xs", "z"], ["q"], "Q"))
    model.graph.node.insert(1, node("DequantizeLinear", ["q", "xs", "z"], ["a"], "DQ"))
    onnx.save(model, str(path))
    return path


def test_nvfp4_beside_fp8_runs_in_float(tmp_path):
    assert found(mixed(tmp_path / "m.onnx")) == {("product-in-float", "product")}


@RTX
def test_the_builder_takes_nvfp4_beside_fp8_in_float(tmp_path):
    assert fused(mixed(tmp_path / "m.onnx")) == (0, {})


def test_fp4_without_blocks_is_refused(tmp_path):
    # No build: it ends the process.
    constants = {
        "s": np.float32(0.05),
        "z": np.zeros((), E2M1),
        "w": RNG.choice(LEVELS, size=(64, 32)).astype(E2M1),
    }
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["q"], "Q"),
        node("DequantizeLinear", ["q", "s", "z"], ["a"], "DQ"),
        node("DequantizeLinear", ["w", "s"], ["d"], "W"),
        node("MatMul", ["a", "d"], ["y"], "product"),
    ]
    assert found(save(tmp_path / "m.onnx", nodes, constants, [8, 64], [8, 32])) == {("blocks", "product")}


def test_larger_blocks_are_read_as_16(tmp_path):
    (finding,) = lint(nvfp4(tmp_path / "m.onnx", block=32))
    assert (finding.rule, finding.node, finding.severity) == ("blocks", "W", Severity.ERROR)
    assert not finding.refused and "a scale for every 16 codes" in finding.what


@RTX
def test_the_kernel_gets_half_of_the_scales(tmp_path):
    def scales(block):
        path = nvfp4(tmp_path / "m.onnx", shape=(2, 8, 512), block=block)
        built = build(path, BuildSettings(Product.TENSORRT_RTX, compute_capabilities=("SM120",)))
        listing = next(m.text for m in built.log if m.text.startswith("Layers:"))
        product = next(line for line in listing.splitlines() if "LayerType: gemm" in line)
        constants = product.partition("Constants: [")[2].partition("Outputs: [")[0].split("{ Name")
        shape = next(part for part in constants if "Datatype: FP8" in part)
        return np.prod([int(n) for n in shape.partition("Dimensions: [")[2].partition("]")[0].split(",")])

    assert scales(16) == 32 * 512 // 16 * 4 and scales(32) == scales(16) / 2


VALUES = {
    "zero block": (nvfp4, {"first": 0.0}, ("scale-zero", "W")),
    "subnormal block": (nvfp4, {"first": 2.0**-8}, ("scale-subnormal", "W")),
    "subnormal float16": (fp8, {"scale": np.float16(1e-5)}, ("scale-subnormal", "Q")),
    "subnormal float32": (fp8, {"scale": np.float32(1e-40)}, ("scale-subnormal", "Q")),
    "scale of scales": (nvfp4, {"scale": np.float32(0)}, ("scale-not-positive", "DQs")),
}


@pytest.mark.parametrize("case", VALUES)
def test_zero_and_subnormal_scales(tmp_path, case):
    make, changes, expected = VALUES[case]
    findings = lint(make(tmp_path / "m.onnx", **changes))
    assert expected in {(f.rule, f.node) for f in findings} and not any(f.refused for f in findings)


@RTX
@pytest.mark.parametrize("case", VALUES)
def test_the_builder_takes_them(tmp_path, case):
    make, changes, _ = VALUES[case]
    assert fused(make(tmp_path / "m.onnx", **changes)) != "refused"


def test_versions_of_onnx(tmp_path):
    assert found(fp8(tmp_path / "m.onnx", opset=18)) == {("opset-too-low", "Q")}
    assert found(fp8(tmp_path / "m.onnx", ir_version=8)) == {("opset-too-low", "Q")}
    low = lint(nvfp4(tmp_path / "m.onnx", opset=21, ir_version=10))
    assert [(f.rule, f.node) for f in low] == [("opset-too-low", "DQ")] and "opset 21" in low[0].what


@RTX
def test_the_builder_does_not_mind_versions(tmp_path):
    assert fused(nvfp4(tmp_path / "m.onnx", opset=21, ir_version=10)) == (0, {"FP4E2M1": 1})
    assert fused(fp8(tmp_path / "m.onnx", opset=18, ir_version=8)) == (0, {"FP8": 1})


TARGETS = [(fp8, "SM86", True), (fp8, "SM89", False), (nvfp4, "SM89", True), (nvfp4, "SM120", False)]


@pytest.mark.parametrize(("make", "target", "refused"), TARGETS)
def test_compute_capability(tmp_path, make, target, refused):
    rules = {finding.rule for finding in lint(make(tmp_path / "m.onnx"), [target])}
    assert rules == ({"compute-capability"} if refused else set())


@RTX
@pytest.mark.parametrize(("make", "target", "refused"), TARGETS)
def test_the_builder_refuses_the_target(tmp_path, make, target, refused):
    assert (fused(make(tmp_path / "m.onnx"), target) == "refused") == refused


def test_targets_on_the_command_line(tmp_path):
    path = str(nvfp4(tmp_path / "m.onnx"))
    assert CliRunner().invoke(app, ["lint", path]).exit_code == 0
    result = CliRunner().invoke(app, ["lint", path, "--compute-capability", "SM89"])
    assert result.exit_code == 1 and "SM89 has no fp4" in result.stdout
    with pytest.raises(InputError, match=r"'8\.9' is no target"):
        lint(tmp_path / "m.onnx", ["8.9"])


# Inputs and constants of FP4 products as the builder wrote them: a weight, a weight that it padded, two activations.
@pytest.mark.parametrize(
    ("inputs", "constants", "expected"),
    [
        (("FP4E2M1", "FP8"), ("FP4E2M1", "Float", "Float", "FP8"), "FP4E2M1"),
        (("FP4E2M1", "FP4E2M1", "FP8"), ("Float", "Float", "FP8"), "FP4E2M1"),
        (("FP4E2M1", "FP4E2M1", "FP8", "FP8"), ("Float", "Float"), "FP4E2M1"),
        (("FP4E2M1", "FP8", "Half"), ("Float",), None),
    ],
)
def test_operands_of_fp4_products_in_plans(inputs, constants, expected):
    layer = PlanLayer(
        name="p", kind="gemm", inputs=inputs, constants=constants, outputs=("Half",), onnx=("p",)
    )
    assert layer.format == expected


NOT_FUSED = {
    "softmax": ({"bare": ("probabilities",)}, "qk runs on fp8, av in float"),
    "value": ({"bare": ("value",)}, "qk runs on fp8, av in float"),
    "query": ({"bare": ("query",)}, "av runs on fp8, qk in float"),
    "few keys": ({"keys": 31}, "31 keys"),
    "large heads": ({"head": 264}, "head size 264"),
    "float32": ({"kind": FP32}, "a float32 output"),
    "softmax, TensorRT's operators": ({"bare": ("probabilities",), "own": True}, "qk runs on fp8"),
}
FUSED = {"": {}, "32 keys": {"keys": 32}, "head 256": {"head": 256}, "TensorRT's operators": {"own": True}}


@pytest.mark.parametrize("case", FUSED)
def test_attention_that_fuses(tmp_path, case):
    assert lint(attention(tmp_path / "m.onnx", **FUSED[case])) == []


@pytest.mark.parametrize("case", NOT_FUSED)
def test_attention_that_does_not(tmp_path, case):
    changes, why = NOT_FUSED[case]
    findings = [f for f in lint(attention(tmp_path / "m.onnx", **changes)) if f.rule == "attention-not-fused"]
    assert [f.node for f in findings] == ["av"] and why in findings[0].what


def test_attention_with_nothing_quantized_is_no_finding_of_this_kind(tmp_path):
    path = attention(tmp_path / "m.onnx", bare=("query", "key", "value", "probabilities"))
    assert {rule for rule, _ in found(path)} == {"product-in-float"}


@RTX
@pytest.mark.parametrize("case", FUSED)
def test_the_builder_fuses_it(tmp_path, case):
    assert fused(attention(tmp_path / "m.onnx", **FUSED[case])) == (1, {"FP8": 2})


@RTX
@pytest.mark.parametrize("case", NOT_FUSED)
def test_the_builder_does_not_fuse_it(tmp_path, case):
    assert fused(attention(tmp_path / "m.onnx", **NOT_FUSED[case][0]))[0] == 0
