"""What a source states of a network's preprocessing, in the terms of `data.config.DataConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preprocessing:
    """What is stated, and by whom.

    Attributes:
        stated_by: in words; "" where nobody states anything.
        values: DataConfig's fields by name; what is not stated is absent.
    """

    stated_by: str = ""
    values: dict[str, Any] = field(default_factory=dict)


def crop_share(crop: int, resize: int) -> float:
    """The `crop_pct` with which an image is resized to `resize` pixels for a crop of `crop` pixels.

    The resized side is computed as floor(crop / share); a quotient that falls a digit short of it is moved by one.
    """
    share = crop / resize
    return share if math.floor(crop / share) == resize else math.nextafter(share, 0.0)
