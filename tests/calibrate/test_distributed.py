"""Several processes share a calibration or a validation, and come to what one process comes to."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import Forked
from helpers import finished, tiny

from ospq_export.calibrate.checks import check_processes
from ospq_export.calibrate.observe import observe
from ospq_export.calibrate.reconstruct.activations import Batches, SliceData
from ospq_export.cli.validate import run_validate
from ospq_export.demo import demo_images
from ospq_export.errors import InputError
from ospq_export.formats.choice import integers
from ospq_export.graph.capture import capture
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model
from ospq_export.recipes import load_recipe
from ospq_export.runs.files import CHECKPOINTS, QUANTIZED_TENSORS
from ospq_export.runs.manifest import read_manifest
from ospq_export.runs.run import Run
from ospq_export.runs.tensors import read_tensors
from ospq_export.validate.shards import share_of
from ospq_export.world.processes import SOLO, World, joined

CPU = torch.device("cpu")
SCRIPT = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from helpers import tiny
tiny(Path(sys.argv[2]), *sys.argv[3:])
"""


def launched(tmp_path, out, *overrides):
    """A calibration by two processes, as users start it."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), str(Path(__file__).parents[1]), str(out), *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return Run.open(out)


def two_processes(folder, function, *arguments):
    """The same call in two processes, with the variables by which a launcher tells them of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        Forked(folder, function, *arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(2)
    ]


def interrupted(out):
    """A calibration that dies in its second slice."""
    from ospq_export.calibrate.reconstruct.reconstructor import Reconstructor

    run = Reconstructor.run

    def dying(self, piece, data, seed, objective):
        assert not list((out / CHECKPOINTS).glob("001.*")), "interrupted"
        return run(self, piece, data, seed, objective)

    Reconstructor.run = dying
    tiny(out)


def tensors(run):
    return read_tensors(run.path / QUANTIZED_TENSORS)[0]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path):
    # Nothing is dropped: what is dropped differs between processes, and then no two results could be compared exactly.
    fixed = ["reconstruction.drop_probability=0.0", "reconstruction.iterations=20"]
    one, two = tiny(tmp_path / "one", *fixed), launched(tmp_path, tmp_path / "two", *fixed)
    assert two.manifest.calibration.processes == 2 and one.manifest.calibration.processes == 1
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    codes = [k for k in first if k.endswith(".codes")]
    differing = sum(int((first[k] != second[k]).sum()) for k in codes)
    assert differing <= 0.002 * sum(first[k].numel() for k in codes)
    for name in first:
        if name.endswith(".scale"):
            torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=0)
    for a, b in zip(one.manifest.slices, two.manifest.slices, strict=True):
        assert b.error_after == pytest.approx(a.error_after, rel=0.02)
        assert b.losses == pytest.approx(a.losses, rel=1e-2)


def tiny_of(recipe, out, *overrides):
    return tiny(out, *overrides, recipe=recipe)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fp8", "nvfp4"])
def test_so_they_do_in_floating_point(tmp_path, recipe):
    """Scales of blocks are those of the shared gradients, too."""
    one = tiny_of(recipe, tmp_path / "one", "reconstruction.drop_probability=0.0")
    for process in two_processes(
        tmp_path, tiny_of, recipe, tmp_path / "two", "reconstruction.drop_probability=0.0"
    ):
        assert process.ended() == 0, process.errors
    first, second = tensors(one), tensors(Run.open(tmp_path / "two"))
    assert first.keys() == second.keys()
    codes = [k for k in first if k.endswith(".codes")]
    differing = sum(int((first[k] != second[k]).sum()) for k in codes)
    assert codes and differing <= 0.002 * sum(first[k].numel() for k in codes)


@pytest.mark.slow
def test_two_processes_resume_and_drop(tmp_path):
    for process in two_processes(tmp_path, tiny, tmp_path / "two"):
        assert process.ended() == 0, process.errors
    whole, one = Run.open(tmp_path / "two"), tiny(tmp_path / "one")
    for a, b in zip(one.manifest.slices, whole.manifest.slices, strict=True):
        # Other elements are dropped: after six steps that is as far apart as two seeds.
        assert b.error_after == pytest.approx(a.error_after, rel=0.5) and len(b.losses) == len(a.losses)
    again = tmp_path / "again"
    dying = two_processes(tmp_path, interrupted, again)
    # The second to come there may find that the first has gone.
    assert all(process.ended() != 0 for process in dying)
    assert any("interrupted" in process.errors for process in dying)
    assert read_manifest(again).status == "calibrating"
    for process in two_processes(tmp_path, tiny, again):
        assert process.ended() == 0, process.errors
    assert finished(again) == finished(whole.path)


def test_shares_of_a_batch_are_the_batch():
    column = torch.arange(40.0)[:, None]
    data = SliceData((column,), (column,), column, 40)
    whole = Batches(data, 8, CPU, 3).next().target
    parts = [Batches(data, 8, CPU, 3, World(rank, 2)).next().target for rank in range(2)]
    assert sorted(torch.cat(parts).flatten().tolist()) == sorted(whole.flatten().tolist())


class Recorded(World):
    """One process of several, of which this test plays all: what each observes is put together by the test."""

    def gather(self, parts, count):
        held.update(parts)
        return [held.get(place, next(iter(parts.values()))) for place in range(count)]


held = {}


def test_shares_of_the_observation_are_the_observation():
    torch.manual_seed(0)
    kwargs = {"img_size": 16, "patch_size": 8, "depth": 1, "num_classes": 3, "embed_dim": 16, "num_heads": 2}
    network = capture(create_model(ModelSpec(name="vit_tiny_patch16_224", kwargs=kwargs)), (3, 16, 16))
    images = torch.randn(20, 3, 16, 16)
    ranges = []
    held.clear()
    for world in (SOLO, Recorded(0, 2), Recorded(1, 2)):
        graph = insert_quantizers(network, integers(4, 4))
        observe(graph, images, batch_size=5, seed=0, values_per_tensor=400, world=world)
        ranges.append([(float(a.scale), float(a.offset)) for a in graph.activations.values()])
    # The last one found what the others had observed beside its own.
    assert ranges[2] == ranges[0] and len(held) == 4


def test_a_batch_that_cannot_be_shared(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match=r"32 images cannot be shared evenly by 3 processes.*batch_size=30"):
        check_processes(load_recipe("w4a4"))


def test_alone(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as world:
        assert world is SOLO and world.agree(7) == 7
        value = torch.ones(2)
        world.average([value])
        assert value.tolist() == [1.0, 1.0] and world.gather({0: [value]}, 1) == [[value]]


def validated(path, limit):
    """`validate` as the command line does it, and what this process is told."""
    run = Run.open(path)
    images = demo_images("test", run.manifest.data)
    options = {"batch_size": 40, "limit": limit, "floor_images": 100, "code_images": 8}
    report = run_validate(run, images, quiet=True, **options)
    sys.stdout.write(f"verdict of one process: {report.verdict.text[0]}\n")


def untimed(records):
    return [{k: v for k, v in r.items() if k not in ("seconds", "images_per_second")} for r in records]


@pytest.mark.slow
def test_two_processes_validate_as_one_does(tmp_path, finished_runs):
    one, two = (shutil.copytree(finished_runs["w4a4"], tmp_path / name) for name in ("one", "two"))
    validated(one, 370)
    shared = two_processes(tmp_path, validated, two, 370)
    for process in shared:
        assert process.ended() == 0, process.errors
        assert process.output.count("verdict of one process:") == 1, "the other process is told"
    assert sum(process.output.count("report:") for process in shared) == 1, "one process writes and prints"
    first, second = (json.loads((path / "report.json").read_text()) for path in (one, two))
    assert second["images"] == first["images"] == 370
    for name in ("backends", "comparisons"):
        assert untimed(second[name]) == untimed(first[name])
    # How many images are sampled depends on the number of batches in a share.
    for a, b in zip(first["floor"]["variations"], second["floor"]["variations"], strict=True):
        assert a["name"] == b["name"] and 100 <= b["images"] <= a["images"] + 20
    ours, theirs = (report["verdict"]["faithful"] for report in (first, second))
    assert ours["outcome"] == theirs["outcome"]
    named = [[(c["deployed"], c["name"], c["outcome"]) for c in v["criteria"]] for v in (ours, theirs)]
    assert named[0] == named[1]
    assert second["calibration_images_seen"] == first["calibration_images_seen"] == 0
    assert second["verdict"]["faithful"]["outcome"] == "met" and [
        x["deployed"] for x in second["locations"]
    ] == ["model.onnx"]


def test_shares_are_whole_batches_and_all_of_them():
    shares = [share_of(World(rank, 3), 370, 40) for rank in range(3)]
    assert [i for share in shares for i in share] == list(range(370))
    assert all(share.start % 40 == 0 for share in shares)
    with pytest.raises(InputError, match="2 batches for 3 processes"):
        share_of(World(0, 3), 80, 40)
