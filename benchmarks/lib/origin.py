"""Where a measurement comes from. Nothing heavy is imported before it is asked for: some scripts measure memory."""

from __future__ import annotations

import contextlib
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from lib.rows import ROOT
from ospq_export.world.processor import machine_name

# Changes elsewhere leave a measurement as it is; benchmarks/rows changes with every row.
_CODE = ("ospq_export", "benchmarks/*.py", "benchmarks/lib")
# Distributions whose versions a run directory does not name, and whose name is not the same everywhere.
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "tensorrt_rtx_cu13")


def origin(device: str = "cpu", checkout: Path = ROOT) -> dict[str, Any]:
    """The last fields of every row.

    Args:
        device: torch's name of what was measured.
        checkout: of the code that was measured.

    Returns:
        `versions`, `machine` and, in a checkout, `commit`, with a "+" where the code has changes that are not committed.
    """
    from ospq_export.runs.manifest import installed_versions

    versions = installed_versions()
    for name in _RUNTIMES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    commit = _commit(checkout)
    return {"versions": versions, "machine": _machine(device), **({"commit": commit} if commit else {})}


def _machine(device: str) -> str:
    if not device.startswith("cuda"):
        return machine_name()
    import torch

    return torch.cuda.get_device_name(device)


def _commit(checkout: Path) -> str:
    def git(*words: str) -> str:
        command = ["git", "-C", str(checkout), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        commit = git("rev-parse", "--short", "HEAD")
        return f"{commit}+" if git("status", "--porcelain", "--", *_CODE) else commit
    except (OSError, subprocess.CalledProcessError):
        return ""
