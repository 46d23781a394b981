"""From what a source says of its labels to the network's outputs."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ospq_export.data.choice import ClassChoice, Classes
from ospq_export.data.class_map import read_class_map
from ospq_export.data.classes import from_map, known_classes, number_classes
from ospq_export.data.found import Found
from ospq_export.errors import InputError

logger = logging.getLogger(__name__)

BY_NUMBER = "whole numbers in the data, taken as the network's outputs"
OWN_NUMBERS = "the data's own numbering of its class names"


def find_classes(
    found: Found,
    choice: ClassChoice,
    outputs: int | None,
    known: Classes | None = None,
    *,
    needed: bool = True,
) -> Classes:
    """The classes of images of any source.

    Whole numbers are the network's outputs. Names are numbered as folders are; where a source has numbers for its names, the
    names decide wherever they are known, and else its numbers.

    Args:
        found: The images.
        choice: What the user says.
        outputs: Outputs of the network; None where they are not known.
        known: The classes of a run; None, or empty, where it has none.
        needed: Whether labels are needed.

    Raises:
        InputError: See `number_classes` and `known_classes`; or a number is no output of the network.
    """
    run = known if known is not None and known.indices else None
    if found.labels.codes is None or not found.labels.numbered:
        return (
            number_classes(found, choice, outputs, needed=needed)
            if run is None
            else known_classes(found, choice, run)
        )
    if found.names and (run is not None or choice.map_file is not None or choice.order is not None):
        expected = run.indices if run is not None else _mapped(choice)
        if expected is None or any(name in expected for name in found.names):
            return (
                number_classes(found, choice, outputs) if run is None else known_classes(found, choice, run)
            )
        logger.warning("%s: not one class name is among the known ones: its numbers are used", found.root)
    if choice.order is not None:
        raise InputError(
            "`class_order` orders class names, and these labels are numbers",
            where=found.root,
            fix="leave it out",
        )
    return _by_number(found, choice, outputs, run, needed=needed)


def _mapped(choice: ClassChoice) -> Mapping[str, int] | None:
    return None if choice.map_file is None else read_class_map(choice.map_file)


def _by_number(
    found: Found, choice: ClassChoice, outputs: int | None, run: Classes | None, *, needed: bool
) -> Classes:
    codes = found.labels.codes
    count = len(run.indices) if run is not None else None if outputs is None else max(outputs, 2)
    if codes is not None and count is not None and codes.max() >= count:
        what = f"label {int(codes.max())}, but the network has {count} classes"
        if needed:
            raise InputError(what, where=found.root, fix="give this network's own data")
        logger.warning("%s: %s: the run keeps no labels", found.root, what)
        return Classes()
    logger.warning("%s: labels are %s", found.root, BY_NUMBER)
    if run is not None:
        return Classes(run.indices, BY_NUMBER, by_number=True)
    if choice.map_file is not None:
        named = from_map(choice.map_file, count)
        return Classes(named.indices, f"{BY_NUMBER}; {named.source}", by_number=True)
    if found.names and count in (None, len(found.names)) and len(set(found.names)) == len(found.names):
        indices = {name: index for index, name in enumerate(found.names)}
        return Classes(indices, OWN_NUMBERS, by_number=True)
    return Classes({}, BY_NUMBER, by_number=True)
