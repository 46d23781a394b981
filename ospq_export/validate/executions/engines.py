"""TensorRT and TensorRT-RTX engines, run by Polygraphy; tensors live in torch's CUDA memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ospq_export.engines.products import Product, load, load_engine, quiet_polygraphy
from ospq_export.errors import InputError
from ospq_export.runs.files import ENGINE, QUANTIZED_ONNX, sha256
from ospq_export.tasks.measure import Outputs
from ospq_export.tasks.statistics import FloatArray


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
        _check_product(product, sidecar, path)
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
    product, path = Product(name), engine_file(folder)
    _check_product(product, _sidecar(path), path)
    _check_gpu(name)
    load(product)


def _check_product(product: Product, sidecar: dict[str, Any], path: Path) -> None:
    built_by = sidecar.get("product", product)
    if built_by != product:
        raise InputError(
            f"the engine was built by {built_by}",
            where=path,
            fix=f"validate it as {built_by}, or build one with `engine` {product}",
        )


def engine_file(folder: Path) -> Path:
    """The run's engine.

    Raises:
        InputError: it has none, or one that is not the file its sidecar describes.
    """
    path = folder / ENGINE
    if not path.is_file():
        raise InputError(f"the run has no {ENGINE}", where=folder, fix="build an engine with `export` first")
    _sidecar(path)
    return path


def _sidecar(path: Path) -> dict[str, Any]:
    beside = path.parent / f"{path.name}.json"
    try:
        values = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"the engine's sidecar cannot be read: {error}", where=beside, fix="build the engine again"
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
