"""What is said of the classes, and what is known of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from ospq_export.data.config import ClassLevel
from ospq_export.errors import InputError

ClassOrder = Literal["plain", "natural"]


@dataclass(frozen=True)
class ClassChoice:
    """What the user says of the classes.

    Attributes:
        map_file: A class map, see `read_class_map`.
        order: The order the folders are numbered in: `plain` is torchvision's, `natural` is timm's.
        level: Which folders are the classes, see `scan_folder`.
    """

    map_file: Path | None = None
    order: ClassOrder | None = None
    level: ClassLevel | None = None

    def __post_init__(self) -> None:
        """Raises InputError where both a map and an order are given."""
        if self.map_file is not None and self.order is not None:
            raise InputError(
                "`class_map` and `class_order` are both given", where=self.map_file, fix="give one of them"
            )


@dataclass(frozen=True)
class Classes:
    """The classes of a network.

    Attributes:
        indices: Outputs by name; empty where they are not known.
        source: What that rests on, in words; None where it is not known.
        by_number: Whether the images' labels are numbers of outputs already.
    """

    indices: Mapping[str, int] = field(default_factory=dict)
    source: str | None = None
    by_number: bool = False


class Classified(Protocol):
    """Images with class names: a folder, a list, ..."""

    @property
    def root(self) -> Path | str:
        """Where they are."""

    @property
    def names(self) -> Sequence[str]:
        """All class names."""

    @property
    def empty(self) -> Sequence[str]:
        """Those without an image."""

    @property
    def called(self) -> str:
        """What a class name is here, in the plural."""
