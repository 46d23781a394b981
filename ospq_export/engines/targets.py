"""Which hardware multiplies which formats: the one table that checks, help texts and diagnoses ask.

Nothing here is guessed from a name. Where no source says since which TensorRT something is there, the version is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ospq_export.engines.products import Product, known_capabilities
from ospq_export.engines.rates import GPUS
from ospq_export.errors import InputError

if TYPE_CHECKING:
    from ospq_export.formats.base import Format


@dataclass(frozen=True)
class Target:
    """A generation of GPUs.

    Attributes:
        name: as settings call it.
        hardware: what it is, with examples.
        compute_capabilities: as TensorRT spells them.
        formats: by the family of a format (`Format.family`) that it multiplies, the first TensorRT that has it there; None
            where no source was found.
        tensorrt: the first TensorRT that supports the hardware; None where no source was found.
        former: what a compute capability of it was called before.
    """

    name: str
    hardware: str
    compute_capabilities: tuple[str, ...]
    formats: Mapping[str, str | None]
    tensorrt: str | None = None
    former: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Such as "Ampere (SM80, SM86)"."""
        return f"{self.name.capitalize()} ({', '.join(self.compute_capabilities)})"


_INTEGER: dict[str, str | None] = {"integer": None}
_FP8 = {**_INTEGER, "fp8": None}

# Compute capabilities and examples: https://developer.nvidia.com/cuda-gpus
# INT8: https://nvidia.github.io/TensorRT-LLM/reference/support-matrix.html for SM75 to SM90; for SM87 the support matrix of
#   2022, as copied in https://blog.csdn.net/HaoZiHuang/article/details/125830864; for Blackwell (convolutions)
#   https://docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/release-notes-10/10.10.0.html
#   TensorRT-RTX 1.7 compiles our files' products as INT8 for SM75, SM80 and SM89 (seen; float32 products it refuses for SM75).
# FP8 from 8.9 on, FP4 from 10.0 on:
#   https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/work-quantized-types.html
#   https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/getting-started/support-matrix.html (no FP8 on 7.5 and 8.6)
#   https://nvidia.github.io/TransformerEngine/support_matrix.html (the same for 8.0, 9.0 and 10.3)
# Blackwell, and E2M1 on it, since 10.8; not since when INT8 and FP8 are there:
#   https://docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/release-notes-10/10.8.0.html
# Thor: INT8 and FP8 in https://developer.nvidia.com/docs/drive/drive-os/7.0.3/public/drive-os-tensorrt-release-notes/ (as 10.1);
#   NVFP4 on SM110 in https://docs.nvidia.com/deeplearning/tensorrt/10.16.0/index.html; SM101 until CUDA 12.9:
#   https://docs.nvidia.com/cuda/curanddx/release_notes.html
# TensorRT 10.0's parser takes opset 9 to 20, 8.5's up to 17: docs/operators.md of https://github.com/onnx/onnx-tensorrt
BUILD_THERE = (
    "take model_qdq_fp16.onnx (`fp16`) to the device and build there with TensorRT 10 or later, strongly typed; "
    "TensorRT 8 reads opset 17 at most, and these files have 20"
)
_ALL = (
    Target("turing", "T4, GeForce RTX 20", ("SM75",), _INTEGER),
    Target("ampere", "A100 (SM80), A10 and GeForce RTX 30 (SM86)", ("SM80", "SM86"), _INTEGER),
    Target("orin", "Jetson AGX Orin, Orin NX, Orin Nano", ("SM87",), _INTEGER),
    Target("ada", "L4, L40S, GeForce RTX 40", ("SM89",), _FP8),
    Target("hopper", "H100, H200, GH200", ("SM90",), _FP8),
    Target(
        "blackwell",
        "B200 (SM100), B300 (SM103), GeForce RTX 50 (SM120), GB10 (SM121)",
        ("SM100", "SM103", "SM120", "SM121"),
        {**_FP8, "nvfp4": "10.8"},
        tensorrt="10.8",
    ),
    Target("thor", "Jetson T5000, T4000", ("SM110",), {**_FP8, "nvfp4": None}, former=("SM101",)),
)
TARGETS: Mapping[str, Target] = {target.name: target for target in _ALL}


def find_target(name: str) -> Target:
    """The target of a name.

    Args:
        name: such as "ada", or a GPU of it, "l4".

    Raises:
        InputError: there is none.
    """
    gpu = GPUS.get(name.lower())
    found = TARGETS.get(name.lower() if gpu is None else gpu.target)
    if found is None:
        fix = f"use one of {', '.join(TARGETS)}, or a GPU: {', '.join(GPUS)}"
        raise InputError(f"there is no target {name!r}", where="`target`", fix=fix)
    return found


def target_of(capability: str) -> Target | None:
    """The target that has a compute capability such as "SM89"; None where the table knows none."""
    known = ((target, (*target.compute_capabilities, *target.former)) for target in _ALL)
    return next((target for target, names in known if capability.upper() in names), None)


def gpu_here() -> str | None:
    """Compute capability of this machine's GPU, such as "SM89"; None where there is no GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    return "SM{}{}".format(*torch.cuda.get_device_capability())


def check_formats(target: Target, formats: Iterable[Format], *, where: str = "") -> None:
    """Refuse formats that hardware does not multiply.

    Args:
        target: the hardware.
        formats: of all operands.
        where: what named the hardware; the setting `target` if that is left out.

    Raises:
        InputError: it lacks one of them; the line says which hardware has all.
    """
    asked = {format_.family: format_.name for format_ in formats}
    missing = [name.upper() for family, name in asked.items() if family not in target.formats]
    if not missing:
        return
    able = [other.name for other in _ALL if set(asked) <= set(other.formats)]
    raise InputError(
        f"{target} does not multiply {_spoken(missing)}",
        where=where or f"`target` {target.name}",
        fix=f"{_spoken(able)} {'does' if len(able) == 1 else 'do'}" if able else "choose other formats",
    )


def in_order(capabilities: Iterable[str]) -> str:
    """Compute capabilities from the oldest to the newest: "SM75, SM120"."""
    return ", ".join(sorted(capabilities, key=lambda name: (len(name), name)))


def _spoken(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def capabilities_to_build(
    product: Product, formats: Iterable[Format], target: Target | None = None, given: Sequence[str] = ()
) -> tuple[str, ...]:
    """What an engine is built for, held to the formats before anything is exported.

    Args:
        product: what builds it.
        formats: of all operands.
        target: hardware that it has to run on; None: whatever is given, or here.
        given: compute capabilities that were asked for by name; one that the table does not know is left to the product.

    Returns:
        The given ones; without them those of the target that the product builds for; none: the GPU of this machine.

    Raises:
        InputError: hardware lacks a format, what is given is not of the target, or the product cannot build for the target.
    """
    formats = list(formats)
    if target is not None:
        check_formats(target, formats)
    for capability in given:
        _check_given(capability, formats, target)
    if given:
        return tuple(given)
    known = known_capabilities(product) if target is not None else []
    if target is None or not known:
        _check_here(product, formats, target)
        return ()
    chosen = tuple(capability for capability in target.compute_capabilities if capability in known)
    if not chosen:
        raise InputError(
            f"{product} builds for {in_order(known)}, not for {target}",
            where=f"`target` {target.name}",
            fix=BUILD_THERE,
        )
    return chosen


def _check_given(capability: str, formats: Iterable[Format], target: Target | None) -> None:
    found, where = target_of(capability), "`compute_capability`"
    if target is not None and found is not target:
        raise InputError(
            f"{capability} is not {target}, the target", where=where, fix="leave one of them out"
        )
    if found is not None:
        check_formats(found, formats, where=f"{where} {capability}")


def _check_here(product: Product, formats: Iterable[Format], target: Target | None) -> None:
    """Hold this machine's GPU to the formats and to the target; where there is none, the builder says so."""
    gpu = gpu_here()
    found = None if gpu is None else target_of(gpu)
    if gpu is not None and target is not None and found is not target:
        raise InputError(
            f"{product} builds for the GPU of this machine, {gpu}, which is not {target}",
            where=f"`target` {target.name}",
            fix="build where such a GPU is",
        )
    if found is not None:
        check_formats(found, formats, where=f"{gpu}, the GPU of this machine")
