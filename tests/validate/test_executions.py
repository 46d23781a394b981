"""Noise floor, latency, FP16 float parts, and which executions a validation opens."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from ospq_export.demo import demo_images
from ospq_export.engines.products import Product
from ospq_export.errors import InputError
from ospq_export.export import export
from ospq_export.export.jobs import Extras
from ospq_export.graph.outputs import LOGITS
from ospq_export.runs.files import sha256
from ospq_export.runs.run import Run
from ospq_export.tasks.classify import Logits
from ospq_export.validate import latency, validate, write_documents
from ospq_export.validate.executions.backends import OnnxRuntimeBackend, TorchBackend
from ospq_export.validate.executions.chosen import Executions, open_executions
from ospq_export.validate.executions.engines import engine_file
from ospq_export.validate.executions.half import HalfNetwork
from ospq_export.validate.executions.table import (
    ALL_BACKENDS,
    FAKE_QUANT,
    FAKE_QUANT_FP16,
    FLOAT,
    FP16,
    OPTIMIZED,
    QDQ_FP16,
    TABLE,
    UNOPTIMIZED,
)
from ospq_export.validate.floor import FloorMeter, NoiseFloor

IMAGES = np.random.default_rng(0).normal(size=(20, 1, 4, 4)).astype(np.float32)


VARY = Logits([], 20).vary


class Edge(nn.Module):
    """Two logits; the second wins only where the sum is computed as float64, or in batches of fewer than 10."""

    def __init__(self, depends_on: str) -> None:
        super().__init__()
        self.depends_on = depends_on

    def forward(self, x):
        moved = {"float64": x.dtype == torch.float64, "batch split": len(x) < 10, "nothing": False}
        flag = torch.full((len(x),), float(moved[self.depends_on]))
        return torch.stack([torch.full((len(x),), 0.5), flag], 1).to(x.dtype)


@pytest.mark.parametrize("cause", ["float64", "batch split", "nothing"])
def test_floor_counts_the_flips_of_each_variation(cause):
    module = Edge(cause)
    meter = FloorMeter(module, "cpu", [LOGITS], VARY)
    reference = TorchBackend("t", module)(IMAGES)
    meter.add(IMAGES, reference)
    meter.add(IMAGES, reference)
    found = {v.name: v for v in meter.result()}
    assert {v.images for v in found.values()} == {40} and set(found) == {
        "batch split",
        "float64",
        "thread count",
    }
    assert {name: v.flips for name, v in found.items() if v.flips} == (
        {} if cause == "nothing" else {cause: 40}
    )
    worst = NoiseFloor(variations=meter.result()).worst(FAKE_QUANT)
    assert worst is not None and worst.agreement == (100 if cause == "nothing" else 0)
    if cause != "nothing":
        assert found[cause].mean_logit_difference == pytest.approx(0.5), "one logit of two moves by 1"


class OnlyFloat32(nn.Module):
    def forward(self, x):
        if x.dtype != torch.float32:
            raise RuntimeError("float32 only\nand more")
        return x.flatten(1)[:, :3]


def test_floor_says_what_it_could_not_run():
    meter = FloorMeter(OnlyFloat32(), "cpu", [LOGITS], VARY)
    meter.add(IMAGES, TorchBackend("t", OnlyFloat32())(IMAGES))
    found = {v.name: v for v in meter.result()}
    assert found["float64"].skipped == "float32 only" and found["float64"].images == 0
    assert found["batch split"].images == 20


def test_threads_are_set_back():
    before = torch.get_num_threads()
    FloorMeter(Edge("nothing"), "cpu", [LOGITS], VARY).add(IMAGES, {LOGITS: np.zeros((20, 2), np.float32)})
    assert torch.get_num_threads() == before


def test_latency_by_a_clock_of_its_own(monkeypatch):
    """Calls take 10 ms but for every fifth, which takes 30: medians and percentiles follow, and the batch is filled up."""
    now, calls = [0.0], []

    class Execution:
        name, detail, fixed_batch = "x", {}, None

        def __call__(self, batch):
            calls.append(batch.shape)
            now[0] += 0.03 if len(calls) % 5 == 0 else 0.01
            return batch

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    found = latency.measure(Execution(), IMAGES[:3], 8)
    assert set(calls) == {(8, 1, 4, 4)} and len(calls) == found.calls + 2
    assert found.median_ms == pytest.approx(10) and found.p90_ms == pytest.approx(30)
    assert found.images_per_second == pytest.approx(800) and found.calls == 50


def test_latency_of_something_slow_takes_three_calls(monkeypatch):
    now = [0.0]

    class Slow:
        name, detail, fixed_batch = "x", {}, None

        def __call__(self, batch):
            now[0] += 5.0
            return batch

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0])
    assert latency.measure(Slow(), IMAGES, 1).calls == 3


@pytest.mark.slow
def test_fp16_float_parts(finished_runs):
    """Close to float32, not equal to it, and the quantizers keep their float32 scales."""
    run = Run.open(finished_runs["w8a8"])
    graph = run.quantized_graph()
    scales = {name: a.scale.clone() for name, a in graph.activations.items()}
    x = torch.randn(4, *run.manifest.data.input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        single, half = graph.module(x), HalfNetwork(graph.module)(x)
    assert half.dtype == torch.float32 and torch.equal(half, half.half().float()), "logits are FP16 values"
    error = float((single - half).norm() / single.norm())
    assert 0 < error < 0.1
    assert all(
        a.scale.dtype == torch.float32 and torch.equal(a.scale, scales[n])
        for n, a in graph.activations.items()
    )


@pytest.mark.slow
def test_all_that_is_here(finished_runs):
    run = Run.open(finished_runs["w8a8"])
    found = open_executions(run, None, "cpu", "fp32")
    assert {FLOAT, FAKE_QUANT, UNOPTIMIZED, OPTIMIZED} <= set(found.names)
    assert "the run has no engine of tensorrt" in found.skipped["tensorrt"]
    assert set(found.names) | set(found.skipped) <= set(ALL_BACKENDS)
    assert found.references("fp32") == dict.fromkeys([UNOPTIMIZED, OPTIMIZED], FAKE_QUANT)
    assert FAKE_QUANT_FP16 not in found.names
    with pytest.raises(InputError, match=r"no model_qdq_fp16\.onnx.*`fp16`"):
        open_executions(run, None, "cpu", "fp16")


class Named:
    def __init__(self, name):
        self.name = name


@pytest.mark.parametrize(
    ("names", "float_type", "references", "uncompared"),
    [
        ([FAKE_QUANT, UNOPTIMIZED, OPTIMIZED], "fp32", {UNOPTIMIZED: FAKE_QUANT, OPTIMIZED: FAKE_QUANT}, []),
        ([FLOAT, UNOPTIMIZED, OPTIMIZED], "fp32", {OPTIMIZED: UNOPTIMIZED}, []),
        ([FLOAT, OPTIMIZED], "fp32", {}, [OPTIMIZED]),
        ([FAKE_QUANT, FAKE_QUANT_FP16, "tensorrt"], "fp32", {"tensorrt": FAKE_QUANT}, []),
        ([FAKE_QUANT, FAKE_QUANT_FP16, "tensorrt"], "fp16", {"tensorrt": FAKE_QUANT_FP16}, []),
        (
            [FAKE_QUANT, FAKE_QUANT_FP16, OPTIMIZED, QDQ_FP16],
            "fp16",
            {OPTIMIZED: FAKE_QUANT, QDQ_FP16: FAKE_QUANT_FP16},
            [],
        ),
        ([FAKE_QUANT_FP16, OPTIMIZED, QDQ_FP16], "fp16", {QDQ_FP16: FAKE_QUANT_FP16}, [OPTIMIZED]),
    ],
)
def test_like_is_compared_with_like(names, float_type, references, uncompared):
    found = Executions(backends=[Named(name) for name in names])
    assert found.references(float_type) == references
    assert found.uncompared(float_type) == uncompared


@pytest.mark.slow
def test_an_fp16_file_against_fp16_float_parts(run_copy):
    """Logits nearer to the FP16 than to the FP32 network, codes at rounding edges, and a verdict."""
    export(run_copy, overwrite=True, extras=Extras(fp16=True), deploy_batch_size=None)
    run = Run.open(run_copy)
    images = demo_images("test", run.manifest.data)
    chosen = [FAKE_QUANT, OPTIMIZED]
    report = validate(run, images, backends=chosen, limit=200, code_images=4, float_type="fp16")
    pairs = {c.deployed: c for c in report.comparisons}
    assert {n: c.reference for n, c in pairs.items()} == {OPTIMIZED: FAKE_QUANT, QDQ_FP16: FAKE_QUANT_FP16}
    assert pairs[QDQ_FP16].agreement > 98
    assert report.floor.worst(FAKE_QUANT_FP16).images == 200
    assert report.floor.worst(FAKE_QUANT).reference == FAKE_QUANT
    found = {x.deployed: x for x in report.locations}
    assert set(found) == {"model.onnx", "model_qdq_fp16.onnx"}
    assert found["model_qdq_fp16.onnx"].max_excess > found["model.onnx"].max_excess
    assert [x.faults for x in found.values()] == [[], []]
    page = write_documents(run, report, images).read_text()
    assert "model_qdq_fp16.onnx: No slice diverges" in page


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx", FP16])
def test_asked_for_by_name_and_not_there(finished_runs, name):
    with pytest.raises(InputError, match=r"no engine of tensorrt|model_fp16\.onnx"):
        open_executions(Run.open(finished_runs["w8a8"]), [name], "cpu", "fp32")


@pytest.mark.slow
def test_the_float_baseline_is_the_float_network(finished_runs):
    run = Run.open(finished_runs["w8a8"])
    x = np.random.default_rng(0).normal(size=(3, *run.manifest.data.input_size)).astype(np.float32)
    ours, theirs = (TABLE[name].open(run, "cpu")(x) for name in (FLOAT, "onnxruntime-fp32"))
    np.testing.assert_allclose(ours[LOGITS], theirs[LOGITS], atol=1e-4)


def plant_engine(folder, content=b"an engine", **sidecar):
    (folder / "model.engine").write_bytes(content)
    sidecar = {"engine_sha256": sha256(folder / "model.engine"), "onnx": "model.onnx", **sidecar}
    (folder / "model.engine.json").write_text(json.dumps(sidecar))


def test_a_truncated_engine_is_bad_input_and_never_a_skip(run_copy):
    """Also where no GPU could run it: by default what is missing is skipped, and a damaged engine must not hide there."""
    plant_engine(run_copy)
    path = run_copy / "model.engine"
    path.write_bytes(path.read_bytes()[:4])
    with pytest.raises(InputError, match=r"model\.engine is not the one"):
        open_executions(Run.open(run_copy), None, "cpu", "fp32")


def test_an_engine_of_another_file(run_copy):
    plant_engine(run_copy, onnx_sha256="0" * 64)
    with pytest.raises(InputError, match=r"model\.onnx is not the one"):
        open_executions(Run.open(run_copy), None, "cpu", "fp32")


def test_an_engine_without_its_sidecar(run_copy):
    plant_engine(run_copy)
    (run_copy / "model.engine.json").unlink()
    with pytest.raises(InputError, match="sidecar cannot be read"):
        open_executions(Run.open(run_copy), None, "cpu", "fp32")


RTX_SM89, RTX_BOTH = "model.tensorrt-rtx.sm89.engine", "model.tensorrt-rtx.sm86-sm89.engine"
PLANTED = {
    "model.engine": {"product": "tensorrt-rtx", "compute_capabilities": ["SM89"]},
    RTX_SM89: {"product": "tensorrt-rtx", "compute_capabilities": ["SM89"]},
    RTX_BOTH: {"product": "tensorrt-rtx", "compute_capabilities": ["SM86", "SM89"]},
    "model.tensorrt.sm80.ampere_plus.engine": {
        "product": "tensorrt",
        "compute_capabilities": ["SM80"],
        "hardware_compatibility": "ampere_plus",
    },
}


@pytest.mark.parametrize(
    ("product", "gpu", "chosen"),
    [
        (Product.TENSORRT_RTX, "SM89", RTX_SM89),
        (Product.TENSORRT_RTX, "SM86", RTX_BOTH),
        (Product.TENSORRT_RTX, "SM120", None),
        (Product.TENSORRT, "SM90", "model.tensorrt.sm80.ampere_plus.engine"),
        (Product.TENSORRT, "SM75", None),
    ],
)
def test_the_engine_for_the_gpu_at_hand(tmp_path, product, gpu, chosen):
    for name, facts in PLANTED.items():
        (tmp_path / name).write_bytes(name.encode())
        (tmp_path / f"{name}.json").write_text(json.dumps(facts))
    if chosen is None:
        with pytest.raises(
            InputError, match=rf"no engine of the run is for this GPU, {gpu}: it has .* for SM8"
        ):
            engine_file(tmp_path, product, gpu)
    else:
        assert engine_file(tmp_path, product, gpu).name == chosen


def test_an_engine_of_before_targets_were_in_names_is_tried(tmp_path):
    (tmp_path / "model.engine").write_bytes(b"an engine")
    facts = {"product": "tensorrt", "compute_capabilities": ["current"], "gpu": "NVIDIA L4"}
    (tmp_path / "model.engine.json").write_text(json.dumps(facts))
    assert engine_file(tmp_path, Product.TENSORRT, "SM89").name == "model.engine"
    with pytest.raises(InputError, match="no engine of tensorrt-rtx"):
        engine_file(tmp_path, Product.TENSORRT_RTX, "SM89")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_sound_engine_without_a_gpu_is_skipped_with_the_reason(run_copy, monkeypatch):
    for network in ("float_network", "fake_quant_network"):
        monkeypatch.setattr(Run, network, lambda self: nn.Identity())
    plant_engine(run_copy, onnx_sha256=sha256(run_copy / "model.onnx"))
    found = open_executions(Run.open(run_copy), None, "cpu", "fp32")
    assert {"tensorrt", "tensorrt-rtx"} <= set(found.skipped)
    assert all(
        "CUDA" in found.skipped[n] or "pip install" in found.skipped[n] for n in ("tensorrt", "tensorrt-rtx")
    )


WEIGHT = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)


def save(path, batch):
    """A linear classifier on (batch, 3, 2, 2)."""
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path))
    return path


def images(count, channels=3):
    return np.random.default_rng(1).normal(size=(count, channels, 2, 2)).astype(np.float32)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("batch", ["n", 4])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_onnx_runtime_against_numpy(tmp_path, optimize, batch, count):
    backend = OnnxRuntimeBackend("x", save(tmp_path / "m.onnx", batch), optimize=optimize, threads=1)
    x = images(count)
    np.testing.assert_allclose(backend(x)[LOGITS], x.reshape(count, 12) @ WEIGHT, rtol=1e-5, atol=1e-6)
    assert backend.detail["provider"] == "CPUExecutionProvider"
    assert backend.detail["optimisations"] == ("all" if optimize else "off")


def test_images_of_another_shape(tmp_path):
    backend = OnnxRuntimeBackend("x", save(tmp_path / "m.onnx", "n"), optimize=True)
    with pytest.raises(InputError, match=r"\[3, 2, 2\].*\[1, 2, 2\]"):
        backend(images(2, channels=1))


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_truncated_file(tmp_path, keep):
    path = save(tmp_path / "m.onnx", "n")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match="cannot load the file") as info:
        OnnxRuntimeBackend("x", path, optimize=True)
    assert "\n" not in str(info.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="cannot load the file"):
        OnnxRuntimeBackend("x", tmp_path / "none.onnx", optimize=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_is_missing_or_falls_back(tmp_path, provider):
    assert "CPUExecutionProvider" in onnxruntime.get_available_providers()
    with pytest.raises(InputError, match=f"provider '{provider}'"):
        OnnxRuntimeBackend("x", save(tmp_path / "m.onnx", "n"), optimize=True, provider=provider)


def test_torch():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5, bias=False))
    module[1].weight.data = torch.from_numpy(WEIGHT.T.copy())
    x = images(3)
    np.testing.assert_allclose(
        TorchBackend("t", module)(x)[LOGITS], x.reshape(3, 12) @ WEIGHT, rtol=1e-5, atol=1e-6
    )
