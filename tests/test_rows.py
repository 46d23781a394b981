"""The benchmarks' rows: one line per measurement, replaced by its key, and the files as `put` writes them."""

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from lib.rows import BENCHMARKS, TABLES, Table


@pytest.fixture
def table(tmp_path):
    return Table("seeds", ("network", "seed"), tmp_path / "rows")


def row(seed, top1=0.0, network="vit"):
    return {"network": network, "seed": seed, "top1": top1}


def test_no_rows_yet(table):
    assert table.rows() == [] and table.find(network="vit", seed=0) is None and table.notes() == ""


def test_rows_lie_in_the_order_of_their_keys(table):
    table.put(row(10), row(2), row(2, network="swin"))
    assert [(r["network"], r["seed"]) for r in table.rows()] == [("swin", 2), ("vit", 2), ("vit", 10)]
    assert table.path.read_text().splitlines()[0] == '{"network": "swin", "seed": 2, "top1": 0.0}'


def test_a_row_takes_the_place_of_the_one_with_its_key(table):
    table.put(row(0, 80.0), row(1, 81.0))
    table.put(row(0, 82.0))
    assert table.rows() == [row(0, 82.0), row(1, 81.0)]
    assert table.find(network="vit", seed=0) == row(0, 82.0)
    assert table.rows(seed=1) == [row(1, 81.0)]


def test_several_write_at_the_same_time(table):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: table.put(row(seed)), range(24)))
    assert [r["seed"] for r in table.rows()] == list(range(24))


def test_every_file_has_a_table():
    assert {p.stem for p in (BENCHMARKS / "rows").glob("*.jsonl")} <= {table.name for table in TABLES}


@pytest.mark.parametrize("table", [t for t in TABLES if t.path.is_file()], ids=lambda table: table.name)
def test_file_is_as_put_writes_it(table, tmp_path):
    shutil.copy(table.path, tmp_path)
    Table(table.name, table.key, tmp_path).put()
    assert (tmp_path / table.path.name).read_text() == table.path.read_text()
