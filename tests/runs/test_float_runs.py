"""Runs with floating-point formats: reopened they are what was calibrated, and what was tampered with is refused."""

import json
import re
import shutil

import helpers as q
import pytest
import torch

from ospq_export.errors import InputError
from ospq_export.formats.minifloat import E2M1
from ospq_export.recipes import load_recipe
from ospq_export.runs.files import MANIFEST, QUANTIZED_TENSORS
from ospq_export.runs.manifest import read_manifest, record_files
from ospq_export.runs.run import Run
from ospq_export.runs.tensors import read_tensors, write_tensors
from ospq_export.validate.codes.records import weight_comparisons
from ospq_export.validate.report import plots

CHOICES = {
    "fp8": ("weights=fp8", "activations=fp8", "ends=fp8"),
    "nvfp4": ("weights=nvfp4", "activations=nvfp4", "attention=fp8", "ends=fp8"),
    "some float": (
        "weights=fp8",
        "activations=fp8",
        "ends=fp8",
        'overrides={"*.fc1"="float", "head"="int8"}',
    ),
}
FC1, HEAD = "blocks.0.mlp.fc1.weight", "head.weight"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A short run of each choice; do not change them."""
    made = {}

    def get(name):
        if name not in made:
            out = tmp_path_factory.mktemp(name.replace(" ", "_")) / "run"
            made[name] = q.tiny(out, *CHOICES[name])
        return made[name]

    return get


@pytest.fixture
def damaged(runs, tmp_path):
    """A copy of a run whose tensors were changed, with hashes that fit again."""

    def damage(name, change):
        folder = shutil.copytree(runs(name).path, tmp_path / "run")
        tensors, header = read_tensors(folder / QUANTIZED_TENSORS)
        change(tensors)
        write_tensors(folder / QUANTIZED_TENSORS, tensors, header)
        record_files(folder, read_manifest(folder), QUANTIZED_TENSORS)
        return Run.open(folder)

    return damage


@pytest.mark.parametrize("name", CHOICES)
def test_a_reopened_run_is_what_was_calibrated(runs, name):
    run = Run.open(runs(name).path)
    tensors, _ = read_tensors(run.path / QUANTIZED_TENSORS)
    network = run.quantized_graph()
    for record in run.manifest.quantizers:
        quantizer = (network.weights if record.kind == "weight" else network.activations)[record.name]
        assert quantizer.format == record.read_format()
        assert torch.equal(quantizer.scale, tensors[f"{record.name}.scale"])
    for quantizer in network.weights.values():
        codes = tensors[f"{quantizer.name}.codes"]
        assert codes.dtype == quantizer.format.storage
        assert torch.equal(quantizer.codes.view(torch.uint8), codes.view(torch.uint8))
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits, again = network.module(x), Run.open(run.path).fake_quant_network()(x)
        original = run.float_network()(x)
    assert torch.equal(logits, again) and bool(torch.isfinite(logits).all())
    assert float((logits - original).abs().mean()) < 0.5 * float(original.std())
    assert not torch.equal(logits, original)


def test_formats_of_the_runs(runs):
    def formats(name):
        return {r.name: r.format["format"] for r in runs(name).manifest.quantizers}

    assert set(formats("fp8").values()) == {"fp8"}
    found = formats("nvfp4")
    inner = [f"blocks.{k}.{part}" for k in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert {n for n, f in found.items() if f == "nvfp4"} == {
        f"{name}.{operand}" for name in inner for operand in ("weight", "input")
    }
    assert {f for n, f in found.items() if n.removesuffix(".weight").removesuffix(".input") not in inner} == {
        "fp8"
    }
    found = formats("some float")
    assert not [n for n in found if ".fc1." in n] and found[HEAD] == "int8"


def test_the_runs_tensors_survive_without_damage(damaged):
    damaged("nvfp4", lambda tensors: None).quantized_graph()


def at(name, place, value):
    """Sets one element, of a tensor's bytes where they are no plain numbers."""

    def change(tensors):
        tensor = tensors[name]
        flat = (tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor).view(-1)
        flat[place] = value(flat[place]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fp8", at(f"{FC1}.codes", 3, 0x7F), f"{FC1}.codes are not all fp8"),
        ("fp8", at(f"{FC1}.codes", 3, 0xFF), f"{FC1}.codes are not all fp8"),
        ("fp8", at(f"{FC1}.scale", 3, 0.0), f"{FC1}.scale is not positive"),
        ("fp8", at(f"{FC1}.scale", 3, float("nan")), f"{FC1}.scale is not finite"),
        (
            "fp8",
            lambda t: t.update({f"{FC1}.codes": t[f"{FC1}.codes"].view(torch.int8)}),
            "expected torch.uint8",
        ),
        ("fp8", lambda t: t.pop(f"{FC1}.codes"), "found nothing"),
        ("nvfp4", at(f"{FC1}.codes", 3, 5), f"{FC1}.codes are not all nvfp4"),
        ("nvfp4", at(f"{FC1}.codes", 3, -13), f"{FC1}.codes are not all nvfp4"),
        ("nvfp4", at(f"{FC1}.codes", 3, -128), f"{FC1}.codes are not all nvfp4"),
        ("nvfp4", at(f"{FC1}.scale", 3, lambda v: v * 1.03), f"{FC1}.scale is not what nvfp4 can store"),
        ("nvfp4", at(f"{FC1}.scale", 3, lambda v: v * 2**12), f"{FC1}.scale is not what nvfp4 can store"),
        ("nvfp4", at(f"{FC1}.scale", 3, lambda v: v * 2**-20), f"{FC1}.scale is not what nvfp4 can store"),
        ("nvfp4", at(f"{FC1}.scale", 3, lambda v: -v), f"{FC1}.scale is not positive"),
        ("nvfp4", at(f"{FC1}.tensor_scale", 0, 0.0), f"{FC1}.scale is not what nvfp4 can store"),
        ("nvfp4", at(f"{FC1}.tensor_scale", 0, lambda v: -v), f"{FC1}.scale is not what nvfp4 can store"),
        ("nvfp4", at(f"{FC1}.tensor_scale", 0, float("inf")), f"{FC1}.tensor_scale is not finite"),
        ("nvfp4", lambda t: t.pop(f"{FC1}.tensor_scale"), f"{FC1}.tensor_scale.*found nothing"),
        ("nvfp4", at("blocks.0.mlp.fc1.input.scale", 0, 0.0), "input.scale is not positive"),
    ],
)
def test_tampered_tensors_are_refused(damaged, name, change, message):
    run = damaged(name, change)
    with pytest.raises(InputError, match=message):
        run.quantized_graph()


INT8 = {"format": "int8", "bits": 8, "grid": "symmetric", "lo": -128, "hi": 127, "axis": 0}
FP8 = {"format": "fp8", "bits": 8, "axis": 0}


@pytest.mark.parametrize(
    ("name", "quantizer", "record"),
    [
        ("fp8", FC1, INT8),
        ("fp8", FC1, {**FP8, "axis": 1}),
        ("fp8", FC1, {"format": "fp8"}),
        ("fp8", "blocks.0.mlp.fc1.input", {"format": "nvfp4", "bits": 4, "axis": -1, "block_size": 16}),
        ("nvfp4", FC1, FP8),
        ("nvfp4", FC1, INT8),
        ("nvfp4", FC1, {"format": "nvfp4", "bits": 4, "axis": 1, "block_size": 32}),
        ("nvfp4", "blocks.0.mlp.fc1.input", {**FP8, "axis": None}),
        ("nvfp4", FC1, {"format": "float"}),
        ("some float", HEAD, {**INT8, "axis": 1}),
        ("some float", HEAD, {**INT8, "hi": float("inf")}),
    ],
)
def test_records_of_another_format_are_refused(runs, tmp_path, name, quantizer, record):
    folder = shutil.copytree(runs(name).path, tmp_path / "run")
    values = json.loads((folder / MANIFEST).read_text())
    changed = next(r for r in values["quantizers"] if r["name"] == quantizer)
    assert changed["format"] != record
    changed["format"] = record
    (folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(InputError, match=quantizer):
        Run.open(folder).quantized_graph()


@pytest.mark.parametrize(
    ("pattern", "near"), [("blocks.11.mlp.*", r"blocks\.[01]\.mlp\.fc[12]"), ("haed", "head"), ("", "")]
)
def test_an_override_that_fits_no_operator_is_refused_before_any_work(tmp_path, monkeypatch, pattern, near):
    monkeypatch.setattr("ospq_export.calibrate.stage.check_sizes", lambda *_: pytest.fail("work"))
    expected = rf"{pattern!r} fits no operator.*\(the recipe's overrides\): the closest are .*{near}"
    with pytest.raises(InputError, match=expected) as refused:
        q.tiny(tmp_path / "run", f'overrides={{"head"="fp8", "{pattern}"="float"}}')
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def sliceless(values):
    values["slices"].pop()


def tensorless(values):
    del values["files"][QUANTIZED_TENSORS]


@pytest.mark.parametrize(
    ("change", "message"),
    [(sliceless, "lacks the slice of"), (tensorless, f"lacks {QUANTIZED_TENSORS}")],
)
def test_a_manifest_that_contradicts_itself_is_refused(runs, tmp_path, change, message):
    folder = shutil.copytree(runs("fp8").path, tmp_path / "run")
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"the manifest {message}"):
        Run.open(folder)


def test_weights_are_compared_and_their_scales_counted(runs):
    run = runs("nvfp4")
    tensors, _ = read_tensors(run.path / QUANTIZED_TENSORS)
    formats = run.manifest.formats()
    for w in weight_comparisons(run):
        codes, scale = (tensors[f"{w.name}.{part}"] for part in ("codes", "scale"))
        format_ = formats[w.name]
        levels = format_.decode(codes)
        assert w.histogram == [int((levels == level).sum()) for level in format_.levels.all]
        assert w.sqnr > (10 if format_.name == "nvfp4" else 25)
        if format_.name == "fp8":
            assert w.scales == {}
            continue
        stored = scale / tensors[f"{w.name}.tensor_scale"]
        ends = {
            k: int(((stored >= 2.0**k * 0.99) & (stored < 2.0 ** (k + 1) * 0.99)).sum()) for k in w.scales
        }
        assert w.scales == ends and sum(w.scales.values()) == scale.numel()


def test_plots_show_levels(runs):
    run = runs("nvfp4")
    weights, formats = weight_comparisons(run), run.manifest.formats()
    inner, head = (next(w for w in weights if w.name == name) for name in (FC1, HEAD))

    def labels(svg):
        return re.findall(r"<text[^>]*>([^<]*)</text>", svg)

    found = labels(plots.histogram_plot([inner], formats, "codes"))
    assert [float(t) for t in found if re.fullmatch(r"-?[\d.]+", t)][:15] == list(E2M1.all)
    assert "level" in found
    found = labels(plots.histogram_plot([head], formats, "codes"))
    assert not {"120", "-120", "40"} & set(found), "places are no levels"
    found = labels(plots.scale_plot(weights))
    assert "block scale as stored" in found and "256" in found
    assert plots.scale_plot([head]) is None


@pytest.mark.parametrize("constant", [None, "nowhere"])
def test_the_report_refuses_what_it_cannot_compare(runs, tmp_path, constant):
    folder = shutil.copytree(runs("fp8").path, tmp_path / "run")
    assert len(weight_comparisons(Run.open(folder))) == 10
    values = json.loads((folder / MANIFEST).read_text())
    next(r for r in values["quantizers"] if r["name"] == FC1)["constant"] = constant
    (folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(InputError, match=f"{FC1}: there is no constant"):
        weight_comparisons(Run.open(folder))


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_packaged_recipes_choose_them(name):
    formats = load_recipe(name).formats()
    assert (formats.weight, formats.activation, formats.attention, formats.end) == (name, name, "fp8", "fp8")
    assert load_recipe(name).summary() == name
