"""What can be known before the work starts: room on the disk, memory, folders that cannot be written.

A run is refused only where it is certain to fail; where it is likely to, a warning says so.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from ospq_export.errors import InputError

log = logging.getLogger(__name__)

# Files that will be written are counted with this share of their estimate where that decides on a refusal.
CERTAIN = 0.8


def gigabytes(amount: float) -> str:
    """Bytes for people, "0.6 GB"; small amounts keep two digits."""
    return f"{amount / 1e9:.1f} GB" if amount >= 1e8 else f"{amount / 1e9:.2g} GB"


def nearest_folder(path: Path) -> Path:
    """The path itself where it exists, or the nearest folder above it that does."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def free_disk(path: Path) -> int:
    """Bytes that may be written to the file system on which a path lies or will lie."""
    return shutil.disk_usage(nearest_folder(path)).free


def check_disk(where: Path, what: str, *, certain: int, likely: int, free: int | None = None) -> None:
    """Hold what will be written to what there is room for.

    Args:
        where: the folder that is written to; it need not exist.
        what: what is written there, as a plural.
        certain: bytes that are needed at the least.
        likely: bytes that are expected.
        free: bytes there are; None asks the file system.

    Raises:
        InputError: there is not even room for `certain`.
    """
    there = free_disk(where) if free is None else free
    fix = "free some space, or choose another folder"
    _hold(what, certain, likely, there, ("disk", "are free", f" in {where}"), where, fix)


def check_memory(
    what: str, *, certain: int, likely: int, fix: str, where: str | None = None, available: int | None = None
) -> None:
    """The same for memory.

    Args:
        what: what is held, as a plural.
        certain: bytes that are needed at the least.
        likely: bytes that are expected.
        fix: what to do about it.
        where: the setting to blame.
        available: bytes there are; None asks the system.

    Raises:
        InputError: not even `certain` is available.
    """
    from ospq_export.world.memory import available_memory

    there = available_memory() if available is None else available
    _hold(what, certain, likely, there, ("memory", "are available", ""), where, fix)


def _hold(
    what: str, certain: int, likely: int, there: int, words: tuple[str, str, str], where: object, fix: str
) -> None:
    kind, state, place = words
    left = f"{gigabytes(there)} {state}"
    if certain > there:
        said = f"{what} take at least {gigabytes(certain)} of {kind}, {left}"
        raise InputError(said, where=where, fix=fix)
    if likely > there:
        log.warning("%s take about %s of %s, %s%s: %s", what, gigabytes(likely), kind, left, place, fix)


def check_folder(path: Path, option: str) -> None:
    """Hold a folder that will be made or written to what its place allows.

    Raises:
        InputError: something above it is a file, or does not let it be written.
    """
    found = nearest_folder(path)
    if not found.is_dir():
        raise _refused(f"{found} is not a folder", path, option)
    if not os.access(found, os.W_OK | os.X_OK):
        raise _refused(f"{found} cannot be written to", path, option)


def check_file(path: Path, option: str) -> None:
    """Hold a file that will be written to what its place allows; its folder has to exist.

    Raises:
        InputError: it cannot be written.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise _refused("cannot be written: it is a folder", path, option)
    if not folder.is_dir():
        raise _refused(f"cannot be written: there is no folder {folder}", path, option)
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise _refused("cannot be written: permission denied", path, option)


def _refused(what: str, path: Path, option: str) -> InputError:
    return InputError(what, where=f"{option} {path}", fix=f"choose another {option}")


def check_apart(out: Path, data: Path) -> None:
    """Keep results out of the folder of images: the next run would take them for a class.

    Raises:
        InputError: one lies in the other.
    """
    result, images = out.resolve(), data.resolve()
    if result == images or images in result.parents:
        raise _refused("the run directory would lie among the images", out, "`out`")


def check_calibration(out: Path, weights: int | None) -> None:
    """Room for a run directory, and for the network in memory.

    Args:
        out: the run directory; what an interrupted calibration left there counts as written.
        weights: float32 bytes of the parameters; None where they are not known yet.

    Raises:
        InputError: there is none.
    """
    if weights is None:
        return
    there = sum(f.stat().st_size for f in out.iterdir() if f.is_file()) if out.is_dir() else 0
    # The float weights, then their codes: one byte each.
    files = weights + weights // 4
    left = max(0, files - there)
    # Each slice's codes, once more, until the calibration is finished; then model_fp32.onnx and model.onnx.
    likely = left + weights // 4 + files
    what = f"the run's files, {gigabytes(files)}, and those of a later export"
    check_disk(out, what, certain=int(CERTAIN * left), likely=likely)
    # Built, captured, and copied when they are written.
    fix = "use a machine with more memory"
    check_memory("the network's weights", certain=weights, likely=3 * weights, fix=fix)


def check_images(
    count: int,
    size: tuple[int, int, int],
    budget: int | None,
    batch_size: int,
    *,
    available: int | None = None,
) -> None:
    """Memory for the calibration images, which are all decoded at once.

    Args:
        count: how many.
        size: channels, height and width in pixels.
        budget: bytes of host memory for activations, or None.
        batch_size: of the reconstruction.
        available: bytes there are; None asks the system.

    Raises:
        InputError: they do not fit, or the budget cannot hold one batch of images alone.
    """
    image = 4 * size[0] * size[1] * size[2]
    check_memory(
        f"{count:,} calibration images of {'x'.join(map(str, size))}",
        certain=count * image,
        likely=count * image,
        where="`data`",
        fix="`overrides` calibration_images=N with a smaller N",
        available=available,
    )
    # A slice's data is the images for the float and for the quantized network, and its output: `cost.check_budget`.
    least = 2 * batch_size * image
    if budget is not None and budget < least:
        raise InputError(
            f"one batch of {batch_size} images takes {least / 1e6:.1f} MB, the budget is {budget / 1e6:.1f} MB",
            where="`memory_budget`",
            fix="give a larger budget, or lower reconstruction.batch_size",
        )
