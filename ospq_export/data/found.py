"""What was found at a place of images, before the network and its classes are known."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ospq_export.data.class_map import class_name, natural_key, natural_order
from ospq_export.data.config import ClassLevel
from ospq_export.data.folders import Scan
from ospq_export.data.sources import NO_LABEL, FolderSource, Source
from ospq_export.errors import InputError, listed

Labels = NDArray[np.int64]
_NUMBER = re.compile(r"[+-]?[0-9]+")
_WHOLE = "give every image a class name or a whole number, or none of them"


@dataclass(frozen=True)
class Named:
    """Labels as a source has them.

    Attributes:
        codes: (N,) places in `names`, or class numbers where there are no names; None without labels.
        names: Class names.
        numbered: Whether the codes are the source's own class numbers, whatever names belong to them.
    """

    codes: Labels | None = None
    names: Sequence[str] = ()
    numbered: bool = False


@dataclass(frozen=True)
class Found:
    """Images of known number.

    Attributes:
        root: Where they are, as messages call it.
        ids: N names, in the order of the images.
        source: From labels (N,) to the source.
        labels: What the source says of the classes.
        empty: Classes without an image.
        passed_over: What is no image, by file name ending or name, and how many there are.
        class_from: Which folders were taken as classes.
        called: What a class name is here, in the plural.
    """

    root: Path | str
    ids: Sequence[str]
    source: Callable[[Labels], Source]
    labels: Named = field(default_factory=Named)
    empty: Sequence[str] = ()
    passed_over: Mapping[str, int] = field(default_factory=dict)
    class_from: ClassLevel | None = None
    called: str = "class names"

    @property
    def names(self) -> Sequence[str]:
        """All class names."""
        return self.labels.names

    def numbers(self, indices: Mapping[str, int], *, as_they_are: bool) -> Labels:
        """Class indices (N,).

        Args:
            indices: Outputs of the network by class name; without any, nothing is known of the names.
            as_they_are: Whether the source's numbers are the network's.
        """
        codes = self.labels.codes
        if codes is None or not (as_they_are or indices):
            return np.full(len(self.ids), NO_LABEL, np.int64)
        if as_they_are:
            return codes
        return np.array([indices[name] for name in self.names], np.int64)[codes]


def found_in(scan: Scan) -> Found:
    """The images of a folder."""
    places = {name: place for place, name in enumerate(scan.names)}
    codes = np.array([places[name] for name in scan.class_of], np.int64) if scan.names else None
    ids = [text_of(file) for file in scan.files]
    paths = [scan.root / file for file in scan.files]
    return Found(
        scan.root,
        ids,
        lambda labels: FolderSource(paths, labels, ids),
        Named(codes, list(scan.names)),
        empty=scan.empty,
        passed_over=scan.passed_over,
        class_from=scan.class_from,
        called=scan.called,
    )


def text_of(name: str) -> str:
    """A file name as text that can be written, whatever bytes it has."""
    return os.fsencode(name).decode("utf-8", "replace")


def natural_places(names: Sequence[str]) -> list[int]:
    """Places of the names in natural order: every source with names is put into a folder's order."""
    return sorted(range(len(names)), key=lambda place: (natural_key(names[place]), names[place]))


def refuse_twice(names: Sequence[str], where: object) -> None:
    """Raises InputError where two images have one name."""
    ordered = sorted(names)
    twice = [name for name, after in pairwise(ordered) if name == after]
    if twice:
        raise InputError(
            f"{len(twice)} images have another's name: {listed(list(map(text_of, twice)))}",
            where=where,
            fix="name each once",
        )


def read_labels(values: Sequence[Any], where: object, names: Sequence[str] = ()) -> Named:
    """Labels from what a source has for each image.

    Args:
        values: (N,) class names, whole numbers or texts of whole numbers; None or an empty text is none.
        where: The source.
        names: What whole numbers stand for, where the source says it.

    Raises:
        InputError: Some images have a label and others none, or one is neither a name nor a class number.
    """
    none = [place for place, value in enumerate(values) if value in (None, "")]
    if len(none) == len(values):
        return Named()
    if none:
        raise InputError(f"{len(none)} of {len(values)} images have no label", where=where, fix=_WHOLE)
    strange = [v for v in values if isinstance(v, bool) or not isinstance(v, int | np.integer | str)]
    if strange:
        raise InputError(f"the label {str(strange[0])[:40]!r} is no class", where=where, fix=_WHOLE)
    if all(not isinstance(value, str) or is_number(value) for value in values):
        return numbered(np.array([int(value) for value in values], np.int64), where, names)
    classes = [class_name(str(value).strip()) for value in values]
    order = natural_order(list(set(classes)))
    places = {name: place for place, name in enumerate(order)}
    return Named(np.array([places[name] for name in classes], np.int64), order)


def is_number(text: str) -> bool:
    """Whether a label that is written down is a whole number."""
    return _NUMBER.fullmatch(text.strip()) is not None


def numbered(codes: Labels, where: object, names: Sequence[str] = ()) -> Named:
    """Labels that are numbers: -1 throughout means none.

    Raises:
        InputError: Some are negative, or larger than there are names.
    """
    if (codes == NO_LABEL).all():
        return Named()
    wrong = (codes < 0) | (codes >= len(names) if names else False)
    if wrong.any():
        raise InputError(
            f"the label {int(codes[wrong][0])} of {int(wrong.sum())} images is no class",
            where=where,
            fix=_WHOLE,
        )
    return Named(codes, [class_name(name) for name in names], numbered=True)


def label_in_json(text: bytes) -> Any:
    """The entry `label` of a JSON object; None where there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value.get("label") if isinstance(value, dict) else None
