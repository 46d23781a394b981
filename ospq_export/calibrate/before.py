"""What is checked before anything is computed: the folder, the batch, the processes, and the run that is to be continued."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from torch import fx

from ospq_export.calibrate.lock import LOCK
from ospq_export.errors import InputError
from ospq_export.recipes import Recipe
from ospq_export.runs.files import FLOAT_TENSORS, MANIFEST, is_temporary, sha256
from ospq_export.runs.manifest import Manifest, check_files, differences, read_manifest
from ospq_export.runs.tensors import write_tensors

log = logging.getLogger(__name__)


def check_output_folder(out: Path) -> None:
    """Refuse a folder that holds anything but an interrupted calibration.

    Raises:
        InputError: `out` is a file, a finished run, or a folder with other content.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError("the output is not a folder", where=out, fix="choose another `out`")
    if all(path.name == LOCK or is_temporary(path) for path in out.iterdir()):
        return
    if not (out / MANIFEST).is_file():
        raise InputError("the output folder is not empty", where=out, fix="choose another `out`")
    if read_manifest(out).status == "calibrated":
        raise InputError(
            "the output folder already holds a finished run", where=out, fix="choose another `out`"
        )


def check_batch(recipe: Recipe, images: int) -> None:
    """Hold the number of images to the recipe's batch.

    Raises:
        InputError: there are too few.
    """
    settings = recipe.reconstruction
    if settings.iterations > 0 and images < settings.batch_size:
        raise InputError(
            f"{images} calibration images are fewer than a batch of {settings.batch_size}",
            where="`data`",
            fix=f"give more images, or `overrides` reconstruction.batch_size={images}",
        )


def check_processes(recipe: Recipe) -> None:
    """Hold the recipe's batch to the number of processes.

    Raises:
        InputError: they cannot share it evenly.
    """
    size, batch = int(os.environ.get("WORLD_SIZE", "1")), recipe.reconstruction.batch_size
    if batch % size:
        raise InputError(
            f"a batch of {batch} images cannot be shared evenly by {size} processes",
            where="reconstruction.batch_size",
            fix=f"`overrides` reconstruction.batch_size={max(1, batch // size) * size}",
        )


def check_same(out: Path, found: Manifest, manifest: Manifest, captured: fx.GraphModule) -> None:
    """Hold an interrupted run to the one that is about to continue it.

    Args:
        out: the run directory.
        found: its manifest.
        manifest: what this run would have written at its start.
        captured: the float network.

    Raises:
        InputError: they differ.
    """
    check_files(out, found)
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder) / FLOAT_TENSORS
        write_tensors(probe, dict(captured.named_buffers()))
        files = {FLOAT_TENSORS: sha256(probe)}
    theirs, mine = found.identity(), manifest.model_copy(update={"files": files}).identity()
    changed = [key for key in mine if mine[key] != theirs[key]]
    if changed:
        what = "; ".join(differences(theirs, mine))
        raise InputError(
            f"the interrupted run there was made with another {', '.join(changed)} ({what})",
            where=out,
            fix="repeat the very same command to resume, or choose another `out`",
        )
    before, now = found.calibration.threads, manifest.calibration.threads
    if before not in (None, now):
        log.warning(
            "the run was begun with %d threads and goes on with %d: the last digits of its sums differ from those of a "
            "run that is not interrupted; `threads` %d avoids it",
            before,
            now,
            before,
        )
