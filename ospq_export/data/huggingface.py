"""Images in datasets of Hugging Face: on this disk, from the hub, or streamed from there.

timm's readers are not used: they read neither what `save_to_disk` wrote nor images without labels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ospq_export.data.columns import IMAGE, LABEL, Rows, check_schema, class_names, content_of, load_package
from ospq_export.data.found import Found, Labels
from ospq_export.data.pixels import read_picture
from ospq_export.data.sources import Record
from ospq_export.errors import InputError, listed, reason_of

MAPPED, STREAMED = "hfds:", "hfids:"
_SAVED = {"dataset_dict.json", "state.json"}
_ROWS = 1000
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HuggingFaceSource:
    """Rows of a dataset that Arrow maps into memory.

    Attributes:
        dataset: With a column `image` that is not decoded.
        rows: int64, (N,), the row of each image.
        labels: int64, (N,).
        ids: N names.
    """

    dataset: Any
    rows: NDArray[np.int64]
    labels: Labels
    ids: list[str]

    def decode(self, index: int, mode: str, exif: bool) -> tuple[Image.Image, tuple[str, ...]]:
        """Image `index` in PIL mode `mode`, and notes on it; see `read_picture`."""
        image = self.dataset[int(self.rows[index])][IMAGE]
        return read_picture(content_of(image, Path()), mode, exif=exif)


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote this folder."""
    return any((folder / name).is_file() for name in _SAVED)


def open_dataset(where: str) -> Found:
    """The images of a dataset.

    Args:
        where: A folder that `save_to_disk` wrote or that `load_dataset` reads, or a name on the hub; `:split` behind it where it
            has several.

    Raises:
        InputError: datasets is missing, the dataset cannot be loaded, the split has to be named, or see `check_schema` and
            `read_labels`.
    """
    dataset = _undecoded(_loaded(where, streaming=False), where)
    raw = dataset.with_format("arrow")
    check_schema(raw[:0].schema, where)
    columns = [name for name in (IMAGE, LABEL, "path") if name in dataset.column_names]
    rows = Rows()
    for table in raw.select_columns(columns).iter(_ROWS):
        rows.add(table)
    ids, order, labels = rows.named(where, class_names(raw[:0].schema.metadata))
    places = np.array(order, np.int64)
    return Found(where, ids, lambda numbers: HuggingFaceSource(dataset, places, numbers, ids), labels)


def stream_dataset(where: str) -> Iterator[Record]:
    """The images of a dataset as they come, from the hub without a copy on this disk.

    Raises:
        InputError: As `open_dataset`.
    """
    dataset = _undecoded(_loaded(where, streaming=True), where)
    names = getattr((dataset.features or {}).get(LABEL), "names", None)
    for place, row in enumerate(dataset):
        label = row.get(LABEL)
        named = names[label] if names and isinstance(label, int) and label >= 0 else label
        image = row[IMAGE]
        path = image.get("path") if isinstance(image, dict) else None
        yield Record(path or f"{place:08d}", content_of(image, Path()).read(), named, by_name=bool(names))


def _loaded(where: str, *, streaming: bool) -> Any:
    datasets = load_package("datasets", where)
    name, _, split = where.partition(":")
    try:
        if is_saved(Path(name)):
            found = datasets.load_from_disk(name)
            found = found[split] if split and isinstance(found, dict) else found
        else:
            found = datasets.load_dataset(name, split=split or None, streaming=streaming)
    except Exception as error:
        # The hub, its client, builders and Arrow raise all sorts of things.
        raise InputError(
            f"this dataset cannot be loaded: {reason_of(error)}", where=where, fix="check name and split"
        ) from error
    if isinstance(found, dict):
        if len(found) == 1:
            return next(iter(found.values()))
        raise InputError(
            f"this dataset has the splits {listed(list(found), 8)}",
            where=where,
            fix=f"say which: {name}:{next(iter(found))}",
        )
    return found


def _undecoded(dataset: Any, where: str) -> Any:
    """With the images as they are stored, in a column `image`, and labels in one called `label`."""
    datasets = load_package("datasets", where)
    features = dataset.features or {}
    for wanted, kind in ((IMAGE, datasets.Image), (LABEL, datasets.ClassLabel)):
        fitting = [name for name, feature in features.items() if isinstance(feature, kind)]
        if wanted not in features and len(fitting) == 1:
            logger.warning("%s: the column %s is taken as `%s`", where, fitting[0], wanted)
            dataset = dataset.rename_column(fitting[0], wanted)
    if isinstance((dataset.features or {}).get(IMAGE), datasets.Image):
        dataset = dataset.cast_column(IMAGE, datasets.Image(decode=False))
    return dataset
