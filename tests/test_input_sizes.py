"""Runs with a range of input sizes: calibrated at one, exported with free height and width, judged there and at both ends."""

import json
import sys
from functools import partial

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from any_size import Convolutions, Tokens
from helpers import RTX, SETTINGS

from ospq_export import Run
from ospq_export.cli.app import main
from ospq_export.data.config import DataConfig
from ospq_export.engines.record import build_engine
from ospq_export.errors import InputError
from ospq_export.graph.sizes import SizeRange
from ospq_export.runs.manifest import read_manifest

pytestmark = pytest.mark.slow
OWN, ENDS = (32, 32), ((16, 16), (40, 52))
SHORT = [
    "calibration_images=16",
    "observation_images=16",
    "reconstruction.batch_size=8",
    "reconstruction.iterations=4",
    "slicing=block",
]
PREPROCESSING = DataConfig(
    input_size=(3, *OWN),
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    interpolation="bilinear",
    crop_pct=1.0,
    crop_mode="center",
)


# Head size 16, and patches that the width of the largest size is no multiple of.
NETWORKS = {"convolutions": partial(Convolutions, 16), "tokens": partial(Tokens, 32, 4)}


def images(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 4, 4, generator=generator)
    return F.interpolate(coarse, size, mode="bilinear") + 0.1 * torch.randn(
        count, 3, *size, generator=generator
    )


def refused(capsys, *arguments):
    """What the command line says of bad input."""
    with pytest.raises(SystemExit) as info, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ospq-export", *arguments])
        main()
    assert info.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An exported run of each network, made when it is first asked for."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            out = tmp_path_factory.mktemp("sizes") / "run"
            run = Run.calibrate(
                NETWORKS[name]().eval(),
                images(16, OWN),
                "w8a8",
                out,
                overrides=SHORT,
                size_range=ENDS,
                preprocessing=PREPROCESSING,
            )
            made[name] = run.export(fp16=name == "tokens")
        return made[name]

    return get


@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_is_faithful_at_its_own_size_and_at_both_ends(runs, name):
    run = runs(name)
    assert read_manifest(run.path).size_range == SizeRange(smallest=ENDS[0], largest=ENDS[1])
    for size in (OWN, *ENDS):
        sized = run.at((3, *size))
        report = sized.validate(images(320, size, seed=1), documents=False, floor_images=64, code_images=8)
        assert report.faithful, report.verdict.text
        assert report.findings[0].startswith(
            f"judged at {size[0]}x{size[1]} alone, and the run takes 16x16 to"
        )
        assert [location.first_diverging for location in report.locations] == [None] * len(report.locations)
    ends = {f"report.{height}x{width}.json" for height, width in ENDS}
    assert {path.name for path in run.path.glob("report*")} == {"report.json", *ends}, (
        "each size keeps its own"
    )


def test_files_have_free_sides_and_say_between_which(runs):
    run = runs("tokens")
    for name in ("model.onnx", "model_fp32.onnx", "model_qdq_fp16.onnx"):
        model = onnx.load(str(run.path / name))
        dims = model.graph.input[0].type.tensor_type.shape.dim
        assert [d.dim_param for d in dims][2:] == ["height", "width"]
        assert dims[1].dim_value == 3
        assert dims[0].dim_param == "batch" or name == "model_qdq_fp16.onnx"
        said = {p.key: p.value for p in model.metadata_props}
        assert json.loads(said["size_range"])["largest"] == list(ENDS[1])


@RTX
def test_an_engine_has_the_ranges_profile(runs, tmp_path):
    run = runs("tokens")
    record = build_engine(run.path / "model_qdq_fp16.onnx", tmp_path / "x.engine", SETTINGS)
    assert record.input["shape"] == [1, 3, -1, -1]
    assert record.sides == {"height": (16, 32, 40), "width": (16, 32, 52)}
    assert record.fusion.quantized_gemms == record.fusion.gemms


def test_other_sizes_are_refused_in_one_line(runs, capsys):
    run = runs("tokens")
    with pytest.raises(InputError, match="images of 8x16 lies outside of 16x16 to 40x52"):
        run.at((3, 8, 16))
    with pytest.raises(InputError, match="is no size of images with 3 channels"):
        run.at((1, 16, 16))
    with pytest.raises(InputError, match=r"not float \(3, 32, 32\)"):
        run.validate(images(4, ENDS[0]), documents=False)
    fixed = Run(run.path, run.manifest.model_copy(update={"size_range": None}))
    with pytest.raises(InputError, match=r"takes images of 32x32 only.*calibrate with `size_range`"):
        fixed.at((3, 16, 16))
    command = ["validate", str(run.path), "--data", str(run.path), "--input-size", "3,64,64"]
    assert "images of 64x64 lies outside of 16x16 to 40x52 (--input-size)" in refused(capsys, *command)


def test_a_network_of_one_size_is_refused_before_any_work(tmp_path, capsys):
    np.savez(tmp_path / "images.npz", images=np.zeros((16, 32, 32, 3), np.uint8))
    model = ["vit_tiny_patch16_224", "--random-weights", "--model-kwargs", "depth=1 img_size=32"]
    command = ["calibrate", *model, "--data", str(tmp_path / "images.npz"), "--out", str(tmp_path / "run")]
    expected = {
        "16:64": "no range of heights and widths (--size-range): write it like",
        "16x16": "no range of heights and widths (--size-range): write it like",
        "64x64:96x96": "images of 32x32 lies outside of 64x64 to 96x96 (--size-range)",
        "16x16:64x64": "Input height (16) doesn't match model (32). (patch_embed, PatchEmbed): leave the range out",
    }
    short = [part for setting in SHORT for part in ("--set", setting)]
    for text, said in expected.items():
        assert said in refused(capsys, *command, *short, "--size-range", text)
    assert not (tmp_path / "run").exists()
