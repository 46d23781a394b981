"""TensorRT and TensorRT-RTX engines of a run, held to their sidecars."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ospq_export.engines.build import BuildSettings, build
from ospq_export.engines.products import Product, load
from ospq_export.engines.targets import gpu_here
from ospq_export.errors import InputError, reason_of
from ospq_export.runs.files import (
    ENGINES,
    FLOAT_ONNX,
    HALF_ONNX,
    QUANTIZED_ONNX,
    UNNAMED_ENGINE,
    sha256,
    sidecar_file,
)
from ospq_export.validate.executions.loaded import LoadedEngine
from ospq_export.validate.latency import listed

if TYPE_CHECKING:
    from ospq_export.runs.run import Run

_AMPERE = 80


class EngineBackend(LoadedEngine):
    """An engine of a run.

    Args:
        name: a product, also how the report calls it.
        path: the engine; its sidecar lies beside it as <file>.json.

    Attributes:
        source: name of the ONNX file that it was built from.
        slow: what in its plan costs time, in words; empty where nothing does.

    Raises:
        InputError: no file, package or GPU; a sidecar that belongs to another engine; an engine that does not load.
    """

    def __init__(self, name: str, path: Path) -> None:
        sidecar = _sidecar(path)
        self.path, self.source = path, _source(sidecar)
        self.slow = slow_layers(sidecar.get("fusion"))
        _check_gpu(name)
        # Last of the checks: it decides which product this process can run.
        super().__init__(name, Product(name), path, (path.name, path.stat().st_size))
        self.detail |= {
            f"sidecar.{k}": str(value) for k, value in sidecar.items() if isinstance(value, str | int)
        }


def float_engine(run: Run, engine: EngineBackend) -> LoadedEngine | None:
    """An engine of the run's float file, in FP16 where that was exported, for the same GPU: what the quantized one has to beat.

    Built in memory; None where the run has no float file.

    Raises:
        InputError: the product refuses to build it.
    """
    file = next((run.path / name for name in (HALF_ONNX, FLOAT_ONNX) if name in run.manifest.files), None)
    if file is None:
        return None
    profile = None if engine.fixed_batch else (1, engine.batch_size, engine.batch_size)
    plan = build(file, BuildSettings(Product(engine.name), profile)).plan
    return LoadedEngine(f"{engine.name}, float", Product(engine.name), plan, (file.name, len(plan)))


def slow_layers(fusion: object) -> str:
    """What a plan runs in float or apart, from the `fusion` of a sidecar; "" where that does not say."""
    kinds = {"not_quantized": "in float run", "not_fused": "attentions apart are"}
    left = {what: fusion.get(key) for key, what in kinds.items()} if isinstance(fusion, dict) else {}
    return "; ".join(
        f"{what} {listed(held)}" for what, held in left.items() if held and isinstance(held, dict)
    )


def _check_gpu(name: str) -> None:
    if not torch.cuda.is_available():
        raise InputError(
            "no CUDA device is usable",
            where=f"execution {name!r}",
            fix="run on a machine with an NVIDIA GPU",
        )


def check_engine(name: str, folder: Path) -> None:
    """Hold a named engine execution to this machine and to the run.

    Raises:
        InputError: no package, no GPU, or no engine that is the one its sidecar describes.
    """
    product = Product(name)
    load(product)
    _check_gpu(name)
    engine_file(folder, product)


def check_engines(folder: Path) -> None:
    """Hold every engine of a run to its sidecar.

    Raises:
        InputError: one is not the file that its sidecar describes.
    """
    for path in sorted(folder.glob(ENGINES)):
        _sidecar(path)


def engine_file(folder: Path, product: Product, gpu: str | None = None) -> Path:
    """The run's engine of a product for a GPU: the one that was built for the fewest others besides.

    Args:
        folder: the run directory.
        product: what built it.
        gpu: compute capability such as "SM89"; None is this machine's.

    Raises:
        InputError: there is none, or one is not the file that its sidecar describes.
    """
    gpu = gpu or gpu_here()
    sidecars = {path: _sidecar(path) for path in sorted(folder.glob(ENGINES))}
    own = {path: s for path, s in sidecars.items() if s.get("product", product) == product}
    again = f"build one with `export` and `engine` {product}"
    if not own:
        raise InputError(f"the run has no engine of {product}", where=folder, fix=again)
    fitting = [path for path, sidecar in own.items() if gpu is None or _runs_on(sidecar, gpu)]
    if not fitting:
        there = ", ".join(f"{path.name} for {', '.join(_targets(s))}" for path, s in own.items())
        raise InputError(
            f"no engine of the run is for this GPU, {gpu}: it has {there}", where=folder, fix=again
        )
    return min(fitting, key=lambda path: _preference(path, own[path], gpu))


def _targets(sidecar: Mapping[str, Any]) -> list[str]:
    return list(map(str, sidecar.get("compute_capabilities", ["current"])))


def _runs_on(sidecar: Mapping[str, Any], gpu: str) -> bool:
    """Whether an engine was built for a GPU; for "current" it is tried: older sidecars do not say more."""
    targets = _targets(sidecar)
    beyond = sidecar.get("hardware_compatibility") == "ampere_plus" and int(gpu.removeprefix("SM")) >= _AMPERE
    return gpu in targets or "current" in targets or beyond


def _preference(path: Path, sidecar: Mapping[str, Any], gpu: str | None) -> tuple[bool, bool, int, str]:
    targets = _targets(sidecar)
    return gpu not in targets, path.name == UNNAMED_ENGINE, len(targets), path.name


def _sidecar(path: Path) -> dict[str, Any]:
    beside = sidecar_file(path)
    try:
        values = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"the engine's sidecar cannot be read: {reason_of(error)}",
            where=beside,
            fix="build the engine again",
        ) from error
    claims = {"engine_sha256": path, "onnx_sha256": path.parent / _source(values)}
    for key, file in claims.items():
        if key in values and (not file.is_file() or sha256(file) != values[key]):
            raise InputError(
                f"{file.name} is not the one that the sidecar describes",
                where=beside,
                fix="build the engine again",
            )
    return dict(values)


def _source(sidecar: object) -> str:
    return Path(str(sidecar.get("onnx", QUANTIZED_ONNX))).name if isinstance(sidecar, dict) else ""
