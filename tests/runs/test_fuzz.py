"""Damaged files are read or refused in one line; the long run of the same is scripts/fuzz.py."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    return {name: fuzz.Material.make(tmp_path_factory.mktemp(name) / "run", name) for name in fuzz.RECIPES}


@pytest.fixture
def material(materials):
    return materials["nvfp4"]


@pytest.mark.parametrize("recipe", fuzz.RECIPES)
def test_undamaged_files_are_read(materials, recipe, monkeypatch):
    materials[recipe].load()
    for name in ("damage_bytes", "damage_value", "damage_tensors"):
        monkeypatch.setattr(fuzz, name, lambda value, _: value)
    for case in fuzz.CASES:
        if case is not fuzz.recipe_override:
            assert fuzz.run_case(materials[recipe], case, 0) == "read", case.__name__


def test_the_runs_have_what_is_to_be_damaged(materials):
    for recipe, made in materials.items():
        record = fuzz.read_manifest(made.folder)
        found = {q.format["format"] for q in record.quantizers}
        wanted = {"w4a4": {"int4", "int8"}, "fp8": {"fp8"}, "nvfp4": {"nvfp4", "fp8"}}
        assert found == wanted[recipe]
        assert ("model_check.onnx" in made.networks) is (recipe == "nvfp4")
        tensors, _ = fuzz.read_tensors(made.folder / fuzz.QUANTIZED_TENSORS)
        assert any(name.endswith(".tensor_scale") for name in tensors) is (recipe == "nvfp4")


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(recipe=st.sampled_from(fuzz.RECIPES), case=st.sampled_from(fuzz.CASES), seed=st.integers(0, 2**32))
def test_damage_is_refused_in_one_line(materials, recipe, case, seed):
    assert fuzz.run_case(materials[recipe], case, seed) in ("read", "refused")


@pytest.mark.parametrize(
    "case",
    [fuzz.manifest_bytes, fuzz.tensors, fuzz.tensor_values, fuzz.onnx_file, fuzz.recipe_bytes],
)
def test_the_damage_is_real(material, case):
    outcomes = [fuzz.run_case(material, case, seed) for seed in range(8)]
    assert outcomes.count("refused") >= 4


def test_a_failing_case_is_noticed(material):
    def crash(_material, _random):
        raise KeyError("x")

    def stray(material, _random):
        (material.folder.parent / "stray").write_text("")

    def slow(_material, _random):
        while True:
            pass

    assert "KeyError" in fuzz.run_case(material, crash, 0)
    assert "files appeared" in fuzz.run_case(material, stray, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fuzz, "SECONDS", 1)
        assert "TooSlowError" in fuzz.run_case(material, slow, 0)


@given(st.binary(max_size=600), st.integers(0, 2**32))
def test_damage_repeats_for_a_seed(data, seed):
    assert fuzz.damage_bytes(data, random.Random(seed)) == fuzz.damage_bytes(data, random.Random(seed))


def test_nesting_beyond_the_recursion_limit(material):
    material.write("manifest.json", b"[" * 100_000)
    with pytest.raises(fuzz.InputError, match="manifest cannot be read"):
        material.load()
    material.restore()
    with pytest.raises(fuzz.InputError):
        fuzz.load_recipe("w4a4", ["weight_bits=" + "[" * 100_000])
    with pytest.raises(fuzz.InputError):
        fuzz.load_recipe("w4a4", ["weight_bits=" + "9" * 5000])
