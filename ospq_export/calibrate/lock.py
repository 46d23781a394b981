"""One process per run directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from ospq_export.errors import InputError

LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run directory, which is made if need be, and goes again where nothing was written into it.

    The operating system gives the lock up when its holder dies, however it dies: a lock file that is left over holds nobody.

    Raises:
        InputError: another process holds it, or the folder cannot be made.
    """
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            "another process is calibrating into this folder",
            where=folder,
            fix="wait for it, or choose another `out`",
        ) from error
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror or error}", where=folder, fix="choose another folder"
        ) from error
    try:
        yield
    finally:
        # Removed while it is still held: who opens the name afterwards makes a lock of its own.
        (folder / LOCK).unlink(missing_ok=True)
        lock.release()
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
