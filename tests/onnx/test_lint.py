"""Each lint rule on a file made to break it, held to what NVIDIA's parser and builder really do with that file."""

import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from ospq_export.cli.app import app
from ospq_export.engines.build import BuildSettings, build
from ospq_export.engines.plan import layers_from_log
from ospq_export.engines.products import Product
from ospq_export.errors import InputError
from ospq_export.onnx.lint import Severity, lint

RNG = np.random.default_rng(0)
OPSET = 21


def quantized_linear(path, **changes):
    """An int8 linear layer on (8, 64) with 32 outputs; `changes` breaks one thing about it."""
    options = {
        "zero": np.int8(0),
        "scale": np.float32(0.05),
        "axis": 1,
        "weight": None,
        "attributes": {},
        **changes,
    }
    weight = (
        RNG.integers(-100, 100, (64, 32)).astype(np.int8) if options["weight"] is None else options["weight"]
    )
    length = weight.shape[options["axis"]] if not options["attributes"] else 32
    weight_scale = options.get("weight_scale", RNG.uniform(0.005, 0.02, length).astype(np.float32))
    constants = {
        "scale": np.asarray(options["scale"]),
        "zero": np.asarray(options["zero"]),
        "codes": weight,
        "weight_scale": weight_scale,
        "weight_zero": np.zeros(weight_scale.shape, weight.dtype),
    }
    nodes = [
        *options.get("before", []),
        helper.make_node(
            "QuantizeLinear", ["x", "scale", "zero"], ["q"], "Q", **options.get("activation", {})
        ),
        helper.make_node(
            "DequantizeLinear", ["q", "scale", "zero"], ["a"], "DQ", **options.get("activation", {})
        ),
        helper.make_node(
            "DequantizeLinear",
            ["codes", "weight_scale", "weight_zero"],
            ["w"],
            "W",
            axis=options["axis"],
            **options["attributes"],
        ),
        helper.make_node("MatMul", ["a", "w"], ["y"], "product"),
    ]
    return save(path, nodes, constants, [8, 64], [8, 32], **options.get("graph", {}))


def save(path, nodes, constants, inputs, outputs, drop=()):
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, outputs)],
        [numpy_helper.from_array(v, k) for k, v in constants.items() if k not in drop],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.save(model, str(path))
    return path


def outcome(path):
    """What NVIDIA makes of a file: "refused", "int8" or "float"."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    try:
        built = build(path, BuildSettings(Product.TENSORRT_RTX, compute_capabilities=("SM89",)))
    except InputError:
        return "refused"
    layers = layers_from_log(m.text for m in built.log)
    return "int8" if any(layer.multiplies and layer.format for layer in layers) else "float"


def rules(path):
    return {finding.rule for finding in lint(path)}


def int4(shape):
    import ml_dtypes

    return RNG.integers(-8, 8, shape).astype(ml_dtypes.int4)


def test_sound_file(tmp_path):
    path = quantized_linear(tmp_path / "m.onnx")
    assert lint(path) == [] and outcome(path) == "int8"


COMPUTED = [helper.make_node("ReduceMax", ["x"], ["scale"], "computed", keepdims=0)]
BROKEN = {
    "zero-point-nonzero": ({"zero": np.int8(3)}, Severity.ERROR, "refused"),
    "datatype": ({"zero": np.int16(0)}, Severity.ERROR, "refused"),
    "scale-not-positive": ({"scale": np.float32(0)}, Severity.ERROR, "refused"),
    "activation-per-channel": (
        {"scale": np.full(64, 0.05, np.float32), "zero": np.zeros(64, np.int8), "activation": {"axis": 1}},
        Severity.WARNING,
        "float",
    ),
    "scale-computed": ({"before": COMPUTED, "graph": {"drop": ("scale",)}}, Severity.WARNING, "float"),
    "weight-axis": ({"axis": 0}, Severity.WARNING, "float"),
    "int4-beside-int8": ({"weight": int4((64, 32))}, Severity.WARNING, None),
    "int4-blocks": (
        {
            "weight": int4((64, 32)),
            "axis": 0,
            "attributes": {"block_size": 16},
            "weight_scale": RNG.uniform(0.005, 0.02, (4, 32)).astype(np.float32),
        },
        Severity.ERROR,
        None,
    ),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_rule_and_what_the_builder_does(tmp_path, rule):
    changes, severity, expected = BROKEN[rule]
    path = quantized_linear(tmp_path / "m.onnx", **changes)
    findings = [finding for finding in lint(path) if finding.rule == rule]
    assert findings and {finding.severity for finding in findings} == {severity}
    assert all(finding.node in ("Q", "DQ", "W") and finding.fix for finding in findings)
    if expected is not None:
        assert outcome(path) == expected


def plan(path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    built = build(path, BuildSettings(Product.TENSORRT_RTX, compute_capabilities=("SM89",)))
    listing = next(m.text for m in built.log if m.text.startswith("Layers:"))
    return listing, layers_from_log([listing])


def test_four_bit_weights_are_unpacked_apart(tmp_path):
    _, layers = plan(quantized_linear(tmp_path / "m.onnx", **BROKEN["int4-beside-int8"][0]))
    assert [layer for layer in layers if "Int4" in layer.constants and not layer.multiplies]


def test_four_bit_blocks_are_refused_or_miscompiled(tmp_path):
    # 4 blocks x 32 channels of scales cannot multiply 32 outputs: where the builder takes the file, it does just that.
    path = quantized_linear(tmp_path / "m.onnx", **BROKEN["int4-blocks"][0])
    if outcome(path) != "refused":
        listing, layers = plan(path)
        assert next(layer for layer in layers if layer.multiplies).format and "Dimensions: [1,128]" in listing


def test_uint8_is_an_error_although_it_builds(tmp_path):
    path = quantized_linear(tmp_path / "m.onnx", zero=np.uint8(0))
    assert "datatype" in rules(path) and outcome(path) != "refused"


def test_missing_zero_point_doubled_and_float_products(tmp_path):
    path = quantized_linear(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    for node in model.graph.node:
        if node.name in ("Q", "DQ"):
            del node.input[2]
    onnx.save(model, str(path))
    assert "zero-point-missing" in rules(path)
    constants = {
        "scale": np.float32(0.1),
        "zero": np.int8(0),
        "b": RNG.normal(size=(64, 32)).astype(np.float32),
    }
    pair = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "Q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["a"], "DQ"),
        helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["q2"], "Q2"),
        helper.make_node("Identity", ["q2"], ["i"], "copy"),
        helper.make_node("Cast", ["i"], ["c"], "cast", to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["c", "b"], ["y"], "product"),
    ]
    constants = {k: np.asarray(v) for k, v in constants.items()}
    found = {f.rule: f for f in lint(save(tmp_path / "n.onnx", pair, constants, [8, 64], [8, 32]))}
    assert found["doubled"].node == "Q2" and found["product-in-float"].node == "product"


def attention(path, *, clip=False, late_key=False):
    """Attention over (2, 64, 32) with all operands quantized; a Clip before the softmax's Q, or K's Q after its transpose."""
    constants = {
        "s": np.float32(0.05),
        "p": np.float32(1 / 127),
        "z": np.int8(0),
        "lo": np.float32(0),
        "hi": np.float32(0.5),
    }

    def pair(source, name, scale="s"):
        return [
            helper.make_node("QuantizeLinear", [source, scale, "z"], [f"{name}.q"], f"{name}.Q"),
            helper.make_node("DequantizeLinear", [f"{name}.q", scale, "z"], [name], f"{name}.DQ"),
        ]

    transpose = helper.make_node("Transpose", ["x" if late_key else "k"], ["kt"], "transpose", perm=[0, 2, 1])
    key = [transpose, *pair("kt", "ktq")] if late_key else [*pair("x", "k"), transpose]
    nodes = [
        *pair("x", "query"),
        *key,
        helper.make_node("MatMul", ["query", "ktq" if late_key else "kt"], ["logits"], "qk"),
        helper.make_node("Softmax", ["logits"], ["soft"], "softmax", axis=-1),
        *([helper.make_node("Clip", ["soft", "lo", "hi"], ["clipped"], "clip")] if clip else []),
        *pair("clipped" if clip else "soft", "probabilities", "p"),
        *pair("x", "value"),
        helper.make_node("MatMul", ["probabilities", "value"], ["y"], "av"),
    ]
    return save(path, nodes, {k: np.asarray(v) for k, v in constants.items()}, [2, 64, 32], [2, 64, 32])


def test_what_breaks_attention(tmp_path):
    assert rules(attention(tmp_path / "a.onnx")) == set()
    clipped = {f.rule: f for f in lint(attention(tmp_path / "b.onnx", clip=True))}
    assert set(clipped) == {"attention-not-fused"} and "Clip" in clipped["attention-not-fused"].what
    late = {f.rule: f.node for f in lint(attention(tmp_path / "c.onnx", late_key=True))}
    assert late == {"key-transposed-first": "ktq.Q"}


@pytest.mark.parametrize("recipe", ["w8a8", "w4a4"])
def test_our_own_files_have_no_errors(finished_runs, recipe):
    findings = lint(finished_runs[recipe] / "model.onnx")
    assert not [f for f in findings if f.severity is Severity.ERROR]
    assert {f.rule for f in findings} == (set() if recipe == "w8a8" else {"attention-not-fused"})


def test_command(tmp_path):
    runner = CliRunner()
    sound, broken = (
        quantized_linear(tmp_path / "a.onnx"),
        quantized_linear(tmp_path / "b.onnx", zero=np.int8(1)),
    )
    assert runner.invoke(app, ["lint", str(sound)]).exit_code == 0
    result = runner.invoke(app, ["lint", str(broken)])
    assert result.exit_code == 1 and "zero-point-nonzero" in result.stdout
    (tmp_path / "c.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError, match="not a valid ONNX file"):
        lint(tmp_path / "c.onnx")
    with pytest.raises(InputError, match="the ONNX file cannot be read: No such file"):
        lint(tmp_path / "missing.onnx")


def test_shapes_that_contradict_each_other(tmp_path):
    # ONNX's checker lets this pass; its shape inference does not.
    path = quantized_linear(tmp_path / "a.onnx")
    model = onnx.load(str(path))
    scale = next(t for t in model.graph.initializer if t.dims == [32])
    model.graph.value_info.append(helper.make_tensor_value_info(scale.name, TensorProto.FLOAT, [7]))
    onnx.save(model, str(path))
    onnx.checker.check_model(model)
    with pytest.raises(InputError, match=r"contradict each other.*a\.onnx"):
        lint(path)


def test_paths_without_number_and_without_end(tmp_path):
    """Squares of squares: 2^1500 paths from the product back to the input, each of 1500 operators."""
    count = 1500
    names = ["x", *(f"t{i}" for i in range(count))]
    nodes = [helper.make_node("Mul", [a, a], [b], b) for a, b in itertools.pairwise(names)]
    nodes.append(helper.make_node("MatMul", [names[-1], "w"], ["y"], "product"))
    path = save(tmp_path / "m.onnx", nodes, {"w": np.ones((4, 4), np.float32)}, [4, 4], [4, 4])
    assert [f.node for f in lint(path) if f.rule == "product-in-float"] == ["product"]
