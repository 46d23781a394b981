"""The memory budget: tiers, refusal, the same bytes whatever the tier; and what a run says about its cost."""

import errno
import gc
import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import SPEC, finished, tiny

from ospq_export.calibrate import calibrate
from ospq_export.calibrate.checkpoints import json_lines
from ospq_export.calibrate.cost import cost_of
from ospq_export.calibrate.reconstruct.activations import Batches, SliceData
from ospq_export.calibrate.reconstruct.store import Store, parse_bytes
from ospq_export.data import Batch, resolve_data_config
from ospq_export.errors import InputError
from ospq_export.graph.capture import capture
from ospq_export.graph.granularity import block_slicing
from ospq_export.models.timm import create_model
from ospq_export.recipes import load_recipe
from ospq_export.runs.manifest import EqualizedSite
from ospq_export.world.memory import peak_memory, process_bytes

CPU = torch.device("cpu")


def test_tiers_fill_and_empty(tmp_path):
    store = Store(1000, tmp_path / "cache", CPU)
    first = store.empty((10, 20), torch.float32)
    second = store.empty((10, 20), torch.float32)
    assert store.used == {"device": 0, "host": 800, "disk": 800}
    second.copy_(torch.arange(200.0).view(10, 20))
    store.trim()
    assert torch.equal(second, torch.arange(200.0).view(10, 20)), "trimmed pages keep their content"
    assert list((tmp_path / "cache").iterdir()) == [], "files have no name that a killed process could leave"
    del first, second
    gc.collect()
    assert store.used == {"device": 0, "host": 0, "disk": 0} and store.peak["disk"] == 800
    assert store.empty((200,), torch.float32).numel() == 200 and store.peak["host"] == 800


def test_images_count(tmp_path):
    store = Store(1000, tmp_path, CPU)
    store.hold(torch.empty(240))
    kept = store.empty((20,), torch.float32)
    assert store.used["disk"] == kept.numel() * 4


def test_no_room_on_the_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(InputError, match=r"take 0\.0 GB of disk beyond the memory budget: No space left"):
        Store(1, tmp_path, CPU).empty((20,), torch.float32)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GB", 8 * 10**9),
        ("512 MB", 512 * 10**6),
        ("1.5e9", 1_500_000_000),
        ("2gib", 2**31),
        ("7", 7),
        ("9b", 9),
    ],
)
def test_amounts(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "8XB", "nan", "inf", "0", "1e40TB", "8 G B x"])
def test_no_amounts(text):
    with pytest.raises(InputError, match="no amount of memory"):
        parse_bytes(text)


def without(event, *keys):
    return {key: value for key, value in event.items() if key not in keys}


def budgeted(out, budget, events):
    torch.manual_seed(0)
    model = create_model(SPEC)
    config = resolve_data_config(model, SPEC, {})
    data = torch.randn(16, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    batch = Batch(data, torch.zeros(16, dtype=torch.int64), [str(i) for i in range(16)])
    short = ["calibration_images=16", "observation_images=16", "reconstruction.batch_size=8"]
    recipe = load_recipe("w4a4", [*short, "reconstruction.iterations=6"])
    return calibrate(model, SPEC, batch, config, recipe, out, memory_budget=budget, events=events)


@pytest.mark.slow
def test_the_same_bytes_from_disk_and_a_log_of_it(tmp_path):
    tiny(tmp_path / "whole")
    log = tmp_path / "log.jsonl"
    run = budgeted(tmp_path / "spilled", 90_000, json_lines(str(log)))
    assert finished(tmp_path / "spilled") == finished(tmp_path / "whole")
    events = [json.loads(line) for line in log.read_text().splitlines()]
    slices, sites = run.manifest.slices, run.manifest.equalized
    before = [*["equalize"] * len(sites), "observe"]
    assert [e["event"] for e in events] == [*before, "cost", *["slice"] * len(slices), "done"]
    assert [
        EqualizedSite.model_validate(without(e, "event", "time", "sites")) for e in events[: len(sites)]
    ] == sites
    assert events[0]["sites"] == len(sites) > 0
    observed = events[len(sites)]
    assert (observed["batch"], observed["batches"], observed["images"]) == (0, 1, 16) and observed[
        "seconds"
    ] > 0
    events = events[len(before) :]
    cost, done = events[0], events[-1]
    assert cost["slices"] == len(slices) and cost["iterations"] == 6 * len(slices) and cost["seconds"] > 0
    assert cost["budget"] == 90_000 < cost["activation_bytes"]
    assert done["activation_bytes"]["disk"] > 0 and done["activation_bytes"]["host"] <= 90_000
    # What was foreseen is what was used: images, and float and quantized tensors on both sides of the largest slice.
    assert (
        0.5 * cost["activation_bytes"] <= sum(done["activation_bytes"].values()) <= cost["activation_bytes"]
    )
    assert [e["losses"] for e in events[1:-1]] == [s.losses for s in slices]
    assert all(s.peak_bytes > 10**7 and s.seconds > 0 for s in slices)


def test_a_budget_below_one_batch(tmp_path):
    with pytest.raises(InputError, match=r"one batch of a slice's activations takes .* MB"):
        budgeted(tmp_path / "run", 1000, lambda *_: None)


def test_cost_of_a_known_network():
    network = capture(create_model(SPEC), (1, 32, 32))
    recipe = load_recipe("w4a4", ["reconstruction.iterations=100", "reconstruction.batch_size=8"])
    slices = block_slicing(network.graph)
    cost = cost_of(network.graph, slices, 2, 50, recipe.reconstruction, 0.001)
    tokens, image = 17 * 32 * 4, 32 * 32 * 4
    assert cost.batch_bytes == 8 * max(2 * image + tokens, 3 * tokens)
    assert cost.activation_bytes == 50 * (image + 2 * (image + tokens))
    assert cost.iterations == 200
    # Two slices of all, each step five passes over its batch.
    expected = 2 / len(slices) * 0.001 * (100 * 8 * 5 + 5 * 50)
    assert cost.seconds == pytest.approx(expected)
    assert "2 slices, 200 iterations, about 1 min" in cost.summary(10**9)
    assert "go to disk" in cost.summary(1000)


def test_an_unwritable_log(tmp_path):
    with pytest.raises(InputError, match="`log_json`"):
        json_lines(str(tmp_path / "none" / "log"))("cost", {})


def test_batches_depend_on_their_seed_alone():
    data = SliceData(
        (torch.arange(40.0)[:, None],), (torch.arange(40.0)[:, None],), torch.arange(40.0)[:, None], 40
    )
    drawn = []
    for seed, noise in ((1, 0), (1, 5), (2, 0)):
        batches = Batches(data, 8, CPU, seed)
        torch.manual_seed(noise)
        parts = [batches.next() for _ in range(3)]
        batches.close()
        assert all(torch.equal(p.target, p.float_input[0]) and len(p.target.unique()) == 8 for p in parts)
        drawn.append(torch.cat([p.target for p in parts]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert Batches(data, 64, CPU, 0).next().images == 40


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_the_peak_is_this_processs_and_not_its_parents():
    held = bytearray(600 << 20)
    held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
    code = (
        "import torch; from ospq_export.world.memory import peak_memory as p; print(p(torch.device('cpu')))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    mine = process_bytes("VmRSS")
    assert len(held) < mine <= peak_memory(CPU)
    assert 0 < int(done.stdout) < mine
