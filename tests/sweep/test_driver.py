"""What a sweep refuses before it starts Ray, and what it says of a run that ended."""

import sys

import pytest
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from ospq_export import cli
from ospq_export.errors import InputError
from ospq_export.sweep import driver
from ospq_export.sweep.cells import cells_of
from ospq_export.sweep.outcome import CELLS, Outcome, read_cells, read_outcome, write_outcome
from ospq_export.sweep.plan import load_plan

PLAN = 'recipes = ["w8a8"]\n[models.vit]\ndemo = "vit"\n'


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def run(capsys, *words):
    """Exit status, standard output and standard error of the command line."""
    with pytest.raises(SystemExit) as info, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ospq-export", "sweep", *map(str, words)])
        cli.main()
    captured = capsys.readouterr()
    return info.value.code or 0, captured.out, captured.err


def finish(plan, out, *overrides):
    """Leave the folder as a finished sweep does."""
    cells = cells_of(load_plan(plan, overrides))
    driver._claim(cells, out)
    for cell in cells:
        lost = 2.0 * cell.nearest
        outcome = {"scores": {"onnxruntime": 88.0 - lost}, "float_score": 88.0, "lost": lost}
        write_outcome(out, Outcome(name=cell.name, measure="Top-1", images=10, bits=16.0, **outcome))
    return cells


def test_without_ray_one_line_says_what_to_install(capsys, plan, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    status, _, said = run(capsys, plan, "--out", tmp_path / "out")
    assert status == 2 and said == "error: sweeps need the package ray: pip install 'ospq-export[sweep]'\n"
    assert not (tmp_path / "out").exists()


def test_a_finished_sweep_needs_no_ray_started(capsys, plan, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    finish(plan, out)
    status, shown, _ = run(capsys, plan, "--out", out, "--address", "127.0.0.1:1")
    assert status == 0
    assert "| vit | 88.00 | 88.00 (lost 0.00, nearest 2.00) |" in shown and "sweep.html" in shown
    assert {path.name for path in out.glob("sweep.*")} == {
        "sweep.csv",
        "sweep.md",
        "sweep.json",
        "sweep.html",
    }


def test_a_plan_may_grow_and_not_change(capsys, plan, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    finish(plan, out)
    grown = finish(plan, out, "seeds=[0, 1]", "recipes=['w8a8', 'w6a6']")
    assert set(read_cells(out)) == {cell.name for cell in grown} and len(grown) == 8
    before = (out / CELLS).read_bytes()
    status, _, said = run(capsys, plan, "--out", out, "--set", "validation.limit=50")
    assert status == 2 and "the folder holds another run vit-w8a8-s0 (validation.limit: None, now 50)" in said
    assert (out / CELLS).read_bytes() == before
    # Leaving nearest rounding out is no other run.
    assert run(capsys, plan, "--out", out, "--set", "nearest=false")[0] == 0


def test_a_folder_of_others_or_in_use_is_refused(capsys, plan, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").touch()
    status, _, said = run(capsys, plan, "--out", out)
    assert status == 2 and "the folder is not empty, and holds no sweep" in said and "--out" in said
    (out / "thesis.tex").unlink()
    with FileLock(out / ".lock"):
        status, _, said = run(capsys, plan, "--out", out)
    assert status == 2 and "another sweep is running in this folder" in said
    status, _, said = run(capsys, plan, "--out", plan / "below")
    assert status == 2 and "is not a folder" in said


def test_damaged_state_is_one_line(tmp_path):
    (tmp_path / CELLS).write_text("{")
    with pytest.raises(InputError, match="damaged"):
        read_cells(tmp_path)
    write_outcome(tmp_path, Outcome(name="a"))
    assert read_outcome(tmp_path, "a") == Outcome(name="a") and read_outcome(tmp_path, "b") is None
    (tmp_path / "results" / "a.json").write_text("{}")
    with pytest.raises(InputError, match="delete this file"):
        read_outcome(tmp_path, "a")


def test_every_run_that_ends_is_a_line_with_an_estimate():
    console = Console(record=True, width=200)
    with Progress(console=console) as progress:
        shown = driver._Shown(progress, 5, 3)
        shown.say(Outcome(name="a", measure="Top-1", lost=0.5, seconds=240.0))
        shown.say(Outcome(name="b", status="failed", reason="no room"))
        shown.say(Outcome(name="c", seconds=7.0))
    text = console.export_text()
    assert "[3/5] a: Top-1 +0.50 lost, 4 min, about 0 s left" in text
    assert "[4/5] b: failed: no room, about" in text and "[5/5] c: 7 s\n" in text
