"""A killed calibration continues and ends in the same bytes; one made from other inputs is not continued."""

import os
import signal

import numpy as np
import pytest
from forks import Forked, command_line
from helpers import finished, tiny

from ospq_export.cli import demo
from ospq_export.recipes import load_recipe
from ospq_export.runs.files import CHECKPOINTS, FLOAT_TENSORS
from ospq_export.runs.manifest import read_manifest

MODEL = ["vit_tiny_patch16_224", "--random-weights", "--model-kwargs"]
KWARGS = "img_size=32 patch_size=16 in_chans=1 depth=4 num_classes=5 embed_dim=24 num_heads=2"
SETTINGS = [
    *("calibration_images=16", "observation_images=8", "equalization=none", "slicing=block"),
    *("reconstruction.iterations=3", "reconstruction.batch_size=8", "reconstruction.refinement_images=4"),
]


def slices_in(out):
    return len(list((out / CHECKPOINTS).glob("[0-9]*.safetensors")))


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


class StopError(Exception):
    """Where a process might be killed."""


def stopped(out, event, count, *overrides, recipe="w4a4"):
    """A calibration that dies at the n-th event of a kind; its events."""
    seen = []

    def stop(name, _facts):
        seen.append(name)
        if seen.count(event) == count:
            raise StopError

    with pytest.raises(StopError):
        tiny(out, *overrides, recipe=recipe, events=stop)
    return seen


def resumed(out, *overrides, recipe="w4a4"):
    """What is left to do of it, event by event."""
    events = []
    tiny(out, *overrides, recipe=recipe, events=lambda event, _: events.append(event))
    return events


SHORT = ("reconstruction.iterations=0", "reconstruction.refinement_images=0", "slicing=model")


@pytest.fixture(scope="module")
def unhurt(tmp_path_factory):
    """A calibration that nothing interrupted, and its events."""
    out = tmp_path_factory.mktemp("unhurt") / "run"
    events = resumed(out, *SHORT)
    return finished(out), events


def test_an_equalization_goes_on_at_the_next_site(tmp_path, unhurt):
    whole, events = unhurt
    out, sites = tmp_path / "run", events.count("equalize")
    assert sites >= 5 and len({site["choice"] for site in whole[0]["equalized"]}) > 1
    stopped(out, "equalize", 4, *SHORT)
    assert read_manifest(out).status == "calibrating" and not (out / FLOAT_TENSORS).exists()
    assert resumed(out, *SHORT).count("equalize") == sites - 4
    assert finished(out) == whole


def test_an_observation_goes_on_at_the_next_batch(tmp_path, unhurt, monkeypatch):
    monkeypatch.setattr("ospq_export.calibrate.observe._WORTH_KEEPING", 0.0)
    monkeypatch.setattr("ospq_export.calibrate.prepare._OBSERVATION_BATCH", 4)
    tiny(tmp_path / "whole", *SHORT)
    out = tmp_path / "run"
    stopped(out, "observe", 3, *SHORT)
    kept = read_manifest(out)
    assert FLOAT_TENSORS in kept.files and len(kept.equalized) == unhurt[1].count("equalize")
    # The last batch, and what is made of all of them.
    events = stopped(out, "cost", 1, *SHORT)
    assert events == ["observe", "cost"]
    assert resumed(out, *SHORT) == ["cost", "slice", "done"]
    assert finished(out) == finished(tmp_path / "whole")


@pytest.mark.slow
def test_trials_go_on_at_the_next_candidate(tmp_path):
    settings = (
        *("slicing=auto", "pilot.held_out=8", "pilot.budget=0.5", "equalization=none"),
        *("reconstruction.iterations=400", "reconstruction.refinement_images=0"),
    )
    # The slices that follow are not waited for.
    whole, out = tmp_path / "whole", tmp_path / "run"
    trials = stopped(whole, "cost", 1, *settings).count("trial")
    assert trials >= 3
    stopped(out, "trial", 2, *settings)
    assert stopped(out, "cost", 1, *settings).count("trial") == trials - 2
    found, expected = ((run / CHECKPOINTS / "slicing.json").read_bytes() for run in (out, whole))
    assert found == expected
