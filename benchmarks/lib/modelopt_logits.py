"""Logits of a network that nvidia-modelopt quantized; `benchmarks/modelopt.py` runs this with modelopt's own interpreter.

    PYTHON benchmarks/lib/modelopt_logits.py FOLDER FORMAT SETTING

FOLDER has `model.json` (timm's name and arguments), `weights.pt`, `calibration.npy` and `images.npy`. `logits.npy` is written
there, and the last line printed is JSON: what is quantized. It needs torch, timm, numpy and modelopt, and none of ours.
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import timm
import torch
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.nn import TensorQuantizer

BATCH = 50
CONFIGURATIONS = {"fp8": "FP8_DEFAULT_CFG", "nvfp4": "NVFP4_DEFAULT_CFG"}
# Of modelopt's own example for timm's networks, examples/torch_onnx/torch_quant_to_onnx.py: convolutions in FP8, since
# TensorRT has none in FP4, and no quantizers where a module's name has one of these words.
EXAMPLE = "example"
_FLOAT_THERE = (
    *(
        "time_emb_proj",
        "time_embedding",
        "conv_in",
        "conv_out",
        "conv_shortcut",
        "add_embedding",
        "pos_embed",
    ),
    *(
        "time_text_embed",
        "context_embedder",
        "norm_out",
        "x_embedder",
        "patch_embed",
        "cpb_mlp",
        "downsample",
    ),
    "global_pool",
)
_CONVOLUTIONS = [
    {"parent_class": "nn.Conv2d", "quantizer_name": name, "cfg": {"num_bits": (4, 3), "axis": None}}
    for name in ("*weight_quantizer", "*input_quantizer")
]
# Between neighbouring magnitudes of E2M1: 0 .5 1 1.5 2 3 4 6.
_LEVELS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def nvfp4(x: torch.Tensor, block_size: int, amax: torch.Tensor, *_: Any) -> torch.Tensor:
    """Modelopt's fake quantization to NVFP4, which it has for CUDA only.

    Written after `fp4_fake_quant_block` of its Triton kernels, line by line.

    Args:
        x: of any shape; blocks lie along its last axis, the last one filled up with zeros.
        block_size: values that share a scale.
        amax: (), the largest magnitude that calibration saw.

    Returns:
        As `x`.
    """
    width = x.shape[-1]
    rows = torch.nn.functional.pad(x.float().reshape(-1, width), (0, -width % block_size))
    blocks = rows.reshape(len(rows), -1, block_size)
    unit = amax.float().amax() / (6.0 * 448.0)
    unit = torch.where(unit > 0, unit, 1e-12)
    scales = (blocks.abs().amax(-1, keepdim=True) / (6.0 * unit)).clamp(max=448.0)
    scales = scales.to(torch.float8_e4m3fn).float() * unit
    # So in the kernel: a block whose scale is below this is all zeros.
    scales = torch.where(scales >= 1e-5, scales, 1.0)
    rounded = _round(blocks.abs() / scales) * scales
    result = torch.where(blocks >= 0, rounded, -rounded)
    return result.reshape(len(rows), -1)[:, :width].reshape(x.shape).to(x.dtype)


def _round(magnitudes: torch.Tensor) -> torch.Tensor:
    """To the nearest magnitude of E2M1, ties to the even code."""
    index = torch.bucketize(magnitudes, _MIDDLES)
    # A tie went down; the codes 1, 3, 5 and 7 are odd, so that one between them and the next goes up.
    tie = magnitudes == _MIDDLES[index.clamp(max=len(_MIDDLES) - 1)]
    return _LEVELS[index + (tie & (index % 2 == 1)).to(index.dtype)]


def quantized(
    model: torch.nn.Module, format_: str, setting: str, images: torch.Tensor
) -> tuple[torch.nn.Module, int]:
    """The network that modelopt calibrates on images by their maximum, and how many quantizers needed CUDA."""
    config: dict[str, Any] = copy.deepcopy(getattr(mtq, CONFIGURATIONS[format_]))
    if setting == EXAMPLE and format_ == "nvfp4":
        config["quant_cfg"].extend(_CONVOLUTIONS)

    def forward_loop(network: torch.nn.Module) -> None:
        for x in images.split(BATCH):
            network(x)

    network = mtq.quantize(model, config, forward_loop)
    if setting == EXAMPLE:
        mtq.disable_quantizer(network, lambda name: any(word in name for word in _FLOAT_THERE))
    blocks = [q for q in _quantizers(network).values() if q.block_sizes]
    if blocks:
        tensor_quant.dynamic_block_quantize_op = nvfp4
    return network, len(blocks)


def _quantizers(network: torch.nn.Module) -> dict[str, Any]:
    """Those that do something, by name."""
    found = network.named_modules()
    return {name: m for name, m in found if isinstance(m, TensorQuantizer) and m.is_enabled}


def parts(network: torch.nn.Module) -> dict[str, int]:
    """How many quantizers of each kind: "Linear input_quantizer e4m3", say."""
    modules = dict(network.named_modules())
    count: Counter[str] = Counter()
    for name, quantizer in _quantizers(network).items():
        owner, _, kind = name.rpartition(".")
        bits = "e{}m{}".format(*quantizer.num_bits)
        count[f"{type(modules[owner]).__name__.removeprefix('Quant')} {kind} {bits}"] += 1
    return dict(sorted(count.items()))


def main() -> None:
    """Command line."""
    folder, format_, setting = Path(sys.argv[1]), *sys.argv[2:4]
    torch.set_num_threads(1)
    timm.layers.set_fused_attn(False)
    spec = json.loads((folder / "model.json").read_text())
    model = timm.create_model(spec["name"], **spec["kwargs"])
    model.load_state_dict(torch.load(folder / "weights.pt"))
    images = {name: torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("calibration", "images")}
    with torch.inference_mode():
        network, blocks = quantized(model.eval(), format_, setting, images["calibration"])
        logits = torch.cat([network(x) for x in images["images"].split(BATCH)])
    np.save(folder / "logits.npy", logits.numpy())
    versions = {"modelopt": metadata.version("nvidia-modelopt"), "torch": torch.__version__}
    found = {"quantizers": parts(network), "written_again": blocks > 0, "versions": versions}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
