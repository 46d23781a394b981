"""Tables and page of a sweep, from outcomes that are made up."""

import csv
import io
import json
import re

import pytest

from ospq_export.sweep.cells import cells_of
from ospq_export.sweep.front import front_of
from ospq_export.sweep.outcome import Outcome
from ospq_export.sweep.plan import load_plan
from ospq_export.sweep.table import Table, write_tables

PLAN = """
name = "Two | networks"
recipes = ["w8a8", "w4a4"]
seeds = [0, 1]
[models.vit]
demo = "vit"
[models.swin]
demo = "swin"
"""
BITS = {"w8a8": 16.0, "w4a4": 8.5}


def made(cell):
    """An outcome that depends on the cell: 4 bits lose a point, seed 1 half a point more, nearest rounding five."""
    lost = (cell.recipe == "w4a4") + 0.5 * cell.seed + 5.0 * cell.nearest
    return Outcome(
        name=cell.name,
        formats=cell.settings.summary(),
        measure="Top-1",
        images=100,
        float_score=90.0,
        scores={"onnxruntime": 90.0 - lost, "openvino": 90.5 - lost},
        lost=lost,
        faithful=True,
        kept=None,
        bits=BITS[cell.recipe],
        file_bytes=2_000_000,
        weight_bytes=int(1e5 * BITS[cell.recipe]) + (cell.model == "swin"),
        seconds=12.5,
    )


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    plan = load_plan(path)
    cells = cells_of(plan)
    return Table(plan, cells, {cell.name: made(cell) for cell in cells})


def written(table, out):
    write_tables(table, out)
    return {path.suffix: path.read_text() for path in out.glob("sweep.*")}


def test_long_and_short_tables(table, tmp_path):
    files = written(table, tmp_path)
    lines = list(csv.DictReader(io.StringIO(files[".csv"])))
    assert [line["run"] for line in lines] == [
        f"{model}-{recipe}-s{seed}" for model in ("vit", "swin") for recipe in BITS for seed in (0, 1)
    ]
    last = lines[-1]
    assert float(last["lost"]) == 1.5 and float(last["nearest lost"]) == 6.5
    assert float(last["onnxruntime"]) == 88.5 and float(last["openvino"]) == 89.0
    assert (last["faithful"], last["accuracy kept"], last["status"]) == ("yes", "open", "done")
    # Means over the seeds of the worse execution, and half of the spread.
    cell = "88.75 ±0.25 (lost 1.25, nearest 6.25)"
    assert table.matrix()[1][1] == [
        "swin",
        "90.00",
        "89.75 ±0.25 (lost 0.25, nearest 5.25)",
        cell,
    ]
    assert f"| {cell} |" in files[".md"] and "12.5" not in files[".md"]
    runs = json.loads(files[".json"])["runs"]
    assert len(runs) == 16 and sum(run["nearest"] for run in runs) == 8


def test_front_is_drawn_and_marked(table, tmp_path):
    marked = {row.cell.name for row in table.rows if row.front}
    assert marked == {f"{model}-{recipe}-s0" for model in ("vit", "swin") for recipe in BITS}
    page = written(table, tmp_path)[".html"]
    assert page.count("<svg ") == 2 and "points lost" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_points_that_nothing_beats():
    assert front_of([(1, 5), (2, 3), (2, 4), (3, 3), (4, 1), (1, 5)]) == [0, 1, 4, 5]
    assert front_of([]) == []


def test_page_sorts_needs_nothing_and_escapes(table, tmp_path):
    failed = Outcome(name="vit-w8a8-s0", status="failed", reason="no <room> (disk)")
    changed = Table(table.plan, table.cells, table.outcomes | {failed.name: failed})
    files = written(changed, tmp_path)
    page = files[".html"]
    assert "no &lt;room&gt; (disk)" in page and "1 failed" in page
    assert not re.search(r'(src|href)="(https?:)?//', page) and "@import" not in page
    heads = re.findall(r'<th[^>]*aria-sort="none"><button type="button">([^<]+)</button></th>', page)
    assert heads[0] == "run" and {"lost", "bits", "seconds"} <= set(heads)
    assert 'href="runs/swin-w4a4-s0/report.html"' in page and 'href="runs/vit-w8a8-s0' not in page
    assert "| vit-w8a8-s0 | no <room> (disk) |" in files[".md"]
    # What is left of that cell is the other seed.
    assert changed.matrix()[1][0][2] == "89.50 (lost 0.50, nearest 5.50)"


def test_nothing_is_done_yet(table, tmp_path):
    waiting = {name: Outcome(name=name, status="waiting") for name in table.outcomes}
    files = written(Table(table.plan, table.cells, waiting), tmp_path)
    assert "16 are not done yet" in files[".html"] and "<svg " not in files[".html"]
    assert files[".csv"].count("waiting") == 8


def test_without_labels_there_is_no_score(table, tmp_path):
    unlabelled = {
        name: o.model_copy(update={"float_score": None, "scores": {"onnxruntime": o.lost}})
        for name, o in table.outcomes.items()
    }
    files = written(Table(table.plan, table.cells, unlabelled), tmp_path)
    assert "| lost 1.25 ±0.25, nearest 6.25 |" in files[".md"] and files[".html"].count("<svg ") == 1
