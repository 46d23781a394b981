"""Building an engine through Polygraphy: one code path for TensorRT 8.6 to 11 and TensorRT-RTX, by what the product offers.

Networks are strongly typed where the product can: the ONNX file alone says what runs in which precision. TensorRT 8.6 cannot;
there the builder gets its flags for FP16 and INT8. No calibrator or implicit quantization is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ospq_export.engines.products import (
    Message,
    Product,
    known_capabilities,
    load,
    quiet_polygraphy,
    recorder,
)
from ospq_export.engines.profiles import profiles
from ospq_export.engines.targets import BUILD_THERE, in_order, target_of
from ospq_export.errors import InputError
from ospq_export.runs.files import replacing
from ospq_export.world.room import check_file

_MIB = 1 << 20
# Settings that TensorRT-RTX has no use for, with the reason.
_NOT_IN_RTX = {
    "timing_cache": "TensorRT-RTX measures nothing while it builds: it has no timing cache",
    "version_compatible": "TensorRT-RTX comes without the lean runtime that a version-compatible engine needs",
    "hardware_compatibility": "TensorRT-RTX builds for the targets that `compute_capability` names, whatever the level",
}
_LINT = "`ospq-export lint` names what it cannot take"


@dataclass(frozen=True)
class BuildSettings:
    """How an engine is built.

    Attributes:
        product: what builds it.
        profile: min, opt and max batch of a file with a dynamic batch; None for a static one. Heights and widths of
            a file that leaves them free are in its metadata.
        compute_capabilities: targets such as "SM89" (TensorRT-RTX); none: the GPU of this machine.
        version_compatible: whether later versions of the product may run it (TensorRT).
        hardware_compatibility: "ampere_plus" or "same_compute_capability" (TensorRT), or None.
        workspace_mib: the most scratch memory a layer may use, in MiB; None leaves the product's default.
        timing_cache: file that measurements are read from and added to (TensorRT).
        tf32: whether float32 products may be computed in TF32, as both products do by default.
    """

    product: Product
    profile: tuple[int, int, int] | None = None
    compute_capabilities: tuple[str, ...] = ()
    version_compatible: bool = False
    hardware_compatibility: str | None = None
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    tf32: bool = True


@dataclass(frozen=True)
class Built:
    """A serialized engine and its builder's whole log."""

    plan: bytes
    log: list[Message]


def build(
    onnx_file: Path,
    settings: BuildSettings,
    progress: Progress | None = None,
    outputs: Sequence[str] = (),
) -> Built:
    """Parse an ONNX file and build an engine from it, in memory, through Polygraphy.

    Args:
        onnx_file: what the engine computes.
        settings: how it is built.
        progress: where to show the builder's phases.
        outputs: names of tensors that the engine returns in place of the file's own outputs; none keeps those.

    Raises:
        InputError: the product is missing, a setting is not for it, the parser or the builder refuses: with its reason.
    """
    check_settings(settings)
    trt, log = load(settings.product), recorder(settings.product)
    from polygraphy.backend.trt import EngineBytesFromNetwork, ModifyNetworkOutputs, NetworkFromOnnxPath

    try:
        onnx_file.open("rb").close()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=onnx_file) from error
    log.messages.clear()
    with quiet_polygraphy(), ExitStack() as files:
        # By its path: weights beside the file are found only so.
        parse = NetworkFromOnnxPath(str(onnx_file), strongly_typed=_strongly_typed(trt))
        parsed = _told(parse, log, "the ONNX parser refuses the file", onnx_file)
        if outputs:
            parsed = ModifyNetworkOutputs(parsed, list(outputs))()
        config = _config(trt, settings, onnx_file, parsed, progress)
        if not settings.tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        cache = None
        if settings.timing_cache is not None:
            cache = str(files.enter_context(replacing(settings.timing_cache)))
        compile_ = EngineBytesFromNetwork(parsed, config, save_timing_cache=cache)
        plan = bytes(_told(compile_, log, f"{settings.product} refuses to build", onnx_file))
    return Built(plan, list(log.messages))


def _told(step: Callable[[], Any], log: Any, what: str, onnx_file: Path) -> Any:
    """Run a step of Polygraphy; where it fails, the product's own log has the reason."""
    from polygraphy.exception import PolygraphyException

    try:
        return step()
    except PolygraphyException as error:
        raise InputError(f"{what}: {_reason(log.messages)}", where=onnx_file, fix=_LINT) from error


def _reason(messages: list[Message]) -> str:
    errors = [m.text for m in messages if m.severity in ("ERROR", "INTERNAL_ERROR")]
    return "; ".join(dict.fromkeys(errors[-2:])) or "no reason was logged"


def _strongly_typed(trt: Any) -> bool:
    """Whether strong typing has to be asked for: TensorRT 8.6 has none, TensorRT 11 nothing else."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def _precision_flags(trt: Any, onnx_file: Path) -> dict[str, bool]:
    """The builder's precision flags for a product without strong typing: FP16, and INT8 where the file has quantizers."""
    if _strongly_typed(trt) or not hasattr(trt.BuilderFlag, "INT8"):
        return {}
    import onnx

    nodes = onnx.load(str(onnx_file), load_external_data=False).graph.node
    return {"fp16": True, "int8": any(node.op_type == "QuantizeLinear" for node in nodes)}


def _config(
    trt: Any, settings: BuildSettings, onnx_file: Path, parsed: Any, progress: Progress | None
) -> Any:
    builder, network, _parser = parsed
    common: dict[str, Any] = {"profiles": profiles(network, settings.profile, onnx_file)}
    if settings.workspace_mib is not None:
        common["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: settings.workspace_mib * _MIB}
    if progress is not None and hasattr(trt, "IProgressMonitor"):
        common["progress_monitor"] = _monitor(trt, progress)
    if settings.product is Product.TENSORRT_RTX:
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        targets = target_capabilities(settings)
        asked = {"compute_capabilities": targets} if targets else {"use_gpu": True}
        return CreateConfigRTX(**common, **asked)(builder, network)
    from polygraphy.backend.trt import CreateConfig

    if settings.hardware_compatibility is not None:
        common["hardware_compatibility_level"] = _level(trt, settings.hardware_compatibility)
    known = settings.timing_cache if settings.timing_cache and settings.timing_cache.is_file() else None
    # TF32 is the product's own default for float32 products; Polygraphy would switch it off.
    config = CreateConfig(
        **common,
        **_precision_flags(trt, onnx_file),
        tf32=True,
        load_timing_cache=None if known is None else str(known),
        version_compatible=settings.version_compatible,
    )(builder, network)
    if known is not None and config.get_timing_cache() is None:
        what = "the timing cache is of another version or GPU"
        raise InputError(what, where=known, fix="delete it, or choose another file")
    return config


def _member(kind: Any, name: str, option: str) -> Any:
    known = [n for n in dir(kind) if n.isupper() and n not in ("NONE", "CURRENT")]
    if name.upper() not in known:
        raise InputError(f"{name!r} is unknown", where=option, fix=f"use one of {in_order(known)}")
    return getattr(kind, name.upper())


def _level(trt: Any, name: str) -> Any:
    return _member(trt.HardwareCompatibilityLevel, name, "`hardware_compatibility`")


def check_settings(settings: BuildSettings) -> None:
    """Refuse what the product cannot do, before anything is exported.

    Raises:
        InputError: the product is missing; a target, a level or a profile is impossible, or not for this product; a file
            cannot be written.
    """
    trt = load(settings.product)
    target_capabilities(settings)
    for name, why in _NOT_IN_RTX.items() if settings.product is Product.TENSORRT_RTX else ():
        if getattr(settings, name) not in (None, False):
            raise InputError(why, where=f"`{name}`", fix="leave it out")
    if settings.hardware_compatibility is not None:
        _level(trt, settings.hardware_compatibility)
    if settings.workspace_mib is not None and settings.workspace_mib < 1:
        raise InputError(f"{settings.workspace_mib} MiB", where="`workspace`", fix="give 1 or more")
    if settings.profile is not None:
        _check_profile(settings.profile)
    if settings.timing_cache is not None:
        check_file(settings.timing_cache, "`timing_cache`")


def _check_profile(profile: tuple[int, int, int]) -> None:
    least, opt, most = profile
    if not 1 <= least <= opt <= most:
        raise InputError(
            f"{least},{opt},{most}: min, opt and max have to ascend from 1 on",
            where="`profile`",
            fix="write it like 1,8,32",
        )


def target_capabilities(settings: BuildSettings) -> list[tuple[int, int]]:
    """The targets as (major, minor); empty where the product builds for this machine's GPU.

    Raises:
        InputError: the product is missing, a target is unknown to it, or there is neither a target nor a GPU.
    """
    import torch

    known, wanted = known_capabilities(settings.product), settings.compute_capabilities
    if wanted and not known:
        raise InputError(
            f"{settings.product} builds for the GPU of this machine only",
            where="`compute_capability`",
            fix="leave it out, or use `engine` tensorrt-rtx",
        )
    if not wanted and not torch.cuda.is_available():
        raise InputError(
            "there is no GPU here to build for",
            where="`compute_capability`",
            fix=f"name the target: {in_order(known)}" if known else "build where the GPU is",
        )
    kind = getattr(load(settings.product), "ComputeCapability", None)
    for name in wanted:
        _check_built_for(settings.product, name)
        _member(kind, name, "`compute_capability`")
    digits = [name.upper().removeprefix("SM") for name in dict.fromkeys(wanted)]
    return [(int(d[:-1]), int(d[-1])) for d in digits]


def _check_built_for(product: Product, name: str) -> None:
    """Refuse hardware that there is, and that the product has no code for."""
    known = known_capabilities(product)
    if target_of(name) is not None and name.upper() not in known:
        raise InputError(
            f"{product} does not build for {name.upper()}, only for {in_order(known)}",
            where="`compute_capability`",
            fix=BUILD_THERE,
        )


def _monitor(trt: Any, progress: Progress) -> Any:
    """The builder's phases as rich tasks: a phase is added when it starts and hidden when it ends."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.tasks: dict[str, Any] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            nested = parent_phase is not None
            self.tasks[phase_name] = progress.add_task(phase_name[:28], total=num_steps, nested=nested)

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.tasks:
                progress.update(self.tasks.pop(phase_name), visible=False)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.tasks:
                progress.update(self.tasks[phase_name], completed=step + 1)
            return True

    return Monitor()
