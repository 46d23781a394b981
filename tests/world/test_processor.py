"""Saturation of 8-bit products: which pairs of codes can, and whether this machine's ONNX Runtime does."""

import itertools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from ospq_export.demo import demo_images
from ospq_export.onnx.kernels import integer_kernels, saturable_pairs
from ospq_export.runs.run import Run
from ospq_export.validate.findings import processor_findings
from ospq_export.world.processor import PRECISE_KERNELS, Processor, examine_processor

NARROW = Processor(name="one", architecture="x86_64", cores=1, instructions=["AVX2"], saturates=True)
EXACT = NARROW.model_copy(update={"instructions": ["AVX512-VNNI"], "saturates": False})
ON_X86 = pytest.mark.skipif(
    examine_processor().architecture != "x86_64", reason="elsewhere ONNX Runtime multiplies int8 by int8"
)


def vpmaddubsw(activations: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums of neighbouring products, as the instruction has them: uint8 by int8, saturated to 16 bits."""
    products = activations.astype(np.int64) * weights.astype(np.int64)
    return np.clip(products[..., 0::2] + products[..., 1::2], -(2**15), 2**15 - 1)


@pytest.mark.parametrize(("low", "high"), [(0, 255), (120, 135), (1, 200), (0, 128)])
def test_the_rule_is_the_instruction(low, high):
    rng = np.random.default_rng(low)
    codes = np.array([-128, -127, -100, -65, -64, -63, -1, 0, 1, 63, 64, 65, 100, 126, 127])
    extremes = list(itertools.product((low, (low + high) // 2, high), repeat=2))
    for w in [*itertools.product(codes, repeat=2), *rng.integers(-128, 128, (200, 2))]:
        pair = np.array(w, np.int8)
        exact = [int((np.array(a) * pair.astype(int)).sum()) for a in extremes]
        cut = [int(vpmaddubsw(np.array(a), pair)[0]) for a in extremes]
        assert saturable_pairs(pair[:, None], low, high) == int(exact != cut), w


def test_seven_bits_never_saturate():
    codes = np.random.default_rng(0).integers(-64, 64, (101, 33)).astype(np.int8)
    assert saturable_pairs(codes) == 0
    # 255 * (64 + 64) is 32,640: even 64, which 7 bits do not have, is safe; 65 is not.
    codes[:2, 5] = 64
    assert saturable_pairs(codes) == 0
    codes[:2, 5] = 65
    assert saturable_pairs(codes) == 1


def test_pairs_do_not_straddle():
    codes = np.zeros((8, 1), np.int8)
    codes[1] = codes[2] = 127
    assert saturable_pairs(codes) == 0
    codes[3] = 127
    assert saturable_pairs(codes) == 1


def quantized(path: Path, operator: str, codes: np.ndarray, layout: type[np.integer]) -> Path:
    """A QDQ file with one product of activations `x` and constant int8 codes (K, N), all scales 1 and its output's large."""
    depth = len(codes)
    zero = layout(128 if layout is np.uint8 else 0)
    weights = codes if operator == "MatMul" else np.ascontiguousarray(codes.T)[:, :, None, None]
    constants = {"one": np.float32(1), "zero": zero, "flat": np.int8(0), "codes": weights}
    shape = [1, 8, depth] if operator == "MatMul" else [1, depth, 4, 4]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["a"]),
        helper.make_node("DequantizeLinear", ["codes", "one", "flat"], ["w"]),
        helper.make_node(operator, ["a", "w"], ["product"], name="product"),
        helper.make_node("QuantizeLinear", ["product", "wide", "zero"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "wide", "zero"], ["y"]),
    ]
    constants["wide"] = np.float32(127 * 127 * depth / 127)
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@ON_X86
@pytest.mark.parametrize(("bound", "expected"), [(127.0, True), (7.0, True), (0.0, False)])
def test_a_clip_in_front_of_the_quantizer_counts(tmp_path, bound, expected):
    codes = np.full((64, 16), 127, np.int8)
    # 128 * (127 + 127) is 32,512, which 16 bits hold; 129 times is 32,766, and 135 times is too much.
    model = onnx.load(quantized(tmp_path / "plain.onnx", "MatMul", codes, np.uint8))
    for name, value in {"low": -8.0, "high": bound}.items():
        model.graph.initializer.append(numpy_helper.from_array(np.float32(value), name))
    model.graph.node[0].input[0] = "clipped"
    model.graph.node.insert(0, helper.make_node("Clip", ["x", "low", "high"], ["clipped"]))
    onnx.save(model, tmp_path / "model.onnx")
    assert bool(integer_kernels(tmp_path / "model.onnx").saturable) is expected
    wrong = bool(np.abs(result(tmp_path / "model.onnx", 127.0) - bound * 127 * 64).max() > 127 * 64)
    assert wrong is (expected and bool(examine_processor().saturates))


def result(path: Path, level: float, precise: str = "0") -> np.ndarray:
    """What ONNX Runtime computes where every activation is `level`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry(PRECISE_KERNELS, precise)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.full(session.get_inputs()[0].shape, level, np.float32)})[0]


@ON_X86
@pytest.mark.parametrize("operator", ["MatMul", "Conv"])
@pytest.mark.parametrize("layout", [np.int8, np.uint8])
@pytest.mark.parametrize(("first", "second"), [(127, 127), (63, 63), (127, 0), (127, -127)])
def test_the_finding_is_what_this_machine_computes(tmp_path, operator, layout, first, second):
    codes = np.empty((64, 16), np.int8)
    codes[0::2], codes[1::2] = first, second
    file = quantized(tmp_path / "model.onnx", operator, codes, layout)
    found = integer_kernels(file)
    right = 127.0 * codes[:, 0].astype(int).sum()
    step = 127 * 64
    wrong = bool(np.abs(result(file, 127.0) - right).max() > step)
    expected = first == second == 127
    assert bool(found.saturable) is expected
    assert wrong is (expected and bool(examine_processor().saturates))
    assert np.abs(result(file, 127.0, precise="1") - right).max() <= step
    assert bool(found.warning("model.onnx", NARROW)) is expected
    assert found.warning("model.onnx", EXACT) == ""


def test_a_depthwise_convolution_is_exact(tmp_path):
    codes = np.full((16, 1, 3, 3), 127, np.int8)
    constants = {"one": np.float32(1), "zero": np.uint8(128), "flat": np.int8(0), "codes": codes}
    constants["wide"] = np.float32(9 * 127)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["a"]),
        helper.make_node("DequantizeLinear", ["codes", "one", "flat"], ["w"]),
        helper.make_node("Conv", ["a", "w"], ["product"], name="product", group=16),
        helper.make_node("QuantizeLinear", ["product", "wide", "zero"], ["r"]),
        helper.make_node("DequantizeLinear", ["r", "wide", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "depthwise",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 16, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    file = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    assert np.allclose(result(file, 127.0), 9 * 127 * 127, atol=9 * 127)
    assert integer_kernels(file).saturable == {}


def test_the_processor_is_named_as_the_system_names_it():
    found = examine_processor()
    info = Path("/proc/cpuinfo")
    if info.is_file() and found.architecture == "x86_64":
        text = info.read_text()
        assert found.name in text
        flags = {"AVX2": "avx2", "AVX512-VNNI": "avx512_vnni", "AVX-VNNI": "avx_vnni", "AMX-INT8": "amx_int8"}
        for title, flag in flags.items():
            assert (title in found.instructions) is (f" {flag} " in text.replace("\n", " ")), title
        exact = {"AVX512-VNNI", "AVX-VNNI"} & set(found.instructions)
        assert found.saturates is (not exact)
    assert found.saturates is not None


@pytest.mark.slow
def test_validate_says_which_files_can_saturate(finished_runs, monkeypatch):
    run = Run.open(finished_runs["w8a8"])
    monkeypatch.setattr("ospq_export.validate.findings.examine_processor", lambda: NARROW)
    found = processor_findings(run, ["onnxruntime", "fake_quant"])
    if examine_processor().architecture == "x86_64":
        assert len(found) == 1
        assert "model.onnx" in found[0] and PRECISE_KERNELS in found[0] and "AVX2" in found[0]
    assert processor_findings(run, ["onnxruntime-unoptimised", "fake_quant"]) == []
    # 4-bit codes cannot, and the first and last layer's 8-bit products stay in float.
    assert processor_findings(Run.open(finished_runs["w4a4"]), ["onnxruntime"]) == []
    monkeypatch.setattr("ospq_export.validate.findings.examine_processor", lambda: EXACT)
    assert processor_findings(run, ["onnxruntime"]) == []


@pytest.mark.slow
def test_exact_kernels_take_our_files_and_agree_with_float_products(finished_runs):
    # Weights that share a zero point are refused under this option.
    run = Run.open(finished_runs["w8a8"])
    images = next(iter(demo_images("test", run.manifest.data).batches(100, range(100), 0))).images.numpy()
    level = onnxruntime.GraphOptimizationLevel
    logits = []
    for optimisations, precise in ((level.ORT_ENABLE_ALL, "1"), (level.ORT_DISABLE_ALL, "0")):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = optimisations
        options.intra_op_num_threads = 1
        options.add_session_config_entry(PRECISE_KERNELS, precise)
        file = run.path / "model.onnx"
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        logits.append(session.run(None, {"images": images})[0])
    assert (logits[0].argmax(1) != logits[1].argmax(1)).sum() <= 1
    assert np.abs(logits[0] - logits[1]).mean() < 0.02
