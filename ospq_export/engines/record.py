"""An engine and its sidecar, FILE.engine.json: what was built, from what, by what, for what, and what it compiled to."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich.progress import Progress

from ospq_export.engines.build import BuildSettings, Built, build, check_settings
from ospq_export.engines.plan import Fusion, PlanLayer, analyse, layers_from_inspector, layers_from_log
from ospq_export.engines.products import Product, load, load_engine
from ospq_export.engines.profiles import free_sides
from ospq_export.engines.targets import gpu_here
from ospq_export.errors import InputError
from ospq_export.runs.files import engine_name, json_text, replacing, sha256, sidecar_file


class EngineRecord(BaseModel):
    """The sidecar.

    Attributes:
        product, version: what built it.
        compute_capabilities: what it was built for; in older sidecars "current" is the GPU named in `gpu`.
        gpu: the builder's GPU, or None where there was none.
        input: name, dtype and shape of the images; -1 is a dynamic dimension.
        outputs: the same of what it returns.
        profile: min, opt and max batch of a dynamic one.
        sides: the same of "height" and "width" where they are free.
        preprocessing: what an image goes through before the engine sees it, or None where the file does not say.
        classes: class names by index, where they are known.
        onnx, onnx_sha256: the file it was built from.
        engine_sha256, engine_bytes: the engine.
        build_seconds: parsing and building.
        fusion: which products became Int8, which attentions one kernel.
        layers: the compiled plan.
    """

    model_config = ConfigDict(frozen=True)

    product: Product
    version: str
    compute_capabilities: tuple[str, ...]
    gpu: str | None
    version_compatible: bool
    hardware_compatibility: str | None
    input: dict[str, Any]
    outputs: list[dict[str, Any]]
    profile: tuple[int, int, int] | None
    sides: dict[str, tuple[int, int, int]] = {}
    preprocessing: dict[str, Any] | None
    classes: list[str]
    onnx: str
    onnx_sha256: str
    engine_sha256: str
    engine_bytes: int
    build_seconds: float
    fusion: Fusion
    layers: list[PlanLayer]


def built_for(settings: BuildSettings) -> tuple[str, ...]:
    """The compute capabilities that an engine is built for: those asked for, or this machine's."""
    return tuple(dict.fromkeys(name.upper() for name in settings.compute_capabilities)) or (
        gpu_here() or "current",
    )


def name_of(settings: BuildSettings) -> str:
    """What an engine is called in a run directory, so that those for several targets lie side by side."""
    return engine_name(settings.product, built_for(settings), settings.hardware_compatibility)


def check_target(out: Path, settings: BuildSettings, *, overwrite: bool) -> None:
    """What can be known before anything is exported or built.

    Raises:
        InputError: the engine exists, the product is missing, or it cannot build as the settings say.
    """
    if out.exists() and not overwrite:
        raise InputError("the engine exists", where=out, fix="give `overwrite`, or move it away")
    check_settings(settings)


def build_engine(
    onnx_file: Path,
    out: Path,
    settings: BuildSettings,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> EngineRecord:
    """Build an engine from an ONNX file; write it, its sidecar `<out>.json` and the builder's log `<out>.log`.

    Args:
        onnx_file: one input of images, one output of logits.
        out: the engine's path.
        settings: how.
        overwrite: whether an existing engine may be replaced.
        progress: where to show the builder's phases.

    Raises:
        InputError: the engine exists, the product is missing or refuses, or a file cannot be written; nothing is left
            half-written.
    """
    import onnx

    check_target(out, settings, overwrite=overwrite)
    started = time.perf_counter()
    built = build(onnx_file, settings, progress)
    seconds = time.perf_counter() - started
    model = onnx.load(str(onnx_file), load_external_data=False)
    # All three under temporary names first: a full disk leaves none of them, and what was there before stays.
    with (
        replacing(out) as plan,
        replacing(sidecar_file(out)) as sidecar,
        replacing(out.with_name(f"{out.name}.log")) as log,
    ):
        plan.write_bytes(built.plan)
        record = _record(onnx_file, plan, model, settings, built, seconds)
        sidecar.write_text(json_text(record.model_dump(mode="json")), encoding="utf-8")
        log.write_text("".join(f"[{m.severity}] {m.text}\n" for m in built.log), encoding="utf-8")
    return record


def _record(
    onnx_file: Path, plan: Path, model: Any, settings: BuildSettings, built: Built, seconds: float
) -> EngineRecord:
    layers = _layers(settings.product, built)
    properties = {p.key: p.value for p in model.metadata_props}
    preprocessing = properties.get("preprocessing")
    return EngineRecord(
        product=settings.product,
        version=load(settings.product).__version__,
        compute_capabilities=built_for(settings),
        gpu=gpu_name(),
        version_compatible=settings.version_compatible,
        hardware_compatibility=settings.hardware_compatibility,
        input=_tensor(model.graph.input[0]),
        outputs=[_tensor(value) for value in model.graph.output],
        profile=settings.profile,
        sides=free_sides(model),
        preprocessing=None if preprocessing is None else json.loads(preprocessing),
        classes=json.loads(properties.get("classes", "[]")),
        onnx=onnx_file.name,
        onnx_sha256=sha256(onnx_file),
        engine_sha256=sha256(plan),
        engine_bytes=plan.stat().st_size,
        build_seconds=round(seconds, 3),
        fusion=analyse(model, layers),
        layers=layers,
    )


def _tensor(value: Any) -> dict[str, Any]:
    from onnx import helper

    kind = value.type.tensor_type
    shape = [d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim]
    return {"name": value.name, "dtype": str(helper.tensor_dtype_to_np_dtype(kind.elem_type)), "shape": shape}


def _layers(product: Product, built: Built) -> list[PlanLayer]:
    """From the log; where it lists none (a cached build, another verbosity) and a GPU can load the engine, from the inspector."""
    layers = layers_from_log(message.text for message in built.log)
    if layers or gpu_name() is None:
        return layers
    try:
        inspector = load_engine(product, built.plan).create_engine_inspector()
    except InputError:
        return []
    json_form = load(product).LayerInformationFormat.JSON
    return layers_from_inspector(inspector.get_engine_information(json_form))


def gpu_name() -> str | None:
    """The GPU's name as CUDA gives it, or None."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
