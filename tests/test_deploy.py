"""What leaves a run for a server or a device, and comes back: every task, planted faults, and what is refused.

The server is real HTTP with ONNX Runtime behind it (kserve.py); on the device ONNX Runtime stands in TensorRT's place.
"""

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import RTX
from kserve import served
from onnx import helper, numpy_helper
from test_api import SHORT, images, labels_of, network, swapped
from torch.utils.data import DataLoader, TensorDataset

import ospq_export
from ospq_export import InputError, Run, cli
from ospq_export.demo import demo_images
from ospq_export.export.bundle import Contents, write_bundle
from ospq_export.runs.files import sha256
from ospq_export.runs.manifest import read_manifest, record_files
from ospq_export.validate.executions.table import FAKE_QUANT, FLOAT
from ospq_export.validate.executions.triton import Server

TASKS = ["classify", "embed", "dense", "tensors"]
SOURCES = Path(ospq_export.__file__).parent / "export" / "device"
IMAGES = 64


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An exported run of each task, made when it is first asked for; do not change it."""
    made = {}

    def get(task):
        if task not in made:
            out = tmp_path_factory.mktemp("deploy") / task
            overrides = [*SHORT, "reconstruction.iterations=2"]
            made[task] = Run.calibrate(
                network(task), images(32, 0), "w8a8", out, overrides=overrides
            ).export()
        return made[task]

    return get


def pairs(task, count=IMAGES):
    x = images(count, 1)
    return DataLoader(TensorDataset(x, labels_of(task, x)), batch_size=50)


def copied(run, folder):
    return Run.open(shutil.copytree(run.path, folder / "run"))


def weights_off(model):
    """Every weight's scale 2 % too large."""
    codes = {n.input[0]: n.input[1] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    scales = {codes[t.name] for t in model.graph.initializer if t.name in codes and "weight" in t.name}
    assert scales
    for tensor in model.graph.initializer:
        if tensor.name in scales:
            values = numpy_helper.to_array(tensor) * np.float32(1.02)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def rows_swapped(model):
    """The first two rows of every batch under each other's place; batches have two at least."""
    ends = {"first": (0, 1), "second": (1, 2), "others": (2, 2**62)}
    for name, (start, end) in ends.items():
        for part, value in (("start", start), ("end", end)):
            constant = numpy_helper.from_array(np.array([value]), f"{name}.{part}")
            model.graph.initializer.append(constant)
    for output in model.graph.output:
        for node in model.graph.node:
            node.output[:] = [f"{o}.sorted" if o == output.name else o for o in node.output]
            node.input[:] = [f"{i}.sorted" if i == output.name else i for i in node.input]
        parts = [f"{output.name}.{name}" for name in ("second", "first", "others")]
        for name, part in zip(("second", "first", "others"), parts, strict=True):
            inputs = [f"{output.name}.sorted", f"{name}.start", f"{name}.end"]
            model.graph.node.append(helper.make_node("Slice", inputs, [part]))
        model.graph.node.append(helper.make_node("Concat", parts, [output.name], axis=0))


def plant(path, fault):
    model = onnx.load(path)
    fault(model)
    onnx.save(model, path)


def within_noise(report, name):
    """Nothing speaks against it, and what can be told of so few images is told."""
    found = {c.name: c.outcome for c in report.verdict.faithful.criteria if c.deployed == name}
    seen = all(o.beyond == 0 for c in report.comparisons for o in c.outputs)
    return "missed" not in found.values() and seen and found.get("logits", "met") == "met"


# A served model.


def served_report(run, repository, task, count=IMAGES, **settings):
    with served(repository) as server:
        given = {
            "backends": ["triton"],
            "server": Server(server.url, "net"),
            "floor_images": count,
            **settings,
        }
        return run.validate(pairs(task, count), documents=False, **given), server.requests


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_served_model_is_judged(runs, tmp_path, task):
    run = runs(task)
    run.serve(tmp_path, "net")
    report, requests = served_report(run, tmp_path, task)
    assert within_noise(report, "triton"), report.verdict.text
    assert max(requests) == 32, "no more at once than the configuration allows"
    # Four images are asked for again: each in every row of a batch, and all four twice.
    assert sum(requests) == IMAGES + 6 * 4
    detail = report.backends[-1].detail
    assert detail["model"] == "net, version 1" and detail["file"] == "model.onnx"
    assert "127.0.0.1" not in report.model_dump_json(), "a report names no host"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "fault", "said"),
    [
        ("classify", weights_off, "beyond the noise"),
        ("tensors", weights_off, "beyond the noise"),
        ("tensors", swapped, "classes holds what boxes should"),
        ("embed", rows_swapped, "beyond the noise"),
    ],
)
def test_faults_of_a_served_model_are_found(runs, tmp_path, task, fault, said):
    runs(task).serve(tmp_path, "net")
    plant(tmp_path / "net" / "1" / "model.onnx", fault)
    report, _ = served_report(runs(task), tmp_path, task)
    assert report.faithful is False and not report
    assert any(said in c.text for c in report.verdict.criteria if c.outcome == "missed"), report.verdict.text


@pytest.mark.slow
def test_a_model_that_takes_pixels(every_file, tmp_path):
    """The client sends the pixels that the images were; what are none is refused."""
    run = Run.open(shutil.copytree(every_file, tmp_path / "run"))
    run.serve(tmp_path / "repository", "net")
    with served(tmp_path / "repository") as server:
        settings = {"backends": ["triton"], "server": Server(server.url, "net"), "documents": False}
        test = demo_images("test", run.data)
        report = run.validate(test, limit=40, floor_images=40, **settings)
        with pytest.raises(InputError, match="takes 8-bit pixels"):
            run.validate(torch.rand(4, 1, 28, 28), **settings)
    detail = report.backends[-1].detail
    assert (detail["input"], detail["file"]) == ("UINT8 [-1, 28, 28, 1]", "model_uint8.onnx")
    assert report.faithful is not False, report.verdict.text


class Untouched:
    """Images that must not be asked for."""

    def __iter__(self):
        raise AssertionError("work began")


def refused(run, server, match):
    with pytest.raises(InputError, match=match) as info:
        run.validate(Untouched(), backends=["triton"], server=server, documents=False)
    assert "\n" not in str(info.value)


def other_outputs(config):
    config.output[0].name = "probabilities"


def other_shape(config):
    config.input[0].dims[:] = [3, 32, 24]


def other_type(config):
    config.output[0].data_type = 9


def other_run(config):
    config.parameters["quantized_sha256"].string_value = "0" * 64


@pytest.mark.slow
def test_what_is_served_is_looked_at_before_any_work(runs, tmp_path):
    run = runs("tensors")
    run.serve(tmp_path, "net")
    refused(run, Server("http://127.0.0.1:1"), "does not answer.*`url`")
    refused(run, Server("grpc://127.0.0.1:1"), "no address of a server")
    refused(run, None, "where the model is served is not given")
    with served(tmp_path) as server:
        here = Server(server.url, "net")
        refused(run, Server(server.url, "other"), "knows no such model.*other")
        for change, said in (
            (other_outputs, "has no output classes, only probabilities"),
            (other_shape, r"takes FP32 \[3, 32, 24\], the run FP32 \[4, 32, 24\]"),
            (other_type, r"its classes is INT64"),
            (other_run, "of another run"),
        ):
            kept = type(server.models["net"].config)()
            kept.CopyFrom(server.models["net"].config)
            change(server.models["net"].config)
            refused(run, here, said)
            server.models["net"].config = kept
        server.models["net"].ready = False
        refused(run, here, "not ready")
    with pytest.raises(InputError, match="nothing asks the server"):
        run.validate(Untouched(), server=here, documents=False)
    with pytest.raises(InputError, match="does not run here"):
        run.validate(Untouched(), backends=["device"], documents=False)


@pytest.mark.slow
def test_a_server_that_fails_in_between(runs, tmp_path):
    run = runs("tensors")
    run.serve(tmp_path, "net")
    with served(tmp_path) as server:
        server.models["net"].infer = None
        with pytest.raises(InputError, match=r"the server failed: .*not callable"):
            run.validate(images(8, 1), backends=["triton"], server=Server(server.url, "net"), documents=False)


# A bundle for a device.

ALONE = """
import runpy, sys
# What a device does not have.
for name in ("ospq_export", "torch", "onnx", "timm", "pydantic"):
    sys.modules[name] = None
sys.argv = ["check.pyz", "--runtime", "onnxruntime", *sys.argv[1:]]
runpy.run_path("check.pyz", run_name="__main__")
"""


def checked(run, task, folder, count=IMAGES, fault=None):
    """Pack, unpack, and run the script on its own; returns what it printed, its status, and the path of its result."""
    if fault is not None:
        run = copied(run, folder)
        plant(run.path / "model.onnx", fault)
        run.manifest = record_files(run.path, run.manifest, "model.onnx")
    run.bundle(folder / "bundle.zip", pairs(task, count), images=count)
    device = folder / "device"
    zipfile.ZipFile(folder / "bundle.zip").extractall(device)
    done = subprocess.run([sys.executable, "-I", "-c", ALONE], cwd=device, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return run, done, device / "result.json"


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_device_is_judged(runs, tmp_path, task):
    run, done, result = checked(runs(task), task, tmp_path)
    assert done.returncode == 0 and done.stdout.strip().endswith("within the noise"), done.stdout
    run = copied(run, tmp_path)
    report = run.report_device(result)
    assert within_noise(report, "device"), report.verdict.text
    assert report.images == IMAGES
    assert [b.name for b in report.backends] == [FLOAT, FAKE_QUANT, "fake_quant-fp16", "device"]
    detail = report.backends[-1].detail
    assert detail["runtime"].startswith("onnxruntime ") and detail["file"] == "model.onnx"
    assert {x.name for x in report.latencies} == {"device", "device, float"}
    assert "device against device, float" in (run.path / "report.html").read_text()
    # The same images through the executions here give the same figures.
    if task == "classify":
        given = {"backends": ["onnxruntime"], "code_images": 0, "floor_images": IMAGES}
        here = run.validate(pairs(task), documents=False, **given)
        ours, theirs = here.comparisons[0], report.comparisons[0]
        assert ours.agreement == theirs.agreement and ours.reference_score == theirs.reference_score
        assert here.floor.reach(FAKE_QUANT) == pytest.approx(report.floor.reach(FAKE_QUANT), rel=0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "fault", "printed", "judged"),
    [
        ("classify", weights_off, "more than noise", "beyond the noise"),
        ("tensors", rows_swapped, "row 0 holds 1's, row 1 holds 0's", "beyond the noise"),
    ],
)
def test_faults_on_a_device_are_found(runs, tmp_path, task, fault, printed, judged):
    run, done, result = checked(runs(task), task, tmp_path, IMAGES, fault)
    assert done.returncode == 1 and printed in done.stdout, done.stdout
    report = run.report_device(result, documents=False)
    assert report.faithful is False
    assert any(judged in c.text for c in report.verdict.criteria if c.outcome == "missed")
    assert any(printed in finding for finding in report.findings)


@pytest.mark.slow
def test_results_that_are_not_taken(runs, tmp_path):
    run, _, result = checked(copied(runs("tensors"), tmp_path), "tensors", tmp_path, 16)
    good = json.loads(result.read_text())
    (run.path / "report.json").unlink(missing_ok=True)

    def refuse(match, text=None, **changes):
        result.write_text(json.dumps({**good, **changes}) if text is None else text)
        with pytest.raises(InputError, match=match) as info:
            run.report_device(result, documents=False)
        assert "\n" not in str(info.value)

    refuse("no result of a device", text="{")
    refuse("no result of a device: labels", text=json.dumps({k: v for k, v in good.items() if k != "labels"}))
    refuse("schema_version", schema_version=2)
    refuse("of another run", bundle={**good["bundle"], "quantized_sha256": "0" * 64})
    files = {**good["bundle"]["files"], "model.onnx": "0" * 64}
    refuse(r"another model\.onnx", bundle={**good["bundle"], "files": files})
    outputs = good["outputs"]
    refuse("no result of a device", outputs={k: v for k, v in outputs.items() if k != FLOAT})
    refuse("other outputs", outputs={**outputs, "device": {"classes": outputs["device"]["classes"]}})
    short = {**outputs["device"]["classes"], "base64": "AAAA"}
    refuse("no result of a device", outputs={**outputs, "device": {**outputs["device"], "classes": short}})
    with pytest.raises(InputError, match="cannot be read"):
        run.report_device(tmp_path / "nothing.json")
    assert not (run.path / "report.json").exists()


@pytest.mark.slow
def test_a_damaged_bundle(runs, tmp_path):
    """The script takes no file that is not the bundle's, and writes nothing."""
    _, _, result = checked(runs("tensors"), "tensors", tmp_path, 16)
    result.unlink()
    with (result.parent / "model.onnx").open("ab") as file:
        file.write(b"\0")
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE], cwd=result.parent, capture_output=True, text=True
    )
    assert done.returncode == 2 and not result.exists()
    assert done.stderr.strip() == "error: model.onnx is not the bundle's: unpack it again"


@pytest.fixture
def contents():
    values = np.arange(8, dtype=np.float32).reshape(4, 2)
    outputs = {name: {"logits": values} for name in (FLOAT, FAKE_QUANT)}
    return Contents(
        np.zeros((4, 1, 28, 28), np.float32), np.zeros(4, np.int64), outputs, {"ids": list("abcd")}
    )


def test_a_bundle_knows_no_clock_and_no_host(finished_runs, tmp_path, contents):
    run = Run.open(finished_runs["w8a8"])
    for name in ("a.zip", "b.zip"):
        write_bundle(run, tmp_path / name, contents)
    assert sha256(tmp_path / "a.zip") == sha256(tmp_path / "b.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        facts = json.loads(archive.read("bundle.json"))
        assert {e.date_time for e in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert set(archive.namelist()) == {*facts["files"], "bundle.json", "check.pyz"}
    assert (
        facts["network"] == "model.onnx" and facts["files"]["model.onnx"] == run.manifest.files["model.onnx"]
    )
    assert str(run.path.parent) not in json.dumps(facts)


def test_the_deployed_file_is_packed(every_file, tmp_path, contents):
    write_bundle(Run.open(every_file), tmp_path / "a.zip", contents)
    facts = json.loads(zipfile.ZipFile(tmp_path / "a.zip").read("bundle.json"))
    assert (facts["network"], facts["baseline"]) == ("model_qdq_fp16.onnx", "model_fp16.onnx")
    assert facts["float_type"] == "fp16" and facts["opset"] >= 19


def test_an_existing_bundle_stays(finished_runs, tmp_path, contents):
    (tmp_path / "a.zip").write_text("mine")
    run = Run.open(finished_runs["w8a8"])
    with pytest.raises(InputError, match="the bundle exists"):
        write_bundle(run, tmp_path / "a.zip", contents)
    with pytest.raises(InputError, match="it is a folder"):
        write_bundle(run, tmp_path, contents)
    assert (tmp_path / "a.zip").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("source", sorted(SOURCES.glob("*.py")), ids=lambda path: path.name)
def test_the_script_is_of_the_oldest_python(source):
    tree = ast.parse(source.read_text(), feature_version=(3, 8))
    names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    names += [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    outside = {n.split(".")[0] for n in names} - set(sys.stdlib_module_names)
    assert outside <= {"numpy", "runtimes"}


@RTX
def test_tensorrt_reads_the_file_as_it_says(every_file, monkeypatch):
    """TensorRT-RTX has TensorRT's Python API: the file is parsed, as a strongly typed network."""
    import tensorrt_rtx

    monkeypatch.syspath_prepend(SOURCES)
    import runtimes

    log = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    path = every_file / "model_qdq_fp16.onnx"
    builder, network, parser, typed = runtimes.parse(tensorrt_rtx, log, path)
    assert typed and builder and parser and network.get_output(0).name == "logits"
    with pytest.raises(runtimes.BadInput, match="parser refuses"):
        runtimes.parse(tensorrt_rtx, log, every_file / "scales.json")


# The command line.


def line(capsys, *arguments):
    with pytest.raises(SystemExit) as info, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ospq-export", *map(str, arguments)])
        cli.main()
    captured = capsys.readouterr()
    return info.value.code or 0, captured.out, captured.err


@pytest.mark.slow
def test_from_the_command_line(run_copy, tmp_path, capsys):
    arrays = tmp_path / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (24, 28, 28), dtype=np.uint8)
    np.savez(arrays, images=pixels, labels=np.arange(24) % 10)
    repository, bundle = tmp_path / "repository", tmp_path / "bundle.zip"
    words = ["export", run_copy, "--triton", repository, "--triton-model", "net", "--bundle", bundle]
    before = read_manifest(run_copy).files
    status, out, err = line(capsys, *words, "--data", arrays, "--bundle-images", 16, "--quiet")
    assert status == 0 and "wrote the model" in out and "check.pyz" in out, err
    assert read_manifest(run_copy).files == before, "what was exported stays"
    assert line(capsys, *words, "--data", arrays)[0] == 2, "nothing is replaced without being asked"
    with served(repository) as server:
        asked = ["validate", run_copy, "--data", arrays, "--backend", "triton", "--url", server.url]
        status, out, err = line(capsys, *asked, "--triton-model", "net", "--quiet", "--workers", 0)
    assert status in (0, 1, 3) and "triton" in out, err
    zipfile.ZipFile(bundle).extractall(tmp_path / "device")
    subprocess.run(
        [sys.executable, "-I", "-c", ALONE], cwd=tmp_path / "device", capture_output=True, check=True
    )
    result = tmp_path / "device" / "result.json"
    status, out, err = line(capsys, "validate", run_copy, "--device-result", result)
    assert status in (0, 1, 3) and "device" in out and "report.html" in out, err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["export", "RUN", "--triton-model", "a"], "give --triton"),
        (["export", "RUN", "--bundle", "a.zip"], "give --data"),
        (["export", "RUN", "--data", "a"], "give --bundle"),
        (["validate", "RUN"], "--data"),
        (["validate", "RUN", "--data", "a", "--triton-model", "a"], "give --url"),
        (["validate", "RUN", "--device-result", "a", "--data", "a"], "--data"),
        (["validate", "RUN", "--device-result", "nothing.json"], "nothing.json"),
    ],
)
def test_options_that_miss_another(finished_runs, capsys, words, said):
    words = [str(finished_runs["w8a8"]) if word == "RUN" else word for word in words]
    status, _, err = line(capsys, *words)
    assert status == 2 and err.startswith("error: ") and said in err and len(err.splitlines()) == 1
