"""Two ONNX files held against each other: also files that no run knows."""

import json
import shutil
import sys
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ospq_export import cli
from ospq_export.runs.files import FLOAT_ONNX, QUANTIZED_ONNX

SIZE = (3, 8, 8)


def linear(path, *, off=0.0, outputs=("logits",), side=8, noise=0.0):
    """A classifier of 4 classes by a projection; one with `off` prefers the first class."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3 * side * side, 4)).astype(np.float32)
    weight += noise * np.random.default_rng(1).normal(size=weight.shape).astype(np.float32)
    nodes, values = [helper.make_node("Flatten", ["x"], ["flat"], axis=1)], []
    for name in outputs:
        nodes.append(helper.make_node("Gemm", ["flat", "w", "b"], [name]))
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, side, side])],
        values,
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(np.float32([off, 0, 0, 0]), "b")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """400 images in an archive, with the classes that the float file gives them."""
    folder = tmp_path_factory.mktemp("files")
    images = np.random.default_rng(2).integers(0, 256, (400, 8, 8, 3), dtype=np.uint8)
    weight = np.random.default_rng(0).normal(size=(192, 4)).astype(np.float32)
    pixels = (images.astype(np.float32) / 255 - 0.5) / 0.5
    labels = (pixels.transpose(0, 3, 1, 2).reshape(400, -1) @ weight).argmax(1)
    np.savez(folder / "images.npz", images=images, labels=labels)
    return folder / "images.npz"


@pytest.fixture
def run(capsys):
    """Runs `validate`; gives its exit status and all that it said."""

    def call(*arguments):
        words = ["ospq-export", "validate", *map(str, arguments), "--quiet", "--workers", "0"]
        with pytest.raises(SystemExit) as info, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            cli.main()
        captured = capsys.readouterr()
        return Done(info.value.code or 0, captured.out + captured.err)

    return call


class Done(NamedTuple):
    exit_code: int
    output: str


def compare(run, folder, data, *more, off=0.0, **deployed):
    original = linear(folder / "a.onnx")
    other = linear(folder / "b.onnx", off=off, **deployed)
    stated = ["--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5", "--interpolation", "bilinear", "--crop-pct", 1]
    return run("--float", original, "--deployed", other, "--data", data, *stated, *more)


def test_a_file_and_its_like(run, tmp_path, data):
    done = compare(run, tmp_path, data, noise=1e-4)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "b.report" / "report.json").read_text())
    assert report["images"] == 400 and report["accuracy"][0]["reference"] == "onnxruntime-fp32"
    assert report["backends"][0]["scores"]["Top-1"] == 100, "the labels are the float file's own predictions"
    assert {(v["reference"], v["name"]) for v in report["floor"]["variations"]} == {
        (file, name)
        for file in ("onnxruntime-fp32", "onnxruntime-unoptimised")
        for name in ("batch split", "thread count")
    }
    page = (tmp_path / "b.report" / "report.html").read_text()
    assert "Ready to deploy" in page and "b.onnx against a.onnx" in page


def test_a_file_that_lost_accuracy(run, tmp_path, data):
    done = compare(run, tmp_path, data, "--out", tmp_path / "there", off=20.0)
    assert done.exit_code == 1 and "accuracy is not kept" in done.output
    report = json.loads((tmp_path / "there" / "report.json").read_text())
    assert report["verdict"]["faithful"]["outcome"] == "met", "it computes what it says"
    assert report["accuracy"][0]["drop"] > 20


def test_several_outputs_under_other_names(run, tmp_path, data):
    original = linear(tmp_path / "a.onnx", outputs=("p", "q"))
    other = linear(tmp_path / "b.onnx", outputs=("r", "s"))
    stated = ["--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5"]
    done = run("--float", original, "--deployed", other, "--data", data, *stated)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "b.report" / "report.json").read_text())
    assert report["image_notes"] == {
        f"were prepared with a {name} that was assumed": 400
        for name in ("interpolation", "crop_pct", "crop_mode")
    }
    assert report["task"] == "tensors" and [o["name"] for o in report["comparisons"][0]["outputs"]] == [
        "p",
        "q",
    ]


def test_a_run_of_ours_says_itself_how_images_are_prepared(run, tmp_path, finished_runs):
    from ospq_export.demo import demo_images
    from ospq_export.runs.run import Run

    folder = shutil.copytree(finished_runs["w8a8"], tmp_path / "run")
    config = Run.open(folder).manifest.data
    batch = demo_images("test", config).sample(40, 0)
    pixels = batch.images.numpy() * np.reshape(config.std, (-1, 1, 1)) + np.reshape(config.mean, (-1, 1, 1))
    images = np.rint(pixels.clip(0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    np.savez(
        tmp_path / "i.npz",
        images=images[..., 0] if images.shape[-1] == 1 else images,
        labels=batch.labels.numpy(),
    )
    done = run(
        "--float", folder / FLOAT_ONNX, "--deployed", folder / QUANTIZED_ONNX, "--data", tmp_path / "i.npz"
    )
    assert done.exit_code in (0, 3), done.output
    assert "Top-1" in done.output


@pytest.mark.parametrize(
    ("more", "deployed", "said"),
    [
        ((), {"outputs": ("p", "q")}, "it has 2 outputs"),
        ((), {"side": 4}, "the file takes"),
        (("--task", "dense"), {}, "about logits for every pixel"),
        (("--std", "0,0,0"), {}, "std"),
    ],
)
def test_files_that_do_not_fit_are_one_line(run, tmp_path, data, more, deployed, said):
    done = compare(run, tmp_path, data, *more, **deployed)
    assert done.exit_code == 2 and said in done.output
    assert not (tmp_path / "b.report").exists()


def test_what_is_missing_is_one_line(run, tmp_path, data, finished_runs):
    file = linear(tmp_path / "a.onnx")
    for arguments, said in (
        (["--float", file, "--data", data], "--deployed"),
        (["--float", file, "--deployed", file, "--data", data], "--mean and --std"),
        (
            ["--float", tmp_path / "none.onnx", "--deployed", file, "--data", data],
            "the ONNX file cannot be read: No such file",
        ),
        (["--data", data], "nothing is given to validate"),
        ([finished_runs["w8a8"], "--data", data, "--mean", "0.5"], "the run says it itself"),
        ([finished_runs["w8a8"], "--float", file, "--deployed", file, "--data", data], "RUN alone"),
        (
            ["--float", file, "--deployed", file, "--data", data, "--device", "cpu", "--fp16"],
            "--fp16, --device",
        ),
        (["--float", file, "--deployed", file, "--data", data, "--backend", "openvino"], "not for two files"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2 and said in done.output, (arguments, done.output)
