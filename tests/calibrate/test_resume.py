"""A killed calibration continues and ends in the same bytes; one made from other inputs is not continued."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import computed
from helpers import finished, tiny

from ospq_export.runs.files import CHECKPOINTS, FLOAT_TENSORS, MANIFEST, QUANTIZED_TENSORS
from ospq_export.runs.manifest import read_manifest

COMMAND = [
    *(sys.executable, "-m", "ospq_export.cli", "demo", "--model", "swin", "--limit", "20", "--quiet"),
    *(
        "--set",
        "calibration_images=48",
        "--set",
        "observation_images=16",
        "--set",
        "reconstruction.iterations=3",
        "--set",
        "reconstruction.refinement_images=8",
    ),
]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# A calibration of the tiny network that dies while a slice is finished: the third event comes before the third checkpoint.
DYING = """
import os, signal, sys
from pathlib import Path
from helpers import tiny

slices = []

def die(event, facts):
    slices.extend([facts] if event == "slice" else [])
    if len(slices) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

tiny(Path(sys.argv[1]), *sys.argv[3:], recipe=sys.argv[2], events=die)
"""


def start(out, *extra):
    return subprocess.Popen(
        [*COMMAND, "--out", str(out), *extra],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def slice_checkpoints(out):
    return list((out / CHECKPOINTS).glob("[0-9]*.safetensors"))


def kill_after(out, slices):
    """Start a calibration and kill it without warning as soon as `slices` checkpoints are there."""
    process = start(out)
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if len(slice_checkpoints(out)) >= slices:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail("the calibration was over before it could be killed")


def calibrate_whole(out):
    """Let a calibration end; what `demo` does next is not needed here."""
    process = start(out)
    deadline = time.monotonic() + 400
    while process.poll() is None and time.monotonic() < deadline:
        known = (out / MANIFEST).is_file() and read_manifest(out).status == "calibrated"
        # The checkpoints go last.
        if known and not (out / CHECKPOINTS).exists():
            break
        time.sleep(0.1)
    process.kill()
    process.communicate()


def finished_bytes(out):
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["status"] == "calibrated" and not (out / CHECKPOINTS).exists()
    return (
        (out / QUANTIZED_TENSORS).read_bytes(),
        (out / FLOAT_TENSORS).read_bytes(),
        computed(manifest["slices"]),
    )


@pytest.mark.slow
def test_killed_twice_ends_in_the_same_bytes(tmp_path):
    calibrate_whole(tmp_path / "whole")
    killed = tmp_path / "killed"
    kill_after(killed, 2)
    assert read_manifest(killed).status == "calibrating"
    kill_after(killed, 5)

    refused = start(killed, "--seed", "1")
    assert "was made with another calibration" in refused.communicate(timeout=400)[1]
    assert refused.returncode == 2
    refused = start(killed, "--set", "reconstruction.iterations=4")
    assert "was made with another recipe" in refused.communicate(timeout=400)[1]
    assert refused.returncode == 2

    calibrate_whole(killed)
    assert finished_bytes(killed) == finished_bytes(tmp_path / "whole")


@pytest.mark.slow
def test_codes_in_blocks_survive_a_kill(tmp_path):
    """Checkpoints keep block scales, tensor scales and NVFP4's and FP8's codes as they are."""
    overrides = ("slicing=atom", "equalization=none", "reconstruction.refinement_images=4")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tiny(whole, *overrides, recipe="nvfp4")
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", DYING, str(killed), "nvfp4", *overrides]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    assert read_manifest(killed).status == "calibrating"
    assert len(slice_checkpoints(killed)) == 2
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
