"""What is timed beside what, and what is said of an execution that is not faster than the float network."""

import pytest

from ospq_export.demo import demo_images
from ospq_export.runs.run import Run
from ospq_export.validate import validate
from ospq_export.validate.executions.engines import slow_layers
from ospq_export.validate.executions.table import OPTIMIZED, UNOPTIMIZED
from ospq_export.validate.latency import Latency, not_faster
from ospq_export.validate.timing import _baseline


def took(name, milliseconds, batch_size=1):
    rest = {"p90_ms": milliseconds, "images_per_second": 1e3 * batch_size / milliseconds, "calls": 3}
    return Latency(name=name, batch_size=batch_size, median_ms=milliseconds, **rest)


def test_only_what_is_slower_is_said_with_its_cost():
    timed = [took("a", 2.0), took("a", 9.0, 8), took("a", 40.0, 32), took("b", 1.0)]
    timed += [took("float", 2.5), took("float", 9.2, 8), took("float", 39.0, 32)]
    asked = []

    def cost(name):
        asked.append(name)
        return "two products in float"

    (line,) = not_faster(timed, {"a": "float", "b": "nothing"}, cost)
    where = "batch 8 (9 ms against 9.2 ms), batch 32 (40 ms against 39 ms)"
    assert line == f"a is not faster than float at {where}: two products in float"
    assert asked == ["a"], "what costs time is looked for only where it is needed"
    assert not_faster(timed, {"a": "float"}, lambda _: "") == [line.partition(": two")[0]]


@pytest.mark.parametrize(
    ("name", "device", "beside", "expected"),
    [
        ("onnxruntime", "cpu", ["onnxruntime-fp32", "onnxruntime-fp16"], "onnxruntime-fp32"),
        ("onnxruntime", "cuda", ["onnxruntime-fp32", "onnxruntime-fp16"], "onnxruntime-fp16"),
        ("onnxruntime", "cuda", ["onnxruntime-fp32"], "onnxruntime-fp32"),
        ("openvino", "cpu", ["onnxruntime-fp32", "openvino-fp32"], "openvino-fp32"),
        ("tensorrt-rtx", "cuda", ["onnxruntime-fp32", "tensorrt-rtx, float"], "tensorrt-rtx, float"),
        ("tensorrt-rtx", "cuda", ["onnxruntime-fp32"], None),
        ("float", "cpu", ["onnxruntime-fp32"], None),
        ("onnxruntime-unoptimised", "cpu", ["onnxruntime-fp32"], None),
    ],
)
def test_the_float_execution_that_has_to_be_beaten(name, device, beside, expected):
    assert _baseline(name, {name, *beside}, device) == expected


def test_what_costs_time_in_a_plan():
    left = {f"blocks.{i}": "x" for i in range(5)}
    said = slow_layers({"not_quantized": {"head": "a convolution", "neck": "x"}, "not_fused": left})
    assert said == (
        "in float run head (a convolution), neck (x); "
        "attentions apart are blocks.0 (x), blocks.1 (x), blocks.2 (x) and 2 more"
    )
    for damaged in ({"not_quantized": {}, "not_fused": []}, {"not_fused": "x"}, {}, [], None, 1):
        assert slow_layers(damaged) == ""


@pytest.mark.slow
def test_a_run_that_is_slow_says_why(finished_runs):
    run = Run.open(finished_runs["w8a8"])
    given = {"limit": 16, "floor_images": 0, "code_images": 0, "latency": [1, 4]}
    report = validate(run, demo_images("test", run.manifest.data), backends=[OPTIMIZED, UNOPTIMIZED], **given)
    took = {(x.name, x.batch_size): x.median_ms for x in report.latencies}
    slow = [n for n in (1, 4) if took[OPTIMIZED, n] > 0.95 * took["onnxruntime-fp32", n]]
    lines = [line for line in report.findings if "is not faster" in line]
    assert len(lines) == bool(slow) and all(line.startswith(f"{OPTIMIZED} is") for line in lines)
    assert all(f"batch {n} (" in lines[0] and "patch_embed.proj/Conv" in lines[0] for n in slow)
    assert all(x.p99_ms >= x.p90_ms >= x.median_ms and x.graph_ms is None for x in report.latencies)
