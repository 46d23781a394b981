"""What a file says of itself: key-value pairs in the ONNX model's metadata."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ospq_export.runs.files import QUANTIZED_TENSORS
from ospq_export.runs.run import Run


def quantized_metadata(run: Run) -> dict[str, str]:
    """Of a file of the quantized network: bits, slices, and the digest of the codes that it holds."""
    manifest = run.manifest
    bits = {record.name: record.format["bits"] for record in manifest.quantizers}
    return {
        **_common_metadata(run),
        "weight_bits": str(manifest.recipe.weight_bits),
        "activation_bits": str(manifest.recipe.activation_bits),
        "first_last_bits": str(manifest.recipe.first_last_bits),
        "bits": json.dumps(bits),
        "slicing": json.dumps([s.name for s in manifest.slices]),
        "quantized_sha256": manifest.files[QUANTIZED_TENSORS],
    }


def float_metadata(run: Run) -> dict[str, str]:
    """Of a file of the float network."""
    return {**_common_metadata(run), "weight_bits": "32", "activation_bits": "32"}


def _common_metadata(run: Run) -> dict[str, str]:
    manifest = run.manifest
    classes: Sequence[str] = sorted(manifest.class_to_idx, key=manifest.class_to_idx.__getitem__)
    return {
        "producer": f"ospq-export {manifest.versions['ospq-export']}",
        "model": manifest.model.name,
        "recipe": manifest.recipe.name,
        "graph_fingerprint": manifest.graph_fingerprint,
        "preprocessing": manifest.data.model_dump_json(),
        **({"classes": json.dumps(classes)} if classes else {}),
        **({"classes_source": manifest.classes_source} if manifest.classes_source else {}),
    }
