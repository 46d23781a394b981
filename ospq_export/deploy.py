"""What leaves a run directory for where the network will run, and what comes back from there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

    from ospq_export.data import ImageSet, StreamSet
    from ospq_export.data.tensors import TensorSet
    from ospq_export.runs.run import Run
    from ospq_export.validate.report.model import Report

# So many images without a flip show, with 95 % confidence, that fewer than 1 % flip; 256 would show nothing.
BUNDLE_IMAGES = 320


def serve(run: Run, repository: Path, name: str | None = None, *, overwrite: bool = False) -> Path:
    """Write an exported network into a model repository of Triton.

    Args:
        run: exported.
        repository: a folder, made if need be.
        name: of the model; None takes the run directory's.
        overwrite: whether a model of that name may be replaced.

    Returns:
        The model's folder.

    Raises:
        InputError: see `export.triton.write_model`.
    """
    from ospq_export.export.triton import model_name, write_model

    found = model_name(run, name)
    write_model(run, repository, found, overwrite=overwrite)
    return repository / found


def bundle(
    run: Run,
    out: Path,
    images: ImageSet | StreamSet | TensorSet,
    *,
    count: int = BUNDLE_IMAGES,
    overwrite: bool = False,
    device: str = "cpu",
    workers: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Pack an exported network with images and reference outputs for a check on the device that will run it.

    Args:
        run: exported.
        out: a zip archive.
        images: that the calibration has not seen.
        count: how many of them are packed.
        overwrite: whether the file may be replaced.
        device: torch device of the references.
        workers: processes that decode.
        progress: where to show a progress bar.

    Raises:
        InputError: see `export.bundle.write_bundle` and `validate.references.gather`.
    """
    from ospq_export.export.bundle import Contents, check_bundle, device_files, write_bundle
    from ospq_export.validate.references import gather

    check_bundle(run, out, count, overwrite=overwrite)
    device_files(run)
    found = gather(run, images, count, device=device, workers=workers, progress=progress)
    contents = Contents(found.images, found.labels, found.outputs, found.facts)
    write_bundle(run, out, contents, overwrite=overwrite)
    return out


def report_device(run: Run, result: Path, *, documents: bool = True, **settings: Any) -> Report:
    """Judge what a bundle's script found on a device.

    Args:
        run: what the bundle was made of.
        result: the JSON file that the script wrote.
        documents: whether report.md and report.html are written beside report.json.
        settings: of `validate.device.report_device`: thresholds, decision_threshold, provenance.

    Raises:
        InputError: see `validate.device.report_device`.
    """
    from ospq_export.data.tensors import TensorSet
    from ospq_export.validate import device as stage
    from ospq_export.validate import write_documents

    report = stage.report_device(run, result, **settings)
    if documents:
        write_documents(run, report, TensorSet((), run.data))
    return report
