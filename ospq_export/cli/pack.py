"""`ospq-export export --triton` and `--bundle`: what leaves a run; checked before the export, written after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ospq_export.cli.options import say
from ospq_export.deploy import BUNDLE_IMAGES
from ospq_export.errors import InputError
from ospq_export.runs.files import QUANTIZED_ONNX

if TYPE_CHECKING:
    from ospq_export.data import ImageSet, StreamSet
    from ospq_export.runs.run import Run


@dataclass(frozen=True)
class Packing:
    """What is to be packed once the run is exported.

    Attributes:
        exported: whether the run has been exported already; then nothing has to be written but what is packed.
        writers: what packs, of the exported run.
    """

    exported: bool
    path: Path
    writers: tuple[Callable[[Run], None], ...]

    def __bool__(self) -> bool:
        return bool(self.writers)

    def write(self) -> None:
        """Pack; nothing where nothing is asked for."""
        if self.writers:
            from ospq_export.runs.run import Run

            run = Run.open(self.path)
            for writer in self.writers:
                writer(run)


def packing(
    path: Path,
    *,
    triton: Path | None,
    triton_model: str | None,
    bundle: Path | None,
    data: str | None,
    images: int | None,
    overwrite: bool,
    quiet: bool,
) -> Packing:
    """What the options ask for, held to what can be known before anything is exported.

    Raises:
        InputError: an option misses another one, or a repository, a bundle or the images cannot be used.
    """
    _together(triton=triton, triton_model=triton_model, bundle=bundle, data=data, images=images)
    if triton is None and bundle is None:
        return Packing(False, path, ())
    from ospq_export.runs.run import Run

    run, writers = Run.open(path), []
    if triton is not None:
        writers.append(_triton(run, triton, triton_model, overwrite))
    if bundle is not None and data is not None:
        writers.append(_bundle(run, bundle, data, images or BUNDLE_IMAGES, overwrite, quiet))
    return Packing(QUANTIZED_ONNX in run.manifest.files, path, tuple(writers))


def _together(
    *,
    triton: Path | None,
    triton_model: str | None,
    bundle: Path | None,
    data: str | None,
    images: int | None,
) -> None:
    if triton_model is not None and triton is None:
        raise InputError("only a model repository has it", where="--triton-model", fix="give --triton")
    alone = [name for name, value in (("--data", data), ("--bundle-images", images)) if value is not None]
    if bundle is None and alone:
        raise InputError("only a bundle holds images", where=", ".join(alone), fix="give --bundle")
    if bundle is not None and data is None:
        raise InputError("a bundle holds images", where="--bundle", fix="give --data")


def _triton(run: Run, repository: Path, name: str | None, overwrite: bool) -> Callable[[Run], None]:
    from ospq_export.deploy import serve
    from ospq_export.export.triton import check_repository, model_name

    check_repository(run, repository, model_name(run, name), overwrite=overwrite)

    def write(run: Run) -> None:
        say(f"wrote the model {serve(run, repository, name, overwrite=overwrite)}")

    return write


def _bundle(
    run: Run, out: Path, data: str, count: int, overwrite: bool, quiet: bool
) -> Callable[[Run], None]:
    from ospq_export.data import ClassChoice
    from ospq_export.deploy import bundle
    from ospq_export.export.bundle import check_bundle
    from ospq_export.progress import stage_progress
    from ospq_export.validate.preflight import images_of

    check_bundle(run, out, count, overwrite=overwrite)
    images: ImageSet | StreamSet = images_of(run, data, ClassChoice(), needed=False)

    def write(run: Run) -> None:
        with stage_progress(disable=quiet) as progress:
            bundle(run, out, images, count=count, overwrite=overwrite, progress=progress)
        say(f"wrote {out}: unpack it on the device, and run `python3 check.pyz` there")

    return write
