"""Lists of image files: CSV, TSV or text, a path and perhaps a label on each line."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ospq_export.data.found import Found, natural_places, read_labels, refuse_twice, text_of
from ospq_export.data.sources import FolderSource
from ospq_export.errors import InputError, listed

ENDINGS = (".csv", ".tsv", ".txt")
_FORM = "write path or path,label on each line"
_HEADINGS = (["path"], ["path", "label"], ["path", "mask"])


def open_list(path: Path) -> Found:
    """The images that a list names.

    Args:
        path: The list. Paths in it are relative to its folder. A label is a class name or a whole number; below the heading
            `path,mask` it is the path of a picture with a class index in each pixel.

    Raises:
        InputError: It cannot be read, names nothing, a file twice or one that is not there, or see `read_labels`.
    """
    heading, rows = _rows(path)
    if not rows:
        raise InputError("this list names no image", where=path, fix=_FORM)
    names = [PurePosixPath(row[0].strip()).as_posix() for row in rows]
    refuse_twice(names, path)
    order = natural_places(names)
    names, rows = [names[place] for place in order], [rows[place] for place in order]
    files = _files(path, names)
    ids = [text_of(name) for name in names]
    seconds = [row[1] if len(row) > 1 else "" for row in rows]
    masks = _masks(path, seconds) if heading == ["path", "mask"] else None
    return Found(
        path,
        ids,
        lambda labels: FolderSource(files, labels, ids, masks),
        read_labels([] if masks else seconds, path),
    )


def _rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """The heading, in small letters, empty where there is none; and the other lines that are not empty, of 1 or 2 columns."""
    try:
        with path.open(encoding="utf-8-sig", errors="strict", newline="") as file:
            text = file.read()
    except OSError as error:
        raise InputError(
            f"cannot read this list: {error.strerror}", where=path, fix="give another"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError("this list is not UTF-8 text", where=path, fix="save it as UTF-8") from error
    tabs = path.suffix.lower() == ".tsv" or (path.suffix.lower() == ".txt" and "\t" in text)
    lines = list(csv.reader(text.splitlines(), delimiter="\t" if tabs else ","))
    rows = [row for row in lines if any(cell.strip() for cell in row)]
    first = [cell.strip().casefold() for cell in rows[0]] if rows else []
    heading = first if first in _HEADINGS else []
    rows = rows[1:] if heading else rows
    for row in rows:
        if len(row) > 2 or not row[0].strip():
            place = lines.index(row) + 1
            raise InputError(
                f"line {place} is no path with a label: {','.join(row)[:60]}", where=path, fix=_FORM
            )
    return heading, rows


def _files(path: Path, names: Sequence[str]) -> list[Path]:
    """Paths of files that are there."""
    files = [path.parent / name for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if not file.is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(names)} files are not there: {listed(missing)}",
            where=path,
            fix=f"write paths as they are below {path.parent}",
        )
    return files


def _masks(path: Path, names: Sequence[str]) -> list[Path]:
    if not all(name.strip() for name in names):
        raise InputError("an image has no mask", where=path, fix="name a mask for every image, or for none")
    return _files(path, [name.strip() for name in names])
