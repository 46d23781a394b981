"""The processor: its name, its instructions for products of 8-bit integers, and whether ONNX Runtime's kernels saturate on it.

On x86-64 without VNNI, ONNX Runtime multiplies uint8 by int8 with VPMADDUBSW, which adds two neighbouring products in 16 bits
and saturates (Intel's Software Developer's Manual; MLAS's QgemmU8X8KernelAvx2). Which kernel it takes is asked, not guessed.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# torch's name for a feature, and how vendors write it; what matters to products of 8-bit integers, in rising order.
_INSTRUCTIONS = {
    "avx2": "AVX2",
    "avx512_bw": "AVX512BW",
    "avx_vnni": "AVX-VNNI",
    "avx512_vnni": "AVX512-VNNI",
    "avx_vnni_int8": "AVX-VNNI-INT8",
    "amx_int8": "AMX-INT8",
    "dot": "DotProd",
    "i8mm": "I8MM",
}
PRECISE_KERNELS = "session.x64quantprecision"
"""Session option of ONNX Runtime: "1" takes slower kernels that do not saturate, where the fast ones would."""


class Processor(BaseModel):
    """The machine's processor.

    Attributes:
        name: as the system calls it.
        architecture: x86_64, arm64, ...
        cores: logical ones.
        instructions: those for products of 8-bit integers.
        saturates: whether ONNX Runtime's products of 8-bit integers saturate in 16 bits here; None where it could not be asked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    architecture: str
    cores: int
    instructions: list[str]
    saturates: bool | None = None

    def __str__(self) -> str:
        """Name, instructions, and what they come to."""
        known = ", ".join(self.instructions) or "no instructions for 8-bit integers known"
        return f"{self.name} ({self.architecture}, {self.cores} cores): {known}"

    def consequence(self) -> str:
        """What ONNX Runtime makes of the instructions, in a clause."""
        if self.saturates is None:
            return "whether ONNX Runtime's 8-bit products are exact here is not known"
        if not self.saturates:
            return "ONNX Runtime's 8-bit products are exact"
        return (
            "ONNX Runtime multiplies 8-bit integers as uint8 x int8 and adds pairs of products in 16 bits, "
            "which saturate where weights' codes are large"
        )


def machine_name() -> str:
    """Processor and core count in words."""
    return f"{_name()}, {os.cpu_count()} cores"


@functools.cache
def examine_processor() -> Processor:
    """This machine's processor; looked at once."""
    import torch

    features: dict[str, Any] = dict(torch.cpu.get_capabilities())
    return Processor(
        name=_name(),
        architecture=str(features.get("architecture") or platform.machine()),
        cores=os.cpu_count() or 1,
        instructions=[title for key, title in _INSTRUCTIONS.items() if features.get(key)],
        saturates=_saturates(),
    )


def _name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.is_file() else ""
    lines = (line.partition(":") for line in text.splitlines())
    names = (value.strip() for key, _, value in lines if key.strip() == "model name")
    return next(names, None) or platform.processor() or platform.machine()


_DEPTH = 64
_LARGEST = 127


def saturates(execute: Callable[[bytes, NDArray[np.float32]], NDArray[Any]]) -> bool:
    """Whether a product of the largest codes, which a runtime computes in integers, comes out wrong.

    Args:
        execute: runs an ONNX model on its one input, and returns its one output.
    """
    import numpy as np

    result = execute(_probe(), np.full((1, 8, _DEPTH), _LARGEST, np.float32))
    right = _DEPTH * _LARGEST * _LARGEST
    return bool(np.abs(result - right).max() > 1e-3 * right)


def _saturates() -> bool | None:
    """Whether ONNX Runtime's products do."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1

    def execute(model: bytes, x: NDArray[np.float32]) -> NDArray[Any]:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": x})[0]

    try:
        return saturates(execute)
    except Exception:
        # ONNX Runtime raises a dozen unrelated types; none of them says anything about the processor.
        return None


def _probe() -> bytes:
    """An int8 MatMul as QDQ, `(1, 8, 64) float32 -> (1, 8, 16) float32`, all of whose weights' codes are 127."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    codes = np.full((_DEPTH, 16), _LARGEST, np.int8)
    constants = {"scale": np.float32(1.0), "zero": np.int8(0), "codes": codes}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["a"]),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["w"]),
        helper.make_node("MatMul", ["a", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "saturation",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, _DEPTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 8, 16])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())
