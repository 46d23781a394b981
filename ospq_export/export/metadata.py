"""What files say of themselves and of a run: metadata of an ONNX model, and scales.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ospq_export.graph.quantizers import QuantizedGraph
from ospq_export.runs.files import QUANTIZED_TENSORS
from ospq_export.runs.manifest import SCHEMA_VERSION, Manifest
from ospq_export.runs.run import Run


def quantized_metadata(run: Run) -> dict[str, str]:
    """Of a file of the quantized network: bits, slices, and the digest of the codes that it holds."""
    manifest = run.manifest
    bits = {record.name: record.format["bits"] for record in manifest.quantizers}
    return {
        **_common_metadata(run),
        **manifest.recipe.named_formats(),
        "bits": json.dumps(bits),
        "slicing": json.dumps([s.name for s in manifest.slices]),
        "quantized_sha256": manifest.files[QUANTIZED_TENSORS],
    }


def float_metadata(run: Run) -> dict[str, str]:
    """Of a file of the float network."""
    return {**_common_metadata(run), "weight_bits": "32", "activation_bits": "32"}


def identity(run: Run) -> dict[str, str]:
    """What tells a run from others, for what leaves its directory."""
    manifest = run.manifest
    return {
        "run": run.path.resolve().name,
        "model": manifest.model.name,
        "recipe": manifest.recipe.name,
        "formats": manifest.recipe.summary(),
        "task": manifest.task,
        "quantized_sha256": manifest.files[QUANTIZED_TENSORS],
    }


def _common_metadata(run: Run) -> dict[str, str]:
    manifest = run.manifest
    classes: Sequence[str] = sorted(manifest.class_to_idx, key=manifest.class_to_idx.__getitem__)
    return {
        "producer": f"ospq-export {manifest.versions['ospq-export']}",
        "model": manifest.model.name,
        "recipe": manifest.recipe.name,
        "graph_fingerprint": manifest.graph_fingerprint,
        "preprocessing": manifest.data.model_dump_json(),
        **({"size_range": manifest.size_range.model_dump_json()} if manifest.size_range else {}),
        **({"classes": json.dumps(classes)} if classes else {}),
        **({"classes_source": manifest.classes_source} if manifest.classes_source else {}),
    }


def describe_scales(manifest: Manifest, network: QuantizedGraph) -> dict[str, Any]:
    """Per slice, per quantizer: bits, grid, levels, scale (a list per output channel for weights), offset, axis.

    Scales are in the units of the tensor and exact: a float32 has a shortest decimal form that reads back to the same bits.
    """
    slices: list[dict[str, Any]] = [
        {"index": s.index, "name": s.name, "start": s.start, "end": s.end, "quantizers": []}
        for s in manifest.slices
    ]
    for record in manifest.quantizers:
        entry: dict[str, Any] = record.model_dump(mode="json", exclude={"slice", "format"}) | record.format
        if record.kind == "weight":
            weight = network.weights[record.name]
            entry["scale"] = weight.scale.tolist()
            if weight.tensor_scale is not None:
                entry["tensor_scale"] = float(weight.tensor_scale)
        else:
            quantizer = network.activations[record.name]
            entry["scale"], entry["offset"] = float(quantizer.scale), float(quantizer.offset)
        entry["zero_point"] = 0
        slices[record.slice]["quantizers"].append(entry)
    return {
        "schema_version": SCHEMA_VERSION,
        "model": manifest.model.name,
        "recipe": manifest.recipe.name,
        "slices": slices,
    }
