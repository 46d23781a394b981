"""One cell of a sweep: calibrate, export, validate, through the Python API, going on wherever an earlier try ended."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from ospq_export.api import Run, Session
from ospq_export.calibrate.checks import check_batch
from ospq_export.data import ImageSet, StreamSet, image_set, open_source, resolve_data_config
from ospq_export.demo import demo_data_overrides, demo_images, demo_spec
from ospq_export.errors import InputError, reason_of
from ospq_export.models.sources import check_input, create_model
from ospq_export.models.timm import for_size
from ospq_export.runs.files import MANIFEST, SCALES
from ospq_export.runs.manifest import read_manifest
from ospq_export.sweep.cells import Cell, choice_of, spec_of
from ospq_export.sweep.outcome import LOGS, RUNS, Outcome, outcome_of, read_outcome, write_outcome
from ospq_export.sweep.plan import Model
from ospq_export.world.threads import use_threads

log = logging.getLogger(__name__)
# A process whose driver or node is gone lives on for a while.
_PATIENCE = 300
_PREPROCESSING = ("input_size", "mean", "std", "crop_pct", "interpolation", "exif")


def run_cell(cell: Cell, out: Path, session: Session, threads: int) -> Outcome:
    """Compute one cell, or what is left of it.

    Args:
        cell: of the sweep's plan.
        out: folder of the sweep; every node that runs cells sees it under this name.
        session: device, seed and so on.
        threads: that compute.

    Returns:
        What the tables need; a failure is an outcome like any other, with its reason.
    """
    with _logged(out / LOGS / f"{cell.name}.log"):
        log.info("process %d on %s", os.getpid(), platform.node())
        try:
            use_threads(threads)
            with _alone(out / RUNS / f".{cell.name}.lock"):
                # Whoever held the folder until now may have finished.
                return read_outcome(out, cell.name) or _computed(cell, out, session)
        except Exception as error:
            log.exception("%s failed", cell.name)
            reason = (
                str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {reason_of(error)}"
            )
            return Outcome(name=cell.name, status="failed", reason=reason)


def _computed(cell: Cell, out: Path, session: Session) -> Outcome:
    started = time.monotonic()
    folder = out / RUNS / cell.name
    finished = (folder / MANIFEST).is_file() and read_manifest(folder).status == "calibrated"
    run = Run.open(folder) if finished else _calibrated(cell, folder, session)
    if SCALES not in run.manifest.files:
        # Files without a mention in the manifest are what an interrupted export left.
        run.export(fp16=cell.fp16, overwrite=True)
    report = run.validate(
        _validation_images(cell.network, run),
        session=session,
        documents=cell.validation.pages,
        float_type="fp16" if cell.fp16 else "fp32",
        **{
            key: getattr(cell.validation, key) for key in type(cell.validation).model_fields if key != "pages"
        },
    )
    outcome = outcome_of(cell.name, run, report, time.monotonic() - started)
    write_outcome(out, outcome)
    return outcome


def _calibrated(cell: Cell, folder: Path, session: Session) -> Run:
    """The run, calibrated as the command line does it."""
    given, recipe = cell.network, cell.settings
    settings = {key: getattr(given, key) for key in _PREPROCESSING}
    if given.demo is not None:
        spec, settings = demo_spec(given.demo), demo_data_overrides()
    else:
        spec = for_size(spec_of(given), given.input_size)
    torch.manual_seed(cell.seed)
    network = create_model(spec)
    config = resolve_data_config(network, spec, settings)
    outputs = check_input(network, spec, config.input_size)
    images: ImageSet | StreamSet
    if given.demo is not None:
        images = demo_images("calibration", config)
    else:
        choice = choice_of(given)
        found = open_source(str(given.calibration), choice)
        known = outputs if given.task in (None, "classify") else None
        images = image_set(found, config, choice, known, needed=False)
    check_batch(recipe, images.at_most(recipe.calibration_images))
    return Run.calibrate(
        network,
        images,
        recipe,
        folder,
        task=given.task,
        outputs=given.outputs,
        size_range=given.size_range,
        name=spec,
        session=session,
    )


def _validation_images(network: Model, run: Run) -> ImageSet | StreamSet:
    from ospq_export.validate.preflight import images_of

    if network.demo is not None:
        return demo_images("test", run.data)
    return images_of(run, str(network.validation), choice_of(network), exif=bool(network.exif))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a cell; what an earlier try left running is waited for.

    Raises:
        InputError: it does not end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=_PATIENCE)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError("another process is computing this run", where=path, fix="wait for it") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Everything that is logged, appended to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    ours = logging.getLogger("ospq_export")
    level = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.setLevel(level)
        ours.removeHandler(handler)
        handler.close()
