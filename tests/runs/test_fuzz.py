"""Damaged files are read or refused in one line; the long run of the same is scripts/fuzz.py."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return fuzz.Material.make(tmp_path_factory.mktemp("sandbox") / "run")


def test_undamaged_files_are_read(material):
    material.load()
    for name, damage in (("damage_bytes", lambda data, _: data), ("damage_value", lambda value, _: value)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fuzz, name, damage)
            patch.setattr(fuzz, "damage_bytes", lambda data, _: data)
            for case in fuzz.CASES:
                if case is not fuzz.recipe_override and (
                    name == "damage_value" or "values" not in case.__name__
                ):
                    assert fuzz.run_case(material, case, 0) == "read", case.__name__


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=st.sampled_from(fuzz.CASES), seed=st.integers(0, 2**32))
def test_damage_is_refused_in_one_line(material, case, seed):
    assert fuzz.run_case(material, case, seed) in ("read", "refused")


@pytest.mark.parametrize("case", [fuzz.manifest_bytes, fuzz.tensors, fuzz.onnx_file, fuzz.recipe_bytes])
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
