"""How fast GPUs multiply and move data, as their makers publish it: what a network's time is estimated from.

Rates are dense, of tensor cores, in tera-operations a second, where a multiply-add is two; those of FP16 and FP8 are with float32
sums where a source tells them apart. Where a data sheet prints only figures "with sparsity", half of them is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ospq_export.errors import InputError


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: as settings call it.
        about: what it is.
        target: name of its generation in `targets.TARGETS`.
        rates: 10^12 operations a second, by `Format.engine_type`; "Half" is FP16.
        bandwidth: of its memory, GB/s.
        sources: where the figures are from.
    """

    name: str
    about: str
    target: str
    rates: Mapping[str, float]
    bandwidth: float
    sources: tuple[str, ...]


HALF, INT8, FP8, FP4 = "Half", "Int8", "FP8", "FP4E2M1"
_ADA = "https://images.nvidia.com/aem-dam/Solutions/Data-Center/l4/nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf"
_ALL = (
    Gpu(
        "orin",
        "Jetson AGX Orin 64GB at 1.3 GHz, its GPU without the DLAs",
        "orin",
        # 85 and 170 with sparsity.
        {HALF: 42.5, INT8: 85.0},
        204.8,
        (
            "Jetson AGX Orin data sheet DS-10662-001, tables 1-2 and 1-3",
            "https://static.generation-robots.com/media/Jetson-AGX-Orin-Data-Sheet.pdf",
        ),
    ),
    Gpu(
        "l4",
        "L4",
        "ada",
        {HALF: 121.0, INT8: 242.5, FP8: 242.5},
        300.0,
        ("https://www.nvidia.com/en-us/data-center/l4/", _ADA),
    ),
    Gpu(
        "rtx4090",
        "GeForce RTX 4090",
        "ada",
        {HALF: 165.2, INT8: 660.6, FP8: 330.3},
        1008.0,
        (f"{_ADA}, appendix A",),
    ),
    Gpu(
        "l40s",
        "L40S",
        "ada",
        {HALF: 362.05, INT8: 733.0, FP8: 733.0},
        864.0,
        ("https://www.nvidia.com/en-us/data-center/l40s/",),
    ),
    Gpu(
        "h100",
        "H100 SXM",
        "hopper",
        {HALF: 989.4, INT8: 1978.9, FP8: 1978.9},
        3350.0,
        (
            "NVIDIA H100 Tensor Core GPU Architecture, V1.04, tables 1 and 3",
            "https://glennklockwood.com/garden/processors/h100",
        ),
    ),
    Gpu(
        "b200",
        "B200 in an HGX, 1,000 W",
        "blackwell",
        # 4.5, 9, 9 and 18 POPS with sparsity.
        {HALF: 2250.0, INT8: 4500.0, FP8: 4500.0, FP4: 9000.0},
        7700.0,
        (
            "https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703",
            "https://glennklockwood.com/garden/processors/B200",
        ),
    ),
    Gpu(
        "rtx5090",
        "GeForce RTX 5090",
        "blackwell",
        {HALF: 209.5, INT8: 838.0, FP8: 419.0, FP4: 1676.0},
        1792.0,
        (
            "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf, table 3",
        ),
    ),
    Gpu(
        "thor",
        "Jetson T5000 at 1.575 GHz",
        "thor",
        # FP16 and INT8: 517 and 1,035 with sparsity.
        {HALF: 258.5, INT8: 517.0, FP8: 517.0, FP4: 1035.0},
        273.0,
        (
            "Jetson Thor data sheet DS-11945-001, table 1-1",
            "https://developer.nvidia.com/blog/introducing-nvidia-jetson-thor-the-ultimate-platform-for-physical-ai/",
        ),
    ),
)
GPUS: Mapping[str, Gpu] = {gpu.name: gpu for gpu in _ALL}


def find_gpu(name: str) -> Gpu:
    """The GPU of a name.

    Raises:
        InputError: there is none; of a generation, the line names the GPUs that are known of it.
    """
    found = GPUS.get(name.lower())
    if found is not None:
        return found
    of = [gpu.name for gpu in _ALL if gpu.target == name.lower()]
    what = f"{name} is a generation, of which rates differ" if of else f"the rates of {name!r} are not known"
    raise InputError(what, where="`target`", fix=f"name a GPU: {', '.join(of or GPUS)}")
