"""The boundaries between packages, as CONTRIBUTING.md draws them; what every module keeps to; and the benchmarks' rows."""

import ast
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from lib.rows import BENCHMARKS, TABLES, Table

import ospq_export

ROOT = Path(ospq_export.__file__).parent
BELOW = {
    "errors": set(),
    "progress": set(),
    "formats": {"errors"},
    "world": {"errors"},
    "recipes": {"errors", "formats"},
    "tasks": {"errors"},
    "models": {"errors", "world"},
    "data": {"errors", "models"},
    "graph": {"errors", "formats"},
    "runs": {"errors", "data", "formats", "graph", "models", "recipes"},
    "onnx": {"errors", "runs", "world"},
    "engines": {"errors", "formats", "onnx", "runs", "world"},
    "demo": {"errors", "data", "models"},
}
SHARED = set(BELOW) - {"demo"}
BELOW |= dict.fromkeys(("calibrate", "export", "validate"), SHARED)
BELOW["deploy"] = SHARED | {"export", "validate"}
BELOW["api"] = set(BELOW)
BELOW["sweep"] = set(BELOW)
BELOW["cli"] = set(BELOW)
MODULES = sorted(ROOT.rglob("*.py"))


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Names of the packages that a module imports from, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("ospq_export.")}
    return found


@pytest.mark.parametrize("package", sorted({package_of(p) for p in MODULES} - {"__init__"}))
def test_packages_import_from_below_only(package):
    mine = [p for p in MODULES if package_of(p) == package]
    wrong = {str(p.relative_to(ROOT)): imports(p) - BELOW[package] - {package} for p in mine}
    assert not {name: found for name, found in wrong.items() if found}


def strings(path: Path) -> list[str]:
    """All string constants of a module, docstrings included."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def test_no_library_function_names_an_option():
    # The script of a bundle is a command line of its own.
    library = [p for p in MODULES if package_of(p) != "cli" and p.parent.name != "device"]
    named = [
        (p.name, s) for p in library for s in strings(p) if "`--" in s or " --" in s or s.startswith("--")
    ]
    assert [(name, s) for name, s in named if "torchrun" not in s] == []


def test_names_of_files_are_in_one_place():
    names = [s for s in strings(ROOT / "runs" / "files.py") if s.startswith("model") and " " not in s]
    assert len(names) >= 8
    documented = {p for p in MODULES if package_of(p) == "cli"} | {ROOT / "runs" / "files.py"}
    again = [(p.name, s) for p in MODULES if p not in documented for s in strings(p) if s in names]
    assert again == []


def test_no_module_needs_a_scroll():
    long = {str(p.relative_to(ROOT)): n for p in MODULES if (n := len(p.read_text().splitlines())) > 300}
    assert not long


def loaded_by(code: str) -> set[str]:
    heavy = "{'torch', 'timm', 'torchvision', 'onnx', 'onnxruntime', 'scipy'}"
    command = [sys.executable, "-c", f"import sys\n{code}\nprint(*({heavy} & set(sys.modules)))"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-6:])


def test_nothing_heavy_is_imported_before_it_is_used():
    assert loaded_by("import ospq_export, ospq_export.cli") == set()
    assert loaded_by("import ospq_export.onnx.lint") == {"onnx"}


def test_public_names():
    assert {"Run", "Recipe", "Report", "InputError"} <= set(ospq_export.__all__)
    for name in ospq_export.__all__:
        assert getattr(ospq_export, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ospq_export.nothing  # noqa: B018


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
