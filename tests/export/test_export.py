"""The exported files: standard, deployable, and the artifact's very integers."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from helpers import tiny
from onnx import TensorProto, helper, numpy_helper

from ospq_export.calibrate.observe import observe
from ospq_export.demo import demo_images
from ospq_export.errors import InputError
from ospq_export.export import export
from ospq_export.export.lower.graph import lower, probe_names
from ospq_export.formats.choice import integers
from ospq_export.graph.capture import capture
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode
from ospq_export.graph.slicing import Slice
from ospq_export.onnx.write import check_deployable, write_onnx
from ospq_export.runs.files import QUANTIZED_TENSORS
from ospq_export.runs.run import Run
from ospq_export.runs.tensors import read_tensors
from ospq_export.validate.executions.backends import OnnxRuntimeBackend

BOTH = pytest.mark.parametrize("recipe", ["w8a8", "w4a4"])


@pytest.fixture(scope="module")
def images(finished_runs):
    config = Run.open(finished_runs["w8a8"]).manifest.data
    return next(demo_images("test", config).batches(64)).images.numpy()


def session(path, level=onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = 1
    # On x86 without VNNI the fast 8-bit kernels saturate: docs/processors.md.
    options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


@BOTH
def test_file_is_standard_and_deployable(finished_runs, recipe):
    path = finished_runs[recipe] / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(str(path))
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert {n.domain for n in model.graph.node} == {""}
    constants = {t.name: t for t in model.graph.initializer}
    pairs = [n for n in model.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert len(pairs) > 80
    for node in pairs:
        zero_point = constants[node.input[2]]
        assert zero_point.data_type == TensorProto.INT8 and not numpy_helper.to_array(zero_point).any()
    clips = [n for n in model.graph.node if n.op_type == "Clip"]
    assert len(clips) == (0 if recipe == "w8a8" else 34), (
        "8-bit grids emit no Clip, the others one per quantizer"
    )
    products = [n for n in model.graph.node if n.op_type in ("MatMul", "Conv", "Gemm")]
    by_output = {o: n for n in model.graph.node for o in n.output}
    moves = {"Transpose", "Reshape"}
    for node in products:
        for name in node.input[:2]:
            while by_output[name].op_type in moves:
                name = by_output[name].input[0]
            assert by_output[name].op_type == "DequantizeLinear", f"{node.name} reads {name} unquantized"


@BOTH
def test_initializers_are_the_artifacts_codes(finished_runs, recipe):
    run = Run.open(finished_runs[recipe])
    tensors, _ = read_tensors(run.file(QUANTIZED_TENSORS))
    model = onnx.load(str(run.file("model.onnx")))
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    weights = [r for r in run.manifest.quantizers if r.kind == "weight"]
    assert len(weights) == 20
    for record in weights:
        codes, deployed = tensors[f"{record.name}.codes"].numpy(), constants[f"{record.name}.codes"]
        assert deployed.dtype == np.int8
        np.testing.assert_array_equal(codes if codes.ndim == 4 else codes.T, deployed)
        reader = next(n for n in model.graph.node if f"{record.name}.codes" in n.input)
        assert reader.op_type == "DequantizeLinear"
        np.testing.assert_array_equal(constants[reader.input[1]], tensors[f"{record.name}.scale"].numpy())
        assert helper.get_attribute_value(reader.attribute[0]) == (0 if codes.ndim == 4 else 1)


@pytest.fixture(scope="module", params=["w8a8", "w4a4"])
def logits(finished_runs, images, request):
    """Of both networks of a run: fake-quantized and float."""
    run = Run.open(finished_runs[request.param])
    with torch.no_grad():
        networks = run.fake_quant_network(), run.float_network()
        return run, *(network(torch.from_numpy(images)).numpy() for network in networks)


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_onnx_runtime_computes_the_fake_quantized_network(logits, images, level):
    run, expected, float_logits = logits
    runtime = session(run.file("model.onnx"), getattr(onnxruntime.GraphOptimizationLevel, level))
    got = runtime.run(None, {"images": images})[0]
    # Both differ where a float sum lands on the other side of a rounding edge, by far less than quantization itself.
    assert np.square(got - expected).mean() < 0.3 * np.square(float_logits - expected).mean()
    assert (got.argmax(1) == expected.argmax(1)).mean() >= 62 / 64


@pytest.mark.slow
def test_planted_faults_stand_out(finished_runs, images):
    run = Run.open(finished_runs["w4a4"])
    x = torch.from_numpy(images)
    with torch.no_grad():
        expected = run.fake_quant_network()(x)

        def distance(change):
            network = run.quantized_graph()
            change(network)
            return float((lower(network)(x) - expected).square().mean())

        sound = distance(lambda network: None)
        scale = distance(lambda n: n.activations["layers.1.blocks.0.mlp.fc1.input"].scale.mul_(1.02))
        codes = distance(lambda n: n.weights["layers.1.blocks.0.mlp.fc1.weight"].codes.add_(1))
        swapped = distance(
            lambda n: n.activations["layers.0.blocks.0.mlp.fc1.input"].scale.copy_(
                n.activations["layers.0.blocks.0.mlp.fc2.input"].scale
            )
        )
    assert min(scale, codes, swapped) > 3 * sound


@pytest.mark.slow
@BOTH
def test_tensors_that_tell_where_executions_part_have_names(finished_runs, images, recipe):
    run = Run.open(finished_runs[recipe])
    model = onnx.load(str(run.file("model.onnx")))
    assert [o.name for o in model.graph.output] == ["logits"]
    network = run.quantized_graph()
    slices = [Slice(s.name, s.start, s.end) for s in run.manifest.slices]
    probes = probe_names(network, slices)
    assert len(probes) == len(network.activations) + len(slices) - 1
    produced = {o: n for n in model.graph.node for o in n.output}
    for name in probes.values():
        assert name in produced and (produced[name].op_type == "QuantizeLinear") == name.endswith(".codes")
    # Equal input, first quantizer: what the file computes under that name is what the quantizer computes.
    first = next(iter(network.activations.values()))
    model.graph.output.append(helper.make_tensor_value_info(f"{first.name}.codes", TensorProto.INT8, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    runtime = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    codes = runtime.run([f"{first.name}.codes"], {"images": images})[0]
    np.testing.assert_array_equal(codes, first.codes(torch.from_numpy(images)).numpy())


@pytest.mark.slow
@BOTH
def test_float_baseline_is_the_float_network(finished_runs, images, recipe):
    run = Run.open(finished_runs[recipe])
    got = session(run.file("model_fp32.onnx")).run(None, {"images": images})[0]
    with torch.no_grad():
        expected = run.float_network()(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_metadata_and_no_local_paths(finished_runs):
    run = Run.open(finished_runs["w4a4"])
    data = run.file("model.onnx").read_bytes()
    for trace in (b"site-packages", b'File "', b".py", b"stack_trace", b"/tmp/", b"/home/", b"/root/"):
        assert trace not in data
    properties = {p.key: p.value for p in onnx.load_from_string(data).metadata_props}
    assert properties["weight_bits"] == "4" and properties["recipe"] == "w4a4"
    assert properties["graph_fingerprint"] == run.manifest.graph_fingerprint
    assert json.loads(properties["preprocessing"])["input_size"] == [1, 28, 28]
    names = [n.name for n in onnx.load_from_string(data).graph.node]
    assert len(set(names)) == len(names) and "layers.0.blocks.0.mlp.fc1/MatMul" in names


def test_scales_json_is_complete_and_exact(finished_runs):
    run = Run.open(finished_runs["w4a4"])
    described = json.loads(run.file("scales.json").read_text())
    tensors, _ = read_tensors(run.file(QUANTIZED_TENSORS))
    assert [s["name"] for s in described["slices"]] == [s.name for s in run.manifest.slices]
    entries = [(s["index"], q) for s in described["slices"] for q in s["quantizers"]]
    assert {q["name"] for _, q in entries} == {r.name for r in run.manifest.quantizers}
    for index, entry in entries:
        record = next(r for r in run.manifest.quantizers if r.name == entry["name"])
        assert (record.slice, *(record.format[key] for key in ("bits", "lo", "hi"))) == (
            index,
            entry["bits"],
            entry["lo"],
            entry["hi"],
        )
        expected = tensors[f"{entry['name']}.scale"].numpy()
        np.testing.assert_array_equal(np.float32(entry["scale"]), expected)
        assert entry["hi"] - entry["lo"] == 2 ** entry["bits"] - 1 and entry["zero_point"] == 0


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """An exported run of a network of two small blocks; do not change it."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    tiny(folder)
    export(folder)
    return folder


@pytest.fixture
def tiny_copy(tiny_run, tmp_path):
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def test_an_earlier_export_is_kept_unless_told(run_copy):
    before = {p.name: p.read_bytes() for p in run_copy.iterdir()}
    with pytest.raises(InputError, match=r"model_fp32\.onnx, model\.onnx of an earlier .*there.*`overwrite`"):
        export(run_copy)
    assert {p.name: p.read_bytes() for p in run_copy.iterdir()} == before


@pytest.mark.slow
def test_an_interrupted_export_leaves_the_run_as_it_was(tiny_copy, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    before = {p.name: p.read_bytes() for p in tiny_copy.iterdir()}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        # After model_fp32.onnx, which has another batch size than before.
        patch.setattr("ospq_export.export.stage.lower", interrupted)
        export(tiny_copy, batch_size=2, overwrite=True)
    assert {p.name: p.read_bytes() for p in tiny_copy.iterdir()} == before
    # What a killed process leaves is no file of the run, and goes with the next export.
    (tiny_copy / ".export.killed.tmp").mkdir()
    (tiny_copy / ".export.killed.tmp" / "model.onnx").write_bytes(b"half")
    assert Run.open(tiny_copy)
    export(tiny_copy, overwrite=True)
    assert {p.name for p in tiny_copy.iterdir()} == set(before)
    for name in ("model.onnx", "model_fp32.onnx", "scales.json"):
        assert (tiny_copy / name).read_bytes() == before[name], "exporting twice gives the same bytes"


@pytest.mark.slow
def test_an_export_interrupted_while_files_take_their_places(tiny_copy, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("ospq_export.export.stage.take", interrupted)
        export(tiny_copy, batch_size=2, overwrite=True)
    listed = Run.open(tiny_copy).manifest.files
    assert not {"model.onnx", "model_fp32.onnx", "scales.json"} & listed.keys()
    done = export(tiny_copy, batch_size=4).run
    assert {"model.onnx", "model_fp32.onnx", "scales.json"} <= done.manifest.files.keys()
    assert Run.open(tiny_copy), "the manifest has the new hashes"
    runtime = session(tiny_copy / "model.onnx")
    assert runtime.get_inputs()[0].shape == [4, 1, 32, 32]
    assert runtime.run(None, {"images": np.zeros((4, 1, 32, 32), np.float32)})[0].shape == (4, 5)


@pytest.mark.slow
def test_no_space_leaves_nothing_half_written(run_copy, monkeypatch):
    from ospq_export.onnx import serialize

    def full(_proto, _tensors, path, _where):
        path.write_bytes(b"the first half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serialize, "write", full)
    before = {p.name: p.read_bytes() for p in run_copy.iterdir() if p.name != "manifest.json"}
    with pytest.raises(InputError, match=r"cannot be written: No space left.*model_fp32\.onnx"):
        export(run_copy, batch_size=2, overwrite=True)
    assert {p.name: p.read_bytes() for p in run_copy.iterdir() if p.name != "manifest.json"} == before


def test_streamed_file_is_the_plain_one(tmp_path, finished_runs):
    import onnx_ir

    from ospq_export.onnx import serialize

    path = finished_runs["w8a8"] / "model.onnx"
    plain, model = onnx.load(str(path)), onnx_ir.load(str(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(serialize, "STREAMED_BYTES", 100)
        proto, tensors = serialize.split(model)
    assert len(tensors) > 50 and len(proto.graph.initializer) + len(tensors) == len(plain.graph.initializer)
    serialize.check(proto, tensors, tmp_path)
    assert [i.name for i in proto.graph.input] == ["images"]
    serialize.write(proto, tensors, tmp_path / "m.onnx", tmp_path)
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    streamed = onnx.load(str(tmp_path / "m.onnx"))
    assert list(streamed.graph.node) == list(plain.graph.node)
    assert streamed.metadata_props == plain.metadata_props and streamed.opset_import == plain.opset_import
    expected = {t.name: numpy_helper.to_array(t) for t in plain.graph.initializer}
    assert len(expected) == len(streamed.graph.initializer)
    for tensor in streamed.graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), expected[tensor.name])


def test_a_file_beyond_two_gibibytes_is_refused(tmp_path):
    from ospq_export.onnx import serialize

    class Huge:
        name, dtype, nbytes = "huge", TensorProto.FLOAT, 1 << 31

        class shape:
            @staticmethod
            def numpy():
                return (1 << 29,)

    with pytest.raises(InputError, match=r"2\.15 GB, one ONNX file holds 2\.08"):
        serialize.write(onnx.ModelProto(), [Huge()], tmp_path / "m.onnx", tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("zero_point", [np.uint8(0), np.int8(3), None])
def test_undeployable_files_are_refused(tmp_path, zero_point):
    inputs = ["x", "scale"] + ([] if zero_point is None else ["zero_point"])
    constants = [numpy_helper.from_array(np.array(0.5, np.float32), "scale")]
    if zero_point is not None:
        constants.append(numpy_helper.from_array(np.asarray(zero_point), "zero_point"))
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", inputs, ["y"], name="quantizer")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.INT8, [1])],
        constants,
    )
    with pytest.raises(InputError, match="quantizer without a signed zero_point of 0"):
        check_deployable(helper.make_model(graph), tmp_path)


class Returned(torch.nn.Module):
    """A tensor that is returned, and read by a linear behind a transposition."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(4, 3)

    def forward(self, x):
        x = self.norm(self.first(x.flatten(2)))
        return {"state": x, "found": self.last(x.transpose(1, 2))}


def test_what_the_network_returns_is_not_returned_quantized(tmp_path):
    """ONNX Runtime moves a quantizer up through a transposition, to an output that others read, too."""
    torch.manual_seed(0)
    network = insert_quantizers(capture(Returned().eval(), (4, 2, 4)), integers(8, 8))
    images = torch.randn(64, 4, 2, 4)
    observe(network, images, batch_size=32, seed=0)
    network.set_mode(Mode.QUANTIZE)
    path = tmp_path / "m.onnx"
    lowered = lower(network)
    write_onnx(lowered, path, input_size=(4, 2, 4), batch_size=None, metadata={}, outputs=["state", "found"])
    expected = network.module(images)
    for optimize in (False, True):
        found = OnnxRuntimeBackend("x", path, optimize=optimize)(images.numpy())
        for name, wanted in zip(("state", "found"), expected, strict=True):
            error = np.abs(found[name] - wanted.detach().numpy()).mean() / wanted.abs().mean().item()
            assert error < 1e-4, (name, optimize)
