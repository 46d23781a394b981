"""Whole sweeps on a local Ray: the page's example as it stands, and one whose driver and worker are killed."""

import os
import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
from sweep_killed import (
    SMALL,
    amid_calibration,
    attempts,
    finished,
    kill,
    start,
    tables,
    wait_for,
    write_small,
)

from ospq_export.api import Session
from ospq_export.cli.app import app
from ospq_export.sweep.cells import cells_of
from ospq_export.sweep.outcome import LOGS, RESULTS, Outcome
from ospq_export.sweep.plan import load_plan
from ospq_export.sweep.table import Table, write_tables
from ospq_export.sweep.work import run_cell

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "sweeps.md"
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
    write_small(folder)
    Path("plan.toml").write_text(SMALL)
    # Two networks, and nearest rounding beside each.
    chosen = ["recipes=['w4a4']", "seeds=[0]"]
    words = [word for value in chosen for word in ("--set", value)]
    plan, out = load_plan(Path("plan.toml"), chosen), folder / "killed"
    cells = cells_of(plan)
    assert len(cells) == 4

    first = start(folder, "plan.toml", "--out", out, *words)
    interrupted = wait_for(first, lambda: amid_calibration(out, 1), PATIENCE)
    kill(first)
    kept = {name: (out / RESULTS / f"{name}.json").stat().st_mtime_ns for name in finished(out)}
    assert 1 <= len(kept) < 4 and interrupted not in kept

    second = start(folder, "plan.toml", "--out", out, *words)
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
    process = start(folder, *words[2:])
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
    write_small(folder)
    (folder / "networks.py").write_text("def broken():\n    raise ValueError('two\\nlines')\n")
    Path("plan.toml").write_text(SMALL.replace("networks:small", "networks:broken"))
    cell = cells_of(load_plan(Path("plan.toml")))[0]
    outcome = run_cell(cell, folder / "out", Session(), 1)
    assert outcome.status == "failed" and "two" in outcome.reason and "\n" not in outcome.reason
    assert outcome == Outcome(name=cell.name, status="failed", reason=outcome.reason)
    assert "Traceback" in (folder / "out" / LOGS / f"{cell.name}.log").read_text()
    assert not finished(folder / "out")
