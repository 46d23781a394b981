"""Which executions a validation runs: by name, or all that this machine has; what it lacks is listed with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ospq_export.errors import InputError
from ospq_export.runs.files import QUANTIZED_TENSORS
from ospq_export.validate.executions.backends import Backend, OnnxRuntimeBackend, TorchBackend
from ospq_export.validate.executions.engines import ENGINE, PACKAGES, EngineBackend, engine_file
from ospq_export.validate.executions.half import HalfNetwork
from ospq_export.validate.executions.probes import read_proto

if TYPE_CHECKING:
    from ospq_export.data import DataConfig
    from ospq_export.runs.run import Run

FLOAT, FAKE_QUANT, FAKE_QUANT_FP16 = "float", "fake_quant", "fake_quant-fp16"
OPTIMIZED, UNOPTIMIZED = "onnxruntime", "onnxruntime-unoptimised"
QDQ_FP16, FP32, FP16 = "onnxruntime-qdq-fp16", "onnxruntime-fp32", "onnxruntime-fp16"
CUDA, TENSORRT_PROVIDER = "onnxruntime-cuda", "onnxruntime-tensorrt"
ENGINES = tuple(PACKAGES)
DEFAULT_BACKENDS = (FLOAT, FAKE_QUANT, UNOPTIMIZED, OPTIMIZED, CUDA, TENSORRT_PROVIDER, *ENGINES)
ALL_BACKENDS = (*DEFAULT_BACKENDS, FAKE_QUANT_FP16, QDQ_FP16, FP32, FP16)
DEPLOYED = (UNOPTIMIZED, OPTIMIZED, CUDA, TENSORRT_PROVIDER, *ENGINES, QDQ_FP16)
QUANTIZED_ONNX, FLOAT_ONNX, HALF_ONNX = "model.onnx", "model_fp32.onnx", "model_fp16.onnx"
QUANTIZED_HALF_ONNX = "model_qdq_fp16.onnx"
_NETWORKS = (".onnx", ".engine")
BASELINES = {FP32: FLOAT_ONNX, FP16: HALF_ONNX}


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
        for name in (n for n in self.names if n in DEPLOYED or (n in BASELINES and n in self.asked)):
            for reference in (reference_of(name, float_type), UNOPTIMIZED):
                if reference in self.names and reference != name and (name in DEPLOYED or reference == FLOAT):
                    result[name] = reference
                    break
        return result

    @property
    def float_reference(self) -> str | None:
        """The float network's execution: torch's, or ONNX Runtime's where torch's is not to be had."""
        return next((name for name in (FLOAT, FP32) if name in self.names), None)

    def uncompared(self, float_type: str) -> list[str]:
        """Deployed executions that are neither compared with something nor what others are compared with."""
        references = self.references(float_type)
        used = {*references, *references.values()}
        return [n for n in self.names if n in DEPLOYED and n not in used]


def open_executions(run: Run, names: Sequence[str] | None, device: str, float_type: str) -> Executions:
    """Open the named executions with the references that they are judged by, or every default one that is available.

    Args:
        run: exported.
        names: out of `ALL_BACKENDS`, a deployed one among them; None takes the defaults.
        device: torch device; on a CUDA device the plain ONNX Runtime executions use its CUDA provider.
        float_type: "fp32", or "fp16" to add the fake-quantized network with FP16 float parts and the file that is deployed so.

    Raises:
        InputError: an unknown name, none that is deployed, a named execution that is not available, or a file of another run.
    """
    named = named_executions(names, float_type)
    wanted = list(dict.fromkeys([*_references_of(named, float_type), *named]))
    _check_files(run, wanted)
    result = Executions(asked=named)
    for name in wanted:
        _open(result, run, name, device, must=name in (UNOPTIMIZED, OPTIMIZED) or name in (names or ()))
    # Where torch's side is not to be had, ONNX Runtime stands in for it.
    judged = [name for name in result.names if name in DEPLOYED]
    if judged and FAKE_QUANT not in result.names and UNOPTIMIZED not in judged:
        _open(result, run, UNOPTIMIZED, device, must=False)
    if result.float_reference is None:
        _open(result, run, FP32, device, must=False)
    return result


def reference_of(deployed: str, float_type: str) -> str:
    """What a deployed execution is compared with: the float network for a float file, else the fake-quantized one of its type."""
    if deployed in BASELINES:
        return FLOAT
    half = deployed == QDQ_FP16 or (deployed in ENGINES and float_type == "fp16")
    return FAKE_QUANT_FP16 if half else FAKE_QUANT


def named_executions(names: Sequence[str] | None, float_type: str) -> list[str]:
    """What is asked for by name, or every default execution.

    Raises:
        InputError: an unknown name, or none that is deployed.
    """
    named = list(DEFAULT_BACKENDS if names is None else dict.fromkeys(names))
    unknown = [name for name in named if name not in ALL_BACKENDS]
    if unknown:
        raise InputError(
            f"there is no execution {unknown[0]!r}", fix=f"use some of {', '.join(ALL_BACKENDS)}"
        )
    if float_type == "fp16":
        named += [name for name in (FAKE_QUANT_FP16, QDQ_FP16) if name not in named]
    if not any(name in DEPLOYED or name in BASELINES for name in named):
        raise InputError(
            f"nothing deployed is among {', '.join(named)}: there is nothing to judge",
            where="`backends`",
            fix=f"add one of {', '.join(DEPLOYED)}",
        )
    return named


def _references_of(named: Sequence[str], float_type: str) -> list[str]:
    """What the named deployed executions are judged by."""
    return [FLOAT, *(reference_of(n, float_type) for n in named if n in DEPLOYED or n in BASELINES)]


def _open(result: Executions, run: Run, name: str, device: str, *, must: bool) -> None:
    try:
        result.backends.append(open_execution(run, name, device))
        result.skipped.pop(name, None)
    except InputError as error:
        if must:
            raise
        result.skipped[name] = str(error)


def _check_files(run: Run, wanted: Sequence[str]) -> None:
    """Hold the files of the wanted executions to the run."""
    if any(name in DEPLOYED and name != QDQ_FP16 for name in wanted):
        check_origin(run)
    if QDQ_FP16 in wanted:
        if QUANTIZED_HALF_ONNX not in run.manifest.files:
            raise InputError(
                f"the run has no {QUANTIZED_HALF_ONNX}", where=run.path, fix="export it with `fp16`"
            )
        check_origin(run, QUANTIZED_HALF_ONNX)
    if (run.path / ENGINE).is_file() and any(name in ENGINES for name in wanted):
        # Not being able to run an engine here is one thing; a damaged one must not pass for that.
        engine_file(run.path)


def open_execution(run: Run, name: str, device: str) -> Backend:
    """Open one execution by name.

    Raises:
        InputError: it is not available.
    """
    makers: dict[str, Callable[[], Backend]] = {
        FLOAT: lambda: TorchBackend(name, run.float_network(), device),
        FAKE_QUANT: lambda: TorchBackend(name, run.fake_quant_network(), device),
        FAKE_QUANT_FP16: lambda: TorchBackend(name, HalfNetwork(run.quantized_graph().module), device),
    }
    if name in makers:
        return makers[name]()
    if name in ENGINES:
        return EngineBackend(name, engine_file(run.path))
    provider = {CUDA: "cuda", TENSORRT_PROVIDER: "tensorrt"}.get(name, provider_of(device))
    file = run.file(file_of(name) or QUANTIZED_ONNX)
    return OnnxRuntimeBackend(name, file, optimize=name != UNOPTIMIZED, provider=provider)


def not_executed(run: Run, executions: Sequence[Backend]) -> list[str]:
    """Networks and engines in the run directory that none of the executions ran, by file name."""
    ran = {e.detail.get("file") for e in executions}
    found = sorted(p.name for p in run.path.iterdir() if p.suffix in _NETWORKS)
    return [name for name in found if name not in ran]


def file_of(name: str) -> str | None:
    """The ONNX file that an execution runs; None for torch's and for engines."""
    if name in (FLOAT, FAKE_QUANT, FAKE_QUANT_FP16, *ENGINES):
        return None
    return {**BASELINES, QDQ_FP16: QUANTIZED_HALF_ONNX}.get(name, QUANTIZED_ONNX)


def provider_of(device: str) -> str:
    """ONNX Runtime's provider that goes with a torch device."""
    return "cuda" if device.startswith("cuda") else "cpu"


def check_origin(run: Run, file: str = QUANTIZED_ONNX) -> None:
    """Hold a quantized file to the run it lies in: the same integers, the same preprocessing.

    Raises:
        InputError: it was exported from another run, or the run's preprocessing was changed since.
    """
    path: Path = run.file(file)
    metadata = {p.key: p.value for p in read_proto(path).metadata_props}
    if metadata.get("quantized_sha256") != run.manifest.files[QUANTIZED_TENSORS]:
        raise InputError("the file was exported from another run", where=path, fix="export this run again")
    if json.loads(metadata.get("preprocessing", "{}")) != json.loads(run.manifest.data.model_dump_json()):
        raise InputError(
            "the file was exported for another preprocessing than the manifest's",
            where=path,
            fix="export this run again",
        )


def changed_preprocessing(ours: DataConfig, theirs: DataConfig) -> tuple[str, Any, Any] | None:
    """The first setting in which two preprocessings differ, with both values; None where they are the same."""
    pairs = ((key, getattr(ours, key), getattr(theirs, key)) for key in type(ours).model_fields)
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def check_preprocessing(run: Run, config: DataConfig) -> None:
    """Hold the images to the run's preprocessing; whether files are turned as EXIF says is up to those files.

    Raises:
        InputError: they are prepared differently.
    """
    changed = changed_preprocessing(
        run.manifest.data, config.model_copy(update={"exif": run.manifest.data.exif})
    )
    if changed is not None:
        key, ours, theirs = changed
        raise InputError(
            f"the images are prepared with another {key} ({theirs}) than the run was calibrated with ({ours})",
            where="`data`",
            fix="use the preprocessing in the manifest",
        )
