"""Which executions a validation runs: by name, or all that this machine has; what it lacks is listed with the reason.

A second run, the baseline, may be executed beside the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ospq_export.errors import InputError
from ospq_export.runs.files import (
    FLOAT_ONNX,
    HALF_ONNX,
    QUANTIZED_BRAIN_ONNX,
    QUANTIZED_HALF_ONNX,
    QUANTIZED_ONNX,
    checked_file,
)
from ospq_export.validate.executions.backends import Backend
from ospq_export.validate.executions.engines import check_engines
from ospq_export.validate.executions.origin import changed_preprocessing, check_origin
from ospq_export.validate.executions.table import (
    CLOSED,
    DEFAULT_BACKENDS,
    FAKE_QUANT,
    FAKE_QUANT_FP16,
    FLOAT,
    FP32,
    OPTIMIZED,
    QDQ_FP16,
    TABLE,
    UNOPTIMIZED,
    Role,
    Runtime,
    with_role,
)
from ospq_export.validate.executions.triton import Server

if TYPE_CHECKING:
    from ospq_export.runs.run import Run

_NETWORKS = (".onnx", ".engine")
PREFIX = "baseline/"
_COMPARED = (FAKE_QUANT, OPTIMIZED)


@dataclass
class Executions:
    """What runs, and what does not.

    Attributes:
        backends: in the order asked for.
        skipped: name -> reason, of executions that nobody asked for by name.
        asked: names that were asked for; a float file among them is judged, too, by the float network.
    """

    backends: list[Backend] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    asked: Sequence[str] = ()

    @property
    def names(self) -> list[str]:
        """Names of what runs."""
        return [b.name for b in self.backends]

    def references(self, float_type: str) -> dict[str, str]:
        """Deployed execution -> what it is compared with; those that nothing here can be compared with are left out.

        The fake-quantized network with float parts of the deployed file's own type; without torch's side, ONNX Runtime without
        optimisations stands in for it.

        Args:
            float_type: "fp32", or "fp16" where engines were built with FP16 float parts.
        """
        result = {}
        for name in self.names:
            deployed = TABLE[name].role is Role.DEPLOYED
            if deployed or (TABLE[name].role is Role.FLOAT_FILE and name in self.asked):
                held_to = [TABLE[name].reference(float_type), *([UNOPTIMIZED] if deployed else [])]
                result[name] = next((n for n in held_to if n in self.names and n != name), None)
        return {name: reference for name, reference in result.items() if reference is not None}

    @property
    def float_reference(self) -> str | None:
        """The float network's execution: torch's, or ONNX Runtime's where torch's is not to be had."""
        return next((name for name in (FLOAT, FP32) if name in self.names), None)

    def uncompared(self, float_type: str) -> list[str]:
        """Deployed executions that are neither compared with something nor what others are compared with."""
        references = self.references(float_type)
        used = {*references, *references.values()}
        return [n for n in self.names if TABLE[n].role is Role.DEPLOYED and n not in used]


def open_executions(
    run: Run, names: Sequence[str] | None, device: str, float_type: str, server: Server | None = None
) -> Executions:
    """Open the named executions with the references that they are judged by, or every default one that is available.

    Args:
        run: exported.
        names: out of `ALL_BACKENDS`, a deployed one among them; None takes the defaults.
        device: torch device; on a CUDA device the plain ONNX Runtime executions use its CUDA provider.
        float_type: "fp32", or "fp16" to add the fake-quantized network with FP16 float parts and the file that is deployed so.
        server: where a model is served, for the execution that asks it.

    Raises:
        InputError: an unknown name, none that is deployed, a named execution that is not available, or a file of another run.
    """
    named = named_executions(names, float_type)
    held_to = (TABLE[name].reference(float_type) for name in named)
    wanted = list(dict.fromkeys([FLOAT, *filter(None, held_to), *named]))
    _check_files(run, wanted)
    result = Executions(asked=named)
    for name in wanted:
        must = name in (UNOPTIMIZED, OPTIMIZED) or name in (names or ())
        _open(result, run, name, device, server, must=must)
    # Where torch's side is not to be had, ONNX Runtime stands in for it.
    judged = [name for name in result.names if TABLE[name].role is Role.DEPLOYED]
    if judged and FAKE_QUANT not in result.names and UNOPTIMIZED not in judged:
        _open(result, run, UNOPTIMIZED, device, must=False)
    if result.float_reference is None:
        _open(result, run, FP32, device, must=False)
    return result


def named_executions(names: Sequence[str] | None, float_type: str) -> list[str]:
    """What is asked for by name, or every default execution.

    Raises:
        InputError: an unknown name, or none that is deployed.
    """
    named = list(DEFAULT_BACKENDS if names is None else dict.fromkeys(names))
    unknown = [name for name in named if name not in TABLE]
    if unknown:
        raise InputError(f"there is no execution {unknown[0]!r}", fix=f"use some of {', '.join(TABLE)}")
    if float_type == "fp16":
        named += [name for name in (FAKE_QUANT_FP16, QDQ_FP16) if name not in named]
    if not set(named) & set(with_role(Role.DEPLOYED, Role.FLOAT_FILE)):
        raise InputError(
            f"no verdict without a deployed execution: {', '.join(named)} {'is' if len(named) == 1 else 'are'} none",
            where="`backends`",
            fix=f"add one of {', '.join(n for n in with_role(Role.DEPLOYED) if n not in CLOSED)}",
        )
    return named


def _open(
    result: Executions, run: Run, name: str, device: str, server: Server | None = None, *, must: bool
) -> None:
    try:
        result.backends.append(TABLE[name].open(run, device, server))
        result.skipped.pop(name, None)
    except InputError as error:
        if must:
            raise
        # Reports are sent to others, whom the folder does not concern.
        result.skipped[name] = str(error).replace(f" ({run.path})", "")


def _check_files(run: Run, wanted: Sequence[str]) -> None:
    """Hold the files of the wanted executions to the run."""
    judged = [TABLE[name] for name in wanted if TABLE[name].role is Role.DEPLOYED]
    # Engines were built from a file of the run: where one is asked for, the plain file is held to the run.
    for file in dict.fromkeys(execution.file or QUANTIZED_ONNX for execution in judged):
        if file == QUANTIZED_HALF_ONNX and QUANTIZED_BRAIN_ONNX in run.manifest.files:
            raise InputError(
                f"the run has {QUANTIZED_BRAIN_ONNX} instead of {file}: its values overflow FP16",
                where=run.path,
                fix="validate the engine; ONNX Runtime has no BF16 on a CPU",
            )
        if file == QUANTIZED_HALF_ONNX and file not in run.manifest.files:
            raise InputError(f"the run has no {file}", where=run.path, fix="export it with `fp16`")
        check_origin(run, file)
    if any(execution.runtime is Runtime.ENGINE for execution in judged):
        # Not being able to run an engine here is one thing; a damaged one must not pass for that.
        check_engines(run.path)


def pairs_of(
    executions: Executions, references: Mapping[str, str], float_type: str, others: Sequence[str]
) -> list[tuple[str, str]]:
    """Every (reference, execution held to it) that a report compares.

    Args:
        executions: of the run.
        references: deployed execution -> what it is compared with.
        float_type: as `Executions.references` has it.
        others: executions of the baseline.
    """
    names, held = executions.names, executions.float_reference
    pairs = [(reference, name) for name, reference in references.items()]
    if held is not None:
        pairs += [(held, name) for name in (*references, *executions.uncompared(float_type))]
    both = [(FLOAT, FAKE_QUANT), (FAKE_QUANT_FP16, FAKE_QUANT)]
    pairs += [pair for pair in both if set(pair) <= set(names)]
    return pairs + [(name, name.removeprefix(PREFIX)) for name in others]


def not_executed(run: Run, executions: Sequence[Backend]) -> list[str]:
    """Quantized networks and engines in the run directory that none of the executions ran, nor a file that stands in for them."""
    files = [e.detail["file"] for e in executions if "file" in e.detail]
    # Float files are not what is deployed.
    ran = {*files, *map(checked_file, files), FLOAT_ONNX, HALF_ONNX}
    return sorted(p.name for p in run.path.iterdir() if p.suffix in _NETWORKS and p.name not in ran)


def open_baseline(run: Run, other: Run, names: Sequence[str], device: str) -> list[Backend]:
    """The other run's fake-quantized network and its ONNX file, as far as this run's are executed, too.

    Args:
        run: what is validated.
        other: what it is compared with; another recipe, another calibration or another model for the same data.
        names: of this run's executions.
        device: torch device.

    Returns:
        Executions whose names begin with `PREFIX`.

    Raises:
        InputError: the other run is not exported, its images are prepared differently, its classes are others, or the two have
            no execution in common.
    """
    _check_comparable(run, other)
    chosen = [name for name in _COMPARED if name in names]
    if not chosen:
        raise InputError(
            f"neither {' nor '.join(_COMPARED)} is executed, so there is nothing to compare",
            where="`baseline`",
            fix=f"add `backends` {OPTIMIZED}",
        )
    check_origin(other)
    backends = [TABLE[name].open(other, device) for name in chosen]
    for backend in backends:
        backend.name = f"{PREFIX}{backend.name}"
    return backends


def _check_comparable(run: Run, other: Run) -> None:
    ours, theirs, where = run.manifest, other.manifest, f"`baseline` {other.path}"
    changed = changed_preprocessing(run.data, other.data)
    if changed is not None:
        key, mine, others = changed
        raise InputError(
            f"the other run prepares its images with another {key} ({others}, this one {mine})",
            where=where,
            fix="compare runs with the same preprocessing",
        )
    if ours.class_to_idx != theirs.class_to_idx:
        raise InputError(
            f"the other run has other classes ({len(theirs.class_to_idx)} known, this one {len(ours.class_to_idx)})",
            where=where,
            fix="compare runs that were calibrated on folders with the same classes",
        )
