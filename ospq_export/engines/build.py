"""Building an engine: parser, configuration, progress. One code path for TensorRT 10, TensorRT 11 and TensorRT-RTX.

Networks are strongly typed: the ONNX file alone says what runs in which precision. No precision flag, calibrator or implicit
quantization is used; TensorRT 11 has none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ospq_export.engines.products import Message, Product, known_capabilities, load, recorder
from ospq_export.engines.profiles import set_profile
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
    """

    product: Product
    profile: tuple[int, int, int] | None = None
    compute_capabilities: tuple[str, ...] = ()
    version_compatible: bool = False
    hardware_compatibility: str | None = None
    workspace_mib: int | None = None
    timing_cache: Path | None = None


@dataclass(frozen=True)
class Built:
    """A serialized engine and its builder's whole log."""

    plan: bytes
    log: list[Message]


def build(onnx_file: Path, settings: BuildSettings, progress: Progress | None = None) -> Built:
    """Parse an ONNX file and build an engine from it, in memory.

    Raises:
        InputError: the product is missing, a setting is not for it, the parser or the builder refuses: with its reason.
    """
    check_settings(settings)
    trt, log = load(settings.product), recorder(settings.product)
    log.messages.clear()
    builder = trt.Builder(log)
    network = _parsed(trt, builder, log, onnx_file)
    config = _config(trt, builder, settings)
    set_profile(builder, network, config, settings.profile, onnx_file)
    if progress is not None:
        config.progress_monitor = _monitor(trt, progress)
    cache = _timing_cache(config, settings.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        what = f"{settings.product} refuses to build: {_reason(log.messages)}"
        raise InputError(what, where=onnx_file, fix=_LINT)
    if cache is not None and settings.timing_cache is not None:
        with replacing(settings.timing_cache) as temporary:
            temporary.write_bytes(bytes(cache.serialize()))
    return Built(bytes(plan), list(log.messages))


def _parsed(trt: Any, builder: Any, log: Any, onnx_file: Path) -> Any:
    # The flag is gone where strong typing is all there is.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    try:
        onnx_file.open("rb").close()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=onnx_file) from error
    # By its path: weights beside the file are found only so.
    if not parser.parse_from_file(str(onnx_file)):
        errors = [parser.get_error(index).desc() for index in range(parser.num_errors)]
        what = f"the ONNX parser refuses the file: {'; '.join(errors[:3]) or _reason(log.messages)}"
        raise InputError(what, where=onnx_file, fix=_LINT)
    return network


def _reason(messages: list[Message]) -> str:
    errors = [m.text for m in messages if m.severity in ("ERROR", "INTERNAL_ERROR")]
    return "; ".join(dict.fromkeys(errors[-2:])) or "no reason was logged"


def _config(trt: Any, builder: Any, settings: BuildSettings) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib * _MIB)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatibility is not None:
        config.hardware_compatibility_level = _level(trt, settings.hardware_compatibility)
    members = target_members(settings)
    if members:
        config.num_compute_capabilities = len(members)
    for index, member in enumerate(members):
        config.set_compute_capability(member, index)
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
    target_members(settings)
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


def target_members(settings: BuildSettings) -> list[Any]:
    """The product's names of the targets; empty where it builds for this machine's GPU only.

    Raises:
        InputError: the product is missing, a target is unknown to it, or there is neither a target nor a GPU.
    """
    import torch

    trt, wanted = load(settings.product), settings.compute_capabilities
    has_targets = hasattr(trt, "ComputeCapability")
    if wanted and not has_targets:
        raise InputError(
            f"{settings.product} builds for the GPU of this machine only",
            where="`compute_capability`",
            fix="leave it out, or use `engine` tensorrt-rtx",
        )
    if not wanted and not torch.cuda.is_available():
        known = known_capabilities(settings.product)
        raise InputError(
            "there is no GPU here to build for",
            where="`compute_capability`",
            fix=f"name the target: {in_order(known)}" if known else "build where the GPU is",
        )
    if has_targets and not wanted:
        return [trt.ComputeCapability.CURRENT]
    for name in wanted:
        _check_built_for(settings.product, name)
    return [_member(trt.ComputeCapability, name, "`compute_capability`") for name in dict.fromkeys(wanted)]


def _check_built_for(product: Product, name: str) -> None:
    """Refuse hardware that there is, and that the product has no code for."""
    known = known_capabilities(product)
    if target_of(name) is not None and name.upper() not in known:
        raise InputError(
            f"{product} does not build for {name.upper()}, only for {in_order(known)}",
            where="`compute_capability`",
            fix=BUILD_THERE,
        )


def _timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    try:
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=path) from error
    if cache is None or not config.set_timing_cache(cache, False):
        what = "the timing cache is of another version or GPU"
        raise InputError(what, where=path, fix="delete it, or choose another file")
    return cache


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
