"""The one way in: from what the user gives as images to what was found there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from glob import glob, has_magic
from itertools import product
from pathlib import Path

from ospq_export.data import arrays, huggingface, lists, parquet, pipes
from ospq_export.data.choice import ClassChoice, Classes
from ospq_export.data.columns import load_package
from ospq_export.data.config import DataConfig
from ospq_export.data.folders import ending, is_hidden, scan_folder
from ospq_export.data.found import Found, found_in, natural_places
from ospq_export.data.images import ImageSet
from ospq_export.data.labels import find_classes
from ospq_export.data.pixels import picture_extensions
from ospq_export.data.streams import Stream, StreamSet, stream_classes
from ospq_export.data.tar import open_shards
from ospq_export.errors import InputError

TAR = (".tar",)
_KINDS = "give a folder of images, a list (.csv, .tsv, .txt), .tar files, Parquet files, .npz or .npy, or hfds:NAME"
_RANGE = re.compile(r"\{([0-9]+)\.\.([0-9]+)\}")
_MOST = 100_000


def open_source(where: str | Path, choice: ClassChoice | None = None) -> Found | Stream:
    """Finds images.

    Args:
        where: A folder, a file, several files as a glob or a range `{000..009}`, `-` for a tar file on standard input, or a
            dataset of Hugging Face: `hfds:NAME[:split]`, or streamed `hfids:NAME[:split]`.
        choice: What the user says of the classes.

    Returns:
        What is there; a stream where that cannot be known without reading all of it.

    Raises:
        InputError: There is nothing, of no kind that is known, or it cannot be read.
    """
    text, said = str(where), choice or ClassChoice()
    if text.startswith(huggingface.MAPPED):
        return huggingface.open_dataset(text.removeprefix(huggingface.MAPPED))
    if text.startswith(huggingface.STREAMED):
        # Before any work, not when the first image is asked for.
        load_package("datasets", text)
        return Stream(text, partial(huggingface.stream_dataset, text.removeprefix(huggingface.STREAMED)))
    path = Path(where)
    packed = text.lower().endswith(pipes.ENDINGS) and path.is_file()
    if text == pipes.STANDARD_INPUT or path.is_fifo() or packed:
        return Stream(text, partial(pipes.stream_tar, text, said), once=not packed)
    if path.is_dir():
        return _open_folder(path, said)
    return _open_files([path] if path.exists() else several(text), path, said)


def folder_of(where: str | Path) -> Path | None:
    """The folder that is read as a whole, where nothing else may be written; None where it is none."""
    return Path(where) if Path(where).is_dir() else None


def image_set(
    found: Found | Stream,
    config: DataConfig,
    choice: ClassChoice,
    outputs: int | None,
    known: Classes | None = None,
    *,
    needed: bool = True,
) -> ImageSet | StreamSet:
    """What was found, as a network takes it; see `find_classes`.

    Args:
        found: The images.
        config: The preprocessing.
        choice: What the user says of the classes.
        outputs: Outputs of the network; None where they are not known.
        known: The classes of a run; None, or empty, where it has none.
        needed: Whether labels are needed.

    Raises:
        InputError: Nothing tells the images' classes, or how they become the network's input; or a contradiction.
    """
    if not config.known:
        raise InputError(
            "nothing tells how image files become this network's input",
            where=found.root,
            fix="give `preprocessing` when the network is calibrated, or tensors",
        )
    if isinstance(found, Stream):
        return StreamSet(found, config, stream_classes(choice, known, outputs), needed=needed)
    return ImageSet.from_found(found, config, find_classes(found, choice, outputs, known, needed=needed))


def several(text: str) -> list[Path]:
    """The files that a glob or a range stands for, in natural order.

    Raises:
        InputError: There is none, or one of a range is missing.
    """
    if not _RANGE.search(text) and not has_magic(text):
        raise InputError("no such file or folder", where=text, fix=_KINDS)
    found: list[str] = []
    for pattern in _expanded(text):
        files = _globbed(pattern) if has_magic(pattern) else [pattern]
        missing = [file for file in files if not Path(file).is_file()]
        if missing or not files:
            raise InputError(
                "no such file", where=missing[0] if missing else pattern, fix="check pattern and range"
            )
        found += files
    return [Path(found[place]) for place in natural_places(found)]


def _globbed(pattern: str) -> list[str]:
    # Path.glob takes no pattern with a root.
    return glob(pattern, recursive=True)  # noqa: PTH207


def _expanded(text: str) -> list[str]:
    """A pattern for each number of the ranges."""
    ranges = [(match[1], int(match[1]), int(match[2])) for match in _RANGE.finditer(text)]
    total = 1
    for _, first, last in ranges:
        total *= max(0, last - first + 1)
    if not 0 < total <= _MOST:
        raise InputError(f"this range has {total} files", where=text, fix="write {FIRST..LAST}")
    numbers = [[f"{n:0{len(raw)}d}" for n in range(first, last + 1)] for raw, first, last in ranges]
    form = _RANGE.split(text)[::3]
    return [
        "".join(part + n for part, n in zip(form, [*chosen, ""], strict=True)) for chosen in product(*numbers)
    ]


def _open_folder(folder: Path, choice: ClassChoice) -> Found:
    if huggingface.is_saved(folder):
        return huggingface.open_dataset(str(folder))
    try:
        entries = [entry for entry in folder.iterdir() if not is_hidden(entry.name)]
    except OSError:
        entries = []
    endings = {ending(entry.name) for entry in entries}
    # A folder with folders or pictures in it is one of images, whatever else lies there.
    if not endings & picture_extensions() and not any(entry.is_dir() for entry in entries):
        for kind in (TAR, parquet.ENDINGS):
            files = [str(entry) for entry in entries if ending(entry.name) in kind]
            if files:
                return _open_files([Path(files[place]) for place in natural_places(files)], folder, choice)
    return found_in(scan_folder(folder, choice.level))


def _open_files(paths: Sequence[Path], root: Path, choice: ClassChoice) -> Found:
    found = _opened(paths, root, choice)
    if not found.ids:
        raise InputError("no images in it", where=root, fix=_KINDS)
    return found


def _opened(paths: Sequence[Path], root: Path, choice: ClassChoice) -> Found:
    kinds = {ending(path.name) for path in paths}
    if kinds <= set(TAR):
        return open_shards(paths, root, choice)
    if kinds <= set(parquet.ENDINGS):
        return parquet.open_parquet(paths, root)
    if len(paths) > 1:
        raise InputError(
            "several files are tar files or Parquet files", where=root, fix="give one file, or its folder"
        )
    if kinds <= set(lists.ENDINGS):
        return lists.open_list(paths[0])
    if kinds <= set(arrays.ENDINGS):
        return arrays.open_arrays(paths[0])
    raise InputError("images cannot be read from such a file", where=root, fix=_KINDS)
