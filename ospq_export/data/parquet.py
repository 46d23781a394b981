"""Images in Parquet files, read by row groups.

A row of a Parquet file cannot be read by itself. Images are therefore gathered, still encoded, for many places at a time, in one
pass over the row groups that hold them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ospq_export.data.columns import (
    IMAGE,
    LABEL,
    PATH,
    Rows,
    check_schema,
    class_names,
    content_of,
    load_package,
)
from ospq_export.data.found import Found, Labels
from ospq_export.data.sources import Held
from ospq_export.errors import InputError, reason_of

ENDINGS = (".parquet", ".pq")
_ROWS = 64


@dataclass(frozen=True)
class Group:
    """A row group.

    Attributes:
        path: The file.
        place: Its place in the file.
    """

    path: Path
    place: int

    def images(self, rows: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Rows of the group, ascending, and what the column `image` has there; few rows are in memory at a time."""
        first = 0
        wanted = iter(rows)
        row = next(wanted, None)
        with open_file(self.path) as file:
            for batch in file.iter_batches(_ROWS, row_groups=[self.place], columns=[IMAGE]):
                while row is not None and row < first + batch.num_rows:
                    yield row, batch.column(IMAGE)[row - first].as_py()
                    row = next(wanted, None)
                if row is None:
                    return
                first += batch.num_rows


@dataclass(frozen=True)
class ParquetSource:
    """Images in the rows of Parquet files.

    Attributes:
        groups: All row groups.
        starts: The number of rows before each of them.
        rows: int64, (N,), the row of each image, counted over all groups.
        labels: int64, (N,).
        ids: N names.
    """

    groups: Sequence[Group]
    starts: Sequence[int]
    rows: NDArray[np.int64]
    labels: Labels
    ids: Sequence[str]

    def gather(self, indices: Sequence[int]) -> Held:
        """The images at these places, still encoded."""
        wanted: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for index in set(indices):
            row = int(self.rows[index])
            group = bisect_right(self.starts, row) - 1
            wanted[group].append((row - self.starts[group], index))
        held: dict[int, Any] = {}
        for group, pairs in sorted(wanted.items()):
            held |= self._read(self.groups[group], dict(pairs))
        return Held(held, self.labels, self.ids)

    def _read(self, group: Group, index_of: Mapping[int, int]) -> dict[int, Any]:
        """Images of one group by their place; where its data is damaged, the reason instead."""
        held: dict[int, Any] = {}
        try:
            for row, image in group.images(sorted(index_of)):
                held[index_of[row]] = content(image, group.path.parent)
        except Exception as error:
            # A damaged page ends its row group, not the whole source.
            held |= {index: error for index in index_of.values() if index not in held}
        return held

    def decode(self, index: int, mode: str, exif: bool) -> tuple[Image.Image, tuple[str, ...]]:
        """Image `index` in PIL mode `mode`, and notes on it; see `read_picture`."""
        return self.gather([index]).decode(index, mode, exif)


def content(image: Any, folder: Path) -> bytes | Exception:
    """The bytes of a row's image, or why there are none."""
    try:
        return content_of(image, folder).read()
    except (OSError, ValueError) as error:
        return error


@contextmanager
def open_file(path: Path) -> Iterator[Any]:
    """A Parquet file, of which nothing is read ahead.

    Raises:
        InputError: pyarrow is missing, or the file is damaged or no Parquet file.
    """
    pq, pa = load_package("pyarrow.parquet", path), load_package("pyarrow", path)
    try:
        with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"this Parquet file cannot be read: {reason_of(error)}",
            where=path,
            fix="copy it again, or leave it out",
        ) from error


def open_parquet(paths: Sequence[Path], root: Path) -> Found:
    """The images in Parquet files.

    Args:
        paths: The files.
        root: What they are called together in messages.

    Raises:
        InputError: pyarrow is missing, a file cannot be read, there is no image, or see `check_schema` and `read_labels`.
    """
    rows, groups, sizes, names = Rows(), [], [], []
    for path in paths:
        with open_file(path) as file:
            schema = file.schema_arrow
            check_schema(schema, path)
            names.append(class_names(schema.metadata))
            # Of the images their paths alone, where they have any.
            for batch in file.iter_batches(columns=[PATH, f"{IMAGE}.{PATH}", LABEL]):
                rows.add(batch)
            for place in range(file.num_row_groups):
                groups.append(Group(path, place))
                sizes.append(file.metadata.row_group(place).num_rows)
    if any(other != names[0] for other in names):
        raise InputError(
            "the files have other class names for their numbers", where=root, fix="write them alike"
        )
    ids, order, labels = rows.named(root, names[0])
    starts = [0, *accumulate(sizes)][:-1]
    places = np.array(order, np.int64)
    return Found(root, ids, lambda numbers: ParquetSource(groups, starts, places, numbers, ids), labels)
