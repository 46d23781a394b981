"""Tensors of a run directory, as safetensors; no pickle anywhere."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ospq_export.errors import damaged, reason_of
from ospq_export.runs.files import replacing


def tensor_sha256(tensor: Tensor) -> str:
    """Hex digest of a tensor's bytes (row-major)."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().numpy().tobytes()).hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest of tensors with their names and types, whatever their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def image_digests(images: NDArray[np.float32]) -> list[str]:
    """A short digest of every image's content, 16 hex digits of SHA-256; images (N, C, H, W), preprocessed."""
    return [hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:16] for image in images]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> None:
    """Write safetensors atomically; tensors are copied to host memory."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, metadata=dict(header or {}))
        except SafetensorError as error:
            # A full disk is reported as a serialisation error; to the user it is an unwritable file.
            raise OSError(str(error)) from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file.

    Raises:
        InputError: missing, truncated or not safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise damaged(f"cannot be read as safetensors: {reason_of(error)}", path) from error
