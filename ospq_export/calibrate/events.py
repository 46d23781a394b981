"""What happens in a calibration, as JSON lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ospq_export.errors import InputError
from ospq_export.runs.files import json_line

Events = Callable[[str, dict[str, Any]], None]
"""Called with what happened, "cost", "slice", "done", and its facts."""


def no_events(_event: str, _facts: dict[str, Any]) -> None:
    """For calibrations that nobody listens to."""


def json_lines(target: str) -> Events:
    """Appends a line per event, {"event": ..., "time": seconds since 1970, ...}, to a file, or to standard error for "-".

    Each line is written as a whole and at once, so that a reader never sees a part of one.

    Raises:
        InputError: the file cannot be written.
    """

    def write(event: str, facts: dict[str, Any]) -> None:
        line = json_line({"event": event, "time": round(time.time(), 3), **facts})
        if target == "-":
            sys.stderr.write(line)
            return
        try:
            with Path(target).open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise InputError(
                f"cannot be written: {error.strerror or error}",
                where=target,
                fix="choose another `log_json`",
            ) from error

    return write
