"""The table of hardware, and what it refuses before any work."""

import sys
from pathlib import Path

import pytest
from helpers import RTX, tiny

from ospq_export import cli
from ospq_export.engines import targets
from ospq_export.engines.products import Product, known_capabilities
from ospq_export.engines.targets import TARGETS, capabilities_to_build, check_formats, find_target, target_of
from ospq_export.errors import InputError
from ospq_export.formats.choice import Choice, named
from ospq_export.recipes import load_recipe, packaged_recipes

ROOT = Path(__file__).parents[2]
INT8, FP8, NVFP4 = (named(name, weight=True) for name in ("int8", "fp8", "nvfp4"))
RTX_KNOWS = ["SM120", "SM121", "SM75", "SM80", "SM86", "SM89"]


@pytest.fixture
def rtx(monkeypatch):
    """TensorRT-RTX as the table needs it, installed or not; there is no GPU."""
    products = {Product.TENSORRT_RTX: RTX_KNOWS, Product.TENSORRT: []}
    monkeypatch.setattr(targets, "known_capabilities", products.__getitem__)
    monkeypatch.setattr(targets, "gpu_here", lambda: None)
    return Product.TENSORRT_RTX


def test_every_capability_is_of_one_target():
    names = [n for t in TARGETS.values() for n in (*t.compute_capabilities, *t.former)]
    assert len(names) == len(set(names)) and all(target_of(n.lower()) is target_of(n) for n in names)
    assert target_of("SM101") is target_of("SM110") is TARGETS["thor"] and target_of("SM999") is None
    assert {family for t in TARGETS.values() for family in t.formats} == {
        f.family for f in (INT8, FP8, NVFP4)
    }


@RTX
def test_capabilities_are_spelled_as_the_product_spells_them():
    known = known_capabilities(Product.TENSORRT_RTX)
    assert known and [name for name in known if target_of(name) is None] == []


def test_documents_name_all_targets():
    text = (ROOT / "docs" / "formats.md").read_text()
    assert [name for name in TARGETS if f"`{name}`" not in text] == []


@pytest.mark.parametrize(
    ("format_", "able"),
    [(INT8, list(TARGETS)), (FP8, ["ada", "hopper", "blackwell", "thor"]), (NVFP4, ["blackwell", "thor"])],
)
def test_who_multiplies_what(format_, able):
    for name, target in TARGETS.items():
        if name in able:
            check_formats(target, [INT8, format_])
            continue
        with pytest.raises(InputError, match=f"does not multiply .*{able[0]}.* and {able[-1]} do"):
            check_formats(target, [INT8, format_])


def test_the_line_says_what_where_and_how_to_fix_it():
    with pytest.raises(InputError) as info:
        check_formats(find_target("Ampere"), [INT8, FP8])
    line = "Ampere (SM80, SM86) does not multiply FP8 (`target` ampere): ada, hopper, blackwell and thor do"
    assert str(info.value) == line
    with pytest.raises(InputError, match=r"multiply FP8 and NVFP4 .*: blackwell and thor do"):
        check_formats(TARGETS["orin"], [FP8, NVFP4])
    with pytest.raises(InputError, match="use one of turing, ampere"):
        find_target("volta")


def test_every_place_of_a_recipe_counts():
    places = {
        "w": Choice("fp8", "float", "float", "float"),
        "a": Choice("float", "fp8", "float", "float"),
        "attention": Choice("int8", "int8", "fp8", "int8"),
        "end": Choice("int8", "int8", "int8", "fp8"),
        "override": Choice("int8", "int8", "int8", "int8", (("*.fc1", "fp8"),)),
    }
    for place, choice in places.items():
        assert "fp8" in {f.name for f in choice.formats()}, place
    assert Choice("float", "float", "float", "float").formats() == []
    # What takes over where NVFP4 cannot.
    assert {f.name for f in Choice("nvfp4", "nvfp4", "nvfp4", "int8").formats()} == {"nvfp4", "fp8", "int8"}


def test_packaged_recipes():
    able = {"fp8": 4, "nvfp4": 2}
    for name in packaged_recipes():
        families = {f.family for f in load_recipe(name).formats().formats()}
        found = [t for t in TARGETS.values() if families <= set(t.formats)]
        assert len(found) == able.get(name, len(TARGETS)), name


def test_the_target_says_what_is_built(rtx):
    def built(target, given=()):
        return capabilities_to_build(rtx, [INT8], TARGETS[target], given)

    assert built("ampere") == ("SM80", "SM86")
    assert built("blackwell") == ("SM120", "SM121")
    assert built("ampere", ["sm86"]) == ("sm86",)
    assert capabilities_to_build(rtx, [INT8]) == ()
    with pytest.raises(InputError, match=r"builds for SM.*, not for Hopper \(SM90\).*`target` hopper"):
        built("hopper")
    with pytest.raises(InputError, match=r"SM89 is not Ampere \(SM80, SM86\), the target"):
        built("ampere", ["SM80", "SM89"])


def test_a_given_capability_is_held_to_the_formats(rtx):
    with pytest.raises(InputError, match=r"Ada \(SM89\) does not .* NVFP4 \(`compute_capability` SM89\)"):
        capabilities_to_build(rtx, [NVFP4, FP8], given=["SM120", "SM89"])
    # What the table does not know is the product's to refuse.
    assert capabilities_to_build(rtx, [NVFP4], given=["SM999"]) == ("SM999",)


def test_so_is_the_gpu_of_this_machine(rtx, monkeypatch):
    monkeypatch.setattr(targets, "gpu_here", lambda: "SM86")
    assert capabilities_to_build(rtx, [INT8]) == ()
    assert capabilities_to_build(Product.TENSORRT, [INT8], TARGETS["ampere"]) == ()
    with pytest.raises(InputError, match=r"does not multiply FP8 \(SM86, the GPU of this machine\)"):
        capabilities_to_build(rtx, [FP8])
    with pytest.raises(InputError, match=r"this machine, SM86, which is not Ada \(SM89\)"):
        capabilities_to_build(Product.TENSORRT, [FP8], TARGETS["ada"])


def refused(capsys, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ospq-export", *map(str, arguments)])
    with pytest.raises(SystemExit) as info:
        cli.main()
    assert info.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", ["calibrate", "demo"])
def test_a_recipe_is_refused_before_anything_is_read(capsys, monkeypatch, tmp_path, command):
    words = ["no_such_model", "--data", tmp_path / "nothing"] if command == "calibrate" else []
    given = [*words, "--out", tmp_path / "run", "--recipe", "nvfp4", "--target", "ada"]
    line = "Ada (SM89) does not multiply NVFP4 (--target ada): blackwell and thor do"
    assert refused(capsys, monkeypatch, command, *given) == f"error: {line}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_refused_before_the_export(capsys, monkeypatch, tmp_path, rtx):
    run, everywhere = tmp_path / "run", "reconstruction.iterations=0"
    kinds = [f"{key}=fp8" for key in ("weights", "activations", "attention", "ends")]
    tiny(run, *kinds, everywhere, "reconstruction.refinement_images=0")
    before = sorted(p.name for p in run.iterdir())
    said = refused(capsys, monkeypatch, "export", run, "--target", "turing")
    assert "Turing (SM75) does not multiply FP8 (--target turing)" in said
    words = ["export", run, "--engine", "tensorrt-rtx", "--compute-capability", "SM86"]
    said = refused(capsys, monkeypatch, *words)
    assert "does not multiply FP8 (--compute-capability SM86): ada, hopper" in said
    assert "no target 'volta' (--target)" in refused(capsys, monkeypatch, *words, "--target", "volta")
    assert sorted(p.name for p in run.iterdir()) == before
