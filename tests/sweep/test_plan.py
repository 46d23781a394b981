"""Plans: what they come to, and one line for each that cannot be computed."""

import re
from pathlib import Path

import numpy as np
import pytest

from ospq_export.errors import InputError
from ospq_export.recipes import load_recipe
from ospq_export.recipes.keys import keys_of
from ospq_export.sweep.cells import cells_of, nearest, spec_of
from ospq_export.sweep.plan import Images, Model, Plan, Resources, load_plan

ROOT = Path(__file__).parents[2]
PLAN = """
recipes = ["w8a8", "w4a4"]
seeds = [0, 7]
[data]
calibration = "images.npz"
validation = "images.npz"
[models.small]
model = "vit_tiny_patch16_224"
model_kwargs = "img_size=32 depth=1"
random_weights = true
[models.mine]
model = "module:networks:network"
model_kwargs = { width = 8, sizes = [1, 2] }
validation = "hfds:somewhere"
[overrides]
plain = []
short = ["reconstruction.iterations=3"]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with images, which tests are in."""
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", images=np.zeros((2, 32, 32), np.uint8))
    return tmp_path


def read(text, *overrides):
    Path("plan.toml").write_text(text)
    return load_plan(Path("plan.toml"), overrides)


def test_every_model_meets_every_recipe_set_and_seed(folder):
    plan = read(PLAN)
    cells = cells_of(plan)
    learned = [cell for cell in cells if not cell.nearest]
    assert len(learned) == 2 * 2 * 2 * 2 == len({cell.name for cell in learned})
    assert {(c.model, c.recipe, c.overrides, c.seed) for c in learned} == {
        (m, r, o, s) for m in plan.models for r in plan.recipes for o in plan.overrides for s in plan.seeds
    }
    assert [cell.seed for cell in learned] == [0] * 8 + [7] * 8
    by_name = {cell.name: cell for cell in cells}
    cell = by_name["small-w4a4-short-s7"]
    assert cell.settings == load_recipe("w4a4", ["reconstruction.iterations=3"])
    assert cell.network.calibration == cell.network.validation == str(folder / "images.npz")
    assert by_name["mine-w8a8-plain-s0"].network.validation == "hfds:somewhere"


def test_nearest_rounding_is_one_run_for_all_that_differ_in_learning_alone(folder):
    cells = {cell.name: cell for cell in cells_of(read(PLAN))}
    rounded = [cell for cell in cells.values() if cell.nearest]
    assert len(rounded) == 2 * 2 * 2
    for cell in cells.values():
        if not cell.nearest:
            beside = cells[cell.beside]
            assert beside.settings.formats() == cell.settings.formats()
            assert (beside.model, beside.seed) == (cell.model, cell.seed)
    assert cells["small-w4a4-short-s0"].beside == cells["small-w4a4-plain-s0"].beside
    # Other images are other ranges.
    more = ["overrides.short=['calibration_images=512']"]
    assert sum(cell.nearest for cell in cells_of(read(PLAN, *more))) == 2 * 2 * 2 * 2
    assert not any(cell.nearest or cell.beside for cell in cells_of(read(PLAN, "nearest=false")))
    settings = nearest(load_recipe("nvfp4")).reconstruction
    assert settings.iterations == settings.refinement_images == settings.compensation_images == 0
    assert not settings.bias_correction


def test_networks_are_named_as_on_the_command_line(folder):
    plan = read(PLAN)
    cells = {cell.model: cell for cell in cells_of(plan)}
    small, mine = (spec_of(cells[name].network) for name in ("small", "mine"))
    assert (small.source, small.kwargs, small.pretrained) == ("timm", {"img_size": 32, "depth": 1}, False)
    assert (mine.source, mine.name, mine.kwargs["sizes"]) == ("module", "networks:network", (1, 2))


def test_a_cell_travels_as_json(folder):
    for cell in cells_of(read(PLAN)):
        again = type(cell).model_validate_json(cell.model_dump_json())
        assert again.identity() == cell.identity() and spec_of(again.network) == spec_of(cell.network)


BAD = [
    (PLAN, "recipes=3", "recipes 3 is not possible"),
    ("recipes = ", "", "not valid TOML"),
    ('recipes = ["w8a8"]', "", "the plan lacks models"),
    (PLAN.replace("recipes =", "recipe ="), "", "unknown plan key 'recipe' (plan.toml): write recipes"),
    (PLAN, "nothing", "not of the form key=value"),
    (PLAN, "validation.limits=3", "write validation.limit"),
    (PLAN, "validation.thresholds.max_dorp=3", "write validation.thresholds.max_drop"),
    (
        PLAN,
        "resources.cpus=0",
        "resources.cpus 0 is not possible (plan.toml): it takes a whole number, at least 1",
    ),
    (PLAN, "resources.memory=lots", "'lots' is no amount of memory (plan.toml, resources.memory)"),
    (PLAN, "zebra=1", "docs/sweep-plan.md lists the keys"),
    (PLAN, "models.small.chekpoint=a", "(plan.toml, models.small): write checkpoint"),
    (PLAN, "models.other=3", "a model is a section (plan.toml, models.other)"),
    (PLAN, "models.other.task='embed'", "nothing says which network it is (plan.toml, models.other)"),
    (PLAN, "models.small.demo='vit'", "demo brings everything along"),
    (PLAN, "models.small.demo='bert'", "demo 'bert' is unknown"),
    (PLAN, "models.'a b'.demo='vit'", "is no name for a run"),
    (PLAN, "seeds=[0, 0]", "two runs have the same name (small-w8a8-plain-s0"),
    (PLAN, "seeds=[-1]", "seeds -1"),
    (PLAN, "recipes=['w5a5']", "there is no recipe 'w5a5'"),
    (PLAN, "overrides.bad=['weight_bits=77']", "weight_bits 77 is not possible"),
    (PLAN, "overrides.bad=['weight_bit=7']", "write weight_bits (recipes w8a8, overrides.bad)"),
    (PLAN, "overrides.bad=['nonsense']", "not of the form key=value (overrides)"),
    (PLAN, "target=turing", None),
    ("target='turing'" + PLAN, "recipes=['fp8']", "TURING"),
    (PLAN, "validation.backends=['onnxrt']", "there is no execution 'onnxrt'"),
    (PLAN, "validation.backends=['float']", "no verdict without a deployed execution: float is none"),
    (PLAN, "data.calibration=nowhere", "no such file or folder (nowhere)"),
    (PLAN, "data.calibration=-", "a pipe is read once"),
    (
        PLAN,
        "data={}",
        "nothing says where the images are (models.small.calibration): write it, or data.calibration",
    ),
    (PLAN, "models.small.checkpoint=a.safetensors", "there is no such file (models.small.checkpoint"),
    (PLAN, "models.small.model_kwargs=depth", "not name=value"),
    (PLAN + "[models.third]\nmodel = 'a'\nclass_map = 'plan.toml'\nclass_order = 'plain'", "", "class"),
    (PLAN, "data.class_map=classes.txt", "there is no such file (models.small.class_map"),
]


@pytest.mark.parametrize(("text", "override", "said"), BAD)
def test_bad_plans_are_one_line(folder, text, override, said):
    overrides = [override] if override else []
    if said is None:
        assert cells_of(read(text, *overrides))
        return
    with pytest.raises(InputError) as info:
        cells_of(read(text, *overrides))
    line = str(info.value)
    assert said.lower() in line.lower() and "\n" not in line, line


def test_all_keys_are_explained_on_the_page():
    text = (ROOT / "docs" / "sweep-plan.md").read_text()
    # Those of a network stand in a table of their own.
    known = {key.name for kind in (Plan, Model) for key in keys_of(kind)} | {
        "data.calibration",
        "data.validation",
    }
    known -= {f"data.{name}" for name in Images.model_fields}
    assert {f"resources.{name}" for name in Resources.model_fields} < known
    explained = set(re.findall(r"`([a-z_.0-9]+)`", text))
    assert not {name for name in known if name not in explained and name.rpartition(".")[2] not in explained}


@pytest.mark.parametrize("path", sorted((ROOT / "plans").glob("*.toml")), ids=lambda path: path.stem)
def test_plans_of_the_repository_can_be_read(path, folder):
    """As far as that goes without the images."""
    plan = load_plan(path, ["data.calibration=images.npz", "data.validation=images.npz"])
    cells = cells_of(plan)
    assert len(cells) >= 2 * len(plan.models)


def test_the_plan_of_the_paper_names_networks_that_timm_has():
    import timm

    plan = load_plan(ROOT / "plans" / "imagenet.toml")
    assert {
        name for m in plan.models.values() if (name := str(m.model)) not in timm.list_pretrained()
    } == set()
    assert plan.recipes == ("paper-w4a4",)
