"""No run is lost: locks, divergence, what a refused resume says, a full disk, and death at any moment."""

import random
import resource
import shutil
import signal
import sys
import time

import pytest
import torch
from forks import Forked
from helpers import SPEC, finished, tiny

from ospq_export.calibrate.checks import LOCK, differences, locked
from ospq_export.calibrate.observe import observe
from ospq_export.calibrate.reconstruct.activations import SliceData, forward
from ospq_export.calibrate.reconstruct.reconstructor import Reconstructor
from ospq_export.errors import InputError
from ospq_export.formats.choice import integers
from ospq_export.graph.capture import capture
from ospq_export.graph.granularity import block_slicing
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import Mode, quantizers_of
from ospq_export.graph.slicing import extract
from ospq_export.models.timm import create_model
from ospq_export.recipes import load_recipe
from ospq_export.runs.files import CHECKPOINTS, MANIFEST
from ospq_export.runs.manifest import Manifest, installed_versions, read_manifest
from ospq_export.runs.quantizers import quantizer_tensors

CPU = torch.device("cpu")


def hold(folder):
    with locked(folder):
        (folder / "held").touch()
        time.sleep(400)


def test_one_process_per_folder(tmp_path):
    holder = Forked(tmp_path, hold, tmp_path)

    def found():
        if (tmp_path / "held").exists():
            with pytest.raises(InputError, match="another process is calibrating"), locked(tmp_path):
                pytest.fail("two processes hold the same folder")
            return True
        return False

    assert holder.kill_when(found), holder.errors
    assert (tmp_path / LOCK).exists(), "the dead process left its lock file"
    with locked(tmp_path):
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_a_folder_made_for_the_lock_goes_with_it(tmp_path):
    with locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), locked(tmp_path / "file" / "run"):
        pytest.fail("a file is no folder")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that stopped after its first slice."""
    out = tmp_path_factory.mktemp("interrupted") / "run"

    class StopError(Exception):
        pass

    class Stopping(Reconstructor):
        def run(self, piece, *args, **kwargs):
            if list((out / CHECKPOINTS).glob("[0-9]*.safetensors")):
                raise StopError
            return super().run(piece, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ospq_export.calibrate.job.Reconstructor", Stopping)
        with pytest.raises(StopError):
            tiny(out)
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"another calibration \(calibration\.seed: 0, now 1\)"),
        (
            {"images": 1},
            r"another calibration \(calibration\.images_sha256: [0-9a-f]{12}, now [0-9a-f]{12}\)",
        ),
        ({"weights": 1}, r"another weights \(weights: [0-9a-f]{12}, now"),
        (
            {"overrides": ["reconstruction.iterations=7"]},
            r"another recipe \(recipe\.reconstruction\.iterations: 6, now 7\)",
        ),
    ],
)
def test_a_refused_resume_says_what_changed(interrupted, changes, message):
    before = {p: p.read_bytes() for p in interrupted.rglob("*") if p.is_file()}
    with pytest.raises(InputError, match=message):
        tiny(interrupted, *changes.pop("overrides", []), **changes)
    assert {p: p.read_bytes() for p in interrupted.rglob("*") if p.is_file()} == before


def test_another_version_is_refused(interrupted, monkeypatch):
    versions = {**installed_versions(), "torch": "1.0"}
    monkeypatch.setattr("ospq_export.calibrate.stage.installed_versions", lambda: versions)
    with pytest.raises(InputError, match=r"versions\.torch: .*, now 1\.0"):
        tiny(interrupted)


def test_differences():
    old = {"a": {"b": 1, "c": [1, 2]}, "d": "x" * 64}
    assert differences(old, old) == []
    assert differences(old, {"a": {"b": 2, "c": [1, 2]}, "d": "y" * 64}) == [
        "a.b: 1, now 2",
        f"d: {'x' * 12}, now {'y' * 12}",
    ]
    assert differences({}, {"new": 1}) == ["new: None, now 1"]


@pytest.fixture(scope="module")
def block():
    """The second block of a small network, and its data."""
    torch.manual_seed(0)
    network = capture(create_model(SPEC), (1, 32, 32))
    images = torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    graph = insert_quantizers(network, integers(4, 4))
    observe(graph, images, batch_size=16, seed=0)
    slices = block_slicing(network.graph)
    x = forward(extract(graph.module, slices[0]), (images,), Mode.FLOAT, CPU, 16)
    piece = extract(graph.module, slices[1])
    return piece, SliceData(x, x, forward(piece, x, Mode.FLOAT, CPU, 16)[0], 16)


def at_rate(rate):
    overrides = ["iterations=4", "batch_size=8", f"learning_rate_scale={rate}", "refinement_images=0"]
    return load_recipe("w4a4", [f"reconstruction.{o}" for o in overrides]).reconstruction


def state(piece):
    return {k: v.clone() for k, v in quantizer_tensors(list(quantizers_of(piece))).items()}


def put_back(piece, saved):
    for name, value in quantizer_tensors(list(quantizers_of(piece))).items():
        value.copy_(saved[name])


def test_divergence_is_retried_once_at_a_lower_rate(block):
    piece, data = block
    before = state(piece)
    # One step of Adam moves a logarithmic scale by its rate: exp(300) is infinite in float32, exp(30) is not.
    metrics = Reconstructor(at_rate(300.0), CPU).run(piece, data, seed=0)
    assert metrics.warning == "diverged; learned again at a tenth of its rates"
    assert all(bool(torch.isfinite(v).all()) for v in state(piece).values() if v.is_floating_point())
    put_back(piece, before)
    assert Reconstructor(at_rate(1e-3), CPU).run(piece, data, seed=0).warning == ""
    put_back(piece, before)


def test_divergence_at_both_rates_leaves_the_best_state(block):
    piece, data = block
    before = state(piece)
    metrics = Reconstructor(at_rate(1e5), CPU).run(piece, data, seed=0)
    assert metrics.warning.startswith("diverged, also at a tenth")
    assert metrics.error_after == metrics.error_before
    after = state(piece)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert all(quantizer.mode is Mode.QUANTIZE for quantizer in quantizers_of(piece))


def test_a_loss_that_begins_at_zero_may_grow():
    # An input on the grid and float weights to start from: the first loss is the sums' rounding, any step is a thousand times it.
    network = capture(create_model(SPEC), (1, 32, 32))
    graph = insert_quantizers(network, integers(3, 3))
    images = torch.randint(-127, 128, (16, 1, 32, 32), generator=torch.Generator().manual_seed(1)) / 127.0
    observe(graph, images, batch_size=16, seed=0)
    piece = extract(graph.module, block_slicing(network.graph)[0])
    x = forward(piece, (images,), Mode.FLOAT, CPU, 16)[0]
    settings = load_recipe("w4a4", ["reconstruction.iterations=20", "reconstruction.drop_probability=0"])
    learned = Reconstructor(settings.reconstruction, CPU).run(
        piece, SliceData((images,), (images,), x, 16), seed=0
    )
    assert learned.losses[0] < 1e-3 and learned.warning == ""


def test_a_warning_reaches_the_manifest(tmp_path):
    run = tiny(tmp_path / "run", "reconstruction.learning_rate_scale=1e5")
    assert any("diverged" in record.warning for record in run.manifest.slices)
    assert read_manifest(run.path) == run.manifest
    old = run.manifest.model_dump(mode="json")
    for record in old["slices"]:
        del record["warning"], record["peak_bytes"]
    loaded = Manifest.model_validate(old)
    assert loaded.slices[0].peak_bytes is None, "runs of before this field are still read"


def on_a_full_disk(out, limit):
    """The calibration of the tiny network where no file may be larger than `limit` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        tiny(out)
    except InputError as error:
        sys.stdout.write(str(error))
        sys.exit(2)


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_good_state(tmp_path, interrupted):
    whole = tmp_path / "whole"
    tiny(whole)
    tensors = [name for name in finished(whole)[1] if name.endswith(".safetensors")]
    assert min((whole / name).stat().st_size for name in tensors) > 20_000
    done = Forked(tmp_path, on_a_full_disk, tmp_path / "none", 20_000)
    assert done.ended() == 2 and "cannot be written" in done.output, done.errors
    assert not (tmp_path / "none").exists() or not any((tmp_path / "none").iterdir())
    out = tmp_path / "some"
    shutil.copytree(interrupted, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    done = Forked(tmp_path, on_a_full_disk, out, 10_000)
    assert done.ended() == 2 and "cannot be written" in done.output, done.errors
    after = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert all(after[path] == content for path, content in before.items())
    tiny(out)
    assert finished(out) == finished(whole)


def calibrated(out):
    tiny(out, "equalization=none", "reconstruction.refinement_images=0")


def is_finished(out):
    return (out / MANIFEST).is_file() and read_manifest(out).status == "calibrated"


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path):
    """What was killed is continued, and may be killed again, until it ends."""

    def calibration(out, moment=None):
        started = time.monotonic()
        child = Forked(tmp_path, calibrated, out)
        if moment is not None:
            child.kill_when(lambda: time.monotonic() - started >= moment)
        status = child.ended()
        assert status in (0, -signal.SIGKILL), child.errors
        return status, time.monotonic() - started

    assert calibration(tmp_path / "warm", 0)[0], "what starts the first child is not timed"
    status, seconds = calibration(tmp_path / "whole")
    assert status == 0
    whole, moments = finished(tmp_path / "whole"), random.Random(0)
    killed = tried = ended = 0
    while killed < 10:
        assert tried < 30, "most of the moments lie within the calibration"
        tried += 1
        out = tmp_path / str(ended)
        status, _ = calibration(out, moments.uniform(0.02, 0.98) * seconds)
        if status and not is_finished(out):
            killed += 1
            continue
        # What was killed on its way out may have left its lock.
        assert status or finished(out) == whole
        ended += 1
    assert calibration(tmp_path / str(ended))[0] == 0
    assert finished(tmp_path / str(ended)) == whole
