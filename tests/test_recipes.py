"""Recipes: the packaged ones, the paper's settings, overrides, and what is refused."""

import pytest

from ospq_export.errors import InputError
from ospq_export.recipes import load_recipe, packaged_recipes


def test_packaged_recipes_load_under_their_names():
    assert packaged_recipes() == ["paper-w4a4", "w4a4", "w4a8", "w6a6", "w8a8"]
    for name in packaged_recipes():
        recipe = load_recipe(name)
        assert recipe.name == name and recipe.description
    bits = {
        name: (load_recipe(name).weight_bits, load_recipe(name).activation_bits)
        for name in packaged_recipes()
    }
    assert bits == {"paper-w4a4": (4, 4), "w4a4": (4, 4), "w4a8": (4, 8), "w6a6": (6, 6), "w8a8": (8, 8)}


def test_the_papers_settings():
    recipe = load_recipe("paper-w4a4")
    r = recipe.reconstruction
    assert recipe.calibration_images == 16 * 64 and r.batch_size == 64
    assert (r.learning_rate_rounding, r.learning_rate_scale, r.scale_parametrization) == (
        1e-3,
        4e-5,
        "linear",
    )
    assert (r.rounding_weight, r.iterations, r.drop_probability) == (0.1, 20_000, 0.5)
    assert (r.beta_start, r.beta_end, r.warm_up) == (20.0, 2.0, 0.2)
    assert (recipe.first_last_bits, r.loss, r.refinement_images) == (8, "literal", 0)
    assert recipe.equalization == "none"


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
    with pytest.raises(InputError, match="weight_bits"):
        load_recipe(str(broken))
