"""Post-training quantization of vision networks, from float weights to a file with proven accuracy.

Three stages that meet only in a run directory: `ospq_export.calibrate`, `ospq_export.export` and
`ospq_export.validate`. Nothing heavy is imported before it is used, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from ospq_export.errors import BudgetError, InputError

if TYPE_CHECKING:
    from ospq_export.api import Run, Session
    from ospq_export.data.config import DataConfig
    from ospq_export.recipes import Recipe, load_recipe
    from ospq_export.validate.report.model import Report

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "BudgetError",
    "DataConfig",
    "InputError",
    "Recipe",
    "Report",
    "Run",
    "Session",
    "__version__",
    "load_recipe",
]
_WHERE = {
    "Budget": "ospq_export.runs.allocation",
    "Recipe": "ospq_export.recipes",
    "load_recipe": "ospq_export.recipes",
    "Report": "ospq_export.validate.report.model",
    "Run": "ospq_export.api",
    "Session": "ospq_export.api",
    "DataConfig": "ospq_export.data.config",
}


def __getattr__(name: str) -> object:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
