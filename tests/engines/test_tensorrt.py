"""Engines built ahead of time by TensorRT-RTX, without a GPU; the compiled plan is read back."""

import functools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import RTX, SETTINGS
from helpers import tiny as tiny_calibration
from typer.testing import CliRunner

from ospq_export.calibrate.observe import observe
from ospq_export.cli.app import app
from ospq_export.demo import demo_spec
from ospq_export.engines import products
from ospq_export.engines.build import BuildSettings, build, target_capabilities
from ospq_export.engines.doctor import examine, tiny_model
from ospq_export.engines.plan import layers_from_inspector, layers_from_log
from ospq_export.engines.products import Product
from ospq_export.engines.record import EngineRecord, build_engine
from ospq_export.errors import InputError
from ospq_export.export.lower import finishers
from ospq_export.export.lower.graph import highest_opset, lower
from ospq_export.formats.choice import integers
from ospq_export.graph.capture import capture
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model
from ospq_export.onnx.half import to_half
from ospq_export.onnx.write import write_onnx
from ospq_export.recipes import load_recipe
from ospq_export.runs.files import sha256, sidecar_file
from ospq_export.runs.manifest import read_manifest
from ospq_export.runs.run import Run
from ospq_export.validate.executions.engines import engine_file

EIGHT_BITS, FOUR_BITS = integers(8, 8), integers(4, 4)
NETWORKS = {
    "vit": ("vit_tiny_patch16_224", {"depth": 1, "num_classes": 10}, 1),
    "deit": ("deit_tiny_patch16_224", {"depth": 1, "num_classes": 10}, 1),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": (2,), "num_heads": (3,), "num_classes": 10},
        2,
    ),
}


def quantized_file(path, name, kwargs, choice=EIGHT_BITS, batch_size=1):
    size = (3, 224, 224)
    torch.manual_seed(0)
    network = insert_quantizers(capture(create_model(ModelSpec(name=name, kwargs=kwargs)), size), choice)
    observe(network, torch.randn(1, *size), batch_size=1, seed=0, values_per_tensor=4096)
    network.set_mode(Mode.QUANTIZE)
    return written(network, path, size, batch_size)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    path.write_bytes(tiny_model())
    return path


@RTX
@pytest.mark.parametrize("name", NETWORKS)
def test_all_products_are_int8_and_all_attentions_one_kernel(tmp_path, name):
    model, kwargs, attentions = NETWORKS[name]
    file = quantized_file(tmp_path / "m.onnx", model, kwargs)
    record = build_engine(file, tmp_path / "m.engine", SETTINGS)
    products = [n for n in onnx.load(str(file)).graph.node if n.op_type in ("MatMul", "Gemm", "Conv")]
    assert record.fusion.gemms == len(products) > 5
    assert set(record.fusion.not_quantized) <= {"patch_embed.proj/Conv"}
    assert record.fusion.attentions == record.fusion.fused_attentions == attentions, record.fusion.not_fused


@RTX
def test_below_8_bits_products_stay_int8_and_the_reason_is_named(tmp_path):
    model, kwargs, _ = NETWORKS["vit"]
    file = quantized_file(tmp_path / "m.onnx", model, kwargs, FOUR_BITS)
    fusion = build_engine(file, tmp_path / "m.engine", SETTINGS).fusion
    assert set(fusion.not_quantized) <= {"patch_embed.proj/Conv"}
    assert set(fusion.not_fused) == {"blocks.0.attn/MatMul_1"}
    assert "Clip between the softmax and its quantizer" in fusion.not_fused["blocks.0.attn/MatMul_1"]


@RTX
@pytest.mark.parametrize("name", ["vit", "swin"])
def test_attention_of_8_bits_is_one_kernel_beside_products_of_4(tmp_path, name):
    model, kwargs, attentions = NETWORKS[name]
    choice = load_recipe("w4a4", ["attention=int8"]).formats()
    fusion = build_engine(
        quantized_file(tmp_path / "m.onnx", model, kwargs, choice), tmp_path / "m.engine", SETTINGS
    ).fusion
    assert fusion.attentions == fusion.fused_attentions == attentions, fusion.not_fused
    assert set(fusion.not_quantized) <= {"patch_embed.proj/Conv"}


@RTX
def test_float_products_are_named(tmp_path):
    file = quantized_file(tmp_path / "m.onnx", *NETWORKS["vit"][:2])
    model = onnx.load(str(file))
    # The first MLP product reads its float input: what a quantizer forgotten there looks like.
    product = next(n for n in model.graph.node if n.name == "blocks.0.mlp.fc1/MatMul")
    cast = next(n for n in model.graph.node if product.input[0] in n.output)
    dequantize = next(n for n in model.graph.node if cast.input[0] in n.output)
    quantize = next(n for n in model.graph.node if dequantize.input[0] in n.output)
    cast.input[0] = quantize.input[0]
    onnx.save(model, str(file))
    fusion = build_engine(file, tmp_path / "m.engine", SETTINGS).fusion
    assert fusion.not_quantized["blocks.0.mlp.fc1/MatMul"] == "operand 0 is not quantized"


@functools.cache
def captured_demo(name):
    """The graph of a packaged network, or of fewer of its blocks; `insert_quantizers` does not change it."""
    name, _, fewer = name.partition(" ")
    spec = demo_spec(name)
    kwargs = {**spec.kwargs, **({"swin": {"depths": (2, 1, 1)}, "vit": {"depth": 2}}[name] if fewer else {})}
    return capture(create_model(ModelSpec(name=spec.name, kwargs=kwargs)), (1, 28, 28))


def settings_for(*capabilities):
    return BuildSettings(Product.TENSORRT_RTX, compute_capabilities=capabilities)


def demo_file(folder, name, recipe):
    network = insert_quantizers(captured_demo(name), load_recipe(recipe).formats())
    observe(network, torch.randn(8, 1, 28, 28), batch_size=8, seed=0, values_per_tensor=4096)
    network.set_mode(Mode.QUANTIZE)
    return written(network, folder / "m.onnx", (1, 28, 28))


def written(network, path, size, batch_size=1):
    passes = (*finishers(network), to_half)
    options = {"opset": highest_opset(network), "passes": passes, "metadata": {}}
    write_onnx(lower(network), path, input_size=size, batch_size=batch_size, **options)
    return path


@pytest.mark.slow
@RTX
@pytest.mark.parametrize(
    ("name", "recipe", "gemms", "attentions"),
    [
        ("vit small", "w8a8", 14, 2),
        ("vit small", "w4a4", 14, 2),
        ("swin small", "w8a8", 28, 4),
        ("swin small", "w4a4", 28, 4),
    ],
)
def test_the_packaged_networks_at_every_recipe(tmp_path, name, recipe, gemms, attentions):
    fusion = build_engine(demo_file(tmp_path, name, recipe), tmp_path / "m.engine", SETTINGS).fusion
    assert fusion.gemms == fusion.quantized_gemms == gemms
    assert fusion.attentions == attentions
    assert fusion.fused_attentions == (attentions if recipe == "w8a8" else 0), fusion.not_fused
    assert len(fusion.not_fused) == attentions - fusion.fused_attentions


# The Swin's last attention has 16 keys; the FP8 kernel takes 32 or more.
@pytest.mark.slow
@RTX
@pytest.mark.parametrize(
    ("name", "recipe", "formats", "fused"),
    [
        ("vit small", "fp8", {"FP8": 14}, 2),
        ("vit small", "nvfp4", {"FP4E2M1": 8, "FP8": 6}, 2),
        ("swin small", "fp8", {"FP8": 28}, 3),
        ("swin small", "nvfp4", {"FP4E2M1": 18, "FP8": 10}, 3),
    ],
)
def test_the_packaged_networks_in_floating_point(tmp_path, name, recipe, formats, fused):
    file = demo_file(tmp_path, name, recipe)
    for target in ("SM89", "SM120") if recipe == "fp8" else ("SM120",):
        engine = tmp_path / f"{target}.engine"
        fusion = build_engine(file, engine, settings_for(target)).fusion
        assert (fusion.formats, fusion.not_quantized) == (formats, {})
        assert fusion.fused_attentions == fused
        assert set(fusion.not_fused.values()) <= {"16 keys: the FP8 kernel takes 32 or more"}


@RTX
@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
def test_no_product_stays_float_whatever_the_patch_embedding(tmp_path, recipe):
    model, kwargs, attentions = NETWORKS["vit"]
    torch.manual_seed(0)
    captured = capture(create_model(ModelSpec(name=model, kwargs={**kwargs, "img_size": 96})), (3, 96, 96))
    network = insert_quantizers(captured, load_recipe(recipe).formats())
    observe(network, torch.randn(1, 3, 96, 96), batch_size=1, seed=0, values_per_tensor=4096)
    network.set_mode(Mode.QUANTIZE)
    file = written(network, tmp_path / "m.onnx", (3, 96, 96))
    fusion = build_engine(file, tmp_path / "m.engine", settings_for("SM120")).fusion
    assert not fusion.not_quantized and not fusion.not_fused and fusion.fused_attentions == attentions
    assert fusion.formats == ({"FP8": 8} if recipe == "fp8" else {"FP4E2M1": 4, "FP8": 4})


@pytest.mark.slow
@RTX
@pytest.mark.parametrize("recipe", ["w8a8"])
def test_command_on_the_demo(finished_runs, tmp_path, recipe):
    import shutil

    run = shutil.copytree(finished_runs[recipe], tmp_path / "run")
    options = ["export", str(run), "--engine", "tensorrt-rtx", "--compute-capability", "SM86"]
    result = CliRunner().invoke(
        app,
        [*options, "--overwrite", "--profile", "1,2,4", "--workspace", "256"],
    )
    assert result.exit_code == 0, result.output
    engine = run / "model.tensorrt-rtx.sm86.engine"
    sidecar = sidecar_file(engine)
    record = EngineRecord.model_validate_json(sidecar.read_text())
    assert record.engine_sha256 == sha256(engine)
    assert record.onnx_sha256 == sha256(run / "model_qdq_fp16.onnx")
    assert record.profile == (1, 2, 4) and record.input["shape"] == [-1, 1, 28, 28]
    assert record.compute_capabilities == ("SM86",) and record.preprocessing["mean"] == [0.286]
    assert record.fusion.gemms == record.fusion.quantized_gemms == 28 and record.layers
    assert len(record.classes) == 10
    assert "Layers:" in (run / f"{engine.name}.log").read_text()
    assert {engine.name, sidecar.name} <= read_manifest(run).files.keys()


@RTX
def test_engines_of_several_targets_lie_side_by_side(tmp_path):
    run = tmp_path / "run"
    short = ("reconstruction.iterations=0", "reconstruction.refinement_images=0", "slicing=model")
    tiny_calibration(run, *short, recipe="w8a8")
    options = ["export", str(run), "--engine", "tensorrt-rtx", "--quiet", "--compute-capability"]
    first = CliRunner().invoke(app, [*options, "SM89"], catch_exceptions=False)
    names = ["model_fp32.onnx", "model_fp16.onnx", "model_qdq_fp16.onnx", "model.onnx", "scales.json"]
    assert (
        f"exported {', '.join(names)} to" in first.output.replace("\n", " ")
        and "unchanged" not in first.output
    )
    before = {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.iterdir() if p.name != "manifest.json"
    }
    second = CliRunner().invoke(app, [*options, "SM86"], catch_exceptions=False)
    assert "exported" not in second.output and "model.tensorrt-rtx.sm89.engine" in second.output
    assert f"built {run / 'model.tensorrt-rtx.sm86.engine'} with" in second.output.replace("\n", " ")
    after = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.iterdir()}
    assert {name: after[name] for name in before} == before
    engines = [f"model.tensorrt-rtx.{target}.engine" for target in ("sm86", "sm89")]
    assert {*engines, *(f"{name}.json" for name in engines)} <= Run.open(run).manifest.files.keys()
    assert [engine_file(run, Product.TENSORRT_RTX, gpu).name for gpu in ("SM86", "SM89")] == engines
    with pytest.raises(InputError, match=r"the engine exists.*`overwrite`"):
        CliRunner().invoke(app, [*options, "SM86"], catch_exceptions=False)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in run.iterdir()} == after


@RTX
def test_the_builders_reason_is_shown_and_nothing_is_left(tmp_path):
    bad = onnx.load_from_string(tiny_model())
    zero = next(t for t in bad.graph.initializer if t.name == "zero")
    zero.CopyFrom(onnx.numpy_helper.from_array(np.int8(3), "zero"))
    file = tmp_path / "bad.onnx"
    onnx.save(bad, str(file))
    with pytest.raises(InputError, match="zero"):
        build_engine(file, tmp_path / "out" / "model.engine", SETTINGS)
    assert not (tmp_path / "out").exists()
    file.write_bytes(b"nonsense")
    with pytest.raises(InputError, match="parser refuses"):
        build(file, SETTINGS)
    with pytest.raises(InputError, match="cannot be read"):
        build(tmp_path / "missing.onnx", SETTINGS)


@RTX
def test_no_space_leaves_nothing_half_written(tiny, tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(InputError, match="No space left"):
        build_engine(tiny, tmp_path / "model.engine", SETTINGS)
    assert list(tmp_path.iterdir()) == []


@RTX
def test_no_space_for_the_log_keeps_what_was_there(tiny, tmp_path, monkeypatch):
    def full(self, data, *_args, **_options):
        if ".log." in self.name:
            raise OSError(28, "No space left on device")
        return write(self, data)

    write = Path.write_text
    out = tmp_path / "model.engine"
    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left"):
        patch.setattr("pathlib.Path.write_text", full)
        build_engine(tiny, out, SETTINGS)
    assert list(tmp_path.iterdir()) == []
    build_engine(tiny, out, SETTINGS)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(InputError, match="No space left"):
        patch.setattr("pathlib.Path.write_text", full)
        build_engine(tiny, out, SETTINGS, overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@RTX
def test_a_refused_build_shows_the_builders_reason(tmp_path):
    model = onnx.load_from_string(tiny_model())
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    # The parser takes it; the builder finds that a batch of 2 does not fit.
    model.graph.node[-1].output[0] = "product"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2, 2]), "shape"))
    model.graph.node.append(onnx.helper.make_node("Reshape", ["product", "shape"], ["y"]))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2
    onnx.save(model, str(tmp_path / "m.onnx"))
    settings = BuildSettings(Product.TENSORRT_RTX, (1, 2, 3), ("SM89",))
    with pytest.raises(InputError, match=r"refuses to build.*reshape would change volume 8 to 4"):
        build_engine(tmp_path / "m.onnx", tmp_path / "model.engine", settings)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@RTX
def test_settings_that_do_not_fit(tiny, tmp_path):
    there = r"tensorrt-rtx does not build for SM87, only for SM75,.* take model_qdq_fp16\.onnx .* TensorRT 10"
    with pytest.raises(InputError, match=there):
        target_capabilities(BuildSettings(Product.TENSORRT_RTX, compute_capabilities=("SM87",)))
    with pytest.raises(InputError, match="static batch of 1"):
        build(tiny, BuildSettings(Product.TENSORRT_RTX, (1, 2, 4), ("SM89",)))
    with pytest.raises(InputError, match="measures nothing"):
        build(tiny, BuildSettings(Product.TENSORRT_RTX, None, ("SM89",), timing_cache=tmp_path / "timings"))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="no GPU here"):
            target_capabilities(BuildSettings(Product.TENSORRT_RTX))


def test_a_missing_product(tmp_path, monkeypatch):
    monkeypatch.setattr(products, "load", products.load.__wrapped__)
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(InputError, match=r"pip install 'ospq-export\[tensorrt\]'"):
        products.load(Product.TENSORRT)


def test_doctor_really_asks():
    seen = {d.name: d for d in examine()}
    assert seen["onnxruntime CPUExecutionProvider"].works
    assert all(d.works or d.fix for d in seen.values())
    if not torch.cuda.is_available():
        assert not seen["onnxruntime CUDAExecutionProvider"].works and not seen["torch on CUDA"].works
        assert not seen["tensorrt-rtx runs"].works


LAYER = (
    "Layers:\nName: a/MatMul_myl0_1, LayerType: gemm, Inputs: [ { Name: x, Dimensions: [8,64], Datatype: Int8, Format: f }], "
    "Constants: [ { Name: w, Datatype: Int8 }, { Name: s, Datatype: Float }], Outputs: [ { Name: y, Datatype: Half }], "
    "TacticName: t, StreamId: 0, Metadata: [ONNX Layer: a/MatMul][ONNX Layer: a/DQ]\n\nI/O Tensors:\n Name: x, DataType: Float\n"
)


def test_log_and_inspector_agree():
    (layer,) = layers_from_log(["something else", LAYER])
    assert layer.format and layer.multiplies and not layer.is_attention
    assert (layer.inputs, layer.constants, layer.outputs) == (("Int8",), ("Int8", "Float"), ("Half",))
    assert layer.onnx == ("a/MatMul", "a/DQ") and layers_from_log(["no plan"]) == []
    entry = {
        "Name": "a/MatMul_myl0_1",
        "LayerType": "gemm",
        "Inputs": [{"Name": "x", "Datatype": "Int8"}],
        "Constants": [{"Name": "w", "Datatype": "Int8"}, {"Name": "s", "Datatype": "Float"}],
        "Outputs": [{"Name": "y", "Format/Datatype": "Half row-major"}],
        "Metadata": "[ONNX Layer: a/MatMul]\u001e[ONNX Layer: a/DQ]",
    }
    assert layers_from_inspector(json.dumps({"Layers": [entry, "name only"]})) == [layer]
