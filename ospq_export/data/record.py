"""What a manifest and a report keep of where images and their classes came from."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

ClassLevel = Literal["first", "path"]


class ImagesRecord(BaseModel):
    """Where a set of images came from.

    Attributes:
        classes_source: What the classes' numbers rest on, in words; None where the images have no classes or it is not known.
        class_from: Which folders are the classes: the first level below the root, or the whole path; None without class folders.
        passed_over: Files and folders that are no images, by file name ending or, hidden ones, by name, and how many there are.
        notes: What was ignored, assumed or applied in reading images, and for how many of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    classes_source: str | None = None
    class_from: ClassLevel | None = None
    passed_over: dict[str, int] = {}
    notes: dict[str, int] = {}
