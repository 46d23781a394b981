"""Whole sweeps on a local Ray: the page's example as it stands, and one whose driver and worker are killed."""

import os
import re
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from sweep_killed import amid_calibration, attempts, finished, kill, start, tables, wait_for

from ospq_export.api import Session
from ospq_export.cli.app import app
from ospq_export.sweep.cells import cells_of
from ospq_export.sweep.outcome import LOGS, RESULTS, Outcome
from ospq_export.sweep.plan import load_plan
from ospq_export.sweep.table import Table, write_tables
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

    first = start(folder, "plan.toml", "--out", out, path=[folder])
    interrupted = wait_for(first, lambda: amid_calibration(out, 1), PATIENCE)
    kill(first)
    kept = {name: (out / RESULTS / f"{name}.json").stat().st_mtime_ns for name in finished(out)}
    assert 1 <= len(kept) < 4 and interrupted not in kept

    second = start(folder, "plan.toml", "--out", out, path=[folder])
    again = wait_for(second, lambda: attempts(out, interrupted)[1:], PATIENCE)
    # In the middle of it: after its beginning, before its result.
    os.kill(again[0], signal.SIGKILL)
    _, said = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, said
    # Once by each driver, and once more since its worker died.
    assert len(attempts(out, interrupted)) == 3 and "[4/4]" in said
    for name, written in kept.items():
        assert (out / RESULTS / f"{name}.json").stat().st_mtime_ns == written
        assert len(attempts(out, name)) == 1

    whole = folder / "whole"
    outcomes = {c.name: run_cell(c, whole, Session(seed=c.seed), 1) for c in cells}
    assert {outcome.status for outcome in outcomes.values()} == {"done"}
    write_tables(Table(plan, cells, outcomes), whole)
    assert tables(out) == tables(whole)


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
    process = start(folder, *words[2:], path=[folder])
    shown, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert "| wide |" in shown and "[6/6]" in said and "left" in said
    lines, _ = tables(folder / "runs" / "sweep")
    assert len(lines) == 6 and {line["status"] for line in lines} == {"done"}
    listed = re.findall(r"^\| `([^|]+)` \|", PAGE.read_text().partition("## What comes out")[2], re.MULTILINE)
    for names in listed[:4]:
        for name in re.findall(r"[\w.]+", names):
            assert name == "NAME" or "log" in name or list((folder / "runs" / "sweep").glob(f"**/{name}")), (
                name
            )


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
