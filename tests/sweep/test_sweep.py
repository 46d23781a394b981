"""Whole sweeps on a local Ray: the page's example as it stands, and one whose driver and worker are killed."""

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ospq_export.api import Session
from ospq_export.cli.app import app
from ospq_export.sweep.cells import cells_of
from ospq_export.sweep.outcome import LOGS, RESULTS, RUNS, Outcome
from ospq_export.sweep.plan import load_plan
from ospq_export.sweep.table import CSV, MARKDOWN, Table, write_tables
from ospq_export.sweep.work import run_cell

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "sweeps.md"
NETWORKS = """
import torch
from torch import nn


def small():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 4, 4), nn.GELU(), nn.Conv2d(8, 8, 2, 2), nn.Flatten(), nn.Linear(72, 5)]
    return nn.Sequential(*layers)
"""
PLAN = """
recipes = ["w4a4"]
seeds = [0, 1]
[data]
calibration = "calibration.npz"
validation = "validation.npz"
[overrides]
quick = ["calibration_images=16", "observation_images=16", "reconstruction.batch_size=8",
    "reconstruction.iterations=400", "equalization=none", "slicing=layer", "reconstruction.refinement_images=0"]
[models.small]
model = "module:networks:small"
random_weights = true
input_size = [1, 28, 28]
mean = [0.5]
std = [0.5]
[validation]
backends = ["onnxruntime"]
floor_images = 0
code_images = 0
pages = false
"""
PATIENCE = 600


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a network of the user's own, which this process is in, and those that it starts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # Another test's module of that name, in a folder of its own.
    sys.modules.pop("networks", None)
    yield tmp_path
    sys.modules.pop("networks", None)


def started(folder, *words, **options):
    """A driver in a process group of its own."""
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "ospq_export.cli", "sweep", *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, condition):
    """What the condition gives as soon as it gives something, while the process runs."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := condition():
            return found
        if process.poll() is not None:
            pytest.fail(f"the sweep was over before that: {process.communicate()}")
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("that did not come")


def finished(out):
    return {path.stem for path in (out / RESULTS).glob("*.json")}


def attempts(out, name):
    """Processes that computed a run, in the order of their beginnings."""
    path = out / LOGS / f"{name}.log"
    text = path.read_text() if path.is_file() else ""
    return [int(pid) for pid in re.findall(r"process (\d+) on", text)]


def amid_calibration(out):
    """An unfinished run with a checkpoint, once another is finished."""
    done = finished(out)
    begun = {path.parents[1].name for path in (out / RUNS).glob("*/slices/*.safetensors")} - done
    return next(iter(begun), None) if done else None


def without_times(path):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in csv.DictReader(path.open())]


@pytest.mark.slow
def test_killed_driver_and_killed_worker_leave_the_table_of_an_undisturbed_sweep(folder):
    (folder / "networks.py").write_text(NETWORKS)
    rng = np.random.default_rng(0)
    for name, count in (("calibration", 16), ("validation", 40)):
        images = rng.integers(0, 255, (count, 28, 28), dtype=np.uint8)
        np.savez(f"{name}.npz", images=images, labels=np.arange(count) % 5)
    Path("plan.toml").write_text(PLAN)
    plan, out = load_plan(Path("plan.toml")), folder / "killed"
    cells = cells_of(plan)
    assert len(cells) == 4

    first = started(folder, "plan.toml", "--out", out)
    interrupted = wait_for(first, lambda: amid_calibration(out))
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    kept = {name: (out / RESULTS / f"{name}.json").stat().st_mtime_ns for name in finished(out)}
    assert 1 <= len(kept) < 4 and interrupted not in kept

    second = started(folder, "plan.toml", "--out", out)
    again = wait_for(second, lambda: attempts(out, interrupted)[1:])
    # In the middle of it: before its result, after its beginning.
    os.kill(again[0], signal.SIGKILL)
    _, said = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, said
    # Twice by the drivers, once more since its worker died.
    assert len(attempts(out, interrupted)) == 3
    assert all(
        (out / RESULTS / f"{n}.json").stat().st_mtime_ns == t and len(attempts(out, n)) == 1
        for n, t in kept.items()
    )
    assert "[4/4]" in said

    whole = folder / "whole"
    outcomes = {c.name: run_cell(c, whole, Session(seed=c.seed), 1) for c in cells}
    assert {outcome.status for outcome in outcomes.values()} == {"done"}
    write_tables(Table(plan, cells, outcomes), whole)
    assert without_times(out / CSV) == without_times(whole / CSV)
    assert (out / MARKDOWN).read_text() == (whole / MARKDOWN).read_text()


@pytest.mark.slow
def test_the_page_runs_as_it_stands(folder):
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    by_kind = {kind: [text for k, text in blocks if k == kind] for kind in ("python", "toml", "bash")}
    demo, own = by_kind["toml"]
    assert demo in (ROOT / "plans" / "demo.toml").read_text()
    networks, images = by_kind["python"]
    (folder / "networks.py").write_text(networks)
    exec(compile(images, "docs/sweeps.md", "exec"), {})
    (folder / "plan.toml").write_text(own)
    (command,) = by_kind["bash"]
    words = shlex.split(command)
    assert words[:2] == ["ospq-export", "sweep"] and "sweep" in {
        c.callback.__name__ for c in app.registered_commands
    }
    process = started(folder, *words[2:])
    shown, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert "| wide |" in shown and "[6/6]" in said and "left" in said
    lines = without_times(folder / "runs" / "sweep" / CSV)
    assert len(lines) == 6 and {line["status"] for line in lines} == {"done"}
    listed = re.findall(r"^\| `([^|]+)` \|", PAGE.read_text().partition("## What comes out")[2], re.MULTILINE)
    for names in listed[:4]:
        for name in re.findall(r"[\w.]+", names):
            assert name == "NAME" or "log" in name or list((folder / "runs" / "sweep").glob(f"**/{name}")), (
                name
            )


@pytest.mark.slow
def test_one_failure_stops_nothing_and_is_listed(folder):
    """Without Ray: a cell that fails is an outcome, its reason one line, its traceback in the log."""
    np.savez("images.npz", images=np.zeros((16, 28, 28), np.uint8))
    (folder / "networks.py").write_text("def broken():\n    raise ValueError('two\\nlines')\n")
    text = PLAN.replace("calibration.npz", "images.npz").replace("validation.npz", "images.npz")
    Path("plan.toml").write_text(text.replace("networks:small", "networks:broken"))
    cell = cells_of(load_plan(Path("plan.toml")))[0]
    outcome = run_cell(cell, folder / "out", Session(), 1)
    assert outcome.status == "failed" and "two" in outcome.reason and "\n" not in outcome.reason
    assert outcome == Outcome(name=cell.name, status="failed", reason=outcome.reason)
    assert "Traceback" in (folder / "out" / LOGS / f"{cell.name}.log").read_text()
    assert not finished(folder / "out")
