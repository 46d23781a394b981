"""Options of a budget, and what they say together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ospq_export.engines.rates import GPUS
from ospq_export.engines.targets import check_formats, find_target
from ospq_export.errors import InputError, refusal_of

if TYPE_CHECKING:
    from ospq_export.runs.allocation import Budget

BudgetDropOption = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=100,
        help="Choose formats that lose at most so many points, measured on held-out images of --data; needs --formats.",
    ),
]
BudgetBitsOption = Annotated[
    float | None,
    typer.Option(
        help="Choose formats of so many bits on average, weights and activations, weighed by multiply-adds."
    ),
]
BudgetLatencyOption = Annotated[
    float | None,
    typer.Option(
        help="Choose formats that take this share of FP16's time by the published rates of --target, a GPU."
    ),
]
BudgetFormatsOption = Annotated[
    str | None, typer.Option(help="With a budget: formats to choose from, like int8,int4 or fp8,nvfp4,float.")
]
BudgetConfidenceOption = Annotated[
    float | None,
    typer.Option(help="With --max-drop: how surely it is to be kept. Default: 0.95; 0.5: the bare estimate."),
]


def budget_of(
    max_drop: float | None,
    bits: float | None,
    latency: float | None,
    formats: str | None,
    confidence: float | None,
    target: str | None,
) -> Budget | None:
    """What the command line says of a budget; None where it says nothing.

    Raises:
        InputError: an option is of no use without another, or a value is impossible.
    """
    from pydantic import ValidationError

    from ospq_export.formats.choice import FLOAT, Choice
    from ospq_export.runs.allocation import Budget

    if max_drop is None and bits is None and latency is None:
        for value, option in ((formats, "--formats"), (confidence, "--confidence")):
            if value is not None:
                fix = "give --max-drop, --budget-bits or --budget-latency"
                raise InputError("it belongs to a budget", where=option, fix=fix)
        return None
    names = tuple(dict.fromkeys((formats or "").replace(",", " ").split()))
    if not names:
        raise InputError(
            "a budget needs formats to choose from", where="--formats", fix="write it like int8,int4"
        )
    values = {"max_drop": max_drop, "bits": bits, "latency": latency, "confidence": confidence}
    given = {key: value for key, value in values.items() if value is not None}
    gpu = target if latency is not None or (target or "").lower() in GPUS else None
    if target is not None:
        kinds = [Choice(name, name, name, name) for name in names if name != FLOAT]
        check_formats(find_target(target), [found for kind in kinds for found in kind.formats()])
    try:
        return Budget(formats=names, gpu=gpu, **given)
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(str(part) for part in found["loc"]) or "--budget-latency"
        raise InputError(refusal_of(found), where=where, fix="see calibrate --help") from error


def own_drop(run: Path | None) -> float:
    """What a run was calibrated to lose at most, where that was said."""
    from ospq_export.runs.files import MANIFEST
    from ospq_export.runs.manifest import read_manifest
    from ospq_export.validate.verdict import Thresholds, allowed

    if run is None or not (run / MANIFEST).is_file():
        return Thresholds().max_drop
    return allowed(read_manifest(run).recipe).max_drop
