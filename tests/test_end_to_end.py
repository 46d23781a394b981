"""The whole command line on real architectures (slow)."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import calibrated_demo
from forks import Forked, command_line
from PIL import Image

from ospq_export.data import ImageSet
from ospq_export.demo import demo_images
from ospq_export.export import export
from ospq_export.runs.run import Run
from ospq_export.validate import validate

pytestmark = pytest.mark.slow


def command(folder, *arguments, expect=0):
    done = Forked(folder, command_line, *map(str, arguments), "--quiet")
    assert done.ended() == expect, done.output + done.errors
    return done.output


def settings(*values):
    return [part for value in values for part in ("--set", value)]


def test_demo_is_faithful(tmp_path):
    """In a process of its own, as users start it."""
    short = settings(
        *("reconstruction.iterations=5", "reconstruction.refinement_images=8", "slicing=block"),
        *("calibration_images=64", "observation_images=64"),
    )
    command = [
        "demo",
        "--model",
        "vit",
        "--recipe",
        "w8a8",
        "--limit",
        "700",
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "ospq_export.cli", *command, *short, "--quiet"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout[done.stdout.index("the deployment is") :].splitlines()
    assert lines[0].startswith("the deployment is faithful: ") and lines[1].startswith("accuracy is kept: ")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    top1 = {b["name"]: b["scores"]["Top-1"] for b in report["backends"]}
    assert top1["float"] > 85 and top1["fake_quant"] > top1["float"] - 1


def test_lost_accuracy_is_said_at_every_size_that_shows_it(tmp_path):
    """Two bits by round to nearest lose tens of points; five images show nothing."""
    broken = ["weight_bits=2", "activation_bits=2", "reconstruction.iterations=0", "equalization=none"]
    run = Run.open(
        calibrated_demo("swin", "w4a4", tmp_path / "run", *broken, "slicing=block", small=True).path
    )
    export(run.path)
    run, images = Run.open(run.path), demo_images("test", run.manifest.data)
    for limit, status, outcome in ((5, 3, "open"), (100, 1, "missed"), (250, 1, "missed")):
        report = validate(run, images, backends=["onnxruntime", "float"], limit=limit, floor_images=0)
        verdict = report.verdict
        assert verdict.exit_status == status and verdict.accuracy.outcome == outcome, verdict.text
    top1 = {b.name: b.scores["Top-1"] for b in report.backends}
    assert top1["float"] - top1["onnxruntime"] > 10
    line = next(line for line in verdict.text if line.startswith("accuracy is not kept"))
    assert f"{top1['onnxruntime']:.2f} %" in line and f"float {top1['float']:.2f} %" in line


@pytest.fixture
def jpegs(tmp_path):
    """Three classes of three smooth 320 x 240 px pictures."""
    rng = np.random.default_rng(0)
    for name in ("n01", "n02", "n03"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8))
            smooth = coarse.resize((320, 240), Image.Resampling.BICUBIC)
            smooth.save(tmp_path / "images" / name / f"{i}.JPEG")
    (tmp_path / "classes.txt").write_text("".join(f"n{number:02}\n" for number in range(1000)))
    return tmp_path / "images"


def noise_floor(folder, images):
    """Mean distance of the logits of two executions of the fake-quantized network: in float32 and in float64."""
    run = Run.open(folder)
    batch = ImageSet.from_folder(images, run.manifest.data).sample(9, seed=0)
    module = run.fake_quant_network()
    with torch.inference_mode():
        single = module(batch.images)
        double = module.double()(batch.images.double())
    return float((single - double).abs().mean())


def test_224_px_with_random_weights(tmp_path, jpegs):
    short = settings(
        *("reconstruction.iterations=1", "reconstruction.refinement_images=0", "reconstruction.batch_size=4"),
        *("calibration_images=4", "observation_images=4"),
    )
    run, data = tmp_path / "run", ["--data", jpegs, "--class-map", tmp_path / "classes.txt", "--workers", 0]
    model = ["deit_tiny_patch16_224", "--random-weights", "--model-kwargs", "depth=2"]
    command(tmp_path, "calibrate", *model, *data, "--out", run, *short)
    command(tmp_path, "export", run)
    # Random weights give a thousand near-equal logits: their order says nothing, their values do.
    loose = ["--min-agreement", 0, "--max-top1-difference", 100, "--max-drop", 100]
    command(tmp_path, "validate", run, *data, *loose, "--batch-size", 4)
    report = json.loads((run / "report.json").read_text())
    # From block to block rounding edges amplify a last bit to the size of the quantization error itself, in any two executions.
    allowed = 1.5 * noise_floor(run, jpegs)
    assert len(report["comparisons"]) == 2
    for comparison in report["comparisons"]:
        assert comparison["mean_logit_difference"] < allowed
