"""Executions of a network behind one small interface: torch modules and ONNX Runtime sessions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnxruntime
import torch
from torch import nn

from ospq_export.errors import InputError
from ospq_export.runs.files import stored_bytes
from ospq_export.tasks.statistics import FloatArray
from ospq_export.world.processes import local_rank
from ospq_export.world.processor import PRECISE_KERNELS, examine_processor

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_ERRORS_ONLY = 3
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"


class Backend(Protocol):
    """One way to run a network.

    Attributes:
        name: how the report calls it.
        detail: what it runs on, in words, by aspect.
        fixed_batch: the one batch size that it takes; None where it takes any.
    """

    name: str
    fixed_batch: int | None
    detail: dict[str, str]

    def __call__(self, images: FloatArray) -> FloatArray:
        """Logits (B, K) float32 of images (B, C, H, W) float32."""
        raise NotImplementedError


def batches_of(images: FloatArray, size: int | None) -> list[FloatArray]:
    """Images (B, C, H, W) as a file takes them: in batches of its size, the last one filled up with zeros, or all at once.

    Args:
        images: one or more.
        size: the one batch size that the file takes; None where it takes any.
    """
    if size is None:
        return [images]
    padding = np.zeros((-len(images) % size, *images.shape[1:]), np.float32)
    padded = np.concatenate([images, padding]) if len(padding) else images
    return [padded[start : start + size] for start in range(0, len(padded), size)]


class TorchBackend:
    """A torch module on a device."""

    fixed_batch: int | None = None

    def __init__(self, name: str, module: nn.Module, device: str = "cpu") -> None:
        self.name = name
        self.device = torch.device(device)
        self.module = module.to(self.device).eval()
        self.detail = {"runtime": f"torch {torch.__version__}", "device": str(self.device)}

    def __call__(self, images: FloatArray) -> FloatArray:
        """Logits (B, K) float32 of images (B, C, H, W) float32."""
        with torch.inference_mode():
            logits: torch.Tensor = self.module(torch.from_numpy(images).to(self.device))
        return logits.float().cpu().numpy()


class OnnxRuntimeBackend:
    """An ONNX Runtime session with a stated optimisation level, on a provider that it really got.

    Of a file with one input (B, C, H, W) float32 and one output (B, K); see `open_session` for arguments and errors.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        *,
        optimize: bool,
        provider: str = "cpu",
        threads: int | None = None,
        without: Sequence[str] = (),
    ) -> None:
        self.name, self.path = name, path
        self.session = open_session(
            path, path, optimize=optimize, provider=provider, threads=threads, without=without
        )
        self.input = self.session.get_inputs()[0]
        batch = self.input.shape[0]
        self.fixed_batch = batch if isinstance(batch, int) else None
        self.detail = {
            "runtime": f"onnxruntime {onnxruntime.__version__}",
            "optimisations": "all" if optimize else "off",
            "provider": self.session.get_providers()[0],
            "file": path.name,
            "bytes": str(stored_bytes(path)),
        }
        if optimize and without:
            self.detail["optimisations"] = f"all but {', '.join(without)}"
        if _needs_exact_kernels(optimize, provider):
            self.detail["session options"] = f"{PRECISE_KERNELS}=1"

    def __call__(self, images: FloatArray) -> FloatArray:
        """Logits (B, K) float32 of images (B, C, H, W) float32."""
        self._check(images)
        parts = [self._run(part) for part in batches_of(images, self.fixed_batch)]
        return np.concatenate(parts)[: len(images)]

    def _check(self, images: FloatArray) -> None:
        expected = self.input.shape[1:]
        fits = all(not isinstance(e, int) or e == g for e, g in zip(expected, images.shape[1:], strict=True))
        if not fits or self.input.type != "tensor(float)":
            raise InputError(
                f"the file takes {self.input.type} {expected}, the data is float32 {list(images.shape[1:])}",
                where=self.path,
                fix="export the run again",
            )

    def _run(self, images: FloatArray) -> FloatArray:
        return self.session.run(None, {self.input.name: images})[0]


def check_provider(provider: str) -> str:
    """ONNX Runtime's name of a provider.

    Args:
        provider: "cpu", "cuda" or "tensorrt".

    Raises:
        InputError: this ONNX Runtime was built without it, or there is no GPU for it.
    """
    wanted = _PROVIDERS[provider]
    if wanted not in onnxruntime.get_available_providers():
        raise InputError(
            f"this onnxruntime has no {wanted}",
            where=f"provider {provider!r}",
            fix="install onnxruntime-gpu, or use the CPU",
        )
    if provider != "cpu" and not torch.cuda.is_available():
        # ONNX Runtime would try, write its own lines all over the terminal, and fall back.
        raise InputError(
            "there is no NVIDIA GPU that can be used",
            where=f"provider {provider!r}",
            fix="check the driver, or use the CPU",
        )
    return wanted


def _needs_exact_kernels(optimize: bool, provider: str) -> bool:
    """Whether ONNX Runtime's fast 8-bit kernels would be taken, and saturate on this processor."""
    return optimize and provider == "cpu" and bool(examine_processor().saturates)


def open_session(
    model: Path | bytes,
    where: Path,
    *,
    optimize: bool,
    provider: str,
    threads: int | None = None,
    without: Sequence[str] = (),
) -> onnxruntime.InferenceSession:
    """Open a file, or a model in memory, on the provider that is asked for and on no other.

    Args:
        model: the file, or its content; its external data lies beside `where`.
        where: what errors name.
        optimize: all of ONNX Runtime's graph optimisations, or none.
        provider: "cpu", "cuda" or "tensorrt".
        threads: intra-op threads; None takes as many as torch has.
        without: names of optimisations that are left out.

    Raises:
        InputError: the file cannot be loaded, or the provider is not there or fell back.
    """
    wanted = check_provider(provider)
    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    options.log_severity_level = _ERRORS_ONLY
    if isinstance(model, bytes):
        options.add_session_config_entry(_DATA_FOLDER, str(where.parent.resolve()))
    # Left to itself, ONNX Runtime takes every core and ties its threads to them, whatever share of the processor there is.
    options.intra_op_num_threads = threads or torch.get_num_threads()
    if _needs_exact_kernels(optimize, provider):
        # The file is judged, and has to be deployed, with kernels that add exactly; the report says so.
        options.add_session_config_entry(PRECISE_KERNELS, "1")
    try:
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            options,
            providers=[wanted],
            disabled_optimizers=list(without),
            provider_options=[{} if provider == "cpu" else {"device_id": str(local_rank())}],
        )
    except Exception as error:
        # ONNX Runtime raises a dozen unrelated types, some of them bare Exception subclasses.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"ONNX Runtime cannot load the file: {reason}", where=where, fix="export the run again"
        ) from error
    # A provider whose libraries are missing falls back to the CPU without an error.
    if session.get_providers()[0] != wanted:
        raise InputError(
            f"{wanted} fell back to {session.get_providers()[0]}",
            where=f"provider {provider!r}",
            fix="install its libraries",
        )
    return session
