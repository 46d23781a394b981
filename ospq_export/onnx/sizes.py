"""How large ONNX files get, and how large they may be."""

from __future__ import annotations

from ospq_export.runs.files import FLOAT_ONNX, FLOAT_TENSORS, QUANTIZED_ONNX, QUANTIZED_TENSORS
from ospq_export.world.room import gigabytes

# What protobuf allows one message to have, less room for those who read a file and write it again with more in it: the shapes of
# all inner tensors, more outputs, another graph of the same weights.
ONNX_BYTES = (1 << 31) - 1 - (1 << 26)


def files_summary(weights: int, quantized: int, most: int) -> str:
    """One line for people: what the files of a run and of its export will weigh.

    Args:
        weights: bytes of the float constants.
        quantized: bytes of the same where the quantized weights are codes of one byte.
        most: bytes that one ONNX file holds; more lies beside it.
    """
    exported = [
        f"{name} {gigabytes(size)}{' (its weights in a file beside it)' if size > most else ''}"
        for name, size in ((QUANTIZED_ONNX, quantized), (FLOAT_ONNX, weights))
    ]
    kept = f"{FLOAT_TENSORS} {gigabytes(weights)}, {QUANTIZED_TENSORS} {gigabytes(quantized)}"
    return f"files: {kept}; of an export: {', '.join(exported)}"
