"""The other exported files: FP16 around the quantized operators, debug outputs, INT4 storage, uint8 input; and the example."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import RTX
from onnx import TensorProto, numpy_helper
from PIL import Image
from typer.testing import CliRunner

from ospq_export.cli.app import app
from ospq_export.data import ImageSet
from ospq_export.demo import demo_images
from ospq_export.engines.build import BuildSettings
from ospq_export.engines.products import Product
from ospq_export.engines.record import build_engine
from ospq_export.errors import InputError
from ospq_export.export import export
from ospq_export.export.jobs import Extras
from ospq_export.graph.quantizers import ActivationQuantizer
from ospq_export.onnx.kernels import Kernels, integer_kernels
from ospq_export.onnx.lint import lint
from ospq_export.runs.files import QUANTIZED_TENSORS
from ospq_export.runs.run import Run
from ospq_export.runs.tensors import read_tensors


@pytest.fixture(scope="module")
def run(every_file):
    """The W4A4 Swin with every extra file."""
    return Run.open(every_file)


@pytest.fixture(scope="module")
def images(run):
    return next(demo_images("test", run.manifest.data).batches(32)).images.numpy()


@pytest.mark.parametrize("file", ["model.onnx", "model_fp32.onnx"])
def test_other_files_change_nothing_in_it(every_file, finished_runs, file):
    """Files of one graph are made of one translation; none of their passes reaches the others."""
    assert (every_file / file).read_bytes() == (finished_runs["w4a4"] / file).read_bytes()


def execute(path, images, names=None):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    # On x86 without VNNI the fast 8-bit kernels saturate: docs/processors.md.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(names, {"images": images})


def constants(path):
    return {t.name: t for t in onnx.load(str(path)).graph.initializer}


@pytest.mark.slow
def test_fp16_keeps_codes_scales_and_predictions(run, images):
    exact, half = constants(run.file("model.onnx")), constants(run.file("model_qdq_fp16.onnx"))
    tensors, _ = read_tensors(run.file(QUANTIZED_TENSORS))
    weights = [r.name for r in run.manifest.quantizers if r.kind == "weight"]
    for name in weights:
        codes = tensors[f"{name}.codes"].numpy()
        np.testing.assert_array_equal(
            codes if codes.ndim == 4 else codes.T, numpy_helper.to_array(half[f"{name}.codes"])
        )
        scale = numpy_helper.to_array(half[f"{name}.scale"])
        assert scale.dtype == np.float32
        np.testing.assert_array_equal(scale, tensors[f"{name}.scale"].numpy())
    model = onnx.load(str(run.file("model_qdq_fp16.onnx")))
    types = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph.value_info
    kinds = {v.name: v.type.tensor_type.elem_type for v in types}
    for node in model.graph.node:
        expected = TensorProto.FLOAT if node.op_type in ("LayerNormalization", "Softmax") else None
        expected = TensorProto.FLOAT16 if node.op_type == "MatMul" else expected
        assert expected is None or kinds.get(node.output[0], expected) == expected, node.name
    assert exact.keys() >= {f"{name}.scale" for name in weights}
    reference = execute(run.file("model.onnx"), images)[0]
    deployed = execute(run.file("model_qdq_fp16.onnx"), images)[0]
    with torch.inference_mode():
        original = run.float_network()(torch.from_numpy(images)).numpy()
    assert deployed.dtype == np.float32
    # Half precision moves many values across rounding edges, so the bound is the quantization's own error, and the predictions.
    assert np.square(deployed - reference).mean() < np.square(original - reference).mean()
    assert (deployed.argmax(1) == reference.argmax(1)).mean() >= 0.95
    np.testing.assert_allclose(
        execute(run.file("model_fp16.onnx"), images)[0], original, atol=0.02 * np.abs(original).max()
    )


@pytest.mark.slow
def test_debug_codes_are_the_fake_quantizers(run, images):
    path = run.file("model_debug.onnx")
    names = [o.name for o in onnx.load(str(path)).graph.output]
    network = run.quantized_graph()
    codes = [f"{name}.codes" for name in network.activations]
    assert names[0] == "logits" and set(codes) < set(names)
    assert len([n for n in names if n.endswith(".output")]) == len(run.manifest.slices) - 1
    got = dict(zip(names, execute(path, images), strict=True))
    exact, seen = copy.deepcopy(network.module).double(), {}

    def follow(quantizer, args, _output):
        """Compare in float64, then go on from the deployed codes: the next quantizer's inputs are equal again."""
        offset = 0.0 if quantizer.used_offset is None else quantizer.used_offset
        real = torch.clamp(
            (args[0] - offset) / quantizer.scale, quantizer.format.levels.lo, quantizer.format.levels.hi
        )
        deployed = torch.from_numpy(got[f"{quantizer.name}.codes"]).double()
        step = (torch.round(real) - deployed).abs()
        seen[quantizer.name] = (
            int(step.max()),
            float((real - deployed).abs().max()),
            float((step != 0).double().mean()),
        )
        return deployed * quantizer.scale + offset

    for module in exact.modules():
        if isinstance(module, ActivationQuantizer):
            module.register_forward_hook(follow)
    with torch.inference_mode():
        logits = exact(torch.from_numpy(images).double())
    assert set(seen) == set(network.activations)
    steps, distances, shares = zip(*seen.values(), strict=True)
    assert max(steps) <= 1 and max(distances) < 0.5 + 1e-3, "only a rounding edge may go either way"
    assert max(shares) < 1e-3, f"{max(shares):.2%} of the codes of a quantizer lie at rounding edges"
    np.testing.assert_allclose(got["logits"], logits, atol=1e-4 * float(logits.abs().max()))


@pytest.mark.slow
def test_uint8_activations_are_the_same_codes(run, images):
    path, original = run.file("model_uint8_activations.onnx"), run.file("model.onnx")
    zeros = {n: numpy_helper.to_array(t) for n, t in constants(path).items() if n.endswith(".zero_point")}
    assert [n for n, z in zeros.items() if z.dtype == np.uint8] == ["activation.zero_point"]
    codes = [f"{name}.codes" for name in run.quantized_graph().activations]
    signed, shifted = (with_outputs(file, codes, images) for file in (original, path))
    for name in codes:
        assert shifted[name].dtype == np.uint8 and signed[name].dtype == np.int8
        np.testing.assert_array_equal(shifted[name].astype(int) - 128, signed[name])
    np.testing.assert_array_equal(shifted["logits"], signed["logits"])
    assert {f.rule for f in lint(path)} >= {"zero-point-nonzero", "datatype"}


def with_outputs(path, names, images):
    model = onnx.load(str(path))
    types = {
        v.name: v.type.tensor_type.elem_type
        for v in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    model.graph.output.extend(onnx.helper.make_tensor_value_info(n, types[n], None) for n in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return dict(zip(["logits", *names], session.run(["logits", *names], {"images": images}), strict=True))


@pytest.mark.slow
@RTX
def test_uint8_activations_are_not_for_tensorrt(run, tmp_path):
    settings = BuildSettings(Product.TENSORRT_RTX, profile=(1, 1, 1), compute_capabilities=("SM89",))
    with pytest.raises(InputError, match="zero"):
        build_engine(run.file("model_uint8_activations.onnx"), tmp_path / "m.engine", settings)
    options = ["export", str(run.path), "--activation-layout", "uint8", "--engine", "tensorrt-rtx"]
    with pytest.raises(InputError, match="int8 activations only"):
        CliRunner().invoke(app, options, catch_exceptions=False)


@pytest.mark.slow
def test_integer_kernels_are_listed(run):
    kernels = Kernels.model_validate(json.loads(run.file("scales.json").read_text())["onnxruntime"])
    products = [
        n
        for n in onnx.load(str(run.file("model.onnx"))).graph.node
        if n.op_type in ("MatMul", "Gemm", "Conv")
    ]
    assert kernels.products == len(products) and kernels.version == onnxruntime.__version__
    assert kernels.integer_products + len(kernels.in_float) == len(products)
    assert kernels.operators["MatMulIntegerToFloat"] + kernels.operators.get("QLinearMatMul", 0) >= 0.9 * len(
        products
    )
    assert set(kernels.in_float) <= {n.name for n in products} and all(kernels.in_float.values())
    assert "patch_embed.proj/Conv" in kernels.in_float
    float_file = integer_kernels(run.file("model_fp32.onnx"))
    assert float_file.integer_products == 0 and "operand 0 is not quantized" in " ".join(
        float_file.in_float.values()
    )


@pytest.mark.slow
def test_int4_storage_has_the_same_values(run, images):
    small, full = run.file("model_int4.onnx"), run.file("model.onnx")
    packed, plain = constants(small), constants(full)
    narrow = [n for n, t in packed.items() if t.data_type == TensorProto.INT4 and n.endswith(".codes")]
    assert (
        len(narrow)
        == sum(r.kind == "weight" and r.read_format().bits <= 4 for r in run.manifest.quantizers)
        > 15
    )
    for name in narrow:
        np.testing.assert_array_equal(
            numpy_helper.to_array(packed[name]).astype(np.int8), numpy_helper.to_array(plain[name])
        )
    assert small.stat().st_size < full.stat().st_size
    np.testing.assert_allclose(execute(small, images)[0], execute(full, images)[0], rtol=0, atol=1e-4)


def test_int4_needs_four_bit_weights(run_copy):
    before = {p.name for p in run_copy.iterdir()}
    with pytest.raises(InputError, match="no weight of this run has 4 bits"):
        export(run_copy, extras=Extras(int4=True))
    assert {p.name for p in run_copy.iterdir()} == before


@pytest.mark.slow
def test_uint8_input_is_normalised_inside(run):
    data, pixels = run.manifest.data, np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), np.uint8)
    outside = (pixels / 255 - np.array(data.mean)) / np.array(data.std)
    expected = execute(run.file("model.onnx"), outside.transpose(0, 3, 1, 2).astype(np.float32))[0]
    inside = execute(run.file("model_uint8.onnx"), pixels)[0]
    assert (inside.argmax(1) == expected.argmax(1)).all()
    assert np.abs(inside - expected).max() < 0.5 * np.abs(expected).max()


@pytest.mark.slow
def test_metadata(run):
    properties = {p.key: p.value for p in onnx.load(str(run.file("model_qdq_fp16.onnx"))).metadata_props}
    bits = json.loads(properties["bits"])
    assert bits == {r.name: r.read_format().bits for r in run.manifest.quantizers} and set(bits.values()) == {
        4,
        8,
    }
    assert json.loads(properties["slicing"]) == [s.name for s in run.manifest.slices]
    assert json.loads(properties["classes"])[9] == "Ankle boot" and properties["precision"] == "float16"


@pytest.mark.slow
def test_every_tensor_has_a_readable_name(run):
    model = onnx.load(str(run.file("model.onnx")))
    names = [o for n in model.graph.node for o in n.output] + list(constants(run.file("model.onnx")))
    assert not [n for n in names if n.startswith("val_")] and len(set(names)) == len(names)
    assert (
        "layers.0.blocks.0.mlp.fc1/MatMul.out" in names and "layers.0.blocks.0.mlp.fc1.input.scale" in names
    )


@pytest.mark.slow
def test_example_agrees_with_the_package(run, tmp_path):
    pixels = next(demo_images("test", run.manifest.data).batches(1)).images
    data = run.manifest.data
    array = (pixels[0, 0].numpy() * data.std[0] + data.mean[0]) * 255
    (tmp_path / "images" / "a").mkdir(parents=True)
    path = tmp_path / "images" / "a" / "x.png"
    Image.fromarray(np.rint(array).astype(np.uint8)).save(path)
    example = Path(__file__).parents[2] / "examples" / "onnx_runtime.py"
    done = subprocess.run(
        [sys.executable, str(example), str(run.file("model.onnx")), str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    tensor = ImageSet.from_folder(tmp_path / "images", data).sample(1, seed=0).images.numpy()
    logits = execute(run.file("model.onnx"), tensor)[0][0]
    classes = sorted(run.manifest.class_to_idx, key=run.manifest.class_to_idx.__getitem__)
    expected = [classes[i] for i in logits.argsort()[::-1][:5]]
    assert [line.split("%")[1].strip() for line in done.stdout.splitlines()] == expected


@pytest.mark.parametrize(("crop", "mode"), [(0.9, "center"), (1.0, "center"), (0.875, "squash")])
def test_examples_preprocessing_is_timms(tmp_path, crop, mode):
    from importlib.util import module_from_spec, spec_from_file_location

    from ospq_export.data import DataConfig

    spec = spec_from_file_location("example", Path(__file__).parents[2] / "examples" / "onnx_runtime.py")
    example = module_from_spec(spec)
    spec.loader.exec_module(example)
    config = DataConfig(
        input_size=(3, 64, 64),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.4),
        interpolation="bicubic",
        crop_pct=crop,
        crop_mode=mode,
    )
    noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    got = example.preprocess(str(tmp_path / "x.png"), json.loads(config.model_dump_json()))
    expected = config.transform()(Image.open(tmp_path / "x.png"))[None].numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.slow
def test_run_reopens(run):
    assert Run.open(run.path)
