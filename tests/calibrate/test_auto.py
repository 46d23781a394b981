"""slicing = "auto": bounded, deterministic, recorded, resumed; and what is refused beforehand."""

import json

import pytest
import torch
from conftest import CUDA, calibrated_demo
from helpers import tiny

from ospq_export.calibrate.cost import step_bytes
from ospq_export.calibrate.observe import observe, outlier_profile
from ospq_export.calibrate.slicing import auto
from ospq_export.calibrate.slicing.auto import choose_slicing
from ospq_export.calibrate.slicing.plan import cut_dominance, division, image_steps, plan
from ospq_export.errors import InputError
from ospq_export.export import export
from ospq_export.formats.choice import integers
from ospq_export.graph.capture import capture
from ospq_export.graph.granularity import slicing_of
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model
from ospq_export.recipes import load_recipe
from ospq_export.runs.files import FLOAT_TENSORS, QUANTIZED_TENSORS
from ospq_export.runs.run import Run

CPU = torch.device("cpu")
VALUES = ["slicing=auto", "pilot.held_out=16", "pilot.budget=0.5"]
SHORT = [
    *VALUES,
    *("reconstruction.iterations=400", "reconstruction.batch_size=8", "reconstruction.refinement_images=0"),
]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "depth": 3, "num_classes": 5, "embed_dim": 48, "num_heads": 3}
    return capture(create_model(ModelSpec(name="vit_tiny_patch16_224", kwargs=kwargs)), (3, 32, 32))


@pytest.fixture(scope="module")
def images():
    return torch.randn(48, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def dominances(network, images):
    return cut_dominance(outlier_profile(network, images))


def observed(network, images):
    graph = insert_quantizers(network, integers(3, 3))
    observe(graph, images, batch_size=16, seed=0)
    return graph


def test_trials_stay_within_their_budget():
    recipe = load_recipe("w4a4", ["slicing=auto"])
    for iterations, batch, budget in ((100, 32, 0.3), (500, 32, 0.3), (20_000, 64, 0.3), (500, 32, 0.1)):
        settings = recipe.reconstruction.model_copy(update={"iterations": iterations, "batch_size": batch})
        chosen = recipe.model_copy(
            update={
                "reconstruction": settings,
                "pilot": recipe.pilot.model_copy(update={"budget": budget}),
            }
        )
        found = plan(chosen, 1024, [object()] * 8)
        assert found.share <= budget
        if len(found.candidates) > 1:
            assert found.iterations >= 60
            assert found.share > 0.5 * budget, "what is allowed is used"
    assert len(found.candidates) >= 1
    assert image_steps(recipe.reconstruction, 1024) > 500 * 32


@pytest.mark.parametrize(
    ("images", "expected"), [(512, (256, 256)), (600, (256, 344)), (1024, (256, 768)), (50_000, (256, 1024))]
)
def test_trials_are_judged_on_what_they_do_not_learn_from(images, expected):
    assert division(load_recipe("w4a4"), images) == expected


@pytest.mark.slow
def test_the_choice_has_the_least_divergence_and_is_the_same_again(network, images, dominances):
    recipe = load_recipe("w4a4", SHORT)
    results = []
    for _ in range(2):
        graph = observed(network, images)
        before = [s.clone() for s in graph.state()]
        steps = []

        def advance_of(total, steps=steps):
            return lambda: steps.append(total)

        slices, record = choose_slicing(graph, network.graph, recipe, images, dominances, CPU, 0, advance_of)
        results.append(
            (slices, record.model_dump_json(), [float(a.scale) for a in graph.activations.values()])
        )
        assert all(map(torch.equal, graph.state(), before)), "the run starts as if nothing had been tried"
        assert 0 < len(steps) == steps[0]
    assert results[0] == results[1]
    assert record.choice in {c.name for c in record.candidates} and len(record.candidates) >= 3
    assert min(record.candidates, key=lambda c: c.divergence).name == record.choice
    assert all(len(c.divergence) == 1 and c.divergence[0] > 0 for c in record.candidates)
    assert 0 < record.share <= 0.5 and record.held_out == 16
    assert len({tuple(c.ends) for c in record.candidates}) == len(record.candidates)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("pilot.held_out=25", "48 images are too few to hold 25 out"),
        ("pilot.budget=0.01", "1 % of so few steps"),
    ],
)
def test_where_nothing_can_be_tried_blocks_are_taken(network, images, dominances, value, why):
    recipe = load_recipe("w4a4", ["slicing=auto", "pilot.held_out=16", value])
    graph, said = observed(network, images), []
    before = [float(a.scale) for a in graph.activations.values()]
    slices, record = choose_slicing(graph, network.graph, recipe, images, dominances, CPU, 0, say=said.append)
    assert slices == slicing_of(network.graph, "block")
    assert record.choice == "block" and record.share == record.held_out == 0
    assert [c.divergence for c in record.candidates] == [[]]
    assert before == [float(a.scale) for a in graph.activations.values()]
    assert len(said) == 1 and why in said[0]


@pytest.mark.slow
def test_slices_too_large_for_the_device_are_not_tried(network, images, dominances, monkeypatch):
    whole = step_bytes(network.graph, slicing_of(network.graph, "model"), 8)
    blocks = step_bytes(network.graph, slicing_of(network.graph, "block"), 8)
    assert blocks < 0.8 * whole
    monkeypatch.setattr(auto, "total_memory", lambda device: 2 * whole - 2)
    recipe, graph = load_recipe("w4a4", SHORT), observed(network, images)
    _, record = choose_slicing(graph, network.graph, recipe, images, dominances, CPU, 0)
    names = {c.name for c in record.candidates}
    assert {"block", "atom"} <= names and "model" not in names


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_a_run_records_its_slicing_and_resumes_after_the_trials(tmp_path, device):
    overrides = [*SHORT, "pilot.held_out=8", "reconstruction.batch_size=8", "reconstruction.iterations=260"]

    def calibrated(name):
        return tiny(tmp_path / name, *overrides, device=device)

    whole = calibrated("whole")
    assert len(whole.manifest.slicing.candidates) > 1 and whole.manifest.slicing.dominance
    chosen = next(c for c in whole.manifest.slicing.candidates if c.name == whole.manifest.slicing.choice)
    assert [s.end for s in whole.manifest.slices] == chosen.ends

    class Killed(Exception):
        pass

    from ospq_export.calibrate import job

    with pytest.MonkeyPatch.context() as patch:
        save = job.Job._save

        def dying(self, step):
            if step.index == 1:
                raise Killed
            save(self, step)

        patch.setattr(job.Job, "_save", dying)
        with pytest.raises(Killed):
            calibrated("killed")
        patch.undo()
        patch.setattr(job, "choose_slicing", None)  # the trials are not repeated
        resumed = calibrated("killed")
    assert len(resumed.manifest.slices) > 1 and resumed.manifest.status == "calibrated"
    if device == "cpu":  # a GPU adds in any order
        assert resumed.manifest.slicing == whole.manifest.slicing
        for name in (FLOAT_TENSORS, QUANTIZED_TENSORS):
            assert (resumed.path / name).read_bytes() == (whole.path / name).read_bytes()


@pytest.mark.slow
def test_a_granularity_reaches_the_file(tmp_path):
    granularity = "layer"
    overrides = ["reconstruction.iterations=1", "reconstruction.refinement_images=0"]
    run = tiny(tmp_path / "run", f"slicing={granularity}", *overrides)
    assert run.manifest.slicing.choice == granularity
    expected = slicing_of(run.captured().graph, granularity)
    assert Run.open(run.path).slices() == expected
    export(run.path)
    described = json.loads((run.path / "scales.json").read_text())
    assert [s["name"] for s in described["slices"]] == [s.name for s in expected]
    assert sum(len(s["quantizers"]) for s in described["slices"]) == len(run.manifest.quantizers)


def test_fewer_images_than_a_batch(tmp_path):
    with pytest.raises(InputError, match="8 calibration images are fewer than a batch of 32"):
        calibrated_demo("swin", "w8a8", tmp_path / "run", "calibration_images=8")
    assert not (tmp_path / "run").exists()


def test_a_cut_point_that_does_not_exist(tmp_path):
    with pytest.raises(InputError, match="no cut point 'nowhere'"):
        calibrated_demo("swin", "w8a8", tmp_path / "run", 'slicing=["nowhere"]', small=True)
    assert not (tmp_path / "run").exists()
