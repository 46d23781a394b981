"""All files of an export or none: they are written beside the run's own, and take their place together."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ospq_export.errors import InputError

_PREFIX, _SUFFIX = ".export.", ".tmp"


@contextlib.contextmanager
def staging(run: Path) -> Iterator[Path]:
    """An empty folder inside a run directory, which is removed at the end; what a killed process left is removed first.

    Raises:
        InputError: the run directory cannot be written to.
    """
    for left in run.glob(f"{_PREFIX}*{_SUFFIX}"):
        shutil.rmtree(left, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=run))
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror or error}",
            where=run,
            fix="free some space, or copy the run",
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def take(folder: Path, run: Path, *, stale: Sequence[str]) -> None:
    """Move finished files to their places.

    Args:
        folder: where they are.
        run: where they go.
        stale: names of files that go where `folder` has no new one.
    """
    for name in stale:
        if not (folder / name).exists():
            (run / name).unlink(missing_ok=True)
    for path in sorted(folder.iterdir()):
        path.replace(run / path.name)
