"""The export stage: writes model.onnx, model_fp32.onnx and scales.json into a run directory."""

from __future__ import annotations

from pathlib import Path

from rich.progress import Progress

from ospq_export import artifact
from ospq_export.errors import InputError
from ospq_export.export.lower import lower, probe_names
from ospq_export.export.onnx_file import write_onnx
from ospq_export.export.scales import describe_scales
from ospq_export.progress import stepper
from ospq_export.run import Run

QUANTIZED_ONNX, FLOAT_ONNX, SCALES = "model.onnx", "model_fp32.onnx", "scales.json"


def export(path: Path, *, batch_size: int | None = None, progress: Progress | None = None) -> Run:
    """Write the deployable files of a calibrated run; existing ones are replaced.

    Args:
        path: the run directory.
        batch_size: a fixed batch size, or None for a dynamic batch.
        progress: where to show a progress bar.

    Returns:
        The run with the new files in its manifest.

    Raises:
        InputError: the run directory is damaged, or the network cannot be written as ONNX.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"a batch of {batch_size} images", where="--batch-size", mend="give 1 or more")
    run = Run.open(path)
    advance = stepper(progress, "export", 3)
    size, metadata = run.manifest.data.input_size, _metadata(run)
    network = run.quantized_graph()
    probes = probe_names(network, run.slices())
    write_onnx(
        lower(network, probes),
        path / QUANTIZED_ONNX,
        input_size=size,
        batch_size=batch_size,
        metadata=metadata,
        probes=list(probes.values()),
    )
    advance()
    baseline = {**metadata, "weight_bits": "32", "activation_bits": "32"}
    write_onnx(run.captured(), path / FLOAT_ONNX, input_size=size, batch_size=batch_size, metadata=baseline)
    advance()
    artifact.write_json(path / SCALES, describe_scales(run.manifest, network))
    run.manifest = artifact.record_files(path, run.manifest, QUANTIZED_ONNX, FLOAT_ONNX, SCALES)
    advance()
    return run


def _metadata(run: Run) -> dict[str, str]:
    manifest, data = run.manifest, run.manifest.data
    return {
        "producer": f"ospq-export {manifest.versions['ospq-export']}",
        "model": manifest.model.name,
        "recipe": manifest.recipe.name,
        "weight_bits": str(manifest.recipe.weight_bits),
        "activation_bits": str(manifest.recipe.activation_bits),
        "first_last_bits": str(manifest.recipe.first_last_bits),
        "graph_fingerprint": manifest.graph_fingerprint,
        "quantized_sha256": manifest.files[artifact.QUANTIZED_TENSORS],
        "preprocessing": data.model_dump_json(),
    }
