"""The two orders that class folders are numbered in: torchvision's plain one and timm's natural one."""

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise


def natural_key(name: str) -> list[int | str]:
    """A name's key in timm's order: digits by value, letters without case; unlike timm's own it takes digits such as '²' too."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def class_name(raw: str) -> str:
    """A folder's or a file's name as a class name: machines differ in how they compose letters (NFC, NFD)."""
    return unicodedata.normalize("NFC", raw)


def plain_order(names: Sequence[str]) -> list[str]:
    """Sorted by code points, as torchvision's ImageFolder numbers classes."""
    return sorted(names)


def natural_order(names: Sequence[str]) -> list[str]:
    """Sorted as timm numbers classes; names that timm's key does not tell apart are in plain order."""
    return sorted(names, key=lambda name: (natural_key(name), name))


def natural_ties(names: Sequence[str]) -> list[str]:
    """The first two names that timm's order does not tell apart, such as '1' and '01'; nothing where there are none."""
    ordered = natural_order(names)
    for one, other in pairwise(ordered):
        if natural_key(one) == natural_key(other):
            return [one, other]
    return []


def decomposed_order(names: Sequence[str]) -> list[str]:
    """Plain order as a machine sees it that stores letters and their accents apart (NFD)."""
    return sorted(names, key=lambda name: unicodedata.normalize("NFD", name))
