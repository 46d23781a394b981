"""What can be known before a network is built or an image is decoded: names, devices, files, memory."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ospq_export.data import ClassChoice, Classes, ImageSet, StreamSet, image_set, open_source
from ospq_export.errors import InputError
from ospq_export.models.timm import torch_device
from ospq_export.runs.files import QUANTIZED_ONNX
from ospq_export.validate.executions.backends import check_provider
from ospq_export.validate.executions.chosen import named_executions
from ospq_export.validate.executions.engines import check_engine
from ospq_export.validate.executions.inside import check_inside
from ospq_export.validate.executions.openvino import check_openvino
from ospq_export.validate.executions.table import TABLE, TRITON, Runtime, not_here
from ospq_export.validate.executions.triton import Server, check_server
from ospq_export.world.room import check_folder, check_memory

if TYPE_CHECKING:
    from ospq_export.runs.run import Run

log = logging.getLogger(__name__)


def images_of(
    run: Run, data: str | Path, choice: ClassChoice, *, exif: bool = False, needed: bool = True
) -> ImageSet | StreamSet:
    """Validation images, prepared as the run says, with the run's classes where it knows them.

    Args:
        run: its manifest says how.
        data: whatever `data.open_source` opens.
        choice: what is said of the classes.
        exif: whether they are turned as EXIF says even where those of the calibration were not.
        needed: whether labels are needed.

    Raises:
        InputError: there are no images, or their classes are not the run's.
    """
    manifest = run.manifest
    if manifest.class_from == "path":
        choice = dataclasses.replace(choice, level=choice.level or "path")
    known = Classes(manifest.class_to_idx, manifest.classes_source)
    config = run.data
    if exif and not config.exif:
        log.warning("images are turned as EXIF says, those of the calibration were not")
        config = config.model_copy(update={"exif": True})
    return image_set(open_source(data, choice), config, choice, manifest.outputs, known, needed=needed)


def check_request(
    run: Run,
    names: Sequence[str] | None,
    device: str,
    baseline: Run | None,
    server: Server | None = None,
    *,
    engine_debug: bool = False,
) -> None:
    """Hold what is asked for to what there is.

    Args:
        run: what is validated; its folder takes the report.
        names: executions that were asked for by name; None where the machine's own are taken.
        device: torch device.
        baseline: another run, or None.
        server: where a model is served, or None.
        engine_debug: whether engines are looked into.

    Raises:
        InputError: an unknown or unavailable execution, none that is deployed, a device that does not work, a run that is not
            exported, or a folder that does not take the report.
    """
    check_folder(run.path, "RUN")
    torch_device(device)
    named = named_executions(names, "fp32")
    if engine_debug:
        check_inside(named)
    if baseline is not None:
        baseline.file(QUANTIZED_ONNX)
    if server is not None and TRITON not in (names or ()):
        raise InputError("nothing asks the server", where="`url`", fix=f"add `backends` {TRITON}")
    for execution in (TABLE[name] for name in names or ()):
        if execution.runtime is Runtime.SERVER:
            check_server(run, server)
        elif execution.runtime is Runtime.RECORD:
            raise not_here(execution.name)
        elif execution.runtime is Runtime.ENGINE:
            check_engine(execution.name, run.path)
        elif execution.runtime is Runtime.OPENVINO:
            check_openvino(run, str(execution.file))
        elif execution.file is not None:
            run.file(execution.file)
            check_provider(execution.provider_on(device))


def check_batch_memory(
    images: int, batch_size: int, size: tuple[int, int, int], available: int | None = None
) -> None:
    """Hold a batch of decoded images to the memory there is.

    Args:
        images: how many there are.
        batch_size: images per forward pass.
        size: channels, height and width in pixels.
        available: bytes there are; None asks the system.

    Raises:
        InputError: a batch does not fit.
    """
    count = min(images, batch_size)
    needed = 4 * count * size[0] * size[1] * size[2]
    check_memory(
        f"{count:,} images of {'x'.join(map(str, size))}",
        certain=needed,
        likely=needed,
        where="`batch_size`",
        fix="give a smaller one",
        available=available,
    )
