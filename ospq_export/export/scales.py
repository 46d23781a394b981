"""scales.json: every quantizer of a run in readable form."""

from __future__ import annotations

from typing import Any

from ospq_export.graph.quantizers import QuantizedGraph
from ospq_export.runs.manifest import SCHEMA_VERSION, Manifest


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
            entry["scale"] = network.weights[record.name].scale.tolist()
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
