"""TensorRT and TensorRT-RTX engines, run by Polygraphy; tensors live in torch's CUDA memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ospq_export.engines.products import Product, load, load_engine, quiet_polygraphy
from ospq_export.engines.targets import gpu_here
from ospq_export.errors import InputError, reason_of
from ospq_export.runs.files import ENGINES, QUANTIZED_ONNX, UNNAMED_ENGINE, sha256, sidecar_file
from ospq_export.tasks.measure import Outputs
from ospq_export.tasks.statistics import FloatArray

_AMPERE = 80


class EngineBackend:
    """A serialized engine on the current CUDA device, in fixed batches.

    Args:
        name: a product, also how the report calls it.
        path: the engine; its sidecar lies beside it as <file>.json.

    Raises:
        InputError: no file, package or GPU; a sidecar that belongs to another engine; an engine that does not load.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        product = Product(name)
        sidecar = _sidecar(path)
        _check_gpu(name)
        # Last of the checks: it decides which product this process can run.
        trt = load(product)
        self.engine = load_engine(product, path)
        from polygraphy.backend.trt import TrtRunner

        self.runner = TrtRunner(self.engine, name=name)
        with quiet_polygraphy():
            self.runner.activate()
        tensors = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        inputs = [t for t in tensors if self.engine.get_tensor_mode(t) == trt.TensorIOMode.INPUT]
        self.input, self.outputs = inputs[0], [t for t in tensors if t not in inputs]
        fixed = int(self.engine.get_tensor_shape(self.input)[0])
        self.fixed_batch = fixed if fixed > 0 else None
        self.batch_size = int(self.engine.get_tensor_profile_shape(self.input, 0)[2][0])
        self.detail = {
            "runtime": f"{product.module} {trt.__version__}",
            "device": torch.cuda.get_device_name(),
            "file": path.name,
            "bytes": str(path.stat().st_size),
            **{f"sidecar.{k}": str(value) for k, value in sidecar.items() if isinstance(value, str | int)},
        }

    def __call__(self, images: FloatArray) -> Outputs:
        """The outputs by name, float32 (B, ...) each, of images (B, C, H, W) float32."""
        x = torch.from_numpy(images).cuda()
        parts = [self._run(part) for part in x.split(self.batch_size)]
        return {n: torch.cat([part[n] for part in parts]).numpy() for n in self.outputs}

    def _run(self, part: torch.Tensor) -> dict[str, torch.Tensor]:
        count = len(part)
        if self.fixed_batch is not None and self.fixed_batch > count:
            part = torch.cat([part, part.new_zeros(self.fixed_batch - count, *part.shape[1:])])
        part = part.contiguous()
        # The runner has a stream of its own, which does not wait for torch's.
        torch.cuda.current_stream().synchronize()
        with quiet_polygraphy():
            found = self.runner.infer({self.input: part}, check_inputs=False, copy_outputs_to_host=False)
        # The runner's buffers are its own again at the next call.
        return {name: found[name][:count].float().cpu() for name in self.outputs}


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
    source = Path(str(values.get("onnx", QUANTIZED_ONNX))).name if isinstance(values, dict) else ""
    claims = {"engine_sha256": path, "onnx_sha256": path.parent / source}
    for key, file in claims.items():
        if key in values and (not file.is_file() or sha256(file) != values[key]):
            raise InputError(
                f"{file.name} is not the one that the sidecar describes",
                where=beside,
                fix="build the engine again",
            )
    return dict(values)
