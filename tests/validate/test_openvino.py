"""OpenVINO as an execution: what it is told, what it multiplies, what it refuses, and that it tells nobody."""

import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from forks import Forked
from onnx import TensorProto, helper, numpy_helper
from test_faults import SLICE, plant, scale_off_by_two_percent
from torch import nn

from ospq_export.demo import demo_images
from ospq_export.errors import InputError
from ospq_export.runs.run import Run
from ospq_export.validate import latency, validate
from ospq_export.validate.codes.locate import Locator, Reference
from ospq_export.validate.executions import openvino as ours
from ospq_export.validate.executions.backends import in_batches
from ospq_export.validate.executions.chosen import open_executions
from ospq_export.validate.executions.openvino import (
    FLOAT_PRODUCTS,
    OpenVinoBackend,
    load_openvino,
    openvino_findings,
    openvino_saturates,
)
from ospq_export.validate.executions.probes import CODES, Probed
from ospq_export.validate.executions.table import (
    FAKE_QUANT,
    FLOAT,
    OPENVINO,
    OPENVINO_FP32,
    OPENVINO_INTEGER,
    TABLE,
    UNOPTIMIZED,
)
from ospq_export.validate.preflight import check_request
from ospq_export.world.processor import saturates

WEIGHT = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)


def save(path, nodes, shape, constants, outputs=("logits",)):
    """A network on images of this shape."""
    graph = helper.make_graph(
        [helper.make_node(op, inputs, [name], name=name, **kw) for op, inputs, name, kw in nodes],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


def linear(path, batch="n"):
    """A linear classifier on (batch, 3, 2, 2), which also returns its features."""
    nodes = [("Flatten", ["images"], "features", {}), ("MatMul", ["features", "w"], "logits", {})]
    return save(path, nodes, [batch, 3, 2, 2], {"w": WEIGHT}, ("logits", "features"))


def quantized(path, code, *, bare=False):
    """A product of int8 codes, all weights' the same, on (1, 8, 64); `bare` adds one with activations in float."""
    constants = {"scale": np.float32(1), "zero": np.int8(0), "codes": np.full((64, 64), code, np.int8)}
    nodes = [
        ("QuantizeLinear", ["images", "scale", "zero"], "q", {}),
        ("DequantizeLinear", ["q", "scale", "zero"], "a", {}),
        ("DequantizeLinear", ["codes", "scale", "zero"], "w", {}),
        ("MatMul", ["a", "w"], "sound" if bare else "logits", {}),
    ]
    nodes += [("MatMul", ["sound", "w"], "logits", {})] if bare else []
    return save(path, nodes, [1, 8, 64], constants)


def images(count, channels=3):
    return np.random.default_rng(1).normal(size=(count, channels, 2, 2)).astype(np.float32)


@pytest.mark.parametrize("batch", ["n", 4])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_against_numpy(tmp_path, batch, count):
    backend, x = OpenVinoBackend("x", linear(tmp_path / "m.onnx", batch), threads=1), images(count)
    assert backend.fixed_batch == (None if batch == "n" else 4)
    np.testing.assert_allclose(backend(x)["logits"], x.reshape(count, 12) @ WEIGHT, rtol=1e-5, atol=1e-6)
    outputs = backend(x)
    assert list(outputs) == ["logits", "features"], "by name, in the file's order"
    np.testing.assert_array_equal(outputs["features"], x.reshape(count, 12))


def test_batches_of_a_fixed_size():
    x, seen = images(5), []

    def run(part):
        seen.append(part)
        return {"twice": 2 * part}

    np.testing.assert_array_equal(in_batches(run, x, 3)["twice"], 2 * x)
    first, second = seen
    assert first.shape == second.shape and not second[2:].any()
    in_batches(run, x, None)
    assert seen[-1] is x


def test_what_it_is_told(tmp_path):
    """Precision and threads are set, not left to the machine; nothing is quantized that the file leaves in float."""
    compiled = OpenVinoBackend("x", linear(tmp_path / "m.onnx"), threads=1).compiled
    told = {
        name: compiled.get_property(name)
        for name in ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
    }
    assert told == {
        "INFERENCE_NUM_THREADS": 1,
        "NUM_STREAMS": 1,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    assert compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"
    backend = OpenVinoBackend("x", linear(tmp_path / "m.onnx"))
    assert backend.detail["threads"] == str(torch.get_num_threads())
    assert backend.detail["runtime"].startswith("openvino 20") and backend.detail["device"] == "CPU"


def test_images_of_another_shape(tmp_path):
    backend = OpenVinoBackend("x", linear(tmp_path / "m.onnx"))
    with pytest.raises(InputError, match=r"f32 \[3, 2, 2\].*\[1, 2, 2\].*m\.onnx"):
        backend(images(2, channels=1))


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_truncated_file(tmp_path, keep):
    path = linear(tmp_path / "m.onnx")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"OpenVINO cannot load the file: (?!Exception|Check)") as info:
        OpenVinoBackend("x", path)
    assert "\n" not in str(info.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot load the file"):
        OpenVinoBackend("x", tmp_path / "none.onnx")


def test_an_operator_that_it_does_not_know(tmp_path):
    """Listed with the first line that says something of the file."""
    path = save(tmp_path / "m.onnx", [("Abacus", ["images"], "logits", {})], ["n", 3, 2, 2], {})
    with pytest.raises(InputError, match="cannot load the file: Model wasn't fully converted"):
        OpenVinoBackend("x", path)


@pytest.fixture
def without_openvino(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)


def test_not_installed_it_is_refused_with_the_reason(without_openvino, run_copy, monkeypatch):
    for network in ("float_network", "fake_quant_network"):
        monkeypatch.setattr(Run, network, lambda self: nn.Identity())
    with pytest.raises(InputError, match=r"pip install 'ospq-export\[openvino\]'"):
        open_executions(Run.open(run_copy), [OPENVINO], "cpu", "fp32")


def test_not_installed_it_is_refused_by_name_before_any_work(without_openvino, finished_runs):
    with pytest.raises(InputError, match=r"pip install 'ospq-export\[openvino\]'"):
        check_request(Run.open(finished_runs["w8a8"]), [OPENVINO], "cpu", None)


def test_formats_that_it_computes_otherwise_are_refused(finished_runs, monkeypatch):
    monkeypatch.setattr(Run, "has_integers_only", False)
    run = Run.open(finished_runs["w8a8"])
    with pytest.raises(InputError, match=r"integer formats only as the file says \(.*model\.onnx\)"):
        TABLE[OPENVINO].open(run, "cpu")
    with pytest.raises(InputError, match="integer formats only"):
        check_request(run, [OPENVINO_INTEGER], "cpu", None)
    assert TABLE[OPENVINO_FP32].open(run, "cpu").detail["file"] == "model_fp32.onnx"


def test_it_tells_nobody_and_leaves_nothing_behind(tmp_path):
    """Neither an identifier nor a cache in the home directory, the working directory or that of temporary files."""
    path = linear(tmp_path / "m.onnx")
    home = tmp_path / "home"
    home.mkdir()
    code = (
        "import sys, pathlib, numpy\n"
        "from ospq_export.validate.executions.openvino import OpenVinoBackend\n"
        f"OpenVinoBackend('x', pathlib.Path({str(path)!r}))(numpy.zeros((2, 3, 2, 2), numpy.float32))\n"
        "from openvino.tools.ovc import telemetry_utils\n"
        "print(telemetry_utils.tm.__name__, 'openvino_telemetry' in sys.modules)\n"
    )
    settings = {"HOME": str(home), "TMPDIR": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    kept = {k: v for k, v in os.environ.items() if k not in ("CI", "TF_BUILD", "JENKINS_URL")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **settings},
        cwd=home,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["openvino.tools.ovc.telemetry_stub", "False"]
    assert not list((home / "intel").glob("*")) and not list(home.rglob("*.blob"))
    assert not {p.name for p in home.iterdir()} & {"intel", "Intel", "cl_cache", "model_cache"}


def test_hiding_a_package_is_undone():
    before = dict(sys.modules)
    with ours._hidden("json"), pytest.raises(ImportError):
        __import__("json")
    assert sys.modules["json"] is before["json"]
    with ours._hidden("no_such_package"):
        pass
    assert "no_such_package" not in sys.modules


def test_saturation_is_asked_of_the_runtime():
    """Against sums in 32 bits and pairs of products that saturate in 16, as VPMADDUBSW adds them."""
    right = 64 * 127 * 127
    assert not saturates(lambda model, x: np.full((1, 8, 16), right, np.float32))
    assert saturates(lambda model, x: np.full((1, 8, 16), 32 * 32767 - 64 * 127 * 128, np.float32))


@pytest.mark.parametrize("exact", [True, False])
def test_large_codes_are_multiplied_exactly_where_that_is_asked_for(tmp_path, exact):
    backend = OpenVinoBackend("x", quantized(tmp_path / "m.onnx", 127), exact=exact)
    (result,) = backend(np.full((1, 8, 64), 127, np.float32)).values()
    right = bool(np.allclose(result, 64 * 127 * 127))
    assert right is (exact or not openvino_saturates())
    assert any("saturate" in line for line in backend.findings) is openvino_saturates()
    told = backend.detail.get("properties", "")
    assert (told == f"{FLOAT_PRODUCTS}=NO") is (exact and openvino_saturates())


def test_small_codes_do_not_saturate_and_stay_integers(tmp_path):
    backend = OpenVinoBackend("x", quantized(tmp_path / "m.onnx", 63), exact=False)
    x = np.random.default_rng(0).integers(-128, 128, (1, 8, 64)).astype(np.float32)
    (found,) = backend(x).values()
    np.testing.assert_array_equal(found, np.broadcast_to(63 * x.sum(-1, keepdims=True), (1, 8, 64)))
    assert backend.detail["quantized products"] == "1 of 1 in 8-bit integers, 0 in float"


def test_a_processor_that_is_exact_gets_integer_kernels_and_no_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "openvino_saturates", lambda: False)
    backend = OpenVinoBackend("x", quantized(tmp_path / "m.onnx", 63))
    assert backend.detail["quantized products"].startswith("1 of 1 in 8-bit integers")
    assert "properties" not in backend.detail and backend.findings == []


def test_a_product_that_the_file_does_not_quantize_is_not_missed(tmp_path):
    backend = OpenVinoBackend("x", quantized(tmp_path / "m.onnx", 63, bare=True), exact=False)
    assert backend.detail["quantized products"] == "1 of 1 in 8-bit integers, 0 in float"
    assert not any("in float: " in line for line in backend.findings)


def test_a_quantized_product_in_float_is_named(tmp_path):
    """A scale along the inner dimension cannot be moved behind the product."""
    scale, zero = np.linspace(0.5, 1.5, 64, dtype=np.float32), np.zeros(64, np.int8)
    constants = {"s": np.float32(1), "z": np.int8(0), "codes": np.full((64, 8), 3, np.int8)}
    nodes = [
        ("QuantizeLinear", ["images", "s", "z"], "q", {}),
        ("DequantizeLinear", ["q", "s", "z"], "a", {}),
        ("DequantizeLinear", ["codes", "scale", "zero"], "w", {"axis": 0}),
        ("MatMul", ["a", "w"], "logits", {}),
    ]
    path = save(tmp_path / "m.onnx", nodes, [1, 8, 64], {**constants, "scale": scale, "zero": zero})
    backend = OpenVinoBackend("x", path, exact=False)
    assert backend.detail["quantized products"] == "0 of 1 in 8-bit integers, 1 in float"
    lines = openvino_findings([backend, backend, object()])
    assert "m.onnx: OpenVINO computes 1 of 1 quantized products in float: logits" in lines
    assert len(lines) == len(set(lines)), "each once"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["w8a8", "w4a4"])
def test_what_our_files_multiply(finished_runs, recipe):
    """All products in 8-bit integers, also behind a Clip; no node that multiplies has a float kernel."""
    backend = TABLE[OPENVINO_INTEGER].open(Run.open(finished_runs[recipe]), "cpu")
    assert backend.detail["quantized products"] == "28 of 28 in 8-bit integers, 0 in float"
    infos = [node.get_rt_info() for node in backend.compiled.get_runtime_model().get_ordered_ops()]
    kinds = ("Convolution", "FullyConnected", "MatMul")
    kernels = [i["primitiveType"].value for i in infos if i["layerType"].value in kinds]
    assert len(kernels) >= 28 and {kernel[-3:].lower() for kernel in kernels} <= {"_i8", "_u8"}


@pytest.mark.slow
def test_unfaulted_run_is_faithful(run_copy):
    run = Run.open(run_copy)
    options = {"limit": 300, "floor_images": 300, "code_images": 0}
    images = demo_images("test", run.manifest.data)
    report = validate(run, images, backends=[FAKE_QUANT, OPENVINO], **options)
    assert report.verdict.faithful, report.verdict.text
    assert [(c.reference, c.deployed) for c in report.comparisons] == [(FAKE_QUANT, OPENVINO)]
    assert any("OpenVINO's 8-bit products" in line for line in report.findings) is openvino_saturates()


def located(folder):
    """Codes and slices of the file as OpenVINO itself computes them, on 4 images."""
    run = Run.open(folder)
    reference = Reference.of(run)
    model = onnx.load(str(run.file("model.onnx")))
    returned = {o.name for o in model.graph.output}
    names = [o for n in model.graph.node for o in n.output if o in reference.wanted - returned]
    for name in names:
        kind = TensorProto.INT8 if name.endswith(CODES) else TensorProto.FLOAT
        model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    onnx.save(model, str(folder / "probed.onnx"))
    backend = OpenVinoBackend("x", folder / "probed.onnx")
    size = backend.fixed_batch or 4

    def run_probed(x):
        results = backend.compiled({0: x})
        return {name: results[name] for name in backend.names}

    probed = Probed(run_probed, frozenset(backend.names), half=False)
    locator = Locator(reference, probed, "probed.onnx")
    for batch in demo_images("test", run.manifest.data).batches(size, range(4), 0):
        locator.add(batch.images.numpy())
    return locator.result()


@pytest.mark.slow
def test_its_codes_are_those_of_the_network_at_four_bits(finished_runs, tmp_path):
    """Whatever it fuses or scales anew: with equal inputs, codes differ at rounding edges only."""
    found = located(Path(shutil.copytree(finished_runs["w4a4"], tmp_path / "run")))
    assert found.faults == [] and len(found.quantizers) > 30
    assert max(q.excess for q in found.quantizers) < 1e-3


@pytest.mark.slow
def test_a_planted_fault_is_caught(run_copy):
    """By the codes that OpenVINO computes, and by a validation in which nothing else is executed."""
    assert located(run_copy).faults == []
    (run_copy / "probed.onnx").unlink()
    plant(run_copy, scale_off_by_two_percent)
    assert located(run_copy).first_diverging == SLICE
    run = Run.open(run_copy)
    options = {"backends": [OPENVINO], "limit": 50, "floor_images": 50, "code_images": 4}
    report = validate(run, demo_images("test", run.manifest.data), **options)
    assert report.verdict.exit_status == 1 and report.locations[0].first_diverging == SLICE


@pytest.mark.slow
def test_logits_that_are_not_finite(run_copy):
    def spoil(model):
        bias = next(t for t in model.graph.initializer if t.name.startswith("head") and "bias" in t.name)
        values = numpy_helper.to_array(bias).copy()
        values[0] = np.inf
        bias.CopyFrom(numpy_helper.from_array(values, bias.name))

    plant(run_copy, spoil)
    run = Run.open(run_copy)
    options = {"backends": [OPENVINO], "limit": 8, "floor_images": 0, "code_images": 0}
    report = validate(run, demo_images("test", run.manifest.data), **options)
    assert "openvino: gives logits that are not finite" in report.verdict.reasons


@pytest.mark.slow
def test_the_float_file_is_the_float_network_and_is_timed_beside_it(run_copy, monkeypatch):
    run = Run.open(run_copy)
    x = np.random.default_rng(0).normal(size=(3, *run.manifest.data.input_size)).astype(np.float32)
    backend = TABLE[OPENVINO_FP32].open(run, "cpu")
    expected = TABLE[FLOAT].open(run, "cpu")(x)["logits"]
    np.testing.assert_allclose(expected, backend(x)["logits"], atol=1e-4)
    assert backend.findings == []
    monkeypatch.setattr(latency, "_SECONDS", 0.0)
    options = {"limit": 8, "floor_images": 0, "code_images": 0, "latency": [1]}
    timed = {}
    for name in (OPENVINO, UNOPTIMIZED):
        report = validate(run, demo_images("test", run.manifest.data), backends=[name], **options)
        timed[name] = [x.name for x in report.latencies]
    assert OPENVINO_FP32 in timed[OPENVINO] and OPENVINO_FP32 not in timed[UNOPTIMIZED]


def signalled_after_two(path):
    """Two executions that end in the order in which they began, and then a signal."""
    first, second = (OpenVinoBackend(name, path) for name in ("first", "second"))
    del first
    gc.collect()
    del second
    gc.collect()
    received = []
    signal.signal(signal.SIGUSR1, lambda *_: received.append(True))
    os.kill(os.getpid(), signal.SIGUSR1)
    assert received == [True]


def test_a_signal_after_it_is_survived(tmp_path):
    constants = {"w": WEIGHT}
    path = save(tmp_path / "m.onnx", [("MatMul", ["images", "w"], "logits", {})], [1, 12], constants)
    child = Forked(tmp_path, signalled_after_two, path)
    assert child.ended() == 0, child.errors


def test_the_module_is_the_package_and_not_itself():
    assert Path(load_openvino().__file__).parent.name == "openvino" and load_openvino() is not ours
