"""A killed calibration continues and ends in the same bytes; one made from other inputs is not continued."""

import os
import signal

import numpy as np
import pytest
from forks import Forked, command_line
from helpers import finished, tiny

from ospq_export.cli import demo
from ospq_export.recipes import load_recipe
from ospq_export.runs.files import CHECKPOINTS
from ospq_export.runs.manifest import read_manifest

MODEL = ["vit_tiny_patch16_224", "--random-weights", "--model-kwargs"]
KWARGS = "img_size=32 patch_size=16 in_chans=1 depth=4 num_classes=5 embed_dim=24 num_heads=2"
SETTINGS = [
    *("calibration_images=16", "observation_images=8", "equalization=none", "slicing=block"),
    *("reconstruction.iterations=3", "reconstruction.batch_size=8", "reconstruction.refinement_images=4"),
]


def slices_in(out):
    return len(list((out / CHECKPOINTS).glob("*.safetensors")))


@pytest.mark.slow
def test_killed_twice_ends_in_the_same_bytes(tmp_path):
    """By the command line, killed from outside at any moment after so many checkpoints."""
    data, whole, killed = tmp_path / "images.npz", tmp_path / "whole", tmp_path / "killed"
    np.savez(data, images=np.random.default_rng(0).integers(0, 256, (16, 32, 32), np.uint8))
    settings = [part for value in SETTINGS for part in ("--set", value)]

    def start(out, *extra):
        command = ["calibrate", *MODEL, KWARGS, "--data", str(data), "--workers", "0", "--quiet", *settings]
        return Forked(tmp_path, command_line, *command, "--out", str(out), *extra)

    once = start(whole)
    assert once.ended() == 0, once.errors
    for slices in (2, 4):
        assert start(killed).kill_when(lambda slices=slices: slices_in(killed) >= slices), "over before"
        assert read_manifest(killed).status == "calibrating"
    assert not demo._is_finished(killed, load_recipe("w8a8", SETTINGS), 0), "the demo continues it, too"

    for extra, said in (
        (("--seed", "1"), "calibration"),
        (("--set", "reconstruction.iterations=4"), "recipe"),
    ):
        refused = start(killed, *extra)
        assert refused.ended() == 2
        assert f"was made with another {said}" in refused.errors

    kept = slices_in(killed)
    last = start(killed)
    assert last.ended() == 0, last.errors
    assert finished(killed) == finished(whole)
    assert 4 <= kept < len(read_manifest(whole).slices), "it was killed before its end"


def die_at_the_third_slice(out, recipe, overrides):
    """A calibration that dies while a slice is finished: the third event comes before the third checkpoint."""
    slices = []

    def die(event, facts):
        slices.extend([facts] if event == "slice" else [])
        if len(slices) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    tiny(out, *overrides, recipe=recipe, events=die)


@pytest.mark.slow
def test_codes_in_blocks_survive_a_kill(tmp_path):
    """Checkpoints keep block scales, tensor scales and NVFP4's and FP8's codes as they are."""
    overrides = ("slicing=atom", "equalization=none", "reconstruction.refinement_images=4")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tiny(whole, *overrides, recipe="nvfp4")
    dying = Forked(tmp_path, die_at_the_third_slice, killed, "nvfp4", overrides)
    assert dying.ended() == -signal.SIGKILL, dying.errors
    assert read_manifest(killed).status == "calibrating"
    assert slices_in(killed) == 2
    resumed = []
    tiny(killed, *overrides, recipe="nvfp4", events=lambda event, _: resumed.append(event))
    manifest, _ = found = finished(killed)
    assert found == finished(whole)
    assert resumed.count("slice") == len(manifest["slices"]) - 2 > 0
    # Both kinds of codes lie in what was restored, and both in what was not.
    for late in (False, True):
        formats = {q["format"]["format"] for q in manifest["quantizers"] if (q["slice"] > 1) is late}
        assert formats == {"nvfp4", "fp8"}
