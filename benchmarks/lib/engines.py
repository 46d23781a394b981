"""What TensorRT-RTX compiles from a file, ahead of time, without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lib.markdown import percent
from ospq_export.engines.build import BuildSettings
from ospq_export.engines.plan import Fusion
from ospq_export.engines.products import Product
from ospq_export.engines.record import EngineRecord, build_engine

TARGET = "SM89"


def compiled(file: Path, folder: Path, target: str = TARGET) -> EngineRecord:
    """The engine of a file, built in a folder for a compute capability.

    Raises:
        InputError: the parser or the builder refuses the file.
    """
    settings = BuildSettings(Product.TENSORRT_RTX, compute_capabilities=(target,))
    return build_engine(file, folder / "model.engine", settings, overwrite=True)


def fusion_cells(fusion: Fusion) -> tuple[str, str]:
    """How many products run on Int8, and how many attentions in one kernel."""
    products = percent(fusion.quantized_gemms, fusion.gemms)
    return products, percent(fusion.fused_attentions, fusion.attentions)


def reasons(label: str, dropped: Mapping[str, str]) -> list[list[str]]:
    """What dropped out, counted by reason, with one example; `dropped` has the reason by the operator's name."""
    names: dict[str, list[str]] = {}
    for name, reason in dropped.items():
        names.setdefault(reason, []).append(name)
    return [[label, str(len(found)), reason, f"`{found[0]}`"] for reason, found in names.items()]
