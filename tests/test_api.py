"""The stages from Python: a module of one's own, tensors from anywhere, every task, and faults that are found."""

import shutil

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx import numpy_helper
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ospq_export import InputError, Run, Session
from ospq_export.data import DataConfig
from ospq_export.runs.manifest import record_files

SIZE, CLASSES, IMAGES = (4, 32, 24), 3, 320
SHORT = [
    "slicing=block",
    "calibration_images=32",
    "observation_images=32",
    "reconstruction.iterations=8",
    "reconstruction.batch_size=16",
]


class Net(nn.Module):
    """Two convolutions and a block of attention on four channels, and whatever a task returns."""

    def __init__(self, task):
        super().__init__()
        self.task = task
        self.stem = nn.Sequential(nn.Conv2d(4, 24, 4, 4), nn.GELU(), nn.Conv2d(24, 24, 3, padding=1))
        self.block = timm.models.vision_transformer.Block(24, 2, qkv_bias=True)
        self.classes, self.boxes = nn.Linear(24, CLASSES), nn.Linear(24, CLASSES)

    def forward(self, x):
        maps = self.stem(x)
        tokens = self.block(maps.flatten(2).transpose(1, 2))
        pooled = tokens.mean(1)
        if self.task == "dense":
            return self.classes(tokens).transpose(1, 2).unflatten(2, maps.shape[2:])
        if self.task == "embed":
            return {"embedding": pooled}
        found = {"classes": self.classes(pooled), "boxes": self.boxes(pooled), "ids": pooled.argmax(1)}
        return found if self.task == "tensors" else found["classes"]


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 4, 4, 3, generator=generator)
    return nn.functional.interpolate(coarse, SIZE[1:], mode="bilinear") + 0.1 * torch.randn(
        count, *SIZE, generator=generator
    )


def network(task):
    torch.manual_seed(3)
    return Net(task).eval()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An exported run of each task, made when it is first asked for."""
    made = {}

    def get(task):
        if task not in made:
            out = tmp_path_factory.mktemp("api") / task
            data = DataLoader(TensorDataset(images(40, 0)), batch_size=16)
            run = Run.calibrate(network(task), (batch for (batch,) in data), "w8a8", out, overrides=SHORT)
            made[task] = run.export()
        return made[task]

    return get


def labels_of(task, x):
    """What the float network itself says: its scores are then 100."""
    with torch.no_grad():
        logits = network("dense" if task == "dense" else "classify")(x)
    return (
        nn.functional.interpolate(logits, SIZE[1:], mode="bilinear") if task == "dense" else logits
    ).argmax(1)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "embed", "dense", "tensors"])
def test_every_task_goes_through(runs, task):
    run, x = runs(task), images(IMAGES, 1)
    assert run.manifest.task == task
    y = labels_of(task, x)
    pairs = DataLoader(TensorDataset(x, y), batch_size=50)
    report = run.validate(pairs, floor_images=IMAGES, code_images=8)
    assert report.faithful is True, report.verdict.text
    # Random weights leave the pixels' classes close to each other: there are points to lose.
    assert (report.accuracy_kept is not False or task == "dense") and bool(report) == bool(
        report.accuracy_kept
    )
    assert report.task == task and report.images == IMAGES
    scores = report.backends[-1].scores
    assert (
        list(scores)[:1]
        == {"classify": ["Top-1"], "embed": ["k-NN Top-1"], "dense": ["mIoU"], "tensors": []}[task]
    )
    if task == "dense":
        assert report.backends[0].scores["mIoU"] == pytest.approx(100, abs=0.01)
    again = Run.open(run.path).validate([{"pixel_values": v} for v in x[:40]], documents=False)
    assert again.images == 40 and not again.backends[0].scores
    assert again.accuracy_kept is None or task == "tensors"


@pytest.mark.slow
def test_what_the_network_returns_besides_is_recorded(runs):
    record = runs("tensors").manifest.calibration
    assert record.outputs_left_out == {"ids": "holds int64, no real numbers"}
    assert not runs("tensors").manifest.data.known
    names = [o.name for o in onnx.load(runs("tensors").path / "model.onnx").graph.output]
    assert names == ["classes", "boxes"]


def scale_off(model):
    """The scale of the block's first linear's input, 2 % too large, in Q and DQ alike."""
    quantizer = next(
        n for n in model.graph.node if n.op_type == "QuantizeLinear" and "attn.qkv" in n.output[0]
    )
    held = next(t for t in model.graph.initializer if t.name == quantizer.input[1])
    fresh = numpy_helper.from_array(numpy_helper.to_array(held) * np.float32(1.02), "off")
    model.graph.initializer.append(fresh)
    for node in model.graph.node:
        if node is quantizer or (node.op_type == "DequantizeLinear" and node.input[0] == quantizer.output[0]):
            node.input[1] = "off"


def swapped(model):
    """The two heads' outputs under each other's names."""
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            node.output[index] = {"classes": "boxes", "boxes": "classes"}.get(name, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "fault", "said"),
    [
        *(
            (task, scale_off, "diverges first in slice block")
            for task in ("classify", "embed", "dense", "tensors")
        ),
        ("tensors", swapped, "classes holds what boxes should"),
    ],
)
def test_planted_faults_are_located(runs, tmp_path, task, fault, said):
    copy = Run.open(shutil.copytree(runs(task).path, tmp_path / "run"))
    path = copy.path / "model.onnx"
    model = onnx.load(path)
    fault(model)
    onnx.save(model, path)
    copy.manifest = record_files(copy.path, copy.manifest, "model.onnx")
    report = copy.validate(images(80, 2), floor_images=80, code_images=8, documents=False)
    assert report.faithful is False and not report
    assert any(said in c.text for c in report.verdict.criteria if c.outcome == "missed")


BAD = [
    ([], "there is no image"),
    ([torch.zeros(4, 32, 24), torch.zeros(4, 32, 23)], r"item 1.*|\(4, 32, 23\), not float"),
    ([torch.full((4, 32, 24), torch.nan)], "NaN"),
    ([torch.zeros(4, 32, 24, dtype=torch.uint8)], "uint8"),
    (["text"], "it is str, no images"),
    ([(torch.zeros(2, 4, 32, 24), [0])], "labels are int64"),
    ([{"labels": 1}], "no images"),
]


@pytest.mark.parametrize(("data", "said"), BAD)
def test_bad_images_are_one_line_and_leave_nothing(tmp_path, data, said):
    with pytest.raises(InputError, match=said) as info:
        Run.calibrate(network("classify"), iter(data), "w8a8", tmp_path / "run", overrides=SHORT)
    assert "\n" not in str(info.value) and not (tmp_path / "run").exists()


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x, y):
        return self.fc((x + y).mean((2, 3)))


class Depends(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = x.mean((2, 3))
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


class NoInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self):
        return self.fc.weight


@pytest.mark.parametrize("module", [TwoInputs, Depends, NoInput])
def test_bad_modules_are_one_line_and_leave_nothing(tmp_path, module):
    with pytest.raises(InputError) as info:
        Run.calibrate(module().eval(), images(32, 0), "w8a8", tmp_path / "run", overrides=SHORT)
    assert "\n" not in str(info.value) and not (tmp_path / "run").exists()


def test_files_need_a_preprocessing(tmp_path):
    with pytest.raises(InputError, match="preprocessing"):
        Run.calibrate(network("classify"), tmp_path, "w8a8", tmp_path / "run")


def test_what_is_given_is_kept(tmp_path):
    given = DataConfig(
        input_size=(3, 16, 16),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        interpolation="bilinear",
        crop_pct=1,
        crop_mode="center",
    )
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(), nn.Linear(128, 3)).eval()
    told = []
    session = Session(seed=7, events=lambda name, _: told.append(name))
    run = Run.calibrate(
        model,
        images(16, 0)[:, :3, :16, :16],
        "w8a8",
        tmp_path / "run",
        overrides=[
            "calibration_images=16",
            "observation_images=16",
            "reconstruction.iterations=0",
            "slicing=model",
        ],
        preprocessing=given,
        classes=["cat", "dog", "owl"],
        name="mine",
        session=session,
    )
    manifest = Run.open(run.path).manifest
    assert manifest.data == given and manifest.calibration.seed == 7 and manifest.model.name == "mine"
    assert manifest.class_to_idx == {"cat": 0, "dog": 1, "owl": 2} and "done" in told
