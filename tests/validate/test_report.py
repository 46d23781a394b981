"""report.json, report.md and report.html of a real validation; a baseline; a copied run directory without anything else."""

import base64
import datetime
import html
import io
import itertools
import json
import platform
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from pydantic import ValidationError

import report_schema
from ospq_export.data import ImageSet
from ospq_export.demo import demo_images
from ospq_export.errors import InputError
from ospq_export.runs.manifest import OutlierRecord, read_manifest, write_manifest
from ospq_export.runs.run import Run
from ospq_export.runs.tensors import read_tensors
from ospq_export.tasks.classify import ECE
from ospq_export.tasks.comparison import Flip, margin_histogram
from ospq_export.validate import Report, render, validate, write_documents
from ospq_export.validate.executions.table import FAKE_QUANT, FLOAT, FP32, OPTIMIZED, UNOPTIMIZED
from ospq_export.validate.findings import stand_in_findings
from ospq_export.validate.report import plots
from ospq_export.validate.report.details import flips_of
from ospq_export.validate.report.model import stamped
from ospq_export.validate.report.pictures import data_url, thumbnails
from ospq_export.validate.report.summary import summarize

ROOT = Path(__file__).parents[2]
LIMIT = 40


@pytest.fixture(scope="module")
def validated(finished_runs, tmp_path_factory):
    """A W4A4 run validated with the W8A8 run as its baseline, with latency; and its images."""
    folder = tmp_path_factory.mktemp("validated")
    run = Run.open(shutil.copytree(finished_runs["w4a4"], folder / "run"))
    other = Run.open(finished_runs["w8a8"])
    images = demo_images("test", run.manifest.data)
    chosen = [FLOAT, FAKE_QUANT, OPTIMIZED]
    options = {
        "limit": LIMIT,
        "floor_images": 20,
        "code_images": 2,
        "latency": (2,),
        "batch_size": 30,
    }
    report = validate(run, images, backends=chosen, baseline=other, **options)
    # A flip shows what flips look like, whatever this machine's rounding gives.
    flip = Flip(id="test/00007", label=1, reference=1, deployed=6, reference_margin=0.25, deployed_margin=0.5)
    margins = report.comparisons[0].margins
    margins = margins.model_copy(update={"flips": [1, *[0] * (len(margins.images) - 1)]})
    comparison = report.comparisons[0].model_copy(update={"flips": [flip], "margins": margins})
    # And a note: whether there is one of its own depends on the processor and its load.
    verdict = report.verdict.model_copy(update={"text": [*report.verdict.text, "model.onnx has a note"]})
    shown = report.model_copy(update={"comparisons": [comparison], "verdict": verdict})
    write_documents(run, shown, images)
    return run, report, shown


class Page(HTMLParser):
    """Collects tags with their attributes, what would be loaded, the text, and the cells of every table."""

    def __init__(self):
        super().__init__()
        self.found, self.loads, self.text, self.tables = [], [], "", []
        self.cell = None

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href", "srcset")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.cell = len(self.tables[-1][-1])
            self.tables[-1][-1].append("")
        elif tag == "small" and self.cell is not None:
            self.tables[-1][-1][self.cell] += "|"

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self.cell = None

    def handle_data(self, data):
        self.text += data
        if self.cell is not None:
            self.tables[-1][-1][self.cell] += data

    @property
    def tags(self):
        return [tag for tag, _ in self.found]

    def table(self, first):
        """Rows of the table whose first header is this."""
        return next(rows for rows in self.tables if rows[0][0] == first)


def page_of(run):
    page = Page()
    page.feed((run.path / "report.html").read_text(encoding="utf-8"))
    return page


def test_report_json_is_the_report(validated):
    run, report, _ = validated
    text = (run.path / "report.json").read_text()
    assert text.splitlines()[3].strip().startswith(json.dumps(report.verdict.text[0])), (
        "the verdict comes first"
    )

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(text, parse_constant=refuse)["schema_version"] == 7
    assert Report.model_validate_json(text) == report


def test_published_schema_is_the_models():
    assert report_schema.TARGET.read_text() == report_schema.schema_text(), (
        "run: python scripts/report_schema.py"
    )


def test_a_real_report_meets_the_published_schema(validated):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    values = json.loads((validated[0].path / "report.json").read_text())
    validator.validate(values)
    del values["verdict"]["exit_status"]
    assert not validator.is_valid(values)


def test_the_page_is_complete_and_self_contained(validated):
    run, _, shown = validated
    page = page_of(run)
    assert [v for v in page.loads if not v.startswith(("data:", "#"))] == [], "nothing is fetched"
    assert "script" not in page.tags and "link" not in page.tags
    assert "default-src 'none'" in (run.path / "report.html").read_text(), "nor could it be"
    assert page.tags.count("img") == 1
    parts = [
        "Is the deployment faithful?",
        "Is accuracy kept?",
        "Size of the file",
        "Latency (batch 2)",
        "Keep in mind",
    ]
    sections = [
        "What the verdicts rest on",
        "Every execution",
        "Against the float network",
        "Noise floor",
        "Latency",
    ]
    sections += [
        "Against w8a8",
        "Slice by slice",
        "Flipped images",
        "Classes",
        "Appendix",
        "Quantization",
        "Provenance",
    ]
    titles = headings(run)
    assert all(part in page.text for part in parts) and all(
        part in titles for part in sections if part != "Against w8a8"
    )
    places = [page.text.rindex(part) for part in (*parts, "What the verdicts rest on")]
    assert places == sorted(places), "the answers come before the evidence"
    order = [next(i for i, t in enumerate(titles) if t.startswith(part)) for part in (*sections, "Glossary")]
    assert order == sorted(order)
    for piece in (*run.manifest.files.values(), *(c.text for c in shown.verdict.criteria), "test/00007"):
        assert piece in page.text
    assert "Trouser" in page.text and run.manifest.graph_fingerprint in page.text
    drawn = [a["aria-label"] for tag, a in page.found if tag == "svg"]
    assert len(drawn) == len(set(drawn)) == 8, (
        "slices, margins, classes, outliers, errors, losses, two of codes; none twice"
    )


def headings(run):
    return [html.unescape(re.sub(r"<[^>]+>", "", found[1])).strip() for found in levels(run)]


def levels(run):
    """(level, content) of every heading of the page."""
    return re.findall(r"<h([1-6])[^>]*>(.*?)</h\1>", (run.path / "report.html").read_text(), re.DOTALL)


def in_bytes(text):
    value, unit = text.split()
    return float(value) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_the_first_screen_answers(validated):
    run, report, _ = validated
    first = (run.path / "report.html").read_text().split("<nav")[0]
    text = " ".join(html.unescape(re.sub(r"<[^>]+>", " ", first)).split())
    worst = max(report.accuracy, key=lambda a: a.drop)
    sizes = [(run.path / name).stat().st_size for name in ("model_fp32.onnx", "model.onnx")]
    shown = re.search(r"([\d.]+ [kMG]B) → ([\d.]+ [kMG]B)", text).groups()
    assert [in_bytes(size) for size in shown] == pytest.approx(sizes, rel=0.01)
    assert f"{worst.reference_score:.2f} % → {worst.deployed_score:.2f} %" in text
    timed = {x.name: x.median_ms for x in report.latencies}
    assert f"{timed['onnxruntime-fp32']:.3g} ms → {timed[OPTIMIZED]:.3g} ms" in text
    assert "w4a4: W4A4" in text and "NVIDIA GPUs from Turing on" in text
    for judged in (report.verdict.faithful, report.verdict.accuracy):
        assert judged.advice and judged.advice.replace("`", "") in text
    decision = {0: "Ready to deploy", 1: "Do not deploy it as it is", 3: "Not decided yet"}
    assert decision[report.verdict.exit_status] in text


def test_a_file_that_stands_in_is_not_the_deployed_one(validated):
    """ONNX Runtime runs an NVFP4 network as a larger file of float operators: neither its size nor its speed is shown."""
    run, report, _ = validated

    def standing(b):
        inside = {**b.detail, "file": "model_check.onnx", "bytes": "99000000"}
        return b.model_copy(update={"detail": inside}) if b.name == OPTIMIZED else b

    changed = report.model_copy(update={"backends": [standing(b) for b in report.backends]})
    tiles = {tile.title: tile for tile in summarize(changed, run.manifest).tiles}
    size = (run.path / "model.onnx").stat().st_size
    assert in_bytes(tiles["Size of the file"].after) == pytest.approx(size, rel=0.01)
    assert not any("Latency" in t for t in tiles)
    findings = stand_in_findings(changed.backends)
    assert [line.split(",")[0] for line in findings] == ["model.onnx was judged by model_check.onnx"]
    assert stand_in_findings(report.backends) == []


def test_charts_are_drawn_once(validated):
    """Executions that flip the same images share a chart, a heading and a list."""
    _, _, shown = validated
    (one,) = shown.comparisons
    margins = one.margins.model_copy(update={"flips": [1, *[0] * (len(one.margins.images) - 1)]})
    both = [
        one.model_copy(update={"deployed": name, "margins": margins}) for name in (OPTIMIZED, UNOPTIMIZED)
    ]
    assert len(plots.margin_plots(both)) == 1 and plots.margin_plots(shown.comparisons[:0]) == []
    (group,) = flips_of(shown.model_copy(update={"comparisons": both}))
    assert group.deployed == [OPTIMIZED, UNOPTIMIZED] and len(group.table(1).rows) == 1


def test_every_cell_stands_under_its_header(validated):
    """Also where two columns are called alike, as for two batch sizes."""
    run, report, shown = validated
    timed = [
        x.model_copy(update={"batch_size": size, "median_ms": x.median_ms * size})
        for x in report.latencies
        for size in (1, 2)
    ]
    copy = Run(Path(shutil.copytree(run.path, run.path.parent / "latencies")), run.manifest)
    write_documents(
        copy, shown.model_copy(update={"latencies": timed}), demo_images("test", run.manifest.data)
    )
    rows = page_of(copy).table("execution")
    headers, *found = next(t for t in page_of(copy).tables if any("batch 1" in cell for cell in t[0]))
    assert headers == [
        "execution",
        *(f"batch {n}, ms|90th percentile" if i == 0 else "images/s" for n in (1, 2) for i in (0, 1)),
    ]
    expected = {(x.name, x.batch_size): x for x in timed}
    for name, *cells in found:
        wanted = []
        for size in (1, 2):
            x = expected[name, size]
            wanted += [f"{x.median_ms:.2f}|{x.p90_ms:.2f}", f"{x.images_per_second:.0f}"]
        assert cells == wanted
    assert len(rows) > 1 and len(found) == len({x.name for x in timed})


def test_the_page_can_be_read_by_everyone(validated):
    run = validated[0]
    page = page_of(run)
    assert all(a.get("scope") for tag, a in page.found if tag == "th")
    assert all(a.get("alt") for tag, a in page.found if tag == "img")
    steps = [int(level) for level, _ in levels(run)]
    assert steps[0] == 1 and steps.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(steps)), "no level is skipped"
    css = (run.path / "report.html").read_text().split("<style>")[1].split("</style>")[0]
    for theme in css.split("prefers-color-scheme: dark")[:2]:
        colours = dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]+);", theme))
        for ink in ("ink", "dim", "link", "good", "bad", "open"):
            for ground in ("page", "panel"):
                assert contrast(colours[ink], colours[ground]) >= 4.5, (ink, ground)


def contrast(first, second):
    """WCAG 2.2's ratio of two colours."""

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_no_picture_where_images_must_not_leave(validated):
    run, _, shown = validated
    copy = Run(Path(shutil.copytree(run.path, run.path.parent / "blind")), run.manifest)
    write_documents(copy, shown, demo_images("test", run.manifest.data), pictures=False)
    page = page_of(copy)
    assert "img" not in page.tags and not [v for v in page.loads if v.startswith("data:")]
    assert "test/00007" in page.text and "Pictures were left out on request" in page.text


def test_date_and_host_on_request_only(validated):
    run, report, shown = validated
    for name in ("report.json", "report.md", "report.html"):
        text = (run.path / name).read_text()
        assert str(run.path.parent) not in text, "nor the folder"
        assert not re.search(r"\d{4}-\d\d-\d\d", text), "no date"
    assert report.provenance.host is None and "not recorded" in (run.path / "report.html").read_text()
    asked = stamped(shown)
    assert report.provenance.date is None and asked.provenance.host == platform.node()
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(asked.provenance.date)
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=1)
    copy = Run(Path(shutil.copytree(run.path, run.path.parent / "stamped")), run.manifest)
    write_documents(copy, asked, demo_images("test", run.manifest.data))
    for name in ("report.md", "report.html"):
        assert f"{asked.provenance.date}, on {platform.node()}" in re.sub(
            r"<[^>]+>", "", (copy.path / name).read_text()
        )


def test_a_report_of_the_version_before_is_read(validated):
    values = validated[1].model_dump(mode="json")
    values["schema_version"] = 6
    for b in values["backends"]:
        b["scores"]["calibration error"] = b["scores"].pop(ECE)
    assert Report.model_validate(values) == validated[1]
    with pytest.raises(ValidationError):
        Report.model_validate({**values, "schema_version": 5})


def test_ids_are_unique_and_colours_are_the_pages(validated):
    text = (validated[0].path / "report.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:xlink:href|href)="#([^"]+)"|url\(#([^)]+)\)', text)
    assert references and {a or b for a, b in references} <= set(ids), (
        "the contents and the glossary lead somewhere"
    )
    variables = set(re.findall(r"var\(--([a-z0-9]+)\)", text))
    light, dark = (text.split("prefers-color-scheme: dark")[i].split("}")[0] for i in (0, 1))
    assert variables >= {"ink", "s1", "s2"}
    assert all(f"--{v}:" in light for v in variables - {"mark"}) and all(
        f"--{v}:" in dark for v in variables - {"mark"}
    )
    assert not re.search(r"#0000[01][0-9]", text), "a placeholder colour was left"


def test_the_flipped_image_is_the_one_of_the_data_set(validated):
    run, _, _ = validated
    images = demo_images("test", run.manifest.data)
    text = (run.path / "report.html").read_text()
    png = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", text).group(1))
    shown = np.asarray(Image.open(io.BytesIO(png)))
    original = images._source.images[images.ids.index("test/00007")]
    assert np.abs(shown.astype(int) - original).max() <= 1


def test_thumbnails_of_colour_images_are_small(tmp_path):
    from ospq_export.data import DataConfig

    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    config = DataConfig(
        input_size=(3, 224, 200),
        mean=mean,
        std=std,
        interpolation="bicubic",
        crop_pct=1.0,
        crop_mode="center",
    )
    pixels = np.full((200, 224, 3), (200, 100, 50), np.uint8)
    tensor = (np.moveaxis(pixels / 255, -1, 0) - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    import torch

    url = data_url(torch.from_numpy(tensor).float(), config)
    picture = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
    assert max(picture.size) == 112 and picture.getpixel((50, 50)) == (200, 100, 50)


def test_markdown_says_the_same(validated):
    run, _, shown = validated
    text = (run.path / "report.md").read_text()
    lines = text.splitlines()
    assert lines[:2] == [f"- **{line}**" for line in shown.verdict.text[:2]]
    assert lines[2] == f"- {shown.verdict.text[2]}"
    for b in shown.backends:
        rate = b.intervals["Top-1"]
        (row,) = re.findall(rf"^\| {b.name} \| [^|]+in [^|]+\| (.*)$", text, re.MULTILINE)
        assert row.startswith(f"{b.top1:.2f} | {rate.low:.2f} to {rate.high:.2f} |")
    assert "| Δ Top-1 |" in text and "expected calibration error (ECE)" in text
    for s in shown.locations[0].slices:
        assert f"| {s.name} | {s.quantization:.1f} |" in text
    assert "| test/00007 | Trouser | Trouser | 0.2500 | Shirt | 0.5000 | lost |" in text
    # Every row of a table has as many cells as its header.
    for block in re.split(r"\n\n", text):
        rows = [line for line in block.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1, block


def test_names_from_outside_cannot_inject_markup(validated):
    run, _, shown = validated
    nasty = '<script>alert("x")</script>|'
    flip = shown.comparisons[0].flips[0].model_copy(update={"id": nasty})
    report = shown.model_copy(
        update={"comparisons": [shown.comparisons[0].model_copy(update={"flips": [flip]})]}
    )
    copy = Run(Path(shutil.copytree(run.path, run.path.parent / "nasty")), run.manifest)
    write_documents(copy, report, demo_images("test", run.manifest.data))
    page = page_of(copy)
    assert "script" not in page.tags and nasty in page.text


def test_nothing_is_left_half_written(validated, monkeypatch):
    run, _, shown = validated
    before = (run.path / "report.html").read_bytes()
    monkeypatch.setattr(
        Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(InputError, match=r"No space left.*report\.md"):
        write_documents(run, shown, demo_images("test", run.manifest.data))
    assert (run.path / "report.html").read_bytes() == before
    assert not [p for p in run.path.iterdir() if p.suffix == ".tmp"]


def test_weights_in_the_report(validated):
    run, report, _ = validated
    tensors, _ = read_tensors(run.path / "quantized.safetensors")
    floats, _ = read_tensors(run.path / "float.safetensors")
    constants = {q.name: q.constant for q in run.manifest.quantizers if q.kind == "weight"}
    assert {w.name for w in report.weights} == set(constants)
    for w in report.weights[:3]:
        codes, weight = tensors[f"{w.name}.codes"].numpy(), floats[constants[w.name]].numpy().astype(float)
        scale = tensors[f"{w.name}.scale"].numpy().reshape(-1, *[1] * (codes.ndim - 1))
        noise = ((weight - codes * scale) ** 2).sum()
        assert w.sqnr == pytest.approx(10 * np.log10((weight**2).sum() / noise), abs=1e-3)
        assert [w.histogram[c + 128] for c in range(-128, 128)] == [
            int((codes == c).sum()) for c in range(-128, 128)
        ]


def test_latencies_have_the_float_baseline_beside_them(validated):
    found = {(x.name, x.batch_size) for x in validated[1].latencies}
    assert found >= {(OPTIMIZED, 2), ("onnxruntime-fp32", 2), (FLOAT, 2)}


def test_what_is_not_faster_than_float_is_a_finding(validated):
    _, report, _ = validated
    took = {x.name: x.median_ms for x in report.latencies}
    lines = [line for line in report.findings if "is not faster than" in line]
    assert len(lines) == (took[OPTIMIZED] > 0.95 * took["onnxruntime-fp32"])
    assert all(
        line.startswith(f"{OPTIMIZED} is not faster than onnxruntime-fp32 at batch 2 (") for line in lines
    )


@pytest.mark.slow
def test_baseline_is_compared_image_by_image(validated, finished_runs):
    _, report, _ = validated
    found = report.baseline
    assert found is not None and found.recipe == "w8a8" and found.run == "w8a8"
    pairs = [(c.reference, c.deployed) for c in found.comparisons]
    assert pairs == [(f"baseline/{n}", n) for n in (FAKE_QUANT, OPTIMIZED)]
    top1 = {b.name: b.top1 for b in report.backends}
    for c in found.comparisons:
        assert c.score_difference == pytest.approx(top1[c.deployed] - top1[c.reference])
        won, lost = c.mcnemar.only_deployed, c.mcnemar.only_reference
        assert (won - lost) / LIMIT * 100 == pytest.approx(c.score_difference)
    assert all(not c.deployed.startswith("baseline/") for c in report.verdict.criteria)
    alone = Run.open(finished_runs["w8a8"])
    images = demo_images("test", alone.manifest.data)
    copy = Run(Path(shutil.copytree(alone.path, validated[0].path.parent / "alone")), alone.manifest)
    again = validate(copy, images, backends=[OPTIMIZED], limit=LIMIT, floor_images=0, batch_size=20)
    (found,) = [b for b in again.backends if b.name == FAKE_QUANT]
    assert found.top1 == top1[f"baseline/{FAKE_QUANT}"]


def test_baseline_in_the_terminal(validated):
    from rich.console import Console

    console = Console(width=100, file=io.StringIO())
    console.print(render(validated[1]))
    text = " ".join(console.file.getvalue().split())
    assert "agreement with w8a8 (w8a8)" in text and "McNemar p =" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {"data": m.data.model_copy(update={"crop_pct": 0.5})}, "another crop_pct"),
        (lambda m: {"class_to_idx": {}}, "other classes"),
    ],
)
def test_baselines_that_cannot_be_compared(finished_runs, run_copy, change, message):
    run, other = Run.open(finished_runs["w4a4"]), Run.open(run_copy)
    other.manifest = other.manifest.model_copy(update=change(other.manifest))
    images = demo_images("test", run.manifest.data)
    with pytest.raises(InputError, match=message):
        validate(run, images, backends=[OPTIMIZED], baseline=other, limit=10)


def test_a_baseline_needs_something_in_common(finished_runs, run_copy):
    run = Run.open(finished_runs["w4a4"])
    images = demo_images("test", run.manifest.data)
    with pytest.raises(InputError, match="nothing to compare"):
        validate(run, images, backends=[FP32], baseline=Run.open(run_copy), limit=10)


@pytest.mark.slow
def test_a_copied_directory_needs_no_weights_and_no_network(run_copy, tmp_path, monkeypatch):
    """On another machine: no calibration data, no pretrained weights, no checkpoint."""
    manifest = read_manifest(run_copy)
    gone = manifest.model.model_copy(update={"checkpoint": "/gone/model.safetensors", "pretrained": True})
    write_manifest(run_copy, manifest.model_copy(update={"model": gone}))
    create = timm.create_model

    def offline(*args, **kwargs):
        assert not kwargs.get("pretrained") and not kwargs.get("checkpoint_path"), "weights were asked for"
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    run = Run.open(run_copy)
    images = demo_images("test", run.manifest.data)
    report = validate(run, images, limit=20, batch_size=20, floor_images=0, code_images=0)
    assert {b.name for b in report.backends} >= {FLOAT, FAKE_QUANT, OPTIMIZED, UNOPTIMIZED}
    assert write_documents(run, report, images).is_file()


def test_without_the_torch_side(run_copy, monkeypatch):
    """Another torch may lack an operator: then the ONNX file is compared with itself, unoptimised, and it is said."""

    def refuse(self):
        raise InputError("the graph cannot be rebuilt", where=self.path)

    monkeypatch.setattr(Run, "_rebuilt", refuse)
    run = Run.open(run_copy)
    images = demo_images("test", run.manifest.data)
    report = validate(run, images, limit=20, batch_size=20)
    assert {FLOAT, FAKE_QUANT} <= set(report.executions_skipped)
    assert {a.reference for a in report.accuracy} == {"onnxruntime-fp32"}, "the exported float file stands in"
    assert [(c.reference, c.deployed) for c in report.comparisons] == [(UNOPTIMIZED, OPTIMIZED)]
    assert report.locations == [] and report.floor is None
    page = write_documents(run, report, images).read_text()
    assert "cannot be rebuilt" in page


def test_margins_are_counted_once():
    rng = np.random.default_rng(0)
    ours = rng.normal(size=(500, 5)).astype(np.float32)
    theirs = ours + rng.normal(size=ours.shape).astype(np.float32) * 0.3
    found = margin_histogram(ours, theirs)
    ordered = np.sort(ours, axis=1)
    gap = ordered[:, -1] - ordered[:, -2]
    flips = ours.argmax(1) != theirs.argmax(1)
    assert sum(found.images) == 500 and sum(found.flips) == flips.sum()
    middle = found.edges[30]
    assert (
        sum(found.images[30:]) == (gap >= middle).sum()
        and sum(found.flips[30:]) == (flips & (gap >= middle)).sum()
    )
    assert margin_histogram(ours[:, :1], theirs[:, :1]).images == []


def test_logits_that_are_not_finite_still_give_json():
    from ospq_export.tasks.comparison import compare

    logits = np.array([[np.nan, 1], [np.inf, 2], [3, 1]], np.float32)
    c = compare(("a", np.eye(3, 2, dtype=np.float32)), ("b", logits), np.array([0, 1, 0]), list("xyz"))
    json.loads(json.dumps(c.model_dump(mode="json"), allow_nan=False))
    assert c.max_logit_difference > 1e38


def test_plots_of_many_slices_name_some_of_them(validated):
    location = validated[1].locations[0]
    many = [
        location.slices[0].model_copy(update={"name": f"a.very.long.path.to.blocks.{i}"}) for i in range(150)
    ]
    svg = plots.sqnr_plot(location.model_copy(update={"slices": many}))
    shown = re.findall(r"blocks\.(\d+)", svg)
    assert 30 < len(shown) <= 40 and shown[0] == "0"


def test_outlier_plot_marks_the_slices_that_were_chosen(validated):
    run, _, _ = validated
    record = OutlierRecord(
        name="x", kind="cut", max_over_std=5, kurtosis=3, largest_share=0.1, channel_share=0.2
    )
    profile = [record.model_copy(update={"name": s.end}) for s in run.manifest.slices[:3]] + [record]
    dotted = re.findall(r"stroke-dasharray", plots.outlier_plot(profile, run.manifest.slices))
    assert len(dotted) == 2 * 3


def test_a_folder_of_files(tmp_path):
    """Ids are found again in a folder, where some files cannot be read."""
    from ospq_export.data import DataConfig

    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (32, 32), (10, 20, 30)).save(tmp_path / name / "1.png")
    (tmp_path / "a" / "0.png").write_bytes(b"damaged")
    config = DataConfig(
        input_size=(3, 32, 32),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        interpolation="bilinear",
        crop_pct=1.0,
        crop_mode="center",
    )
    images = ImageSet.from_folder(tmp_path, config)
    assert set(thumbnails(images, ["b/1.png", "a/1.png", "nowhere"])) == {"a/1.png", "b/1.png"}
