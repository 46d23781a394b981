"""Shared fixtures: one torch thread, small networks, and small finished runs that tests copy before they damage them."""

import contextlib
import functools
import gc
import importlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Tensor, fx
from torch.onnx._internal.exporter._registration import ONNXRegistry

from ospq_export.calibrate import calibrate
from ospq_export.calibrate.observe import observe
from ospq_export.data import resolve_data_config
from ospq_export.demo import demo_data_overrides, demo_images, demo_spec
from ospq_export.export import export
from ospq_export.export.jobs import Extras
from ospq_export.formats.choice import integers
from ospq_export.formats.search import Levels
from ospq_export.graph.capture import capture
from ospq_export.graph.insertion import insert_quantizers
from ospq_export.graph.quantizers import QuantizedGraph
from ospq_export.models.record import ModelSpec
from ospq_export.models.timm import create_model
from ospq_export.recipes import load_recipe
from ospq_export.runs.run import Run

torch.set_num_threads(1)
# torch's modules alone are a million objects, which every full collection would walk through.
gc.freeze()
gc.set_threshold(20_000, 10, 10)
# What torch makes anew for each capture and each file, and what is the same each time: the names of its operators, once per
# namespace, and a table of translations, from the source of a thousand functions. The table has what is registered by then.
importlib.import_module("torch.ao.quantization.fx._decomposed")
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
_materialize = torch._export.utils._materialize_cpp_cia_ops
_materialized = functools.cache(lambda _namespaces: _materialize())
torch._export.utils._materialize_cpp_cia_ops = lambda: _materialized(len(torch.ops._dir))

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
SHORT = [
    "reconstruction.iterations=2",
    "reconstruction.refinement_images=8",
    "calibration_images=32",
    "observation_images=32",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules of slow tests first: one that starts last keeps one worker busy long after the others have ended."""
    slow: dict[Path, list[bool]] = {}
    for item in items:
        slow.setdefault(item.path, []).append(item.get_closest_marker("slow") is not None)
    items.sort(key=lambda item: -sum(slow[item.path]) / len(slow[item.path]))


# What is left of the packaged networks where a test needs no more: a block of each kind.
FEWER = {"swin": {"depths": (2, 1, 1)}, "vit": {"depth": 4}}


def small_spec(name: str, checkpoint: Path) -> ModelSpec:
    """A packaged network with the first blocks of each stage, whose weights are written to a checkpoint.

    The Swin keeps a Top-1 of 80 %, the ViT one of 60 %.
    """
    spec = demo_spec(name)
    spec = spec.model_copy(update={"kwargs": {**spec.kwargs, **FEWER[name]}})
    wanted = create_model(spec, load_weights=False).state_dict().keys()
    save_file({k: v for k, v in load_file(str(spec.checkpoint)).items() if k in wanted}, checkpoint)
    return spec.model_copy(update={"checkpoint": str(checkpoint)})


def calibrated_demo(name: str, recipe: str, out: Path, *overrides: str, small: bool = False) -> Run:
    """A packaged network, or what `small_spec` leaves of it, calibrated for a few steps on a few images."""
    out.parent.mkdir(parents=True, exist_ok=True)
    spec = small_spec(name, out.with_name(f"{out.name}_weights.safetensors")) if small else demo_spec(name)
    model = create_model(spec)
    config = resolve_data_config(model, spec, demo_data_overrides())
    images = demo_images("calibration", config)
    chosen = load_recipe(recipe, [*SHORT, *overrides])
    sample = images.sample(chosen.calibration_images, seed=0)
    classes = images.class_to_idx
    return calibrate(model, spec, sample, config, chosen, out, class_to_idx=classes)


class Captured(dict[str, tuple[fx.GraphModule, int]]):
    """Captured networks with random weights and their image sizes by model name, each made when it is first asked for."""

    def __init__(self, families: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.families = families

    def __missing__(self, name: str) -> tuple[fx.GraphModule, int]:
        torch.manual_seed(0)
        kwargs = self.families[name]
        model = create_model(ModelSpec(name=name, kwargs={"num_classes": 5, **kwargs}))
        size = kwargs.get("img_size") or model.pretrained_cfg["input_size"][-1]
        self[name] = capture(model, (3, size, size)), size
        return self[name]

    @staticmethod
    def parameters(families: dict[str, dict[str, Any]]) -> list[Any]:
        """Their names for `parametrize`; whole networks are large for a unit test."""
        large = [n for n in families if n.startswith(("levit", "xcit"))]
        return [pytest.param(n, marks=pytest.mark.slow) if n in large else n for n in families]


def computed(slices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records of slices without what is measured, times and memory: what two runs that are the same have in common."""
    return [{k: v for k, v in record.items() if k not in ("seconds", "peak_bytes")} for record in slices]


def straight_through(
    x: Tensor, scale: Tensor, levels: Levels, offset: Tensor | None, kept: Tensor | None
) -> Tensor:
    """The fake-quantizer written as autograd would differentiate it: round as the straight-through estimator."""
    scaled = (x if offset is None else x - offset) / scale
    rounded = torch.round(scaled).detach()
    inside = (rounded >= levels.lo) & (rounded <= levels.hi)
    codes = torch.where(inside, scaled + (rounded - scaled).detach(), rounded.clamp(levels.lo, levels.hi))
    real = codes * scale
    real = real if offset is None else real + offset
    return real if kept is None else torch.where(kept > 0, real, x)


@pytest.fixture(scope="session")
def small_vit() -> fx.GraphModule:
    """A captured ViT of two blocks with random weights, for (N, 3, 32, 32); do not change it."""
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "depth": 2, "num_classes": 5, "embed_dim": 48, "num_heads": 3}
    return capture(create_model(ModelSpec(name="vit_tiny_patch16_224", kwargs=kwargs)), (3, 32, 32))


@pytest.fixture(scope="session")
def noise() -> Tensor:
    """Images for it: float32 (32, 3, 32, 32)."""
    return torch.randn(32, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def observed_vit(small_vit: fx.GraphModule, noise: Tensor) -> QuantizedGraph:
    """It with observed quantizers at W3A3, which a test may change."""
    graph = insert_quantizers(small_vit, integers(3, 3))
    observe(graph, noise, batch_size=16, seed=0)
    return graph


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exported runs of the small Swin at W8A8 and W4A4; do not change them."""
    # One set for all test processes: above a worker's own folder lies that of the whole session.
    base = tmp_path_factory.getbasetemp()
    runs = {recipe: (base.parent if WORKER else base) / "runs" / recipe for recipe in ("w8a8", "w4a4")}
    # The second round waits for those that another worker was making in the first.
    for timeout in (0, -1):
        for recipe, run in runs.items():
            with contextlib.suppress(Timeout), FileLock(f"{run}.lock", timeout=timeout):
                _make_once(recipe, run)
    return runs


@pytest.fixture(scope="session")
def every_file(finished_runs: dict[str, Path]) -> Path:
    """The W4A4 run with every extra file, all of them with a dynamic batch; do not change it."""
    run = finished_runs["w4a4"].with_name("w4a4_every_file")
    extras = Extras(fp16=True, debug=True, int4=True, uint8_input=True, uint8_activations=True)
    finished = run.with_suffix(".finished")
    with FileLock(f"{run}.lock"):
        if not finished.exists():
            shutil.copytree(finished_runs["w4a4"], run)
            export(run, extras=extras, deploy_batch_size=None, overwrite=True)
            finished.touch()
    return run


def _make_once(recipe: str, run: Path) -> None:
    finished = run.with_suffix(".finished")
    if not finished.exists():
        calibrated_demo("swin", recipe, run, small=True)
        export(run)
        finished.touch()


@pytest.fixture
def run_copy(finished_runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the W8A8 run that a test may damage."""
    return Path(shutil.copytree(finished_runs["w8a8"], tmp_path / "run"))
