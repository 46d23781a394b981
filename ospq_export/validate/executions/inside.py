"""An engine's own inner tensors: a second engine of the same file, which returns them, too.

TensorRT fuses what nobody looks at: an engine that returns a tensor cannot fuse across it. The second engine is a close
relative of the deployed one, not the same; its own outputs are compared as well, and show whether it has the fault at all.
It computes float32 products without TF32, so that a 2 % fault of a scale is not lost in TF32's digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import Progress

from ospq_export.engines.build import BuildSettings, build
from ospq_export.engines.products import Product, quiet_polygraphy
from ospq_export.errors import InputError
from ospq_export.onnx.write import INPUT
from ospq_export.tasks.statistics import FloatArray
from ospq_export.validate.executions.backends import Backend
from ospq_export.validate.executions.engines import EngineBackend
from ospq_export.validate.executions.loaded import LoadedEngine
from ospq_export.validate.executions.probes import (
    BLOCK_SCALES,
    CODES,
    OPENED,
    InnerTensors,
    Probed,
    Tensors,
    inner_tensors,
    read_proto,
)

if TYPE_CHECKING:
    from ospq_export.runs.run import Run

_BATCH = 8


def check_inside(names: Sequence[str]) -> None:
    """Hold the wish to look into engines to the executions that are asked for, and to this machine.

    Raises:
        InputError: none of them is an engine, or no engine can run here.
    """
    if not set(names) & set(Product):
        raise InputError("no engine is executed", where="`engine_debug`", fix="name one in `backends`")
    if not torch.cuda.is_available():
        raise InputError(
            "no engine can run here: there is no GPU",
            where="`engine_debug`",
            fix="validate on the engine's GPU",
        )


def open_inside(
    run: Run, backends: Sequence[Backend], wanted: frozenset[str], progress: Progress | None = None
) -> dict[str, Probed]:
    """Build a second engine for every engine among the executions, which returns the wanted tensors as well.

    Args:
        run: exported.
        backends: opened executions.
        wanted: names of inner tensors; those of FP4 are left out: an engine returns none.
        progress: where to show the builder's phases.

    Returns:
        By the name of the execution with `OPENED` behind it.

    Raises:
        InputError: none of the executions is an engine, or one cannot be built.
    """
    engines = [backend for backend in backends if isinstance(backend, EngineBackend)]
    if not engines:
        raise InputError(
            "no engine is executed", where="`engine_debug`", fix="name one in `backends`, on its GPU"
        )
    return {f"{engine.name}{OPENED}": _opened(run, engine, wanted, progress) for engine in engines}


def _opened(run: Run, engine: EngineBackend, wanted: frozenset[str], progress: Progress | None) -> Probed:
    file = run.path / engine.source
    inner = inner_tensors(read_proto(file), file, wanted)
    profile = None if engine.fixed_batch else (1, _BATCH, _BATCH)
    settings = BuildSettings(Product(engine.name), profile, tf32=False)
    built = build(file, settings, progress, [*inner.returned, *inner.present])
    loaded = LoadedEngine(engine.name, settings.product, built.plan, (engine.path.name, len(built.plan)))
    return probed_by(loaded.runner, inner, engine.fixed_batch)


def probed_by(runner: Any, inner: InnerTensors, batch_size: int | None = None) -> Probed:
    """What an active runner of Polygraphy's returns, for the comparison of codes.

    Args:
        runner: of a network that returns its inner tensors.
        inner: what it returns.
        batch_size: fixed, or None.
    """
    names = [*inner.returned, *inner.present]

    def run(images: FloatArray) -> Tensors:
        with quiet_polygraphy():
            found = runner.infer({INPUT: torch.from_numpy(images)}, check_inputs=False)
        return {name: _as_stored(name, found[name]) for name in names}

    return Probed(run, frozenset(names), inner.half, batch_size)


def _as_stored(name: str, value: Any) -> Any:
    """A tensor in numpy; 8-bit floats as their codes, other floats as float32."""
    tensor = torch.as_tensor(value).detach().cpu()
    if name.endswith((CODES, BLOCK_SCALES)) and tensor.element_size() == 1:
        return (tensor.view(torch.uint8) if tensor.is_floating_point() else tensor).numpy().copy()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy().copy()
