"""Planted faults in an exported file: each is caught, and the report points at the slice."""

import shutil

import numpy as np
import onnx
import pytest
from conftest import calibrated_demo
from onnx import numpy_helper

from ospq_export.demo import demo_images
from ospq_export.errors import InputError
from ospq_export.export import export
from ospq_export.runs.manifest import read_manifest, record_files, write_manifest
from ospq_export.runs.run import Run
from ospq_export.validate import validate, write_documents
from ospq_export.validate.executions.table import FAKE_QUANT, OPTIMIZED, UNOPTIMIZED

SLICE = "layers.0.blocks.1"


def report_of(folder):
    run = Run.open(folder)
    images = demo_images("test", run.manifest.data)
    return validate(
        run, images, backends=[FAKE_QUANT, UNOPTIMIZED], limit=100, floor_images=100, code_images=4
    )


def constants(model):
    return {t.name: t for t in model.graph.initializer}


def store(model, name, value):
    tensor = constants(model)[name]
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))


def quantize_node(model, quantizer):
    return next(n for n in model.graph.node if f"{quantizer}.codes" in n.output)


def scale_of(model, quantizer):
    return quantize_node(model, quantizer).input[1]


def own_scale(model, quantizer, value):
    """Give one quantizer's Q and DQ a scale of their own: the exporter shares equal constants."""
    name = f"{quantizer}.planted"
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
    quantize_node(model, quantizer).input[1] = name
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] == f"{quantizer}.codes":
            node.input[1] = name


def read_scale(model, quantizer):
    return numpy_helper.to_array(constants(model)[scale_of(model, quantizer)])


def scale_off_by_two_percent(model):
    name = f"{SLICE}.mlp.fc1.input"
    own_scale(model, name, read_scale(model, name) * 1.02)


def weight_scale_off(model):
    codes = f"{SLICE}.mlp.fc2.weight.codes"
    name = next(n for n in model.graph.node if codes in n.input).input[1]
    store(model, name, numpy_helper.to_array(constants(model)[name]) * np.float32(1.02))


def weight_off_by_one(model):
    name = f"{SLICE}.mlp.fc1.weight.codes"
    codes = numpy_helper.to_array(constants(model)[name]).astype(int)
    store(model, name, np.clip(codes + 1, -128, 127).astype(np.int8))


def weight_transposed(model):
    name = f"{SLICE}.attn.proj.weight.codes"
    store(model, name, numpy_helper.to_array(constants(model)[name]).T)


def scales_swapped(model):
    first, second = f"{SLICE}.attn.qkv.input", "layers.2.blocks.0.attn.qkv.input"
    ours, theirs = read_scale(model, first), read_scale(model, second)
    own_scale(model, first, theirs)
    own_scale(model, second, ours)


FAULTS = [scale_off_by_two_percent, weight_scale_off, weight_off_by_one, weight_transposed, scales_swapped]


def plant(folder, fault):
    model = onnx.load(str(folder / "model.onnx"))
    fault(model)
    onnx.save(model, str(folder / "model.onnx"))
    record_files(folder, read_manifest(folder), "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_located(run_copy, fault):
    plant(run_copy, fault)
    report = report_of(run_copy)
    assert report.verdict.faithful.outcome == "missed" and report.verdict.exit_status == 1
    assert report.locations[0].first_diverging == SLICE, report.locations[0].faults
    assert any(SLICE in reason for reason in report.verdict.reasons)


@pytest.mark.slow
def test_missing_clip_at_four_bits(finished_runs, tmp_path):
    folder = shutil.copytree(finished_runs["w4a4"], tmp_path / "run")

    def drop_clip(model):
        node = quantize_node(model, f"{SLICE}.mlp.fc1.input")
        clip = next(n for n in model.graph.node if node.input[0] in n.output)
        assert clip.op_type == "Clip"
        node.input[0] = clip.input[0]

    plant(folder, drop_clip)
    report = report_of(folder)
    assert not report.verdict.faithful and report.locations[0].first_diverging == SLICE


@pytest.mark.slow
@pytest.mark.parametrize(("network", "recipe"), [("swin", "w8a8"), ("swin", "w4a4"), ("vit", "w4a8")])
def test_unfaulted_run_is_faithful(finished_runs, tmp_path, network, recipe):
    """With optimisations off and on, at a batch size for each network."""
    folder = tmp_path / "run"
    if network == "swin":
        shutil.copytree(finished_runs[recipe], folder)
    else:
        calibrated_demo(network, recipe, folder, small=True)
        export(folder)
    run = Run.open(folder)
    images = demo_images("test", run.manifest.data)
    chosen = [FAKE_QUANT, UNOPTIMIZED, OPTIMIZED]
    # The floor is measured on all images: a few hundred are too few to judge from a part of them.
    batch_size = {"vit": 100, "swin": 32}[network]
    options = {"batch_size": batch_size, "limit": 400, "floor_images": 400, "code_images": 4}
    report = validate(run, images, backends=chosen, **options)
    # Whether so short a calibration keeps accuracy is not the question here.
    assert report.verdict.faithful, report.verdict.text
    assert [c.deployed for c in report.comparisons] == [UNOPTIMIZED, OPTIMIZED]
    assert report.locations[0].faults == [] and report.locations[0].unknown == []
    assert max(q.excess for q in report.locations[0].quantizers) < 1e-3


def test_file_of_another_run(run_copy, finished_runs):
    shutil.copy(finished_runs["w4a4"] / "model.onnx", run_copy / "model.onnx")
    record_files(run_copy, read_manifest(run_copy), "model.onnx")
    with pytest.raises(InputError, match="another run"):
        report_of(run_copy)


@pytest.mark.parametrize(
    "change", [{"mean": (0.5,)}, {"std": (0.5,)}, {"interpolation": "nearest"}, {"crop_pct": 0.9}]
)
def test_wrong_preprocessing(run_copy, change):
    run = Run.open(run_copy)
    images = demo_images("test", run.manifest.data.model_copy(update=change))
    with pytest.raises(InputError, match=next(iter(change))):
        validate(run, images, limit=10)


def test_preprocessing_changed_after_the_export(run_copy):
    """The manifest and the images agree with each other, and not with what the file was made for."""
    manifest = read_manifest(run_copy)
    data = manifest.data.model_copy(update={"std": (0.5,)})
    write_manifest(run_copy, manifest.model_copy(update={"data": data}))
    with pytest.raises(InputError, match="another preprocessing"):
        report_of(run_copy)


def test_a_file_that_does_not_say_what_it_was_made_for(run_copy):
    model = onnx.load(str(run_copy / "model.onnx"))
    next(p for p in model.metadata_props if p.key == "preprocessing").value = '{"mean": ['
    onnx.save(model, str(run_copy / "model.onnx"))
    record_files(run_copy, read_manifest(run_copy), "model.onnx")
    with pytest.raises(InputError, match="another preprocessing"):
        report_of(run_copy)


@pytest.mark.slow
def test_the_pages_point_at_the_slice(run_copy):
    plant(run_copy, scale_off_by_two_percent)
    report = report_of(run_copy)
    run = Run.open(run_copy)
    page = write_documents(run, report, demo_images("test", run.manifest.data)).read_text()
    assert f"The first slice that diverges is {SLICE}." in page and "Do not deploy it as it is" in page
    text = (run_copy / "report.md").read_text()
    assert f"The first slice that diverges is {SLICE}." in text and text.startswith(
        "- **the deployment is not faithful: "
    )


def test_changed_file_without_its_hash(run_copy):
    with (run_copy / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(InputError, match=r"model\.onnx was changed or truncated"):
        report_of(run_copy)


@pytest.mark.parametrize("keep", [0, 0.01, 0.5, 0.99])
def test_truncated_file(run_copy, keep):
    path = run_copy / "model.onnx"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    record_files(run_copy, read_manifest(run_copy), "model.onnx")
    with pytest.raises(InputError, match=r"model\.onnx"):
        report_of(run_copy)
