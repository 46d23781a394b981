"""Images in Arrow's columns, as Parquet files and Hugging Face datasets have them: `image` and perhaps `label`."""

from __future__ import annotations

import importlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from ospq_export.data.found import Named, natural_places, numbered, read_labels
from ospq_export.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger(__name__)

IMAGE, LABEL, PATH = "image", "label", "path"
_FORM = "write a column `image` of bytes or of {bytes, path}, and perhaps one `label`"


def load_package(name: str, where: object) -> Any:
    """A package that is not installed with ours.

    Raises:
        InputError: It is missing.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"this needs the package {name.partition('.')[0]}",
            where=where,
            fix="pip install 'ospq-export[data]'",
        ) from error


def check_schema(schema: pa.Schema, where: object) -> None:
    """Holds columns to what is read.

    Raises:
        InputError: There are no images, or labels are neither text nor whole numbers.
    """
    types = load_package("pyarrow.types", where)
    if IMAGE not in schema.names:
        raise InputError(f"no column `image`, only {', '.join(schema.names)}", where=where, fix=_FORM)
    image = schema.field(IMAGE).type
    inner = {field.name: field.type for field in image} if types.is_struct(image) else {"bytes": image}
    content = inner.get("bytes")
    if content is None or not (types.is_binary(content) or types.is_large_binary(content)):
        raise InputError(f"the column `image` is {image}", where=where, fix=_FORM)
    if LABEL in schema.names:
        label = schema.field(LABEL).type
        kind = label.value_type if types.is_dictionary(label) else label
        if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)):
            raise InputError(
                f"the column `label` is {label}", where=where, fix="write names or whole numbers"
            )


def class_names(metadata: Mapping[bytes, bytes] | None) -> list[str]:
    """What a column of whole numbers stands for, where Hugging Face's description of the columns says it."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[LABEL]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


class Rows:
    """Names and labels of rows, collected table by table, without the images themselves."""

    def __init__(self) -> None:
        self._paths: list[str | None] = []
        self._labels: list[Any] = []
        self.count = 0

    def add(self, table: pa.Table | pa.RecordBatch) -> None:
        """Adds rows, with any of the columns `path`, `image` (of which `path` is enough) and `label`."""
        self.count += table.num_rows
        self._paths += _paths(table)
        labelled = LABEL in table.schema.names
        self._labels += table.column(LABEL).to_pylist() if labelled else [None] * table.num_rows

    def named(self, where: Path | str, names: Sequence[str]) -> tuple[list[str], list[int], Named]:
        """Ids and places of the rows in the order of the images, and their labels in it.

        Args:
            where: The source.
            names: What whole numbers stand for.

        Raises:
            InputError: There are no rows, or see `read_labels`.
        """
        if not self.count:
            raise InputError("no images in this source", where=where, fix=_FORM)
        order = list(range(self.count))
        paths = [path for path in self._paths if path]
        if len(paths) == self.count and len(set(paths)) == self.count:
            order = natural_places(paths)
            ids = [paths[place] for place in order]
        else:
            if paths:
                logger.warning("%s: not every row has a path of its own: the rows keep their order", where)
            width = len(str(self.count - 1))
            ids = [f"{place:0{width}d}" for place in order]
        return ids, order, self._named([self._labels[place] for place in order], where, names)

    def _named(self, labels: list[Any], where: object, names: Sequence[str]) -> Named:
        if all(type(label) is int for label in labels):
            return numbered(np.array(labels, np.int64), where, names)
        return read_labels(labels, where)


def _paths(table: pa.Table | pa.RecordBatch) -> list[str | None]:
    if PATH in table.schema.names:
        return [None if path is None else str(path) for path in table.column(PATH).to_pylist()]
    if IMAGE not in table.schema.names:
        return []
    import pyarrow.compute as pc
    import pyarrow.types as types

    image = table.column(IMAGE)
    inner = [field.name for field in image.type] if types.is_struct(image.type) else []
    return pc.struct_field(image, PATH).to_pylist() if PATH in inner else []


def content_of(image: Any, folder: Path) -> BinaryIO:
    """An image of a row: its bytes, or the file that it names.

    Args:
        image: Bytes, or a mapping with `bytes` and `path`, either of which may be missing.
        folder: What paths are relative to.

    Raises:
        ValueError: There is none.
        OSError: The file cannot be read.
    """
    if isinstance(image, Mapping):
        if image.get("bytes") is not None:
            return io.BytesIO(image["bytes"])
        image = (folder / image["path"]).read_bytes() if image.get("path") else None
    if image is None:
        raise ValueError("the row has no image")
    return io.BytesIO(image)
