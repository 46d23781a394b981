"""Recipes: the packaged ones, the paper's settings, overrides, and what is refused."""

import json

import pytest
from conftest import calibrated_demo
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ospq_export.errors import InputError
from ospq_export.recipes import Recipe, load_recipe, packaged_recipes
from ospq_export.recipes.keys import as_toml, keys_of, refusal


def test_packaged_recipes_load_under_their_names():
    assert packaged_recipes() == ["fp8", "nvfp4", "paper-w4a4", "w4a4", "w4a8", "w6a6", "w8a8"]
    for name in packaged_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name and recipe.description
    bits = {
        name: (load_recipe(name).weight_bits, load_recipe(name).activation_bits)
        for name in packaged_recipes()
        if load_recipe(name).weights is None
    }
    assert bits == {"paper-w4a4": (4, 4), "w4a4": (4, 4), "w4a8": (4, 8), "w6a6": (6, 6), "w8a8": (8, 8)}


# Setting by setting: Ma et al. 2024, appendix F; first and last layer from BRECQ, warm-up and regulariser from AdaRound.
PAPER = {
    "weight_bits": 4,
    "activation_bits": 4,
    "first_last_bits": 8,
    "calibration_images": 16 * 64,
    "equalization": "none",
    "reconstruction": {
        "iterations": 20_000,
        "batch_size": 64,
        "learning_rate_rounding": 1e-3,
        "learning_rate_scale": 4e-5,
        "scale_parametrization": "linear",
        "rounding_weight": 0.1,
        "beta_start": 20.0,
        "beta_end": 2.0,
        "warm_up": 0.2,
        "drop_probability": 0.5,
        "loss": {"kind": "literal"},
        "final_loss": "same",
        "refinement_images": 0,
        "learn_offsets": False,
        "bias_correction": False,
    },
}


def assert_papers(found, changed):
    for key, value in PAPER.items():
        if key != "reconstruction" and key not in changed:
            assert found[key] == value, key
    for key, value in PAPER["reconstruction"].items():
        if key not in changed:
            assert found["reconstruction"][key] == value, key


def test_the_papers_settings():
    assert_papers(load_recipe("paper-w4a4").model_dump(), set())


@pytest.mark.slow
def test_a_run_with_the_papers_settings_has_them_in_its_manifest(tmp_path):
    """All of them at work but for the number of steps and of images."""
    changed = {"iterations": 2, "calibration_images": 64, "observation_images": 32}
    run = calibrated_demo(
        "swin",
        "paper-w4a4",
        tmp_path / "run",
        *("calibration_images=64", "slicing=stage", "reconstruction.refinement_images=0"),
        small=True,
    )
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert_papers(manifest["recipe"], set(changed))
    assert manifest["recipe"]["reconstruction"]["iterations"] == 2
    assert [s["iterations"] for s in manifest["slices"]] == [2] * len(manifest["slices"])
    bits = {q["name"]: q["format"]["bits"] for q in manifest["quantizers"]}
    ends = ("patch_embed.proj.weight", "patch_embed.proj.input", "head.fc.weight", "head.fc.input")
    assert all(bits.pop(name) == 8 for name in ends) and set(bits.values()) == {4}
    assert manifest["calibration"]["images"] == 64 and not manifest["equalized"]


def test_overrides_are_typed():
    recipe = load_recipe(
        "w4a4", ["weight_bits=3", "reconstruction.iterations=7", "name=mine", "reconstruction.warm_up=0.0"]
    )
    assert (recipe.weight_bits, recipe.reconstruction.iterations, recipe.name) == (3, 7, "mine")
    assert recipe.reconstruction.batch_size == load_recipe("w4a4").reconstruction.batch_size


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("weight_bits=9", "weight_bits"),
        ("weight_bits=four", "weight_bits"),
        ("reconstruction.iterations=-1", "reconstruction.iterations"),
        ("reconstruction.drop_probability=1.5", "drop_probability"),
        ("reconstruction.loss=huber", "reconstruction.loss"),
        ("learning_rate=1", "learning_rate"),
        ("slicing=stages", "slicing"),
        ("slicing=blocks:0", "slicing"),
        ("equalization=some", "equalization"),
        ("weight_bits", "not of the form key=value"),
        ("weight_bits.deep=1", "not a section"),
    ],
)
def test_bad_overrides_name_the_key(override, message):
    with pytest.raises(InputError, match=message) as info:
        load_recipe("w4a4", [override])
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("iterations=3", "unknown recipe key 'iterations' (w4a4): write reconstruction.iterations"),
        ("reconstruction.iteratons=3", "write reconstruction.iterations"),
        ("pilots.budget=1", "write pilot"),
        ("quux=1", "recipe explain lists the keys"),
        ("slicing=blok", "slicing 'blok' is unknown (w4a4): it takes auto, layer, atom, block, blocks:N"),
        ("slicing=3", "slicing 3 is not possible (w4a4): it takes auto, layer"),
        ("reconstruction.loss=fischer", "it takes normalized, channel, literal, fisher"),
        ('reconstruction.loss={kind="fisher",temperature=-1}', "loss.temperature -1 is not possible"),
        ('reconstruction.loss={kind="literal",temperature=1}', "is no setting of the kind 'literal'"),
        ('reconstruction.loss={kind="fisher",temprature=1}', "write reconstruction.loss.temperature"),
        ("reconstruction.warm_up=1.5", "it takes a number, at least 0, below 1"),
        ("pilot=3", "pilot is a section of a recipe"),
    ],
)
def test_refusals_say_what_is_possible(override, said):
    with pytest.raises(InputError) as info:
        load_recipe("w4a4", [override])
    assert said in str(info.value)


words = st.text("abcdefgh_", min_size=1, max_size=8) | st.sampled_from([k.name for k in keys_of(Recipe)])
values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.integers(), max_size=3)
)


@settings(max_examples=200, deadline=None)
@given(words, values | st.dictionaries(words, values, max_size=2))
def test_whatever_is_wrong_is_one_line(key, value):
    held = load_recipe("w4a4").model_dump(mode="json")
    *sections, last = key.split(".")
    target = held
    for section in sections:
        target = target[section] if isinstance(target.get(section), dict) else target
    target[last] = value
    try:
        Recipe.model_validate(held)
    except ValidationError as error:
        found = str(refusal(Recipe, error, "r.toml"))
        assert "(r.toml): " in found and "pydantic" not in found and "Input should" not in found


def test_every_key_is_explained():
    known = keys_of(Recipe)
    assert len({key.name for key in known}) == len(known)
    assert all(key.description and key.takes for key in known)


@pytest.mark.parametrize("name", packaged_recipes())
def test_what_is_shown_is_the_recipe(name, tmp_path):
    chosen = load_recipe(name, ["reconstruction.iterations=3"])
    (tmp_path / "r.toml").write_text(as_toml(chosen))
    assert load_recipe(str(tmp_path / "r.toml")) == chosen


def test_files(tmp_path):
    with pytest.raises(InputError, match="no recipe 'w5a5'"):
        load_recipe("w5a5")
    broken = tmp_path / "broken.toml"
    broken.write_text("name = [")
    with pytest.raises(InputError, match="not valid TOML"):
        load_recipe(str(broken))
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        load_recipe(str(broken))
    broken.write_text('name = "incomplete"')
    with pytest.raises(InputError, match="the recipe lacks slicing"):
        load_recipe(str(broken))
